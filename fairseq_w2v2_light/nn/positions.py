"""Convolutional relative positions, at the full frame rate or strided."""

from __future__ import annotations

import math
from typing import Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import convolve_groups, trains_on_cpu
from .exporting import is_exporting
from .gating import gated
from .precision import convolve


class WeightNormConv1d(nn.Module):
    """Grouped 1-D convolution with weight normalisation per kernel tap (fairseq's `weight_norm(..., dim=2)`).

    Parameters keep the names of torch's old-style weight norm: weight_g (1, 1, kernel), weight_v (channel,
    channel / groups, kernel), bias (channel). A `causal` one hears the present frame and kernel - 1 before it.

    group_dims: channels of each group, where pruning left unequal ones; the weights are then those of groups that all
    have as many as the largest, and channels that are not there are zero.
    """

    def __init__(self, channels: int, kernel: int, groups: int, causal: bool = False, group_dims: Sequence[int] = ()):
        super().__init__()
        self.causal = causal
        self.register_buffer("places", None, persistent=False)
        if group_dims:
            largest = max(group_dims)
            places = [group * largest + index for group, dim in enumerate(group_dims) for index in range(dim)]
            # from numpy: real values also where the model is built on the meta device
            self.places = torch.from_numpy(np.asarray(places))
            channels = groups * largest
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
        if self.weight_v.requires_grad and not is_exporting():  # what weight_norm calls: a quarter of the time on CPUs
            return torch._weight_norm(self.weight_v, self.weight_g, 2)
        return self.weight_v * (self.weight_g / torch.linalg.vector_norm(self.weight_v, dim=(0, 1), keepdim=True))

    def forward(
        self, x: Tensor, stride: int = 1, past: Optional[Tensor] = None, gate: Optional[Tensor] = None
    ) -> Tensor:
        """(batch, channel, time) -> (batch, channel, ceil(time / stride)), at every stride-th frame.

        past: (batch, channel, kernel - 1), the frames before `x`, for causal convolutions only; None: zeros. gate:
        (channel,) multiplies the result.
        """
        if past is None:
            # one less than the kernel has taps, which makes ceil(time / stride) frames of any time
            before = self.kernel - 1 if self.causal else self.kernel // 2
            x = F.pad(x, (before, self.kernel - 1 - before))
        else:
            x = torch.cat([past, x], dim=-1)
        if self.places is not None:
            x = x.new_zeros(x.size(0), self.bias.numel(), x.size(2)).index_copy(1, self.places, x)
        if gate is not None and self.places is not None:
            gate = torch.zeros_like(self.bias).index_copy(0, self.places, gate.to(self.bias.dtype))
        weight, bias = gated(self.weight(), gate, dim=0), gated(self.bias, gate)
        if stride == 1 and trains_on_cpu(x):
            y = convolve(lambda *inputs: convolve_groups(*inputs, self.groups), x, weight, bias)
        else:
            y = convolve(lambda *inputs: F.conv1d(*inputs, stride, groups=self.groups), x, weight, bias)
        return y if self.places is None else y.index_select(1, self.places)


class ConvPositions(nn.Sequential):
    """wav2vec 2.0's convolutional positions; with a stride, SEW's squeezed ones (the same weights at any stride).

    A strided convolution is the full-rate one evaluated at every stride-th frame, so one kernel serves every squeeze
    factor. Stock state names: `pos_conv.0.weight_g`, `.weight_v`, `.bias`. Streaming models have `causal` ones.
    """

    def __init__(self, channels: int, kernel: int, groups: int, causal: bool = False, group_dims: Sequence[int] = ()):
        super().__init__(WeightNormConv1d(channels, kernel, groups, causal, group_dims))

    def forward(
        self, x: Tensor, stride: int = 1, past: Optional[Tensor] = None, gate: Optional[Tensor] = None
    ) -> Tensor:
        """(batch, time, channel) -> (batch, ceil(time / stride), channel).

        past: (batch, kernel - 1, channel), the frames before `x` (causal ones only); None: zeros. gate: (channel,),
        before the GELU.
        """
        past = None if past is None else past.transpose(1, 2)
        # GELU last, see ConvBlock
        return F.gelu(self[0](x.transpose(1, 2), stride, past, gate).transpose(1, 2))


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
