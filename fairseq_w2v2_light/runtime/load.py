"""A fine-tuned checkpoint as a plain torch module: neither fairseq, hydra nor omegaconf is needed, or trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import torch
from torch import Tensor, nn

from ..nn.config import encoder_config_from
from ..nn.operating_point import OperatingPoint
from .checkpoint import Checkpoint, PathLike, read_checkpoint, sections
from .ctc import CtcModel, check_weights, require_finite
from .folder import is_model_folder, read_folder

SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
_CTC_MODELS = ("wav2vec_ctc", "light_ctc")
_ENCODERS = ("wav2vec2", "w2v2_light", "stochastic_sew")
# where fairseq's CTC models keep what CtcModel has
_PREFIXES = {"w2v_encoder.w2v_model.": "backbone.", "w2v_encoder.proj.": "head."}
# parts of a checkpoint that inference has no use for: the heads of pre-training, the embedding of masked frames
_UNUSED = ("mask_emb", "quantizer.", "project_q.", "target_glu.", "final_proj.", "_ema")
# wav2vec2's own values, which configurations from before hydra may leave out
_STOCK = {
    "extractor_mode": "default",
    "conv_feature_layers": "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
    "conv_bias": False,
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
}


def load_ctc(path: PathLike, dictionary: Optional[PathLike] = None) -> CtcModel:
    """Loads a model folder, or a fine-tuned checkpoint of fairseq (`light_ctc`, `wav2vec_ctc`), for inference, in fp32.

    dictionary: fairseq's dict.ltr.txt, for checkpoints that hold no dictionary of their own (pre-hydra ones). Nothing
    in the file is run. Raises FileNotFoundError when a file is missing; ValueError when the checkpoint is broken, of
    another kind, does not fit its own configuration or the dictionary, or has NaN or infinite weights.
    """
    path = Path(path)
    if is_model_folder(path):
        if dictionary is not None:
            raise ValueError(f"{path}: a model folder has its own labels; leave out --dictionary")
        return read_folder(path)
    return ctc_from_checkpoint(read_checkpoint(path), path, dictionary)


def ctc_from_checkpoint(checkpoint: Checkpoint, path: PathLike, dictionary: Optional[PathLike] = None) -> CtcModel:
    """As `load_ctc`, of a checkpoint that was read from `path`."""
    path = Path(path)
    encoder_cfg = _encoder_sections(checkpoint, path)
    weights = _inference_weights(checkpoint.model)
    symbols = _symbols(checkpoint, weights, path, dictionary)
    ctc_cfg, task_cfg = checkpoint.cfg["model"], checkpoint.cfg["task"]
    try:
        config = encoder_config_from(_complete(encoder_cfg["model"]))
        with torch.device("meta"):
            model = CtcModel(
                config,
                symbols,
                normalize=bool(task_cfg.get("normalize", False)),
                sample_rate=int(task_cfg.get("sample_rate") or 16000),
                point=_fixed_point(encoder_cfg["model"]),
            )
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path}: its configuration describes no network that can be built: {error}") from error
    check_weights(model, weights, path, _checkpoint_name)
    # copies: the tensors of the checkpoint are the file itself, which a training may overwrite
    copies = {_own_name(name): value.to(torch.float32, copy=True) for name, value in weights.items()}
    model.load_state_dict(copies, assign=True)
    require_finite(model, path, _checkpoint_name)
    _add_blank_weight(model.head, ctc_cfg)
    return model.eval().requires_grad_(False)


def read_symbols(path: PathLike) -> List[str]:
    """The labels that fairseq makes of a dictionary file: its own four, then those of the `symbol count` lines.

    A line may end with ` #fairseq:overwrite`, which allows a symbol that was there before. Raises FileNotFoundError
    when the file is missing and ValueError, naming file and line, for a malformed one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such dictionary; expected a file of `symbol count` lines, dict.ltr.txt")
    symbols = list(SPECIAL_SYMBOLS)
    try:
        with open(path, encoding="utf-8") as file:
            lines = list(file)
    except UnicodeError as error:
        raise ValueError(f"{path}: not a dictionary: it is no UTF-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        entry = line.rstrip()
        overwrites = entry.endswith(" #fairseq:overwrite")
        if overwrites:
            entry = entry[: -len(" #fairseq:overwrite")]
        symbol, _, count = entry.rpartition(" ")
        if not symbol or not count.lstrip("-").isdigit():
            raise ValueError(f"{path}:{number}: found {line.rstrip()!r}; expected 'symbol count'")
        if symbol in symbols and not overwrites:
            raise ValueError(f"{path}:{number}: symbol {symbol!r} is listed twice, or one that fairseq adds itself")
        symbols.append(symbol)
    return symbols


def _encoder_sections(checkpoint: Checkpoint, path: Path) -> Dict[str, Dict[str, Any]]:
    """The sections of the pre-training run's configuration, which a CTC model's holds."""
    model = checkpoint.cfg["model"]
    name = _model_name(model)
    if name in _ENCODERS:
        raise ValueError(
            f"{path}: a pre-training checkpoint ('{name}'), which has no CTC head; fine-tune it first: "
            f"fairseq-hydra-train with a recipe of config/finetuning and model.w2v_path={path}"
        )
    if name not in _CTC_MODELS:
        raise ValueError(f"{path}: a checkpoint of model '{name}'; expected a CTC model, {' or '.join(_CTC_MODELS)}")
    encoder = model.get("w2v_args")
    if not isinstance(encoder, dict):
        raise ValueError(
            f"{path}: the configuration has no model.w2v_args, which describes the encoder; found "
            f"{encoder!r}; save the model again with fairseq"
        )
    encoder = sections(encoder)
    name = _model_name(encoder["model"])
    if name not in _ENCODERS:
        raise ValueError(f"{path}: the encoder is of model '{name}'; expected one of {', '.join(_ENCODERS)}")
    return encoder


def _model_name(model: Mapping[str, Any]) -> str:
    return str(model.get("_name") or model.get("arch") or "")


def _complete(model: Mapping[str, Any]) -> Dict[str, Any]:
    """The encoder's section with stock values for the keys that it lacks."""
    given = {key: value for key, value in model.items() if value is not None and not str(value).startswith("${")}
    return {**_STOCK, **given}


def _fixed_point(model: Mapping[str, Any]) -> Optional[OperatingPoint]:
    text = str(model.get("operating_point") or "")
    return None if text in ("", "stochastic") else OperatingPoint.parse(text)


def _own_name(name: str) -> str:
    """CtcModel's name of a checkpoint's parameter."""
    prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
    return _PREFIXES[prefix] + name[len(prefix) :]


def _checkpoint_name(name: str) -> str:
    """The checkpoint's name of a parameter of CtcModel."""
    prefix = next(prefix for prefix, own in _PREFIXES.items() if name.startswith(own))
    return prefix + name[len(_PREFIXES[prefix]) :]


def _inference_weights(state_dict: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    encoder = next(iter(_PREFIXES))
    unused = tuple(encoder + part for part in _UNUSED)
    return {name: value for name, value in state_dict.items() if not str(name).startswith(("_ema", *unused))}


def _symbols(
    checkpoint: Checkpoint, weights: Mapping[str, Tensor], path: Path, dictionary: Optional[PathLike]
) -> List[str]:
    own = checkpoint.symbols
    given = None if dictionary is None else read_symbols(dictionary)
    if own is None and given is None:
        raise ValueError(
            f"{path}: the checkpoint holds no dictionary; give the one it was trained with, --dictionary dict.ltr.txt"
        )
    if own is not None and given is not None and own != given:
        index = next((i for i, pair in enumerate(zip(own, given)) if pair[0] != pair[1]), min(len(own), len(given)))
        found, expected = (symbols[index] if index < len(symbols) else None for symbols in (given, own))
        raise ValueError(
            f"{dictionary}: label {index} is {found!r}, but {expected!r} in {path}; leave out --dictionary, which "
            "is for checkpoints that hold none"
        )
    symbols = given if own is None else own
    rows = weights.get("w2v_encoder.proj.weight")
    if torch.is_tensor(rows) and len(rows) != len(symbols):
        raise ValueError(
            f"{path if own is not None else dictionary}: {len(symbols)} symbols (with {', '.join(SPECIAL_SYMBOLS)}), "
            f"but the CTC head of {path} has {len(rows)} rows; give the dictionary that it was trained with"
        )
    return symbols


def _add_blank_weight(head: nn.Linear, ctc_cfg: Mapping[str, Any]) -> None:
    """Puts what fairseq's CTC models do to the logit of the blank (blank_weight, blank_mode) into the head."""
    weight = float(ctc_cfg.get("blank_weight") or 0)
    if weight == 0:
        return
    with torch.no_grad():
        if ctc_cfg.get("blank_mode") == "set":
            head.weight[CtcModel.blank] = 0
            head.bias[CtcModel.blank] = 0
        head.bias[CtcModel.blank] += weight
