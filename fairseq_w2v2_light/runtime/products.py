"""Linears and convolutions for inference on a CPU, whose weights are ordered once instead of in every call.

oneDNN, or MKL for large Linears on Intel's CPUs, runs them, with the GELU applied to a result that is still in the
cache.
"""

from __future__ import annotations

from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import multiplies_by_mkl, random_tensors
from .mkl import MklWeight, mkl_serves

# oneDNN's names of no activation, and of the exact GELU, with its algorithm
_NO_ACTIVATION, _GELU = ("none", ""), ("gelu", "none")
# the fewest rows and columns of a weight that MKL multiplies faster; with a GELU, which oneDNN has in its product
_MKL_LEAST, _MKL_LEAST_GELU = 384, 512
# the largest weight that torch's own product, which is MKL's on Intel's CPUs, multiplies faster than oneDNN: 512 KiB
_PLAIN_MOST = 2**17
# the most rows for which it is that with a GELU too, and the most values of a GELU that is torch's own: oneDNN takes 30
# and 10 us to start
_FEW_ROWS, _FEW_VALUES = 32, 2**14


class PackedLinear(nn.Module):
    """nn.Linear, with a GELU behind it or without; `rows`: how many frames it will mostly see, which oneDNN asks for.

    The weight is not a parameter any more: it can be neither saved, moved nor trained. MKL orders a large one on
    Intel's CPUs for few threads, where its products take up to a tenth less time than oneDNN's.
    """

    def __init__(self, weight: Tensor, bias: Optional[Tensor], rows: int, gelu: bool = False):
        super().__init__()
        weight = weight.detach().contiguous()
        self.register_buffer("bias", copied(bias), persistent=False)
        self._gelu, self._inputs = gelu, weight.size(1)
        large = min(weight.shape) >= (_MKL_LEAST_GELU if gelu else _MKL_LEAST)
        self.mkl = MklWeight(weight) if large and mkl_serves(*weight.shape) else None
        self.plain = self.packed = None
        if self.mkl is None and weight.numel() <= _PLAIN_MOST and multiplies_by_mkl():
            self.plain = weight.t().contiguous().t()
        if self.mkl is None and (gelu or self.plain is None):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None and (self.plain is None or x.numel() > _FEW_ROWS * x.size(-1)):
            return _multiply(x, self.packed, self.bias, self._gelu)
        y = F.linear(x, self.plain, self.bias) if self.mkl is None else self.mkl.linear(x, self.bias)
        return gelu_(y) if self._gelu else y

    def unpacked(self) -> nn.Linear:
        """The Linear that it was made of, without the GELU."""
        if self.packed is not None:
            weight = _multiply(torch.eye(self._inputs), self.packed, None, gelu=False).t()
        else:
            weight = self.plain if self.mkl is None else self.mkl.unpacked()
        return linear_of(weight, self.bias)


def linear_of(weight: Tensor, bias: Optional[Tensor]) -> nn.Linear:
    """nn.Linear with this weight (out, in), which cannot be trained."""
    linear = nn.utils.skip_init(nn.Linear, *reversed(weight.shape), bias=bias is not None)
    linear.weight.data = weight.contiguous()
    if bias is not None:
        linear.bias.data = bias
    return linear.requires_grad_(False)


def _multiply(x: Tensor, packed: Tensor, bias: Optional[Tensor], gelu: bool) -> Tensor:
    """oneDNN's Linear: (..., in) -> (..., out); packed: its order of the weight."""
    activation, algorithm = _GELU if gelu else _NO_ACTIVATION
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], algorithm)


def gelu_(x: Tensor) -> Tensor:
    """The exact GELU of a contiguous `x` (..., rows, columns), in place."""
    # torch hands a contiguous tensor to oneDNN
    torch.ops.aten.gelu_(x.transpose(-2, -1) if x.numel() <= _FEW_VALUES else x)
    return x


class PackedConv1d(nn.Module):
    """A convolution over the time of (batch, time, channel), with a GELU behind it or without.

    weight: (channel, in channel / groups, kernel). One weight serves every stride; oneDNN's order of it for a stride is
    made when that first occurs. oneDNN has one order for few frames and another for many, and takes a hundred times as
    long with the wrong one: each is made for fewer frames than taps, and for as many.
    """

    def __init__(self, weight: Tensor, bias: Optional[Tensor], padding: int = 0, groups: int = 1, gelu: bool = False):
        super().__init__()
        self.register_buffer("weight", channels_last(copied(weight)), persistent=False)
        self.register_buffer("bias", copied(bias), persistent=False)
        self._padding, self._groups, self._gelu = padding, groups, gelu
        self._packed: Dict[Tuple[int, bool], Tensor] = {}

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        """(batch, time, in channel) -> (batch, frames, channel)."""
        kernel = self.weight.size(3)
        key = stride, (x.size(1) + 2 * self._padding - kernel) // stride + 1 < kernel
        if key not in self._packed:
            self._packed[key] = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, [0, self._padding], [1, stride], [1, 1], self._groups, [1, x.size(2), 1, x.size(1)]
            )
        return _convolve(x, self._packed[key], self.bias, stride, self._padding, self._groups, self._gelu)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    gelu: bool = False,
) -> Tensor:
    """Convolution over time: (batch, time, in channel) -> (batch, frames, channel); weight of `channels_last`."""
    activation, algorithm = _GELU if gelu else _NO_ACTIVATION
    image = x.transpose(1, 2).unsqueeze(2)
    y = torch.ops.mkldnn._convolution_pointwise(
        image, weight, bias, [0, padding], [1, stride], [1, 1], groups, activation, [], algorithm
    )
    return y.squeeze(2).transpose(1, 2)


def channels_last(weight: Tensor) -> Tensor:
    """(channel, in channel, kernel) -> (channel, in channel, 1, kernel), the in channels innermost in memory."""
    return weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)


def copied(tensor: Optional[Tensor]) -> Optional[Tensor]:
    """Of its own memory, and without a gradient."""
    return None if tensor is None else tensor.detach().clone()


def familiar_length(frames: int) -> int:
    """`frames` or a few more, at most one in 32, of which there are few: 32 between any number and its double.

    oneDNN prepares itself for every length that it meets; that takes as long as a second of speech in a small network.
    """
    step = 1 << max(0, frames.bit_length() - 6)
    return -(-frames // step) * step


def can_multiply() -> bool:
    """Whether this torch has oneDNN's packed product (an internal name of torch), and it computes a product."""
    x, weight, bias = random_tensors((3, 8), (4, 8), (4,))
    expected = F.linear(x, weight, bias)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        plain, gelu = (_multiply(x, packed, bias, gelu) for gelu in (False, True))
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return torch.allclose(plain, expected, atol=1e-5) and torch.allclose(gelu, F.gelu(expected), atol=1e-5)


def can_convolve() -> bool:
    """Whether this torch has oneDNN's convolution, as `can_multiply`."""
    x, weight, bias = random_tensors((1, 9, 8), (4, 4, 3), (4,))
    expected = F.gelu(F.conv1d(x.transpose(1, 2), weight, bias, stride=2, padding=1, groups=2)).transpose(1, 2)
    try:
        found = PackedConv1d(weight, bias, padding=1, groups=2, gelu=True)(x, 2)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return torch.allclose(found, expected, atol=1e-5)
