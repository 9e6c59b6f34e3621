"""LayerNorm of what pruning left of a wider layer."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gating import gated


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose mean and variance are those over `width` channels, of which all but `channels` are zero.

    So a pruned model computes what it computed while those channels were only masked. With `width` 0, or equal to
    `channels`, it is nn.LayerNorm. State names: weight, bias, (channels,) each.
    """

    def __init__(self, channels: int, width: int = 0):
        super().__init__(channels)
        self.width = width or channels

    def forward(self, x: Tensor, gate: Optional[Tensor] = None) -> Tensor:
        """(..., channel) -> the same; `gate` (channel,) multiplies the result."""
        return wide_layer_norm(x, gated(self.weight, gate), gated(self.bias, gate), self.eps, self.width)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.width == self.normalized_shape[0] else f", width={self.width}")


def wide_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, width: int) -> Tensor:
    """Layer normalisation of `x` (..., channel) with the statistics of `width` channels, the missing ones zero.

    With the gradient, the missing ones are there while it is computed. Without, which is faster: the mean is the sum of
    those there are over all n, and the n - k others add as many of its squares to the sum of squared deviations.
    """
    channels = x.size(-1)
    if width == channels:
        return F.layer_norm(x, (channels,), weight, bias, eps)
    missing = width - channels
    if torch.is_grad_enabled():
        wide, wide_weight, wide_bias = (F.pad(tensor, (0, missing)) for tensor in (x, weight, bias))
        return F.layer_norm(wide, (width,), wide_weight, wide_bias, eps)[..., :channels]
    mean = x.float().sum(-1, keepdim=True) / width
    centred = x - mean
    squares = torch.linalg.vector_norm(centred, dim=-1, keepdim=True).square()
    deviation = (squares / width + missing / width * mean.square() + eps).sqrt()
    return torch.addcmul(bias.float(), centred.div_(deviation), weight.float()).type_as(x)
