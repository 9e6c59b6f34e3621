"""The configuration of the network, free of fairseq: what an exported model folder stores."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from typing import Any, Dict, Mapping, Optional, Set, Tuple

from .frontend import frame_lengths, receptive_field
from .layer_map import parse_layer_map
from .operating_point import OperatingPointSpace

# what pruning can remove: frontend channels, attention heads, inner channels of the FFN, channels between the layers
PRUNE_UNITS = ("conv", "heads", "ffn", "hidden")


@dataclass(frozen=True)
class EncoderConfig:
    """Shapes and switches of frontend and Transformer. Every mechanism off is wav2vec 2.0.

    conv_layers: (channels, kernel, stride) per frontend layer. extractor_norm: "group" or "layer".
    dim, ffn_dim, heads: Transformer widths. layer_map: the stored layer that serves each depth.
    attention_map_every: n computes an attention map at every n-th depth, the others reuse it.
    operating_points: the operating points the model is trained for.
    unsqueeze_factor: largest squeeze factor that the unsqueeze layer has weights for (1: it has none).
    unsqueeze_residual: add the squeezed frame to its sub-frames (False: SEW).
    squeeze_tail: "keep" pools a last window that is not full, "drop" leaves it out (SEW).
    layer_heads, layer_ffn: heads and FFN width of each stored layer where pruning left them unequal (empty: `heads` and
    `ffn_dim` each); 0 leaves the block out. head_dim: channels of a head (0: dim / heads). norm_dim, conv_norm_dims:
    over how many channels the LayerNorms of the Transformer, and of each frontend layer, take mean and variance: those
    that pruning removed count as zeros (0, empty: their own). conv_pos_group_dims: channels in each group of the
    positional convolution where they are unequal. project_features: project the frontend's channels to `dim` even where
    there are as many. prune_units: what has gates ("conv", "heads", "ffn", "hidden"), for pruning.
    left_context, lookahead: frames of the frontend that a chunk of a streaming model hears before and after itself;
    its chunk sizes are `operating_points.chunk`. A model that streams also has causal positions, and a frontend whose
    input starts with `frontend_padding` zeros.
    """

    conv_layers: Tuple[Tuple[int, int, int], ...]
    extractor_norm: str = "group"
    conv_bias: bool = False
    dim: int = 768
    ffn_dim: int = 3072
    heads: int = 12
    norm_first: bool = False
    activation: str = "gelu"
    conv_pos: int = 128
    conv_pos_groups: int = 16
    layer_map: Tuple[int, ...] = tuple(range(12))
    attention_map_every: int = 1
    operating_points: OperatingPointSpace = OperatingPointSpace()
    unsqueeze_factor: int = 1
    unsqueeze_residual: bool = True
    squeeze_tail: str = "keep"
    left_context: int = 0
    lookahead: int = 0
    layer_heads: Tuple[int, ...] = ()
    layer_ffn: Tuple[int, ...] = ()
    head_dim: int = 0
    norm_dim: int = 0
    conv_norm_dims: Tuple[int, ...] = ()
    conv_pos_group_dims: Tuple[int, ...] = ()
    project_features: bool = False
    prune_units: Tuple[str, ...] = ()
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    layerdrop: float = 0.0
    checkpoint_activations: bool = False

    def __post_init__(self):
        if not self.layer_map or set(self.layer_map) != set(range(self.unique_layers)):
            raise ValueError(
                f"layer_map: found {list(self.layer_map)}, expected the stored layer of each depth, numbered from 0 "
                "without gaps"
            )
        if self.squeeze_tail not in ("keep", "drop"):
            raise ValueError(f"squeeze_tail: found '{self.squeeze_tail}', expected 'keep' or 'drop'")
        if self.attention_map_every < 1:
            raise ValueError(f"attention_map_every: found {self.attention_map_every}, expected 1 or more")
        if max(self.operating_points.squeeze) > self.unsqueeze_factor:
            raise ValueError(
                f"squeeze_factors: found {max(self.operating_points.squeeze)}, but the unsqueeze layer has weights "
                f"for factors up to {self.unsqueeze_factor}; choose smaller factors, or pre-train with that one"
            )
        for key in ("left_context", "lookahead"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}_frames: found {getattr(self, key)}, expected 0 or more frames")
        self._check_probabilities()
        # the layers that points count are these, whoever made the space
        points = replace(self.operating_points, depth=self.depth, map_every=self.attention_map_every)
        object.__setattr__(self, "operating_points", points)
        self._check_widths()
        if self.streams:
            self._check_streaming()

    def _check_widths(self) -> None:
        stored, convolutions = self.unique_layers, len(self.conv_layers)
        for key, found, expected, what in (
            ("layer_heads", self.layer_heads, stored, "stored layers"),
            ("layer_ffn", self.layer_ffn, stored, "stored layers"),
            ("conv_norm_dims", self.conv_norm_dims, convolutions, "frontend layers"),
        ):
            if found and len(found) != expected:
                raise ValueError(
                    f"{key}: found {len(found)} numbers, expected one for each of {expected} {what}, or none"
                )
            if any(number < 0 for number in found):
                raise ValueError(f"{key}: found {list(found)}, expected numbers of 0 or more")
        for index, (width, layer) in enumerate(zip(self.conv_norm_dims, self.conv_layers)):
            if width < layer[0]:
                raise ValueError(
                    f"conv_norm_dims: found {width} for frontend layer {index}, which has {layer[0]} channels; "
                    "expected that many or more"
                )
        if self.norm_dim and self.norm_dim < self.dim:
            raise ValueError(f"norm_dim: found {self.norm_dim}, expected encoder_embed_dim={self.dim} or more, or 0")
        for key, number in (("encoder_attention_heads", self.heads), ("conv_pos_groups", self.conv_pos_groups)):
            if number < 1:
                raise ValueError(f"{key}: found {number}, expected 1 or more")
        if self.head_dim < 0:
            raise ValueError(f"head_dim: found {self.head_dim}, expected 1 or more channels, or 0")
        if not self.head_dim and self.dim % self.heads:
            raise ValueError(
                f"encoder_attention_heads: {self.heads} heads do not divide encoder_embed_dim {self.dim}; choose a "
                "divisor, or set head_dim"
            )
        self._check_position_groups()
        unknown = sorted(set(self.prune_units) - set(PRUNE_UNITS))
        if unknown or len(set(self.prune_units)) < len(self.prune_units):
            raise ValueError(
                f"prune_units: found {list(self.prune_units)}, expected some of {', '.join(PRUNE_UNITS)}, each once"
            )
        for group in self.map_groups.values():
            heads = [self.heads_of(stored) for stored in sorted(group)]
            if len(set(heads)) > 1:
                raise ValueError(
                    f"layer_heads: stored layers {sorted(group)} share attention maps (attention_map_every="
                    f"{self.attention_map_every}), but have {heads} heads; expected equally many"
                )

    def _check_probabilities(self) -> None:
        for key, found in (
            ("dropout", self.dropout),
            ("attention_dropout", self.attention_dropout),
            ("activation_dropout", self.activation_dropout),
            ("encoder_layerdrop (layerdrop)", self.layerdrop),
        ):
            if not 0 <= found <= 1:
                raise ValueError(f"{key}: found {found}, expected a probability from 0 to 1")

    def _check_position_groups(self) -> None:
        groups = self.conv_pos_group_dims
        if not groups and self.dim % self.conv_pos_groups:
            raise ValueError(f"conv_pos_groups: {self.conv_pos_groups} groups do not divide {self.dim} channels")
        if groups and (len(groups) != self.conv_pos_groups or min(groups) < 1 or sum(groups) != self.dim):
            raise ValueError(
                f"conv_pos_group_dims: found {list(groups)}, expected {self.conv_pos_groups} numbers (conv_pos_groups) "
                f"of 1 or more whose sum is encoder_embed_dim={self.dim}, or none"
            )

    def _check_streaming(self) -> None:
        chunks = list(self.operating_points.chunk)
        if self.extractor_norm == "group":
            raise ValueError(
                f"extractor_mode: found 'default', a GroupNorm over the whole utterance, but chunk_frames={chunks} "
                "asks for a streaming model, which cannot wait for its end; use a model trained with "
                "extractor_mode=layer_norm"
            )
        field, hop = receptive_field(self.conv_layers)
        if field < hop:
            raise ValueError(
                f"conv_feature_layers: a frame hears {field} samples and the next one starts {hop} samples later; a "
                "streaming model needs frames that leave no sample out"
            )
        sizes = [("chunk_frames", size) for size in chunks]
        sizes += [("left_context_frames", self.left_context), ("lookahead_frames", self.lookahead)]
        points = self.operating_points
        for squeeze in points.squeeze:
            for pool_key, pools in (("query_pools", points.query), ("kv_pools", points.key_value)):
                for pool in pools:
                    for key, frames in sizes:
                        if frames % (squeeze * pool):
                            raise ValueError(
                                f"{key}: {frames} frames are no multiple of {squeeze * pool}, squeeze factor {squeeze} "
                                f"times {pool} of {pool_key}: a streaming model needs whole windows in a chunk; choose "
                                f"{-(-frames // (squeeze * pool)) * squeeze * pool}, or other factors"
                            )

    @property
    def depth(self) -> int:
        """Number of layer applications."""
        return len(self.layer_map)

    @property
    def unique_layers(self) -> int:
        """Number of stored layers."""
        return len(set(self.layer_map))

    def heads_of(self, stored: int) -> int:
        """Attention heads of a stored layer."""
        return self.layer_heads[stored] if self.layer_heads else self.heads

    def ffn_of(self, stored: int) -> int:
        """Inner channels of a stored layer's FFN."""
        return self.layer_ffn[stored] if self.layer_ffn else self.ffn_dim

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.head_dim or self.dim // self.heads

    @property
    def projects(self) -> bool:
        """Whether a Linear stands between frontend and Transformer."""
        return self.project_features or self.features_dim != self.dim

    @property
    def map_groups(self) -> Dict[int, Set[int]]:
        """Stored layers that use each other's attention maps, and so have the same heads, by the first of each group.

        Without sharing of maps every stored layer is a group of its own.
        """
        owner = list(range(self.unique_layers))
        for depth, stored in enumerate(self.layer_map):
            maker = self.layer_map[depth - depth % self.attention_map_every]
            first, other = sorted((owner[maker], owner[stored]))
            owner = [first if group == other else group for group in owner]
        return {group: {stored for stored, own in enumerate(owner) if own == group} for group in sorted(set(owner))}

    @property
    def streams(self) -> bool:
        """Whether the model attends by chunks at some operating point, and hears a bounded future there."""
        return max(self.operating_points.chunk) > 0

    @property
    def frontend_padding(self) -> int:
        """Zeros before the first sample: they make a streaming model's frame t end with sample hop * (t + 1) - 1."""
        field, hop = receptive_field(self.conv_layers)
        return max(0, field - hop) if self.streams else 0

    def frames(self, samples):
        """Frames that the frontend makes of `samples` (int or Tensor) samples."""
        return frame_lengths(samples + self.frontend_padding, self.conv_layers)

    @property
    def features_dim(self) -> int:
        """Channels that leave the frontend."""
        return self.conv_layers[-1][0]


