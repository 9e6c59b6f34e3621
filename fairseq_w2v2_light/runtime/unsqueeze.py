"""Unsqueeze for Linears whose weight cannot be taken apart."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.squeeze import Unsqueeze


class WholeUnsqueeze(nn.Module):
    """Unsqueeze with a Linear of any class: it makes all sub-frames, of which a smaller factor takes its own.

    State names are those of Unsqueeze, which this is not: packing would look for its weight.
    """

    blocks = Unsqueeze.blocks
    spread = Unsqueeze.spread

    def __init__(self, unsqueeze: Unsqueeze, linear: nn.Module):
        super().__init__()
        self.add_module("0", linear)
        self.dim, self.factor, self.residual = unsqueeze.dim, unsqueeze.factor, unsqueeze.residual

    @property
    def linear(self) -> nn.Module:
        """(batch, squeezed time, d) -> (batch, squeezed time, f d)"""
        return self._modules["0"]

    def forward(self, x: Tensor, factor: int, time: int, gate: Optional[Tensor] = None) -> Tensor:
        """(batch, squeezed time, channel) -> (batch, time, channel), see Unsqueeze; there is no gate."""
        y = self.linear(x)
        if factor < self.factor:
            blocks = torch.tensor(self.blocks(factor), device=x.device)
            y = y.unflatten(-1, (self.factor, self.dim)).index_select(-2, blocks).flatten(-2)
        return self.spread(F.gelu(y), x, factor, time)
