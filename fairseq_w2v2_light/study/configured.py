"""Recipes and checkpoints to count, as fairseq configures them."""

from dataclasses import dataclass
from typing import Dict, List, Optional

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..models.checkpoint import CTC_MODELS, ENCODER_MODELS, STOCK_ENCODER, load_encoder, load_state, model_name
from ..models.recipe import apply_overrides, load_recipe, parse_overrides, read_recipe, unquoted
from ..models.w2v2_light import STOCHASTIC, STREAMING_KEYS, W2V2LightModel, network_config
from ..nn.config import EncoderConfig
from ..nn.counts import SAMPLE_RATE
from ..nn.positions import causal_kernel
from ..runtime.checkpoint import is_checkpoint_file
from .cost import LETTERS


@dataclass
class ConfiguredSubject:
    """A `Subject` with its complete fairseq configuration; normalizes: its `task.normalize`."""

    name: str
    model: DictConfig
    vocabulary: int
    pretraining_heads: bool = False
    normalizes: bool = False
    stored_dtype: Optional[str] = None
    sample_rate: int = SAMPLE_RATE

    @property
    def network(self) -> EncoderConfig:
        """The configuration of its network."""
        return network_config(self.model)

    @property
    def own_point(self) -> str:
        """The text of the operating point that it is fixed to; empty: none."""
        point = self.model.operating_point
        return "" if point == STOCHASTIC else point

    def build(self) -> nn.Module:
        """The model, without memory and without gates."""
        with torch.device("meta"):
            return W2V2LightModel(OmegaConf.merge(self.model, {"prune_units": []}))


def configured_subject(source: str, overrides: List[str], vocabulary: Optional[int] = None) -> ConfiguredSubject:
    """Reads a recipe (path or name) or a checkpoint, with `model.key=value` overrides; see `cost.load_subject`."""
    changes = parse_overrides(overrides)
    if is_checkpoint_file(source):
        return _checkpoint_subject(source, changes)
    recipe = load_recipe(source)
    name = model_name(recipe)
    if name in (STOCK_ENCODER, *ENCODER_MODELS):
        read = read_recipe(source, {})
        return ConfiguredSubject(name, apply_overrides(read.model, changes), 0, normalizes=_normalizes(read))
    if name not in CTC_MODELS:
        raise ValueError(f"'{source}': a recipe of model '{name}', expected one of {', '.join(ENCODER_MODELS)}")

    own = {
        key: unquoted(changes.pop(key)) for key in ("recipe", "w2v_path", "keep_pretraining_heads") if key in changes
    }
    settings = {**OmegaConf.to_container(recipe.model), **own}
    if settings.get("w2v_path"):
        model = load_encoder(settings["w2v_path"], "model.w2v_path").cfg.model
    elif settings.get("recipe"):
        model = read_recipe(settings["recipe"], settings.get("recipe_overrides") or {}).model
    else:
        raise ValueError(
            f"'{source}': a fine-tuning recipe does not say which encoder; add model.recipe=pretraining/NAME or "
            "model.w2v_path=CHECKPOINT"
        )
    for key in ("operating_point", "squeeze_factors", "query_pools", "kv_pools", *STREAMING_KEYS):
        if settings.get(key) not in (None, ""):
            changes.setdefault(key, str(settings[key]))
    if settings.get("w2v_path"):
        changes = _with_causal_positions(model, changes)
    keeps_heads = str(settings.get("keep_pretraining_heads", False)).lower()
    if keeps_heads not in ("true", "false"):
        raise ValueError(f"override 'model.keep_pretraining_heads={keeps_heads}': expected true or false")
    labels = LETTERS if vocabulary is None else vocabulary
    return ConfiguredSubject(name, apply_overrides(model, changes), labels, keeps_heads == "true", _normalizes(recipe))


def _with_causal_positions(checkpoint: DictConfig, changes: Dict[str, str]) -> Dict[str, str]:
    """`changes` and, where they make an offline checkpoint stream, the kernel that its positions get."""
    if any(checkpoint.chunk_frames) or not any(apply_overrides(checkpoint, changes).chunk_frames):
        return changes
    return {"conv_pos": str(causal_kernel(checkpoint.conv_pos)), **changes}


def _normalizes(cfg: DictConfig) -> bool:
    return bool((cfg.get("task") or {}).get("normalize") or False)


def _checkpoint_subject(path: str, changes: Dict[str, str]) -> ConfiguredSubject:
    state = load_state(path)
    name = model_name(state["cfg"])
    encoder = load_encoder(path)
    vocabulary = 0 if encoder.head is None else encoder.head["weight"].size(0)
    keeps_heads = bool(state["cfg"].model.get("keep_pretraining_heads", False))
    changes = _with_causal_positions(encoder.cfg.model, changes)
    model = apply_overrides(encoder.cfg.model, changes)
    rate = encoder.sample_rate or SAMPLE_RATE
    return ConfiguredSubject(name, model, vocabulary, keeps_heads, encoder.normalizes, sample_rate=rate)
