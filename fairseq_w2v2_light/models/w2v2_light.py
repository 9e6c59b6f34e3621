"""`w2v2_light` and `stochastic_sew`: wav2vec 2.0 pre-training models with shared layers and stochastic compute."""

import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

import torch
from fairseq.models import register_model
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from fairseq.modules import GradMultiply
from omegaconf import II, OmegaConf
from torch import nn

from ..nn.backbone import Backbone
from ..nn.config import EncoderConfig, encoder_config_from
from ..nn.heads import ProjectionMLP
from ..nn.masks import FrameMask
from ..nn.operating_point import OperatingPoint
from .checkpoint import EncoderCheckpoint, require_finite_weights
from .contrastive import GumbelQuantizer, contrastive_logits
from .masking import span_mask, training_randomness

logger = logging.getLogger(__name__)

STOCHASTIC = "stochastic"
# the group of fairseq's composite optimizer that trains gates
GATES_GROUP = "gates"
STREAMING_KEYS = ("chunk_frames", "left_context_frames", "lookahead_frames")
# parts of the model that fine-tuning takes away
PRETRAINING_HEADS = ("quantizer", "project_q", "target_glu", "final_proj")
_PRETRAINING_ONLY = (*(f"{name}." for name in PRETRAINING_HEADS), "mask_emb", "_ema")
WFE_C = (
    "[(64, 10, 5), (128, 3, 2), (128, 1, 1), (128, 3, 2), (128, 1, 1), (256, 3, 2), (256, 1, 1), (256, 3, 2), "
    "(256, 1, 1), (512, 2, 2), (512, 1, 1), (512, 2, 2), (512, 1, 1)]"
)


@dataclass
class W2V2LightConfig(Wav2Vec2Config):
    unique_layers: int = field(
        default=0, metadata={"help": "stored Transformer layers that serve all encoder_layers; 0: one each, no sharing"}
    )
    layer_map: str = field(
        default="",
        metadata={
            "help": "which stored layer runs at each depth: 'groups' (neighbours share; the default), 'cycle', or a "
            "list such as '0,0,1,1' or '0x6,1x6'"
        },
    )
    attention_map_every: int = field(
        default=1,
        metadata={"help": "compute an attention map at every n-th layer; the layers between reuse it (1: no sharing)"},
    )
    squeeze_factors: List[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "squeeze factors to draw from in training: the Transformer runs at 1/s of the frame rate"},
    )
    query_pools: List[int] = field(
        default_factory=lambda: [1], metadata={"help": "query pooling factors to draw from in training"}
    )
    kv_pools: List[int] = field(
        default_factory=lambda: [1], metadata={"help": "key-value pooling factors to draw from in training"}
    )
    pool_per_layer: bool = field(
        default=False, metadata={"help": "draw query and key-value pooling for every layer, not once for the model"}
    )
    operating_point: str = field(
        default="",
        metadata={
            "help": "run at this point only, in training and inference, e.g. s2q1k2; empty or 'stochastic': training "
            "draws one per update from squeeze_factors, query_pools and kv_pools, inference uses the smallest of each"
        },
    )
    operating_point_seed: int = field(
        default=II("common.seed"), metadata={"help": "seed of the drawn operating points, with the update number"}
    )
    unsqueeze_factor: int = field(
        default=0,
        metadata={"help": "largest squeeze factor that the unsqueeze layer has weights for; 0: max(squeeze_factors)"},
    )
    unsqueeze_residual: bool = field(
        default=True,
        metadata={"help": "add the squeezed frame to each of its sub-frames, which stochastic models need; false: SEW"},
    )
    squeeze_tail: str = field(
        default="keep",
        metadata={"help": "a last squeeze window that is not full: 'keep' pools its frames, 'drop' zeroes them (SEW)"},
    )
    chunk_frames: List[int] = field(
        default_factory=list,
        metadata={
            "help": "streaming: frames (of 20 ms) that the model hears at a time; [24]: always as many, several: drawn "
            "per update (0: the whole utterance); empty: no streaming"
        },
    )
    left_context_frames: int = field(
        default=300, metadata={"help": "streaming: frames before its chunk that a frame attends to"}
    )
    lookahead_frames: int = field(
        default=0, metadata={"help": "streaming: frames after its chunk that a frame attends to"}
    )
    layer_heads: List[int] = field(
        default_factory=list,
        metadata={
            "help": "attention heads of each stored layer, as pruning leaves them; 0: no attention there; empty: "
            "encoder_attention_heads each"
        },
    )
    layer_ffn: List[int] = field(
        default_factory=list,
        metadata={
            "help": "FFN width of each stored layer, as pruning leaves it; 0: no FFN there; empty: "
            "encoder_ffn_embed_dim each"
        },
    )
    head_dim: int = field(
        default=0, metadata={"help": "channels of an attention head; 0: encoder_embed_dim / encoder_attention_heads"}
    )
    norm_dim: int = field(
        default=0,
        metadata={
            "help": "channels over which the Transformer's LayerNorms take mean and variance, those that pruning "
            "removed counting as zeros; 0: encoder_embed_dim"
        },
    )
    conv_norm_dims: List[int] = field(
        default_factory=list,
        metadata={"help": "the same of the LayerNorms after each frontend layer; empty: their own channels"},
    )
    conv_pos_group_dims: List[int] = field(
        default_factory=list,
        metadata={"help": "channels in each group of the positional convolution, where pruning left them unequal"},
    )
    project_features: bool = field(
        default=False,
        metadata={"help": "have a Linear between frontend and Transformer even where both have as many channels"},
    )
    prune_units: List[str] = field(
        default_factory=list,
        metadata={
            "help": "put hard concrete gates on these, for criterion light_prune: conv (frontend channels), heads, ffn "
            "(inner channels), hidden (channels between the layers); empty: no gates"
        },
    )
    projection: str = field(
        default="linear", metadata={"help": "pre-training heads: 'linear' (stock) or 'mlp' (SEW, with BatchNorm)"}
    )
    projection_hidden_dim: int = field(default=4096, metadata={"help": "hidden width of the 'mlp' projection"})


