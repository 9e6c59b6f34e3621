"""Convolutions over time as matrix products, for training on CPUs.

oneDNN computes a convolution forward about as fast as a matrix product. Its gradients take twice as long: for 512
channels, kernel 3 and stride 2, 235 ms forward and backward where these products take 145 ms, which is what this many
multiplications take at the speed of a large product; for the positions of BASE, gradients alone, 459 ms where
`convolve_groups` takes 273 (one thread of a Xeon with AVX-512).
"""

from __future__ import annotations

from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .exporting import is_exporting


def trains_on_cpu(x: Tensor) -> bool:
    """Whether a gradient will be computed on a CPU in the precision of `x`: not under autocast."""
    if x.device.type != "cpu" or not torch.is_grad_enabled() or is_exporting():
        return False
    try:
        return not torch.is_autocast_enabled("cpu")
    except TypeError:  # torch 2.1 asks for each device by another name
        return not torch.is_autocast_cpu_enabled()


def convolve_by_products(x: Tensor, weight: Tensor, bias: Optional[Tensor], stride: int) -> Tensor:
    """F.conv1d without padding and groups: (batch, in channel, time) -> (batch, channel, frames).

    The result has its channels innermost in memory; it is fastest where `x` has, too. Twice differentiable it is not.
    """
    if weight.size(1) == 1:
        heard = x.squeeze(1).unfold(-1, weight.size(2), stride)
        return F.linear(heard, weight.squeeze(1), bias).transpose(1, 2)
    return _Products.apply(x.transpose(1, 2), weight, bias, stride).transpose(1, 2)


class _Products(torch.autograd.Function):
    """Convolution over the time of (batch, time, in channel) with a weight (channel, in channel, kernel).

    Each `stride` taps of the kernel are one product: what they hear are rows of `stride` frames, one after the other in
    memory, so that no window is copied.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Optional[Tensor], stride: int) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.has_bias = stride, bias is not None
        channels, _, kernel = weight.shape
        frames = (x.size(1) - kernel) // stride + 1
        y = x.new_empty(x.size(0), frames, channels)
        parts = list(_parts(weight, stride))
        for wave, result in zip(x, y):
            for tap, part in parts:
                heard = _heard(wave, tap, part.size(1), stride, frames)
                if tap:
                    result.addmm_(heard, part.t())
                elif bias is None:
                    torch.mm(heard, part.t(), out=result)
                else:
                    torch.addmm(bias, heard, part.t(), out=result)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        stride, frames = ctx.stride, gradient.size(1)
        gradient = gradient.contiguous()
        parts = list(_parts(weight, stride))
        x_gradient = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            # what the first taps hear is written, not added to
            written = frames * stride if weight.size(2) >= stride else 0
            x_gradient = torch.empty_like(x)
            x_gradient[:, written:] = 0
            for wave, given in zip(x_gradient, gradient):
                for tap, part in parts:
                    heard = _heard(wave, tap, part.size(1), stride, frames)
                    if written and tap == 0:
                        torch.mm(given, part, out=heard)
                    else:
                        heard.addmm_(given, part)
        if ctx.needs_input_grad[1]:
            sums = [torch.zeros_like(part) for _, part in parts]
            for wave, given in zip(x, gradient):
                for (tap, part), total in zip(parts, sums):
                    total.addmm_(given.t(), _heard(wave, tap, part.size(1), stride, frames))
            weight_gradient = torch.cat(sums, dim=1).unflatten(1, (weight.size(2), weight.size(1))).transpose(1, 2)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            bias_gradient = gradient.sum((0, 1))
        return x_gradient, weight_gradient, bias_gradient, None


def convolve_groups(x: Tensor, weight: Tensor, bias: Optional[Tensor], groups: int) -> Tensor:
    """F.conv1d with stride 1: (batch, in channel, time) -> (batch, channel, frames). Not twice differentiable."""
    return _Groups.apply(x, weight, bias, groups)


class _Groups(torch.autograd.Function):
    """Grouped convolution; the gradient of `x` is one more, that of the weight a product for each tap."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Optional[Tensor], groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups, ctx.has_bias = groups, bias is not None
        return F.conv1d(x, weight, bias, groups=groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        groups, kernel, frames = ctx.groups, weight.size(2), gradient.size(2)
        x_gradient = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            mirrored = weight.unflatten(0, (groups, -1)).transpose(1, 2).flip(-1).flatten(0, 1)
            x_gradient = F.conv1d(F.pad(gradient, (kernel - 1, kernel - 1)), mirrored, groups=groups)
        if ctx.needs_input_grad[1]:
            # (group, batch, time, in channel) and (group, channel, batch * frames)
            heard = x.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).contiguous()
            given = gradient.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)
            taps = [given @ heard[:, :, tap : tap + frames].flatten(1, 2) for tap in range(kernel)]
            weight_gradient = torch.stack(taps, dim=-1).flatten(0, 1)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            bias_gradient = gradient.sum((0, 2))
        return x_gradient, weight_gradient, bias_gradient, None


def _parts(weight: Tensor, stride: int) -> Iterator[Tuple[int, Tensor]]:
    """Each `stride` taps of the kernel, with the number of the first: (channel, taps * in channel)."""
    taps = weight.transpose(1, 2).contiguous()
    for tap in range(0, weight.size(2), stride):
        yield tap, taps[:, tap : tap + stride].flatten(1)


def _heard(wave: Tensor, tap: int, size: int, stride: int, frames: int) -> Tensor:
    """A view (frames, size) of `wave` (time, in channel): what taps from `tap` on hear for each frame."""
    channels = wave.size(1)
    return wave.as_strided((frames, size), (stride * channels, 1), wave.storage_offset() + tap * channels)
