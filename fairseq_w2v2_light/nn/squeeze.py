"""Squeeze and unsqueeze: run the Transformer at 1/s of the frame rate, for one s (SEW) or several (stochastic)."""

from __future__ import annotations

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .exporting import is_exporting
from .gating import gated
from .masks import FrameMask
from .pooling import mean_pool
from .positions import ConvPositions


def squeeze(
    x: Tensor,
    positions: ConvPositions,
    factor: int,
    mask: Optional[FrameMask] = None,
    drop_tail: bool = False,
    past: Optional[Tensor] = None,
    gate: Optional[Tensor] = None,
) -> Tensor:
    """Adds positions and reduces the rate: (batch, time, channel) -> (batch, about time / factor, channel).

    SEW's squeeze: mean of every `factor` frames plus the strided positional convolution. With factor 1 it is the
    stock sum of frames and positions. `x` must be 0 on padded frames. `past` are the frames before `x` that causal
    positions hear (None: zeros), `gate` (channel,) that of their channels.
    """
    pooled = mean_pool(x, factor, mask, drop_tail)
    return pooled + positions(x, factor, past, gate).narrow(1, 0, pooled.size(1))


class Unsqueeze(nn.Sequential):
    """SEW's upsampling Linear(d -> f d) + GELU, one set of weights for every factor up to f.

    f is the largest squeeze factor that the model is trained with. At factor f this is SEW's layer: rows i d to
    (i + 1) d make sub-frame i. At a smaller factor s, sub-frame j uses the block that lies at the same relative
    position in the window, floor((2 j + 1) f / (2 s)).

    With `residual`, the squeezed frame is added to each of its sub-frames. A model that also runs unsqueezed needs
    it: its heads read frames of either sign at squeeze 1, and a GELU alone gives hardly any below zero. How stochastic
    wav2vec 2.0 (arXiv 2204.11934) upsamples is not public; this is our design, and SEW's without `residual`. State
    names are SEW's: `upsample.0.weight` (f d, d), `upsample.0.bias`.
    """

    def __init__(self, dim: int, factor: int, residual: bool = False):
        super().__init__(nn.Linear(dim, factor * dim))
        self.dim = dim
        self.factor = factor
        self.residual = residual

    def reset_parameters(self) -> None:
        """SEW's initialisation; small weights, so that training starts from repeated frames, with `residual`."""
        if self.residual:
            nn.init.normal_(self[0].weight, mean=0.0, std=0.02)
        else:
            nn.init.kaiming_normal_(self[0].weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self[0].bias)

    def blocks(self, factor: int) -> List[int]:
        """Which of the f weight blocks makes each of the `factor` sub-frames; for f = 4, factor 2: [1, 3]."""
        return [(2 * frame + 1) * self.factor // (2 * factor) for frame in range(factor)]

    def weights(self, factor: int) -> Tuple[Tensor, Tensor]:
        """Weight (factor d, d) and bias (factor d,) of the Linear at a factor."""
        linear = self[0]
        if factor == self.factor:
            return linear.weight, linear.bias
        blocks = torch.tensor(self.blocks(factor), device=linear.weight.device)
        weight = linear.weight.unflatten(0, (self.factor, self.dim)).index_select(0, blocks).flatten(0, 1)
        bias = linear.bias.unflatten(0, (self.factor, self.dim)).index_select(0, blocks).flatten()
        return weight, bias

    def forward(self, x: Tensor, factor: int, time: int, gate: Optional[Tensor] = None) -> Tensor:
        """(batch, squeezed time, channel) -> (batch, time, channel); frames beyond the last window are zero (SEW).

        gate: (channel,), before the GELU.
        """
        if gate is None and factor == self.factor:
            y = self[0](x)
        else:
            weight, bias = self.weights(factor)
            gate = None if gate is None else gate.repeat(factor)
            y = F.linear(x, gated(weight, gate, dim=0), gated(bias, gate))
        return self.spread(F.gelu(y), x, factor, time)

    def spread(self, y: Tensor, x: Tensor, factor: int, time: int) -> Tensor:
        """`y` (batch, squeezed time, factor d), made of `x` (batch, squeezed time, d), as (batch, time, d)."""
        y = y.unflatten(-1, (factor, self.dim))
        if self.residual:
            y = y + x.unsqueeze(2)
        y = y.flatten(1, 2)
        if is_exporting() or y.size(1) < time:
            # a factor more than may be missing, so that nothing depends on how many are
            y = F.pad(y, (0, 0, 0, factor))
        return y.narrow(1, 0, time)