def network_config(cfg: W2V2LightConfig) -> EncoderConfig:
    """The plain-torch configuration of a fairseq model configuration.

    Raises ValueError that names the key for what `w2v2_light` does not have and for malformed values.
    """
    keys = OmegaConf.to_container(cfg, enum_to_str=True) if OmegaConf.is_config(cfg) else vars(cfg)
    return encoder_config_from(keys)


def build_backbone(checkpoint: EncoderCheckpoint, where: str) -> Backbone:
    """Frontend and Transformer of a checkpoint, with its weights, in training mode.

    Raises ValueError that begins with `where` for weights that are not finite or do not fit the configuration.
    """
    weights = {name: value for name, value in checkpoint.model.items() if not name.startswith(_PRETRAINING_ONLY)}
    require_finite_weights(weights, where)
    try:
        backbone = Backbone(network_config(checkpoint.cfg.model))
        backbone.load_state_dict(weights, strict=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: cannot be built from its configuration and weights: {error}") from error
    return backbone


@register_model("w2v2_light", dataclass=W2V2LightConfig)
class W2V2LightModel(Wav2Vec2Model, Backbone):
    """wav2vec 2.0 for fairseq with W2V2-Light's sharing and stochastic SEW's operating points.

    With every mechanism off it computes what fairseq's Wav2Vec2Model computes, from the same state dict. Masking,
    negatives and predictions are inherited; frontend and encoder are `nn.Backbone`.
    """

    def __init__(self, cfg: W2V2LightConfig):
        Backbone.__init__(self, network_config(cfg))
        self._is_generation_fast = False
        self.cfg = cfg
        self.num_updates: Optional[int] = None
        self.calls = 0
        self.seed = cfg.operating_point_seed if isinstance(cfg.operating_point_seed, int) else 1
        self.operating_point: Optional[OperatingPoint] = None
        if cfg.operating_point not in ("", STOCHASTIC):
            self.operating_point = self.check_operating_point(cfg.operating_point)
        self._copy_masking(cfg)
        self.build_heads(cfg)
        self._prepare_gates()

    @classmethod
    def build_model(cls, cfg: W2V2LightConfig, task=None):
        """Builds the model, and tells `task` its network, which criterions may ask for."""
        if task is not None:
            require_streamable_audio(cfg, bool(getattr(task.cfg, "normalize", False)))
        model = cls(cfg)
        if task is not None:
            task.encoder_config = model.config
        return model

    @property
    def embed(self) -> int:
        """Channels of the frontend (stock's name for them)."""
        return self.config.features_dim

    def _copy_masking(self, cfg) -> None:
        for key in (
            "mask_prob",
            "mask_selection",
            "mask_other",
            "mask_length",
            "no_mask_overlap",
            "mask_min_space",
            "mask_channel_prob",
            "mask_channel_before",
            "mask_channel_selection",
            "mask_channel_other",
            "mask_channel_length",
            "no_mask_channel_overlap",
            "mask_channel_min_space",
            "cross_sample_negatives",
            "codebook_negatives",
            "negatives_from_everywhere",
            "logit_temp",
            "feature_grad_mult",
            "crop_seq_to_multiple",
        ):
            setattr(self, key, getattr(cfg, key))
        self.n_negatives = cfg.num_negatives
        self.dropout_input = nn.Dropout(cfg.dropout_input)
        self.dropout_features = nn.Dropout(cfg.dropout_features)
        self.mask_emb = nn.Parameter(torch.empty(cfg.encoder_embed_dim).uniform_())

    def _prepare_gates(self) -> None:
        """Puts the gates into an optimizer group of their own; refuses gates that could get no gradient."""
        if self.gates is None:
            return
        if self.gates.conv is not None and self.feature_grad_mult <= 0:
            raise ValueError(
                f"model.feature_grad_mult: found {self.feature_grad_mult:g}, with which no gradient reaches the "
                "frontend, nor its gates (model.prune_units has 'conv'); set model.feature_grad_mult=1.0, or leave "
                "'conv' out of model.prune_units"
            )
        for parameter in self.gates.parameters():
            parameter.param_group = GATES_GROUP

    def upgrade_state_dict_named(self, state_dict, name):
        """Gives a checkpoint from before pruning the gates that this model has, all open."""
        super().upgrade_state_dict_named(state_dict, name)
        prefix = f"{name}.gates." if name else "gates."
        if self.gates is None or any(key.startswith(prefix) for key in state_dict):
            return
        state_dict.update({f"{prefix}{key}": value for key, value in self.gates.state_dict().items()})
        logger.info("the checkpoint has no gates; they start open, on %s", ", ".join(self.config.prune_units))

    def build_heads(self, cfg: W2V2LightConfig) -> None:
        """Makes the heads of pre-training anew: quantiser and projections."""
        if cfg.projection not in ("linear", "mlp"):
            raise ValueError(f"model.projection: found '{cfg.projection}', expected 'linear' or 'mlp'")

        def projection(in_dim, out_dim):
            if cfg.projection == "mlp":
                return ProjectionMLP(in_dim, out_dim, cfg.projection_hidden_dim)
            return nn.Linear(in_dim, out_dim)

        final_dim = cfg.final_dim if cfg.final_dim > 0 else cfg.encoder_embed_dim
        target_dim = self.embed
        self.quantizer = self.input_quantizer = self.target_glu = None
        if cfg.quantize_targets:
            target_dim = cfg.latent_dim if cfg.latent_dim > 0 else final_dim
            _check_quantizer(cfg, target_dim)
            self.quantizer = GumbelQuantizer(
                dim=self.embed,
                num_vars=cfg.latent_vars,
                temp=cfg.latent_temp,
                groups=cfg.latent_groups,
                combine_groups=False,
                vq_dim=target_dim,
                time_first=True,
                weight_proj_depth=cfg.quantizer_depth,
                weight_proj_factor=cfg.quantizer_factor,
            )
        self.project_q = projection(target_dim, final_dim)
        if cfg.target_glu:
            self.target_glu = nn.Sequential(nn.Linear(final_dim, final_dim * 2), nn.GLU())
        self.final_proj = projection(cfg.encoder_embed_dim, final_dim)

    def set_num_updates(self, num_updates: int) -> None:
        """Called by the trainer before every step; operating point, masks and dropped layers are functions of it."""
        super().set_num_updates(num_updates)
        if num_updates != self.num_updates:
            self.calls = 0
        self.num_updates = num_updates

    def check_operating_point(self, point) -> OperatingPoint:
        """Parses `point` (text or OperatingPoint); raises ValueError when the model was not trained for it."""
        point = OperatingPoint.parse(point) if isinstance(point, str) else point
        return self.config.operating_points.check(point)

    def current_operating_point(self) -> OperatingPoint:
        """The fixed point if there is one; else the drawn one in training and the least reduction in inference."""
        if self.operating_point is not None:
            return self.operating_point
        space = self.config.operating_points
        if self.training and space.is_stochastic:
            return space.draw(self.seed, self.num_updates or 0)
        return space.default

    def forward(
        self,
        source,
        padding_mask=None,
        mask=True,
        features_only=False,
        layer=None,
        mask_indices=None,
        mask_channel_indices=None,
        padding_count=None,
        operating_point=None,
        **kwargs,
    ) -> Dict[str, Any]:
        """Stock Wav2Vec2Model.forward, plus `operating_point` (text or OperatingPoint) to choose one for this call.

        source: (batch, samples); padding_mask: (batch, samples) bool, True on padding. Returns stock's dict: with
        `features_only` x (batch, time, channel), padding_mask, features, layer_results (with layer_depths, and
        layer_padding_mask at their squeezed rate) and features_pen; else x, the logits (1 +
        negatives, batch, masked time), and the terms of the loss.
        """
        point = (
            self.current_operating_point() if operating_point is None else self.check_operating_point(operating_point)
        )
        _require_finite(source)
        gates = self.gate_values()
        frames, frame_mask = self._extract_frames(source, padding_mask, gates)
        features_pen = _mean_square(frames, frame_mask)
        frames = self.normalise(frames, gates)
        frames, frame_mask = self._crop(frames, frame_mask)
        padding = None if frame_mask is None else ~frame_mask.valid

        x = self.dropout_input(self.project(frames))
        unmasked = self.dropout_features(frames)
        with training_randomness(self.seed, self.num_updates, self.calls):
            if mask:
                x, mask_indices = self.apply_mask(x, padding, mask_indices, mask_channel_indices)
            else:
                mask_indices = None
            encoded = self.encoder(x, frame_mask, point, layer, gates)
        self.calls += 1
        x = self._keep_idle_parameters(encoded.x, features_only)

        if features_only:
            return {
                "x": x,
                "padding_mask": padding,
                "features": unmasked,
                "layer_results": [
                    (result.x.transpose(0, 1), None, result.ffn.transpose(0, 1)) for result in encoded.layers
                ],
                "layer_depths": encoded.depths,
                "layer_padding_mask": None if encoded.squeezed_mask is None else ~encoded.squeezed_mask.valid,
                "features_pen": features_pen,
                "operating_point": str(point),
            }

        candidates, codes = self._candidates(unmasked, mask_indices, padding_count)
        if mask_indices is not None:
            x = x[mask_indices].view(x.size(0), -1, x.size(-1))
        return {
            "x": contrastive_logits(self.final_proj(x), *candidates),
            "padding_mask": padding,
            "features_pen": features_pen,
            "operating_point": str(point),
            **codes,
        }

    def apply_mask(self, x, padding_mask, mask_indices=None, mask_channel_indices=None):
        """Masks spans of frames with `mask_emb` and spans of channels with 0, as stock does.

        x: (batch, time, channel); padding_mask: (batch, time) bool or None. Returns the masked frames and the frame
        mask (batch, time) bool, None when mask_prob is 0. Masks that are given are used instead of drawn ones.
        """
        batch, time, channels = x.shape
        if self.mask_channel_prob > 0 and self.mask_channel_before:
            x = x.masked_fill(self._channel_mask(batch, channels).to(x.device), 0)
        if self.mask_prob > 0:
            if mask_indices is None:
                mask_indices = span_mask(
                    (batch, time),
                    padding_mask,
                    self.mask_prob,
                    self.mask_length,
                    self.mask_selection,
                    self.mask_other,
                    min_masks=2,
                    no_overlap=self.no_mask_overlap,
                    min_space=self.mask_min_space,
                    require_same_masks=self.cfg.require_same_masks,
                    mask_dropout=self.cfg.mask_dropout,
                ).to(x.device)
            x = torch.where(mask_indices.unsqueeze(-1), self.mask_emb.to(x.dtype), x)
        else:
            mask_indices = None
        if self.mask_channel_prob > 0 and not self.mask_channel_before:
            if mask_channel_indices is None:
                mask_channel_indices = self._channel_mask(batch, channels).to(x.device)
            x = x.masked_fill(mask_channel_indices, 0)
        return x, mask_indices

    def _channel_mask(self, batch, channels):
        """(batch, 1, channel) bool."""
        return span_mask(
            (batch, channels),
            None,
            self.mask_channel_prob,
            self.mask_channel_length,
            self.mask_channel_selection,
            self.mask_channel_other,
            no_overlap=self.no_mask_channel_overlap,
            min_space=self.mask_channel_min_space,
        ).unsqueeze(1)

    def extract_features(self, source, padding_mask=None, mask=False, layer=None, operating_point=None, **kwargs):
        """Contextual frames at the frontend's rate; see forward with `features_only`."""
        return self.forward(
            source, padding_mask, mask=mask, features_only=True, layer=layer, operating_point=operating_point
        )

    def quantize(self, x):
        """Codebook vectors and indices for `x` (batch, samples)."""
        frames, _ = self.features(x)
        return self.quantizer.forward_idx(self.layer_norm(frames))

    def remove_pretraining_modules(self, last_layer=None) -> None:
        """Drops the pre-training heads; raises ValueError for `last_layer`, which stock uses to drop layers."""
        if last_layer is not None:
            raise ValueError(
                f"last_layer={last_layer}: w2v2_light keeps its layers; set encoder_layers or layer_map instead"
            )
        for name in PRETRAINING_HEADS:
            setattr(self, name, None)

    def _extract_frames(self, source, padding_mask, gates):
        lengths = None
        if padding_mask is not None and padding_mask.any():
            lengths = (~padding_mask.bool()).sum(-1)
        with torch.no_grad() if self.feature_grad_mult <= 0 else contextlib.ExitStack():
            frames, frame_mask = self.features(source, lengths, gates)
        if 0 < self.feature_grad_mult != 1.0:
            frames = GradMultiply.apply(frames, self.feature_grad_mult)
        return frames, frame_mask

    def _crop(self, frames, frame_mask):
        time = frames.size(1) - frames.size(1) % self.crop_seq_to_multiple
        if time == frames.size(1):
            return frames, frame_mask
        return frames[:, :time], None if frame_mask is None else FrameMask(frame_mask.valid[:, :time])

    def _candidates(self, unmasked, mask_indices, padding_count):
        """What `contrastive_logits` compares predictions with, its arguments after them; and code statistics."""

        def select(frames):
            if mask_indices is None:
                return frames
            return frames[mask_indices].view(frames.size(0), -1, *frames.shape[2:])

        codes = {}
        pool = unmasked if self.negatives_from_everywhere else select(unmasked)
        if self.quantizer is not None:
            quantized = self.quantizer(pool, produce_targets=False)
            pool = quantized["x"]
            codes = {key: quantized[key] for key in ("prob_perplexity", "code_perplexity", "num_vars", "temp")}
        pool = self.project_q(pool)
        rows = torch.arange(pool.size(0) * pool.size(1), device=pool.device).view(pool.shape[:2])
        targets = select(rows) if self.negatives_from_everywhere else rows
        # stock gathers the vectors, too: of one zero each, here
        negatives = self.sample_negatives(pool.new_zeros(*rows.shape, 1), targets.size(1), padding_count)[1]
        negatives = negatives.to(pool.device).view(*targets.shape, -1)
        drawn = None
        if self.quantizer is not None and self.codebook_negatives > 0:
            batch, time = targets.shape
            drawn = self.quantizer.sample_from_codebook(batch * time, self.codebook_negatives)
            drawn = self.project_q(drawn.view(self.codebook_negatives * batch, time, -1))
            drawn = drawn.view(-1, batch, time, drawn.size(-1))
        if self.target_glu is not None:
            pool, drawn = self.target_glu(pool), None if drawn is None else self.target_glu(drawn)
        return (pool.flatten(0, 1), targets, negatives, self.logit_temp, drawn), codes

    def _keep_idle_parameters(self, x, features_only: bool):
        """Adds zero times every parameter that this call may not use, so that DDP sees a gradient for each."""
        if not (self.training and torch.is_grad_enabled()):
            return x
        if self.config.layerdrop > 0:
            idle = list(self.encoder.parameters())
        else:
            idle = self.encoder.idle_parameters()
        idle += [self.mask_emb] if self.gates is None else [self.mask_emb, *self.gates.parameters()]
        if features_only:
            heads = [getattr(self, name) for name in PRETRAINING_HEADS]
            idle += [parameter for head in heads if head is not None for parameter in head.parameters()]
        zero = sum(parameter.reshape(-1)[0] * 0.0 for parameter in idle if parameter.requires_grad)
        return x + zero


def _check_quantizer(cfg: W2V2LightConfig, dim: int) -> None:
    for key in ("latent_vars", "latent_groups"):
        if getattr(cfg, key) < 1:
            raise ValueError(f"model.{key}: found {getattr(cfg, key)}, expected 1 or more")
    if dim % cfg.latent_groups:
        raise ValueError(
            f"model.latent_groups: {cfg.latent_groups} groups do not divide the {dim} channels of the targets "
            "(latent_dim, or final_dim)"
        )
    if len(cfg.latent_temp) != 3:
        raise ValueError(
            f"model.latent_temp: found {list(cfg.latent_temp)}, expected the first temperature, the last one, and the "
            "factor from one update to the next, like [2.0, 0.5, 0.999995]"
        )


@dataclass
class StochasticSEWConfig(W2V2LightConfig):
    conv_feature_layers: str = field(
        default=WFE_C,
        metadata={"help": "frontend layers as [(channels, kernel, stride), ...]; default: SEW's compact WFE-C, c=64"},
    )
    conv_pos: int = field(default=31, metadata={"help": "kernel of the convolutional positions (SEW: 31)"})
    squeeze_factors: List[int] = field(
        default_factory=lambda: [1, 2, 3, 4],
        metadata={"help": "squeeze factors to draw from in training: the Transformer runs at 1/s of the frame rate"},
    )
    query_pools: List[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "query pooling factors to draw from in training"}
    )
    kv_pools: List[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "key-value pooling factors to draw from in training"}
    )
    projection: str = field(
        default="mlp", metadata={"help": "pre-training heads: 'linear' (stock) or 'mlp' (SEW, with BatchNorm)"}
    )


