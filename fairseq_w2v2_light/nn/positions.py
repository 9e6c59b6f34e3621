"""Convolutional relative positions, at the full frame rate or strided."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormConv1d(nn.Module):
    """Grouped 1-D convolution with weight normalisation per kernel tap (fairseq's `weight_norm(..., dim=2)`).

    Parameters keep the names of torch's old-style weight norm: weight_g (1, 1, kernel), weight_v (channel,
    channel / groups, kernel), bias (channel).
    """

    def __init__(self, channels: int, kernel: int, groups: int):
        super().__init__()
        if channels % groups:
            raise ValueError(f"conv_pos_groups: {groups} groups do not divide {channels} channels")
        self.groups = groups
        self.kernel = kernel
        self.weight_g = nn.Parameter(torch.empty(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.empty(channels, channels // groups, kernel))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.normal_(self.weight_v, mean=0.0, std=math.sqrt(4.0 / (kernel * channels)))
        with torch.no_grad():
            self.weight_g.copy_(torch.linalg.vector_norm(self.weight_v, dim=(0, 1), keepdim=True))

    def weight(self) -> Tensor:
        """The normalised kernel (channel, channel / groups, kernel)."""
        return self.weight_v * (self.weight_g / torch.linalg.vector_norm(self.weight_v, dim=(0, 1), keepdim=True))

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        """(batch, channel, time) -> (batch, channel, ceil(time / stride)), centred on every stride-th frame."""
        frames = -(-x.size(-1) // stride)
        y = F.conv1d(x, self.weight(), self.bias, stride, padding=self.kernel // 2, groups=self.groups)
        return y[..., :frames]


class ConvPositions(nn.Sequential):
    """wav2vec 2.0's convolutional positions; with a stride, SEW's squeezed ones (the same weights at any stride).

    A strided convolution is the full-rate one evaluated at every stride-th frame, so one kernel serves every squeeze
    factor. Stock state names: `pos_conv.0.weight_g`, `.weight_v`, `.bias`.
    """

    def __init__(self, channels: int, kernel: int, groups: int):
        super().__init__(WeightNormConv1d(channels, kernel, groups))

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        """(batch, time, channel) -> (batch, ceil(time / stride), channel)."""
        # GELU last, see ConvBlock
        return F.gelu(self[0](x.transpose(1, 2), stride).transpose(1, 2))
