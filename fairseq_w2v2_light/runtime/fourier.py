"""Convolutions over time with long kernels as products of spectra: a 26th of the multiplications for BASE's positions.

Overlap-save: blocks of the input, which overlap by a kernel, are transformed, multiplied frequency by frequency (in
each and for each group a product of a (blocks, in channel) matrix and an (in channel, channel) one) and transformed
back. The frames of a block that its end has wrapped around to are not used. The result is that of the direct sum but
for rounding, which here is relative to the largest frames of a block.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import random_tensors

# with fewer taps, and no more channels in a group, oneDNN's direct convolution takes less time
_FEWEST_TAPS, _MOST_CHANNELS = 24, 32


class FourierConv1d:
    """A grouped convolution over the time of (batch, time, in channel), at one stride, in fp32.

    weight: (channel, in channel / groups, kernel). A stride is a convolution of `stride` times as many channels, the
    frames of a stride side by side, with as many times fewer taps. The spectrum takes two to four times the weight's
    memory, for each stride.
    """

    def __init__(self, weight: Tensor, bias: Optional[Tensor], groups: int, stride: int = 1):
        self._bias, self._groups, self._stride = bias, groups, stride
        channels, inner, kernel = weight.shape
        taps = -(-kernel // stride)
        # the power of two that is at least twice as many frames as there are taps: with longer blocks there is less to
        # multiply, but more spectrum to read, and more of the last block is for nothing
        self._block = 1 << (2 * taps - 1).bit_length()
        self._fresh = self._block - taps + 1
        self._spectrum = self._transform(F.pad(weight, (0, taps * stride - kernel)).unflatten(2, (taps, stride)))

    def _transform(self, weight: Tensor) -> Tensor:
        """(channel, in channel, tap, frame of the stride) -> (frequency and group, in channel, channel)."""
        frequencies, width = self._block // 2 + 1, weight.size(0) // self._groups
        spectrum = torch.empty(
            frequencies, self._groups, self._stride * weight.size(1), width, dtype=torch.complex64, device=weight.device
        )
        for group in range(self._groups):  # one by one: all at once take several times the memory
            # conjugated: a convolution as networks have it does not turn its kernel around
            part = torch.fft.rfft(weight[group * width : (group + 1) * width], self._block, dim=2).conj()
            spectrum[:, group] = part.permute(2, 3, 1, 0).flatten(1, 2)
        return spectrum.flatten(0, 1)

    def __call__(self, x: Tensor, before: int, frames: int) -> Tensor:
        """(batch, time, in channel) -> (batch, frames, channel), in fp32; `before` zeros stand before the first frame.

        What a frame hears beyond the last one of `x` is zeros, too.
        """
        batch, time, channels = x.shape
        blocks = -(-frames // self._fresh)
        hop, heard = self._fresh * self._stride, self._block * self._stride
        x = F.pad(x.float(), (0, 0, before, (blocks - 1) * hop + heard - before - time))
        # (batch, blocks, groups and their channels, time of the block, frame of the stride)
        x = x.unfold(1, heard, hop).unflatten(3, (self._block, self._stride))
        x = torch.fft.rfft(x, dim=3).unflatten(2, (self._groups, -1)).permute(4, 2, 0, 1, 5, 3)
        frequencies = x.size(0)
        x = x.reshape(frequencies * self._groups, batch * blocks, -1)
        y = torch.bmm(x, self._spectrum).view(frequencies, self._groups, batch * blocks, -1)
        del x  # as large as what the next line makes
        y = torch.fft.irfft(y.permute(2, 0, 1, 3), self._block, dim=1)[:, : self._fresh]
        y = y.reshape(batch, blocks * self._fresh, -1)[:, :frames]
        return y if self._bias is None else y.add_(self._bias)


def fourier_serves(weight: Tensor, stride: int) -> bool:
    """Whether the spectra of a (channel, in channel / groups, kernel) weight take less time than oneDNN's convolution.

    With more than 32 channels in a group oneDNN takes ten times as long for some lengths, with a weight that it
    ordered for others: there it need not be much faster with few taps.
    """
    return weight.size(2) >= _FEWEST_TAPS * stride or weight.size(1) > _MOST_CHANNELS


def can_transform() -> bool:
    """Whether this torch has Fourier transforms, and they serve a convolution."""
    x, weight = random_tensors((2, 11, 4), (6, 2, 5))
    expected = F.conv1d(x.transpose(1, 2), weight, stride=2, padding=2, groups=2).transpose(1, 2)
    try:
        found = FourierConv1d(weight, None, 2, 2)(x, 2, expected.size(1))
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return torch.allclose(found, expected, atol=1e-5)
