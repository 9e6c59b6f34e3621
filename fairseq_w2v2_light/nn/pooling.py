"""Pooling over time and its inverse, for any length and padding."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .exporting import is_exporting
from .masks import FrameMask, pooled_length


def mean_pool(x: Tensor, factor: int, mask: Optional[FrameMask] = None, drop_tail: bool = False) -> Tensor:
    """Averages windows of `factor` frames: (batch, time, channel) -> (batch, ceil(time / factor), channel).

    Windows start at frame 0. The mean is over the valid frames of a window, so a last window that is not full, and
    padding, change nothing. With `drop_tail` a last window that is not full is left out (SEW), unless it is the only.
    """
    if factor == 1:
        return x
    valid = None if mask is None else mask.valid
    time = x.size(1)
    windows = pooled_length(time, factor, drop_tail)
    # on CPUs older torches pool no fp16
    if valid is None and not is_exporting() and (x.is_cuda or x.dtype != torch.float16):
        # as an image of height 1 whose channels are innermost in memory: a third of the time of a mean over windows
        image = x.transpose(1, 2).unsqueeze(2)
        means = F.avg_pool2d(image, (1, factor), ceil_mode=windows * factor > time, count_include_pad=False)
        return means.squeeze(2).transpose(1, 2)

    if valid is None:
        weights = x.new_ones(1, time, 1)
    else:
        weights = valid.unsqueeze(-1).to(x.dtype)
        x = x * weights
    end = windows * factor - time
    sums = F.pad(x, (0, 0, 0, end)).unflatten(1, (windows, factor)).sum(2)
    counts = F.pad(weights, (0, 0, 0, end)).unflatten(1, (windows, factor)).sum(2)
    return sums / counts.clamp(min=1)


def repeat_frames(x: Tensor, factor: int, time: int) -> Tensor:
    """Repeats every frame `factor` times and cuts to `time` frames: the inverse of pooling for a constant signal."""
    if factor == 1:
        return x
    if is_exporting():  # what is cut off differs between times
        return x.index_select(1, torch.arange(time, device=x.device) // factor)
    return x.repeat_interleave(factor, dim=1)[:, :time]
