"""What gates do to a network: the values of one call, and how they enter its weights."""

from __future__ import annotations

from typing import List, NamedTuple, Optional

import torch.nn.functional as F
from torch import Tensor, nn


class GateValues(NamedTuple):
    """One value per unit, fp32, None where a unit has no gates.

    conv: (channels,) of each frontend layer; None for one without gates of its own. heads: (heads,) and ffn: (FFN
    width,) of each stored layer; None for a layer that has none left. hidden: (dim,).
    """

    conv: Optional[List[Optional[Tensor]]] = None
    heads: Optional[List[Optional[Tensor]]] = None
    ffn: Optional[List[Optional[Tensor]]] = None
    hidden: Optional[Tensor] = None


class LayerGates(NamedTuple):
    """What one Transformer layer is given: heads (heads,), ffn (FFN width,), hidden (dim,); None: open."""

    heads: Optional[Tensor] = None
    ffn: Optional[Tensor] = None
    hidden: Optional[Tensor] = None


# what a network without gates is given, and its layers
NO_GATES = GateValues()
NO_LAYER_GATES = LayerGates()


def layer_gates(gates: GateValues, stored: int) -> LayerGates:
    """Those of a stored layer."""
    heads = None if gates.heads is None else gates.heads[stored]
    ffn = None if gates.ffn is None else gates.ffn[stored]
    return LayerGates(heads, ffn, gates.hidden)


def gated(x: Tensor, gate: Optional[Tensor], dim: int = -1) -> Tensor:
    """`x` times `gate` (channel,) along its dimension `dim`, in the dtype of `x`; None: `x` itself."""
    if gate is None:
        return x
    return x * gate.to(x.dtype).reshape([-1] + [1] * (x.dim() - 1 - dim % x.dim()))


def gated_linear(
    linear: nn.Linear, x: Tensor, rows: Optional[Tensor] = None, columns: Optional[Tensor] = None
) -> Tensor:
    """`linear` of `x` (..., in) with gates on its output channels, rows (out,), and input channels, columns (in,).

    They go into the weights, which are smaller than activations, as `w2v2-light prune` puts them there for good. With
    every column closed the result is 0: there is no bias either.
    """
    if rows is None and columns is None:
        return linear(x)
    bias = gated(linear.bias, rows)
    if columns is not None:
        bias = bias * (columns > 0).any().to(bias.dtype)
    return F.linear(x, gated(gated(linear.weight, rows, dim=0), columns), bias)
