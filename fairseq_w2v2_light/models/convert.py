"""Stock fairseq checkpoints turned into ours; the weights keep their names and values."""

from pathlib import Path

import torch
from fairseq.tasks import TASK_REGISTRY
from omegaconf import OmegaConf

from ..files import atomic_path
from .checkpoint import CTC_MODELS, as_light, load_encoder, load_state, model_name, require_finite_weights
from .w2v2_light import W2V2LightModel


def convert(source, target) -> str:
    """Writes the checkpoint `source` (wav2vec2, wav2vec_ctc, or ours) as a checkpoint of ours; returns a summary.

    A `wav2vec2` model becomes `w2v2_light`; a `wav2vec_ctc` keeps its name and gets a `w2v2_light` encoder. The weights
    are loaded strictly into the new model first. Raises ValueError that lists missing and unexpected parameters.
    """
    if Path(target).exists() and Path(source).exists() and Path(target).samefile(source):
        raise ValueError(f"'{target}': the output is the input; choose another name")
    state = load_state(source)
    name = model_name(state["cfg"])
    encoder = load_encoder(source)
    require_finite_weights(state["model"], str(source))
    with torch.device("meta"):
        model = W2V2LightModel(encoder.cfg.model)
    if name in CTC_MODELS:
        model.remove_pretraining_modules()
    _check_names(model, encoder.model, source)

    cfg = as_light(state["cfg"]) if name not in CTC_MODELS else state["cfg"]
    if name in CTC_MODELS:
        container = OmegaConf.to_container(cfg, enum_to_str=True)
        container["model"]["w2v_args"] = OmegaConf.to_container(encoder.cfg, enum_to_str=True)
        cfg = container
    else:
        cfg = OmegaConf.to_container(cfg, enum_to_str=True)
    task = cfg["task"].get("_name")
    if task not in TASK_REGISTRY:
        raise ValueError(f"'{source}': its task '{task}' is no registered fairseq task")
    state["cfg"] = cfg
    state["args"] = None
    with atomic_path(target) as temporary:
        torch.save(state, temporary)
    parameters = sum(value.numel() for value in encoder.model.values())
    became = "light encoder inside" if name in CTC_MODELS else encoder.cfg.model._name
    return f"{source} ({name}) -> {target} ({became}): {len(encoder.model)} tensors, {parameters:,} values"


def _check_names(model, weights, source) -> None:
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    wrong = sorted(key for key in expected if key in found and expected[key] != found[key])
    if missing or unexpected or wrong:
        raise ValueError(
            f"'{source}' does not fit w2v2_light: missing {missing or 'none'}, unexpected {unexpected or 'none'}, "
            f"other shape {[(key, found[key], expected[key]) for key in wrong] or 'none'}"
        )
