"""`light_ctc`: fine-tuning by CTC that can also change the operating points of the pre-trained model."""

import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any, List, Optional

import torch
from fairseq.dataclass.utils import overwrite_args_by_name
from fairseq.models import register_model
from fairseq.models.wav2vec.wav2vec2_asr import Wav2Vec2CtcConfig, Wav2VecCtc, Wav2VecEncoder
from omegaconf import II, OmegaConf, open_dict

from .checkpoint import (
    EncoderCheckpoint,
    checkpoint_reader,
    load_encoder,
    make_causal,
    require_finite_weights,
    update_model,
)
from .recipe import read_recipe
from .w2v2_light import PRETRAINING_HEADS, STOCHASTIC, STREAMING_KEYS, require_streamable_audio

logger = logging.getLogger(__name__)


@dataclass
class LightCtcConfig(Wav2Vec2CtcConfig):
    w2v_path: str = field(
        default="",
        metadata={"help": "pre-trained or fine-tuned checkpoint to start from: ours, or stock wav2vec2 / wav2vec_ctc"},
    )
    recipe: str = field(
        default="",
        metadata={
            "help": "train from scratch: a pre-training recipe that describes the encoder, as a YAML path or a name "
            "such as pretraining/w2v2_light_tiny; used when w2v_path is empty"
        },
    )
    recipe_overrides: Any = field(
        default=None, metadata={"help": "model keys to change in the recipe, as a dict, e.g. {encoder_layers: 6}"}
    )
    operating_point: str = field(
        default="",
        metadata={
            "help": "fine-tune (and run) at this point only, e.g. s2q1k2; 'stochastic': draw one per update; "
            "empty: as in the pre-trained model"
        },
    )
    squeeze_factors: Optional[List[int]] = field(
        default=None, metadata={"help": "squeeze factors to draw from while fine-tuning; null: as pre-trained"}
    )
    query_pools: Optional[List[int]] = field(
        default=None, metadata={"help": "query pooling factors to draw from while fine-tuning; null: as pre-trained"}
    )
    kv_pools: Optional[List[int]] = field(
        default=None,
        metadata={"help": "key-value pooling factors to draw from while fine-tuning; null: as pre-trained"},
    )
    chunk_frames: Optional[List[int]] = field(
        default=None,
        metadata={
            "help": "streaming: frames (of 20 ms) that the model hears at a time, several: drawn per update (0: the "
            "whole utterance); null: as pre-trained. An offline checkpoint gets causal positions"
        },
    )
    left_context_frames: Optional[int] = field(
        default=None,
        metadata={"help": "streaming: frames before its chunk that a frame attends to; null: as pre-trained"},
    )
    lookahead_frames: Optional[int] = field(
        default=None,
        metadata={"help": "streaming: frames after its chunk that a frame attends to; null: as pre-trained"},
    )
    prune_units: Optional[List[str]] = field(
        default=None,
        metadata={
            "help": "put hard concrete gates on these, for criterion light_prune: conv (frontend channels), heads, ffn "
            "(inner channels), hidden (channels between the layers); null: as in the checkpoint"
        },
    )
    operating_point_seed: int = field(
        default=II("common.seed"), metadata={"help": "seed of the drawn operating points, with the update number"}
    )
    keep_pretraining_heads: bool = field(
        default=False,
        metadata={
            "help": "carry the frozen quantiser and projections of pre-training along, unused; Shrinking Bigfoot's "
            "models do, and count their parameters"
        },
    )


@register_model("light_ctc", dataclass=LightCtcConfig)
class LightCtc(Wav2VecCtc):
    """fairseq's Wav2VecCtc over an encoder of ours, with the plugin's keys at hand."""

    @classmethod
    def build_model(cls, cfg: LightCtcConfig, task):
        """Builds the model; `task.target_dictionary` gives the labels, and `task` gets its network's configuration."""
        encoder = LightCtcEncoder(cfg, list(task.target_dictionary.symbols))
        task.encoder_config = encoder.w2v_model.config
        return cls(cfg, encoder)