@register_model("stochastic_sew", dataclass=StochasticSEWConfig)
class StochasticSEWModel(W2V2LightModel):
    """The same model with SEW's frontend, positions and heads, and stochastic operating points, as defaults."""


def require_streamable_audio(model, normalize: bool) -> None:
    """Raises ValueError when a `model` section that asks for streaming comes with utterance-wise normalised audio."""
    chunks = list(getattr(model, "chunk_frames", None) or [])
    if normalize and any(chunks):
        raise ValueError(
            "task.normalize: found true, mean and variance of the whole utterance, but model.chunk_frames="
            f"{chunks} asks for a streaming model, which cannot wait for its end; set "
            "task.normalize=false (`w2v2-light student` turns a checkpoint that was trained with true into one "
            "without: --input-level)"
        )


def _require_finite(source) -> None:
    finite = torch.isfinite(source).all(dim=-1)
    if not finite.all():
        rows = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"audio: NaN or infinite samples in row(s) {rows} of the batch, expected finite samples; "
            "find the files with `w2v2-light prepare check DATA --deep` and remove them from the manifest"
        )


def _mean_square(frames, frame_mask):
    """Feature penalty: mean square over the valid frames."""
    squares = frames.float().square()
    if frame_mask is None:
        return squares.mean()
    valid = frame_mask.valid.unsqueeze(-1)
    return (squares * valid).sum() / (valid.sum() * frames.size(-1))
