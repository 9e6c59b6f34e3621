"""Checkpoints of wav2vec 2.0 encoders, from fairseq's own models or ours, brought to one form."""

import contextlib
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import MODEL_DATACLASS_REGISTRY
from omegaconf import DictConfig, OmegaConf, open_dict

from .. import compat
from ..nn.backbone import Backbone
from ..nn.config import encoder_config_from
from ..nn.positions import FRAME_CORRELATION, causal_kernel, causal_weights

ENCODER_MODELS = ("w2v2_light", "stochastic_sew")
STOCK_ENCODER = "wav2vec2"
CTC_MODELS = ("wav2vec_ctc", "light_ctc")
# where a CTC model keeps its encoder
CTC_ENCODER = "w2v_encoder.w2v_model."


@dataclass
class EncoderCheckpoint:
    """An encoder's configuration and weights.

    cfg: the pre-training run's configuration (`model` and `task` sections), its model one of ours.
    model: state dict of that model. head: weights of the CTC projection (`weight`, `bias`) when the checkpoint was a
    fine-tuned one, and symbols its dictionary, in order.
    """

    cfg: DictConfig
    model: Dict[str, torch.Tensor]
    head: Optional[Dict[str, torch.Tensor]] = None
    symbols: Optional[List[str]] = None

    @property
    def normalizes(self) -> bool:
        """Whether it was trained on normalised audio, its task.normalize."""
        return bool((self.cfg.get("task") or {}).get("normalize"))

    @property
    def sample_rate(self) -> Optional[int]:
        """Of the audio that it was trained on, in Hz; None: not known."""
        return int((self.cfg.get("task") or {}).get("sample_rate") or 0) or None


def load_state(path, key: str = "checkpoint") -> Dict[str, Any]:
    """Reads a fairseq checkpoint file, its configuration as a DictConfig; `key` names the setting in messages.

    Raises FileNotFoundError when there is no such file and ValueError when it is not a fairseq checkpoint.
    """
    try:
        state = compat.read_checkpoint(path)
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{key}: {error}") from error
    try:
        cfg = _as_config(state.get("cfg") or state["args"])
    except Exception as error:  # hydra and omegaconf raise nearly any type on what they do not know
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{key}: {path}: its configuration is malformed ({type(error).__name__}: {reason})") from error
    return {**state, "cfg": cfg, "args": None}


def _as_config(cfg) -> DictConfig:
    """A checkpoint's configuration: a flat namespace before hydra, nested dicts since, with either inside."""
    if isinstance(cfg, Namespace):
        cfg = convert_namespace_to_omegaconf(cfg)
    cfg = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else dict(cfg)
    model = cfg.get("model") or {}
    if isinstance(model, dict) and isinstance(model.get("w2v_args"), Namespace):
        model["w2v_args"] = OmegaConf.to_container(convert_namespace_to_omegaconf(model["w2v_args"]))
    return OmegaConf.create(cfg)


def load_encoder(path, key: str = "checkpoint") -> EncoderCheckpoint:
    """Reads the encoder of a pre-trained or fine-tuned checkpoint, stock fairseq's or ours.

    A stock `wav2vec2` model becomes `w2v2_light` with every mechanism off (the parameter names are the same). Raises
    as `load_state` does, and ValueError for a checkpoint of another model.
    """
    state = load_state(path, key)
    name = model_name(state["cfg"])
    if name not in (STOCK_ENCODER, *ENCODER_MODELS, *CTC_MODELS):
        raise ValueError(
            f"{key}: '{path}' is a checkpoint of model '{name}'; expected one of "
            f"{', '.join((STOCK_ENCODER, *ENCODER_MODELS, *CTC_MODELS))}"
        )
    if name not in CTC_MODELS:
        require_size(state["cfg"].model, state["model"], f"{key}: {path}")
        return EncoderCheckpoint(as_light(state["cfg"]), state["model"])

    encoder_cfg = state["cfg"].model.w2v_args
    if encoder_cfg is None or model_name(encoder_cfg) not in (STOCK_ENCODER, *ENCODER_MODELS):
        raise ValueError(f"{key}: '{path}' is a CTC checkpoint whose encoder is not a wav2vec 2.0 model")
    weights = encoder_weights(state["model"])
    require_size(encoder_cfg.model, weights, f"{key}: {path}")
    head = {part: state["model"].get(f"w2v_encoder.proj.{part}") for part in ("weight", "bias")}
    dictionary = (state.get("task_state") or {}).get("target_dictionary")
    return EncoderCheckpoint(
        as_light(encoder_cfg),
        weights,
        None if head["weight"] is None else head,
        None if dictionary is None else list(dictionary.symbols),
    )