class LightCtcEncoder(Wav2VecEncoder):
    """fairseq's Wav2VecEncoder, started from any wav2vec 2.0 checkpoint or from a recipe."""

    def __init__(self, cfg: LightCtcConfig, symbols: List[str]):
        start = None
        if cfg.w2v_args is None:
            start = self._start(cfg)
            streamed = _streams(start)
            gated = list(start.cfg.model.prune_units) if start.model is not None else []
            update_model(start.cfg, _changes(cfg, start))
            _check_gates(gated, list(start.cfg.model.prune_units))
            self._check_normalize(cfg, start)
            if start.model is not None and streamed != _streams(start):
                _make_causal(start)
            if start.model is None:
                with open_dict(cfg):
                    cfg.no_pretrained_weights = True

            def read(path, arg_overrides=None):
                overwrite_args_by_name(start.cfg, arg_overrides or {})
                heads = tuple(f"{name}." for name in PRETRAINING_HEADS)
                weights = (start.model or {}).items()
                return {"cfg": start.cfg, "model": {key: value for key, value in weights if not key.startswith(heads)}}

            with checkpoint_reader(read):
                super().__init__(cfg, len(symbols))
        else:
            super().__init__(cfg, len(symbols))
        if cfg.keep_pretraining_heads:
            self._restore_pretraining_heads(start)
        if start is not None and start.head is not None:
            self._copy_head(start, symbols)

    def forward(self, source, padding_mask, **kwargs):
        """Stock's forward, whose result also holds what distillation needs.

        source: (batch, samples); padding_mask: (batch, samples) bool or None. Returns encoder_out, the logits (time,
        batch, labels), and everything that the encoder's extract_features returns but its frames.
        """
        trains = self.freeze_finetune_updates <= self.num_updates
        with contextlib.nullcontext() if trains else torch.no_grad():
            encoded = self.w2v_model.extract_features(source, padding_mask, mask=self.apply_mask and self.training)
        logits = self.proj(self.final_dropout(encoded.pop("x").transpose(0, 1)))
        del encoded["features"]
        return {"encoder_out": logits, **encoded}

    @staticmethod
    def _start(cfg) -> EncoderCheckpoint:
        if cfg.w2v_path:
            start = load_encoder(cfg.w2v_path, "model.w2v_path")
            require_finite_weights(start.model, f"model.w2v_path: {cfg.w2v_path}")
            start.model = {key: value for key, value in start.model.items() if not key.startswith("_ema")}
            return start
        if cfg.recipe:
            return EncoderCheckpoint(read_recipe(cfg.recipe, cfg.recipe_overrides or {}), None)
        raise ValueError(
            "light_ctc: neither model.w2v_path (a checkpoint to fine-tune) nor model.recipe (train from scratch) is "
            "set; give one, e.g. model.w2v_path=/absolute/path/checkpoint_best.pt"
        )

    @staticmethod
    def _check_normalize(cfg, start: EncoderCheckpoint) -> None:
        trained = bool(start.cfg.task.get("normalize", False))
        if start.model is None:  # random weights know no scale
            start.cfg.task.normalize = bool(cfg.normalize)
        elif bool(cfg.normalize) != trained:
            advice = f"set task.normalize={str(trained).lower()}"
            if trained and _streams(start):  # which cannot have that either
                advice = (
                    f"model.chunk_frames={list(start.cfg.model.chunk_frames)} asks for a streaming model, which cannot "
                    "normalise audio over the utterance: make the checkpoint one that hears audio as it is, "
                    f"`w2v2-light student {cfg.w2v_path} OUT --layers every:1 --input-level X` (X: the standard "
                    "deviation that the audio will have), and start from OUT"
                )
            raise ValueError(
                f"task.normalize: found {bool(cfg.normalize)}, but the encoder was pre-trained with {trained}; {advice}"
            )
        require_streamable_audio(start.cfg.model, bool(cfg.normalize))

    def _restore_pretraining_heads(self, start: Optional[EncoderCheckpoint]) -> None:
        """Puts back what stock's constructor took away, with the weights of `start` where it has them."""
        model = self.w2v_model
        model.build_heads(model.cfg)
        for name in PRETRAINING_HEADS:
            head = getattr(model, name)
            if head is None:
                continue
            head.requires_grad_(False)
            prefix = f"{name}."
            weights = (start and start.model) or {}
            weights = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
            if weights:
                head.load_state_dict(weights)

    def _copy_head(self, start: EncoderCheckpoint, symbols: List[str]) -> None:
        if start.symbols != symbols or start.head["weight"].shape != self.proj.weight.shape:
            logger.info("the CTC projection of the checkpoint has another dictionary: initialised anew")
            return
        with torch.no_grad():
            self.proj.weight.copy_(start.head["weight"])
            self.proj.bias.copy_(start.head["bias"])
        logger.info("the CTC projection was copied from the checkpoint")


def _check_gates(before: List[str], units: List[str]) -> None:
    """Gates of a checkpoint stay until it is pruned."""
    if before and sorted(before) != sorted(units):
        raise ValueError(
            f"model.prune_units: found {units}, but the checkpoint has gates on {before}; `w2v2-light prune` removes "
            "what they closed, or leave the key null to go on with them"
        )


def _streams(start: EncoderCheckpoint) -> bool:
    return any(start.cfg.model.chunk_frames)


def _make_causal(start: EncoderCheckpoint) -> None:
    """Makes an offline checkpoint causal for a model that streams; there is no way back."""
    if not _streams(start):
        raise ValueError(
            "model.chunk_frames: found no chunk, but the checkpoint is a streaming model, whose causal positions "
            "cannot become centred ones; start from an offline checkpoint, or add 0 (the whole utterance) to its chunks"
        )
    logger.info(make_causal(start))


def _changes(cfg: LightCtcConfig, start: EncoderCheckpoint) -> dict:
    """The model keys that fine-tuning sets anew."""
    model = start.cfg.model
    changes = {
        "operating_point_seed": cfg.operating_point_seed if isinstance(cfg.operating_point_seed, int) else 1,
    }
    if start.model is not None:  # the weights there are
        changes["unsqueeze_factor"] = model.unsqueeze_factor or max(model.squeeze_factors)
    for key in STREAMING_KEYS + ("squeeze_factors", "query_pools", "kv_pools", "prune_units"):
        value = getattr(cfg, key, None)
        if value is not None:
            changes[key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if cfg.operating_point:
        changes["operating_point"] = cfg.operating_point
    drawn = [key for key in ("squeeze_factors", "query_pools", "kv_pools") if len(changes.get(key, ())) > 1]
    fixed = model.get("operating_point")
    if drawn and not cfg.operating_point and fixed and fixed != STOCHASTIC:
        raise ValueError(
            f"model.{drawn[0]}: found factors to draw from, but training would stay at the operating point {fixed} of "
            f"where it starts; add model.operating_point=stochastic to draw, or model.operating_point={fixed}"
        )
    return changes
