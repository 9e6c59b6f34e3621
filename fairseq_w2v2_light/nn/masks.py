"""Which frames of a padded batch are real, at the full and at every pooled rate."""

from __future__ import annotations

from typing import Dict, Optional

import torch
from torch import Tensor

from .exporting import is_exporting


class FrameMask:
    """The valid frames of one padded batch; pooled masks are computed once per factor.

    `valid` is (batch, time) bool, True on real frames; real frames come first in every row.
    """

    def __init__(self, valid: Tensor):
        self.valid = valid
        self._pooled: Dict[tuple, FrameMask] = {}

    @classmethod
    def from_lengths(cls, lengths: Tensor, time: int) -> Optional[FrameMask]:
        """Mask for `lengths` (batch,) frames in rows of `time` frames; None when nothing is padded."""
        if not is_exporting() and bool((lengths >= time).all()):
            return None
        return cls(torch.arange(time, device=lengths.device) < lengths.unsqueeze(1))

    def attention(self, query_pool: int = 1, kv_pool: int = 1) -> Tensor:
        """(batch, 1, 1, pooled time) bool: True where a pooled key may be attended to, by every query."""
        return self.pooled(kv_pool).valid[:, None, None, :]

    def pooled(self, factor: int, drop_tail: bool = False) -> FrameMask:
        """The mask after pooling by `factor`: a pooled frame is valid when any frame of its window is.

        With `drop_tail`, windows that are not full do not count (SEW: lengths // factor), but every utterance keeps
        at least one frame. Example: valid 1 1 1 0 pooled by 2 is 1 1, and 1 0 with `drop_tail`.
        """
        if factor == 1:
            return self
        key = (factor, drop_tail)
        if key not in self._pooled:
            batch, time = self.valid.shape
            lengths = self.valid.sum(1)
            pooled_lengths = pooled_length(lengths, factor, drop_tail)
            steps = torch.arange(pooled_length(time, factor, drop_tail), device=lengths.device)
            self._pooled[key] = FrameMask(steps < pooled_lengths.unsqueeze(1))
        return self._pooled[key]


def pooled_length(length, factor: int, drop_tail: bool = False):
    """Frames that remain of `length` frames (int or Tensor) after pooling by `factor`: ceil, or max(1, floor)."""
    if not drop_tail:
        return (length + factor - 1) // factor
    floor = length // factor
    return floor.clamp(min=1) if isinstance(floor, Tensor) else torch.sym_max(1, floor)