def require_size(model: Mapping[str, Any], weights: Dict[str, Any], where: str) -> None:
    """Raises ValueError when an encoder's configuration describes no network, or one of far more than `weights` hold.

    Called before memory is given to the network.
    """
    try:
        config = encoder_config_from(complete_model(model, "w2v2_light"))
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            asked = sum(parameter.numel() for parameter in Backbone(config).parameters())
    except (ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{where}: its configuration describes no network that can be built: {error}") from error
    held = sum(value.numel() for value in weights.values() if torch.is_tensor(value))
    if asked > 2 * held + _SMALL:
        raise ValueError(
            f"{where}: its configuration describes {asked:,} parameters, but it holds {held:,}; the file was changed, "
            "or is incomplete"
        )


# parameters of a network that any machine can hold
_SMALL = 10_000_000


def encoder_weights(weights: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """The encoder's part of a CTC model's state dict, under the names of the pre-training model."""
    return {name[len(CTC_ENCODER) :]: value for name, value in weights.items() if name.startswith(CTC_ENCODER)}


def require_finite_weights(weights: Dict[str, torch.Tensor], where: str) -> None:
    """Raises ValueError that names `where` and the first parameter with NaN or infinite values."""
    for name, value in weights.items():
        if torch.is_tensor(value) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{where}: parameter '{name}' has NaN or infinite values, expected finite ones: training diverged; "
                "take an earlier checkpoint, or train again with a lower learning rate"
            )


def model_name(cfg: DictConfig) -> str:
    """The registered name of the model in a checkpoint's configuration ('' when it has none)."""
    model = cfg.get("model")
    if model is None:
        return ""
    return str(model.get("_name") or model.get("arch") or "")


def as_light(cfg: DictConfig) -> DictConfig:
    """The configuration with all of our model keys: stock `wav2vec2` becomes `w2v2_light`, missing keys defaults."""
    name = model_name(cfg)
    name = "w2v2_light" if name == STOCK_ENCODER else name
    others = {key: cfg[key] for key in cfg if key != "model"}
    return OmegaConf.create({**others, "model": complete_model(cfg.model, name)})


def complete_model(model, name: str) -> DictConfig:
    """`model` with the default of every key of the registered model `name` that it does not list."""
    defaults = OmegaConf.to_container(OmegaConf.structured(MODEL_DATACLASS_REGISTRY[name]()), enum_to_str=True)
    defaults["operating_point_seed"] = 1
    given = OmegaConf.to_container(model, enum_to_str=True) if OmegaConf.is_config(model) else dict(model)
    # a key of another section of the run (`${common.seed}`) cannot be looked up here
    given = {key: value for key, value in given.items() if value is not None and not str(value).startswith("${")}
    return OmegaConf.create({**defaults, **given, "_name": name})


def update_model(cfg: DictConfig, changes: Dict[str, Any]) -> None:
    """Sets keys of `cfg.model` in place, new ones included."""
    with open_dict(cfg):
        for key, value in changes.items():
            cfg.model[key] = value


def make_causal(start: EncoderCheckpoint) -> str:
    """Turns the centred convolutional positions of a checkpoint into causal ones, in place: weights and `conv_pos`.

    What every streaming model needs first; nn.positions.causal_weights says what becomes of the taps. Returns a line
    that tells the user.
    """
    kernel = start.cfg.model.conv_pos
    g, v = (f"encoder.pos_conv.0.weight_{part}" for part in "gv")
    start.model[g], start.model[v] = causal_weights(start.model[g], start.model[v])
    update_model(start.cfg, {"conv_pos": causal_kernel(kernel)})
    return (
        f"streaming: the positions' {kernel} taps became {start.cfg.model.conv_pos} causal ones (those of the future "
        f"were added to the present frame's, k frames ahead by {FRAME_CORRELATION}^k)"
    )


@contextlib.contextmanager
def checkpoint_reader(read: Callable[..., Dict[str, Any]]) -> Iterator[None]:
    """While active, fairseq reads checkpoints through `read(path, arg_overrides)`.

    Stock Wav2VecEncoder reads, overrides and builds in one constructor; this hands it a state that is already read.
    """
    original = checkpoint_utils.load_checkpoint_to_cpu
    checkpoint_utils.load_checkpoint_to_cpu = read
    try:
        yield
    finally:
        checkpoint_utils.load_checkpoint_to_cpu = original
