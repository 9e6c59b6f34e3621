"""The configuration of the network, free of fairseq: what an exported model folder stores."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Optional, Tuple

from .layer_map import parse_layer_map
from .operating_point import OperatingPointSpace


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
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    layerdrop: float = 0.0
    checkpoint_activations: bool = False

    def __post_init__(self):
        if self.squeeze_tail not in ("keep", "drop"):
            raise ValueError(f"squeeze_tail: found '{self.squeeze_tail}', expected 'keep' or 'drop'")
        if self.attention_map_every < 1:
            raise ValueError(f"attention_map_every: found {self.attention_map_every}, expected 1 or more")
        if max(self.operating_points.squeeze) > self.unsqueeze_factor:
            raise ValueError(
                f"squeeze_factors: found {max(self.operating_points.squeeze)}, but the unsqueeze layer has weights "
                f"for factors up to {self.unsqueeze_factor}; choose smaller factors, or pre-train with that one"
            )

    @property
    def depth(self) -> int:
        """Number of layer applications."""
        return len(self.layer_map)

    @property
    def unique_layers(self) -> int:
        """Number of stored layers."""
        return len(set(self.layer_map))

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
    )
    return EncoderConfig(
        conv_layers=parse_conv_layers(conv_feature_layers),
        extractor_norm=extractor_norm,
        layer_map=parse_layer_map(layer_map, encoder_layers, unique_layers),
        attention_map_every=attention_map_every,
        operating_points=space,
        unsqueeze_factor=unsqueeze_factor or max(squeeze_factors),
        **widths,
    )
