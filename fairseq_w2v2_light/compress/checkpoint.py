"""What all smaller checkpoints have in common: complete weights to start from, fairseq's entries around new ones."""

from typing import Any, Dict

import torch
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from omegaconf import DictConfig, OmegaConf

from ..models.checkpoint import EncoderCheckpoint, require_finite_weights
from ..models.light_ctc import LightCtcConfig
from ..models.w2v2_light import STREAMING_KEYS, W2V2LightModel


def require_weights(start: EncoderCheckpoint, is_ctc: bool, path) -> None:
    """Refuses a checkpoint without all weights of its own model: what it lacks would quietly start anew."""
    if is_ctc and (start.head is None or start.head["bias"] is None):
        raise ValueError(f"'{path}': a CTC checkpoint without its projection (w2v_encoder.proj)")
    head = {f"w2v_encoder.proj.{name}": value for name, value in (start.head or {}).items()}
    require_finite_weights({**start.model, **head}, str(path))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = W2V2LightModel(start.cfg.model)
    if is_ctc:
        model.remove_pretraining_modules()
    for name, value in model.state_dict().items():
        found = tuple(start.model[name].shape) if name in start.model else "nothing"
        if found != tuple(value.shape):
            raise ValueError(f"'{path}': parameter '{name}': found {found}, expected shape {tuple(value.shape)}")


def ctc_config(cfg: DictConfig, encoder_cfg: DictConfig) -> Dict[str, Any]:
    """The configuration of a light_ctc run, with the keys of `cfg` that light_ctc and audio_ctc have."""
    sections = OmegaConf.to_container(cfg, enum_to_str=True)
    defaults = OmegaConf.to_container(OmegaConf.structured(LightCtcConfig()), enum_to_str=True)
    model = {**defaults, **{key: value for key, value in sections["model"].items() if key in defaults}}
    task = sections.get("task") or {}
    normalize = bool(encoder_cfg.task.get("normalize", False))
    model.update(
        _name="light_ctc",
        w2v_args=OmegaConf.to_container(encoder_cfg, enum_to_str=True),
        normalize=normalize,
        data=str(task.get("data") or ""),
        ddp_backend=(sections.get("distributed_training") or {}).get("ddp_backend") or "legacy_ddp",
        operating_point_seed=(sections.get("common") or {}).get("seed") or 1,
        # the encoder has its own
        **{key: defaults[key] for key in ("w2v_path", "recipe", "recipe_overrides", "operating_point")},
        **{key: defaults[key] for key in ("squeeze_factors", "query_pools", "kv_pools", "prune_units")},
        **{key: defaults[key] for key in STREAMING_KEYS},
    )
    model = {key: value for key, value in model.items() if not str(value).startswith("${")}
    known = set(TASK_DATACLASS_REGISTRY["audio_ctc"].__dataclass_fields__)
    task = {key: value for key, value in task.items() if key in known and value is not None}
    task = {"data": "", "labels": "ltr", **task, "_name": "audio_ctc", "normalize": normalize}
    return {**sections, "model": model, "task": task}


def fresh_state(cfg: Dict[str, Any], weights: Dict[str, Any], task_state: Dict[str, Any]) -> Dict[str, Any]:
    """A checkpoint as fairseq's trainer writes it, before any update."""
    return {
        "args": None,
        "cfg": cfg,
        "model": weights,
        "criterion": None,
        "optimizer_history": [
            {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0},
        ],
        "task_state": task_state,
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
    }