def parse_conv_layers(text: str) -> Tuple[Tuple[int, int, int], ...]:
    """Reads fairseq's `conv_feature_layers`, such as "[(512, 10, 5)] + [(512, 3, 2)] * 4", without eval.

    Raises ValueError that quotes `text` unless it is a list expression of (channels, kernel, stride) triples.
    """
    problem = f"conv_feature_layers '{text}': expected a list of (channels, kernel, stride), like [(512, 10, 5)] * 2"
    try:
        layers = _evaluate(ast.parse(str(text).strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(problem) from error
    if not isinstance(layers, list) or not layers:
        raise ValueError(problem)
    for layer in layers:
        if not isinstance(layer, (tuple, list)) or len(layer) != 3:
            raise ValueError(f"{problem}; '{layer}' is no triple")
        if not all(isinstance(value, int) and value > 0 for value in layer):
            raise ValueError(f"{problem}; '{layer}' needs three positive integers")
    return tuple(tuple(layer) for layer in layers)


# no frontend has as many layers, or channels
_LARGEST = 100_000


def _evaluate(node):
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate(element) for element in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_evaluate(element) for element in node.elts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _evaluate(node.left) + _evaluate(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = _evaluate(node.left), _evaluate(node.right)
        sizes = [value if isinstance(value, int) else len(value) for value in (left, right)]
        if sizes[0] * sizes[1] > _LARGEST:
            raise TypeError("repeats too often")
        return left * right
    raise TypeError(f"{ast.dump(node)} is not allowed")


def encoder_config(
    *,
    conv_feature_layers: str,
    extractor_norm: str,
    encoder_layers: int,
    layer_map: str = "",
    unique_layers: int = 0,
    attention_map_every: int = 1,
    squeeze_factors: Tuple[int, ...] = (1,),
    query_pools: Tuple[int, ...] = (1,),
    kv_pools: Tuple[int, ...] = (1,),
    pool_per_layer: bool = False,
    unsqueeze_factor: Optional[int] = None,
    chunk_frames: Tuple[int, ...] = (),
    left_context_frames: int = 0,
    lookahead_frames: int = 0,
    **widths,
) -> EncoderConfig:
    """Builds the configuration from the keys that recipes use; raises ValueError that names the key at fault."""
    space = OperatingPointSpace(
        tuple(squeeze_factors),
        tuple(query_pools),
        tuple(kv_pools),
        encoder_layers,
        pool_per_layer,
        attention_map_every,
        tuple(chunk_frames) or (0,),
    )
    return EncoderConfig(
        conv_layers=parse_conv_layers(conv_feature_layers),
        extractor_norm=extractor_norm,
        layer_map=parse_layer_map(layer_map, encoder_layers, unique_layers),
        attention_map_every=attention_map_every,
        operating_points=space,
        unsqueeze_factor=unsqueeze_factor or max(squeeze_factors),
        left_context=left_context_frames,
        lookahead=lookahead_frames,
        **widths,
    )


_NORMS = {"default": "group", "layer_norm": "layer"}


def encoder_config_from(model: Mapping[str, Any]) -> EncoderConfig:
    """The network that a complete `model` section of a fairseq checkpoint or recipe describes (ours or stock wav2vec2).

    Keys that the plugin adds may be missing: off. Raises ValueError that names the key for what we do not have
    (conformer layers, stacked positions, quantised inputs) and for malformed values.
    """
    try:
        _check_sizes(model)
        return _encoder_config_from(model)
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"model: a value of its configuration is malformed ({error!r})") from error


# no network is as deep, or as wide
_MOST = {
    "encoder_layers": 1000,
    "encoder_embed_dim": 1_000_000,
    "encoder_ffn_embed_dim": 1_000_000,
    "encoder_attention_heads": 1_000_000,
    "conv_pos": 1_000_000,
    "conv_pos_groups": 1_000_000,
}


def _check_sizes(model: Mapping[str, Any]) -> None:
    """Raises ValueError for sizes that would take all memory or time, before anything is made of them."""
    for key, most in _MOST.items():
        if type(model[key]) is not int or not 1 <= model[key] <= most:
            raise ValueError(f"{key}: found {model[key]!r}, expected a number from 1 to {most:,}")
    unsqueeze = model.get("unsqueeze_factor") or 1
    if not 1 <= unsqueeze <= _MOST["encoder_layers"]:
        raise ValueError(f"unsqueeze_factor: found {unsqueeze}, expected 1 to {_MOST['encoder_layers']:,}")


def _encoder_config_from(model: Mapping[str, Any]) -> EncoderConfig:
    for key, expected in (("layer_type", "transformer"), ("pos_conv_depth", 1), ("quantize_input", False)):
        found = model.get(key, expected)
        if str(found) != str(expected):
            raise ValueError(f"model.{key}: found {found}, expected {expected}: w2v2_light has no other")
    mode = str(model["extractor_mode"])
    if mode not in _NORMS:
        raise ValueError(f"model.extractor_mode: found '{mode}', expected one of {', '.join(_NORMS)}")
    return encoder_config(
        conv_feature_layers=model["conv_feature_layers"],
        extractor_norm=_NORMS[mode],
        conv_bias=bool(model["conv_bias"]),
        dim=model["encoder_embed_dim"],
        ffn_dim=model["encoder_ffn_embed_dim"],
        heads=model["encoder_attention_heads"],
        norm_first=bool(model["layer_norm_first"]),
        activation=str(model["activation_fn"]),
        conv_pos=model["conv_pos"],
        conv_pos_groups=model["conv_pos_groups"],
        encoder_layers=model["encoder_layers"],
        layer_map=model.get("layer_map", ""),
        unique_layers=model.get("unique_layers", 0),
        attention_map_every=model.get("attention_map_every", 1),
        squeeze_factors=tuple(model.get("squeeze_factors", (1,))),
        query_pools=tuple(model.get("query_pools", (1,))),
        kv_pools=tuple(model.get("kv_pools", (1,))),
        pool_per_layer=bool(model.get("pool_per_layer", False)),
        unsqueeze_factor=model.get("unsqueeze_factor") or None,
        unsqueeze_residual=bool(model.get("unsqueeze_residual", True)),
        squeeze_tail=model.get("squeeze_tail", "keep"),
        chunk_frames=tuple(model.get("chunk_frames") or ()),
        left_context_frames=model.get("left_context_frames", 0),
        lookahead_frames=model.get("lookahead_frames", 0),
        layer_heads=_numbers(model, "layer_heads"),
        layer_ffn=_numbers(model, "layer_ffn"),
        head_dim=model.get("head_dim", 0),
        norm_dim=model.get("norm_dim", 0),
        conv_norm_dims=_numbers(model, "conv_norm_dims"),
        conv_pos_group_dims=_numbers(model, "conv_pos_group_dims"),
        project_features=bool(model.get("project_features", False)),
        prune_units=tuple(str(unit) for unit in model.get("prune_units") or ()),
        dropout=model["dropout"],
        attention_dropout=model["attention_dropout"],
        activation_dropout=model["activation_dropout"],
        layerdrop=model["encoder_layerdrop"],
        checkpoint_activations=bool(model.get("checkpoint_activations", False)),
    )


def _numbers(model: Mapping[str, Any], key: str) -> Tuple[int, ...]:
    return tuple(int(number) for number in model.get(key) or ())
