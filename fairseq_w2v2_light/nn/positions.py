"""Convolutional relative positions, at the full frame rate or strided."""

from __future__ import annotations

import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormConv1d(nn.Module):
    """Grouped 1-D convolution with weight normalisation per kernel tap (fairseq's `weight_norm(..., dim=2)`).

    Parameters keep the names of torch's old-style weight norm: weight_g (1, 1, kernel), weight_v (channel,
    channel / groups, kernel), bias (channel). A `causal` one hears the present frame and kernel - 1 before it.
    """

    def __init__(self, channels: int, kernel: int, groups: int, causal: bool = False):
        super().__init__()
        self.causal = causal
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

    def forward(self, x: Tensor, stride: int = 1, past: Optional[Tensor] = None) -> Tensor:
        """(batch, channel, time) -> (batch, channel, ceil(time / stride)), at every stride-th frame.

        past: (batch, channel, kernel - 1), the frames before `x`, for causal convolutions only; None: zeros.
        """
        frames = -(-x.size(-1) // stride)
        if self.causal:
            x = F.pad(x, (self.kernel - 1, 0)) if past is None else torch.cat([past, x], dim=-1)
            return F.conv1d(x, self.weight(), self.bias, stride, groups=self.groups)
        y = F.conv1d(x, self.weight(), self.bias, stride, padding=self.kernel // 2, groups=self.groups)
        return y[..., :frames]


class ConvPositions(nn.Sequential):
    """wav2vec 2.0's convolutional positions; with a stride, SEW's squeezed ones (the same weights at any stride).

    A strided convolution is the full-rate one evaluated at every stride-th frame, so one kernel serves every squeeze
    factor. Stock state names: `pos_conv.0.weight_g`, `.weight_v`, `.bias`. Streaming models have `causal` ones.
    """

    def __init__(self, channels: int, kernel: int, groups: int, causal: bool = False):
        super().__init__(WeightNormConv1d(channels, kernel, groups, causal))

    def forward(self, x: Tensor, stride: int = 1, past: Optional[Tensor] = None) -> Tensor:
        """(batch, time, channel) -> (batch, ceil(time / stride), channel).

        past: (batch, kernel - 1, channel), the frames before `x` (causal ones only); None: zeros.
        """
        past = None if past is None else past.transpose(1, 2)
        # GELU last, see ConvBlock
        return F.gelu(self[0](x.transpose(1, 2), stride, past).transpose(1, 2))


def causal_kernel(kernel: int) -> int:
    """Taps of the causal convolution that a centred one of `kernel` taps becomes: the present frame and its past."""
    return kernel // 2 + 1


# how much of a frame the one before it predicts, 20 ms earlier
FRAME_CORRELATION = 0.7


def causal_weights(weight_g: Tensor, weight_v: Tensor, correlation: float = FRAME_CORRELATION) -> Tuple[Tensor, Tensor]:
    """Weight norm's (g, v) of centred positions turned into those of causal ones: a documented approximation.

    (1, 1, kernel), (channel, channel / groups, kernel) -> the same with kernel // 2 + 1 taps. Taps of the past and the
    present stay as they are. The frame k ahead is not heard; its best guess by a first-order autoregression is
    `correlation` ** k times the present frame, so its tap, scaled by that, is added to the present frame's. 0 drops the
    future (truncation), 1 takes the present frame to last for ever. Our design: no paper says what becomes of the
    positions. On connected digits, before any training, whole-utterance attention: 48 % WER with 0.7, 58 % with 0,
    74 % with 1, from 5.1 % with centred positions; training mends the rest.
    """
    weight_v = weight_v.double()
    weight = weight_v * (weight_g.double() / torch.linalg.vector_norm(weight_v, dim=(0, 1), keepdim=True))
    present = weight.size(-1) // 2
    ahead = torch.arange(weight.size(-1) - present, dtype=weight.dtype, device=weight.device)
    guess = (weight[..., present:] * correlation**ahead).sum(-1, keepdim=True)
    weight = torch.cat([weight[..., :present], guess], dim=-1)
    norm = torch.linalg.vector_norm(weight, dim=(0, 1), keepdim=True)
    return norm.to(weight_g.dtype), weight.to(weight_g.dtype)
