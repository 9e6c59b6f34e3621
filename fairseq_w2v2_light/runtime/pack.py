"""Weights laid out once for the CPU's matrix products, instead of in every call.

A stream runs few frames at a time, so that its Linears spend more time on ordering their weights than on multiplying:
with oneDNN's packed weights a Linear of 24 frames takes half the time, one of 500 frames four fifths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.frontend import ChannelsLastConv1d, windows
from ..nn.gates import Gates
from ..nn.positions import WeightNormConv1d
from ..nn.squeeze import Unsqueeze


class PackedLinear(nn.Module):
    """nn.Linear for inference in fp32 on a CPU; `rows` is how many frames it will mostly see.

    The weight is not a parameter any more: it can be neither saved, moved nor trained.
    """

    def __init__(self, weight: Tensor, bias: Tensor, rows: int):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class PackedConv1d(nn.Module):
    """ChannelsLastConv1d as one product with a packed weight."""

    def __init__(self, conv: ChannelsLastConv1d, rows: int):
        super().__init__()
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]
        self.linear = PackedLinear(conv.weight.transpose(1, 2).flatten(1), conv.bias, rows)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in channel, time) -> (batch, channel, time), channels innermost in memory."""
        return self.linear(windows(x, self.kernel, self.stride)).transpose(1, 2)


class FrozenPositions(WeightNormConv1d):
    """WeightNormConv1d whose weight is normalised once."""

    def __init__(self, conv: WeightNormConv1d):
        nn.Module.__init__(self)
        self.groups, self.kernel, self.causal = conv.groups, conv.kernel, conv.causal
        self.register_buffer("frozen", conv.weight().detach().contiguous(), persistent=False)
        self.register_buffer("bias", conv.bias.detach().clone(), persistent=False)
        self.register_buffer("places", conv.places, persistent=False)

    def weight(self) -> Tensor:
        return self.frozen


def pack_(model: nn.Module, rows: int) -> bool:
    """Packs the Linears and channels-last convolutions of an fp32 model on a CPU, in place, for inference only.

    rows: how many frames a call will mostly see. Returns False, and changes nothing, where torch has no such product,
    or the model is elsewhere or has gates, which change its weights in every call.
    """
    if any(isinstance(module, Gates) for module in model.modules()):
        return False
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32 or not _can_pack():
        return False
    _pack_children(model, rows)
    return True


def _pack_children(module: nn.Module, rows: int) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child.weight, child.bias, rows))
        elif isinstance(child, ChannelsLastConv1d) and child.in_channels > 1:
            setattr(module, name, PackedConv1d(child, rows))
        elif isinstance(child, WeightNormConv1d):
            setattr(module, name, FrozenPositions(child))
        elif not isinstance(child, Unsqueeze):  # that takes its weight apart
            _pack_children(child, rows)


def _can_pack() -> bool:
    """Whether this torch has oneDNN's packed product (an internal name of torch), and it computes a product."""
    x, weight, bias = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    try:
        return torch.allclose(PackedLinear(weight, bias, 3)(x), F.linear(x, weight, bias), atol=1e-5)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
