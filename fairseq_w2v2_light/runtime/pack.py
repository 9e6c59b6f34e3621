"""A network laid out for inference in fp32 on a CPU: it computes the same, in less time.

oneDNN runs what torch composes: Linears and convolutions whose weights are ordered for it once instead of in every
call, channels innermost in memory, and the GELU applied to a result that is still in the cache. Weight norm and the
frontend's GroupNorm go into the weights.
"""

from __future__ import annotations

from typing import Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.activations import get_activation
from ..nn.frontend import ConvBlock, Frontend, TimeGroupNorm, frame_lengths, receptive_field
from ..nn.gates import Gates
from ..nn.layer import EncoderLayer
from ..nn.positions import ConvPositions
from ..nn.squeeze import Unsqueeze

# oneDNN's names of no activation, and of the exact GELU, with its algorithm
_NO_ACTIVATION, _GELU = ("none", ""), ("gelu", "none")


class PackedLinear(nn.Module):
    """nn.Linear, with a GELU behind it or without; `rows` is how many frames it will mostly see.

    The weight is not a parameter any more: it can be neither saved, moved nor trained.
    """

    def __init__(self, weight: Tensor, bias: Optional[Tensor], rows: int, gelu: bool = False):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.register_buffer("bias", _copy(bias), persistent=False)
        self._activation, self._algorithm = _GELU if gelu else _NO_ACTIVATION

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, self._activation, [], self._algorithm)


class PackedConv1d(nn.Module):
    """A convolution over the time of (batch, time, channel), with a GELU behind it or without.

    weight: (channel, in channel / groups, kernel). One weight serves every stride; oneDNN's order of it for a stride is
    made when that first occurs.
    """

    def __init__(
        self, weight: Tensor, bias: Optional[Tensor], padding: int = 0, groups: int = 1, gelu: bool = False
    ):
        super().__init__()
        self.register_buffer("weight", _channels_last(_copy(weight)), persistent=False)
        self.register_buffer("bias", _copy(bias), persistent=False)
        self._padding, self._groups, self._gelu = padding, groups, gelu
        self._packed: Dict[int, Tensor] = {}

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        """(batch, time, in channel) -> (batch, frames, channel)."""
        if stride not in self._packed:
            self._packed[stride] = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, [0, self._padding], [1, stride], [1, 1], self._groups, [1, x.size(2), 1, x.size(1)]
            )
        return _convolve(x, self._packed[stride], self.bias, stride, self._padding, self._groups, self._gelu)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    gelu: bool = False,
) -> Tensor:
    """Convolution over time: (batch, time, in channel) -> (batch, frames, channel); weight of `_channels_last`."""
    activation, algorithm = _GELU if gelu else _NO_ACTIVATION
    image = x.transpose(1, 2).unsqueeze(2)
    y = torch.ops.mkldnn._convolution_pointwise(
        image, weight, bias, [0, padding], [1, stride], [1, 1], groups, activation, [], algorithm
    )
    return y.squeeze(2).transpose(1, 2)


def _channels_last(weight: Tensor) -> Tensor:
    """(channel, in channel, kernel) -> (channel, in channel, 1, kernel), the in channels innermost in memory."""
    return weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)


def _copy(tensor: Optional[Tensor]) -> Optional[Tensor]:
    return None if tensor is None else tensor.detach().clone()


def familiar_length(frames: int) -> int:
    """`frames` or a few more, at most one in 32, of which there are few: 32 between any number and its double.

    oneDNN prepares itself for every length that it meets; that takes as long as a second of speech in a small network.
    """
    step = 1 << max(0, frames.bit_length() - 6)
    return -(-frames // step) * step


class PackedFrontend(Frontend):
    """Frontend with the channels innermost from its first layer on.

    The first layer hears one channel; it runs as one of stride 1 over `stride` channels, which are consecutive samples.
    """

    def __init__(self, frontend: Frontend):
        nn.Module.__init__(self)
        self.shapes, self.padding = frontend.shapes, frontend.padding
        self.conv_layers = nn.ModuleList()
        for index, block in enumerate(frontend.conv_layers):
            if isinstance(_norm(block), TimeGroupNorm):
                layer = PackedGroupNormLayer(block)
            else:
                layer = PackedConvLayer(block, fold=index == 0)
            self.conv_layers.append(layer)

    def convolve(
        self, wave: Tensor, lengths: Optional[Tensor] = None, gates: Optional[Sequence[Optional[Tensor]]] = None
    ) -> Tuple[Tensor, Optional[Tensor]]:
        frames = frame_lengths(wave.size(1), self.shapes)
        field, hop = receptive_field(self.shapes)
        _, kernel, stride = self.shapes[0]
        first = frame_lengths(field + (familiar_length(frames) - 1) * hop, self.shapes[:1])
        samples = (first - 1) * stride + _folded(kernel, stride) * stride
        x = F.pad(wave, (0, samples - wave.size(1))).reshape(wave.size(0), -1, stride)
        for index, layer in enumerate(self.conv_layers):
            if index == 0 and isinstance(layer, PackedGroupNormLayer):
                heard = None if lengths is None else frame_lengths(lengths, self.shapes[:1])
                x = layer(x, wave, heard)
            else:
                x = layer(x)
        lengths = None if lengths is None else frame_lengths(lengths, self.shapes)
        return x[:, :frames], lengths


def _norm(block: ConvBlock) -> Optional[nn.Module]:
    return block[2] if len(block) == 4 else None


def _folded(kernel: int, stride: int) -> int:
    """Taps of the first layer over `stride` channels."""
    return -(-kernel // stride)


def _fold(weight: Tensor, stride: int) -> Tensor:
    """Weight (channel, 1, kernel) of the first layer as (channel, stride, taps)."""
    taps = _folded(weight.size(2), stride)
    return F.pad(weight, (0, taps * stride - weight.size(2))).unflatten(2, (taps, stride)).squeeze(1).transpose(1, 2)


class PackedConvLayer(nn.Module):
    """ConvBlock over (batch, time, channel), with a LayerNorm or no norm; `fold`: the first, over (batch, n, stride)."""

    def __init__(self, block: ConvBlock, fold: bool):
        super().__init__()
        conv, norm = block[0], _norm(block)
        self.stride = 1 if fold else conv.stride[0]
        weight = _fold(conv.weight, conv.stride[0]) if fold else conv.weight
        self.conv = PackedConv1d(weight, conv.bias, gelu=norm is None)
        self.norm = None if norm is None else norm[1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x, self.stride)
        return x if self.norm is None else F.gelu(self.norm(x))


class PackedGroupNormLayer(nn.Module):
    """The first ConvBlock with its GroupNorm as one convolution, whose weights depend on the utterance.

    A channel's mean and variance over time follow from those of the samples that its kernel hears: with their mean m and
    covariance C they are w m and w C w'. In double precision, since a difference of squares leaves few digits.
    """

    def __init__(self, block: ConvBlock):
        super().__init__()
        conv, norm = block[0], block[2]
        self.stride, self.eps = conv.stride[0], norm.eps
        # a bias of the convolution goes with the mean
        self.register_buffer("kernel", conv.weight.detach().squeeze(1).double(), persistent=False)
        self.register_buffer("scale", norm.weight.detach().double(), persistent=False)
        self.register_buffer("shift", norm.bias.detach().double(), persistent=False)

    def forward(self, x: Tensor, wave: Tensor, lengths: Optional[Tensor]) -> Tensor:
        """`x` (batch, n, stride), the padded `wave` (batch, samples) -> (batch, frames, channel).

        lengths: (batch,) valid frames after it, over which the statistics are.
        """
        heard = wave.unfold(1, self.kernel.size(1), self.stride).double()
        count = heard.size(1)
        if lengths is not None:
            heard = heard * (torch.arange(count) < lengths.unsqueeze(1)).unsqueeze(2)
            count = lengths[:, None, None]
        mean = heard.sum(1, keepdim=True) / count
        covariance = heard.transpose(1, 2) @ heard / count - mean.transpose(1, 2) @ mean
        variance = ((self.kernel @ covariance) * self.kernel).sum(2).clamp(min=0)
        scale = self.scale * (variance + self.eps).rsqrt()
        shift = self.shift - scale * (mean @ self.kernel.t()).squeeze(1)
        weights = (scale.unsqueeze(2) * self.kernel).float()
        rows = [
            _convolve(row.unsqueeze(0), _channels_last(_fold(weight.unsqueeze(1), self.stride)), bias, gelu=True)
            for row, weight, bias in zip(x, weights, shift.float())
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


class PackedPositions(nn.Module):
    """ConvPositions whose weight is normalised once."""

    def __init__(self, positions: ConvPositions):
        super().__init__()
        conv = positions[0]
        self.kernel, self.causal = conv.kernel, conv.causal
        self.channels = conv.bias.numel()
        self.register_buffer("places", conv.places, persistent=False)
        padding = 0 if conv.causal else conv.kernel // 2
        self.conv = PackedConv1d(conv.weight(), conv.bias, padding, conv.groups, gelu=True)

    def forward(
        self, x: Tensor, stride: int = 1, past: Optional[Tensor] = None, gate: Optional[Tensor] = None
    ) -> Tensor:
        """See ConvPositions; there is no gate."""
        time, before = x.size(1), 0
        if past is not None:
            x = torch.cat([past, x], dim=1)
        elif self.causal:
            before = self.kernel - 1
        x = F.pad(x, (0, 0, before, familiar_length(time) - time))
        if self.places is not None:
            x = x.new_zeros(x.size(0), x.size(1), self.channels).index_copy(2, self.places, x)
        y = self.conv(x, stride)[:, : -(-time // stride)]
        return y if self.places is None else y.index_select(2, self.places)


class PackedUnsqueeze(Unsqueeze):
    """Unsqueeze with one packed Linear for each factor that occurs."""

    def __init__(self, unsqueeze: Unsqueeze, rows: int):
        nn.Module.__init__(self)
        self.dim, self.factor, self.residual = unsqueeze.dim, unsqueeze.factor, unsqueeze.residual
        self.rows = rows
        self.linears = nn.ModuleDict(
            {
                str(factor): PackedLinear(*unsqueeze.weights(factor), -(-rows // factor), gelu=True)
                for factor in range(2, unsqueeze.factor + 1)
            }
        )

    def forward(self, x: Tensor, factor: int, time: int, gate: Optional[Tensor] = None) -> Tensor:
        """See Unsqueeze; there is no gate."""
        return self.spread(self.linears[str(factor)](x), x, factor, time)


def pack_(model: nn.Module, rows: int) -> bool:
    """Lays an fp32 model on a CPU out for inference, in place; it can be neither trained, moved nor saved after that.

    rows: how many frames a call will mostly see. Returns False, and changes nothing, where this torch has not what it
    takes, or the model is elsewhere, of another precision, or has gates, which change its weights in every call.
    """
    if any(isinstance(module, Gates) for module in model.modules()):
        return False
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32 or not _can_pack():
        return False
    _pack_children(model, rows, _can_convolve())
    return True


def _pack_children(module: nn.Module, rows: int, convolutions: bool) -> None:
    if isinstance(module, EncoderLayer):
        _pack_ffn(module, rows)
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child.weight, child.bias, rows))
        elif isinstance(child, Unsqueeze):
            if not isinstance(child, PackedUnsqueeze):
                setattr(module, name, PackedUnsqueeze(child, rows))
        elif isinstance(child, Frontend):
            if convolutions and not isinstance(child, PackedFrontend):
                setattr(module, name, PackedFrontend(child))
        elif isinstance(child, ConvPositions):
            if convolutions:
                setattr(module, name, PackedPositions(child))
        else:
            _pack_children(child, rows, convolutions)


def _pack_ffn(layer: EncoderLayer, rows: int) -> None:
    """Moves the layer's GELU, if it is one, into its first Linear."""
    if isinstance(layer.fc1, nn.Linear) and layer.activation is F.gelu:
        layer.fc1 = PackedLinear(layer.fc1.weight, layer.fc1.bias, rows, gelu=True)
        layer.activation = get_activation("linear")


def _can_pack() -> bool:
    """Whether this torch has oneDNN's packed product (an internal name of torch), and it computes a product."""
    x, weight, bias = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    expected = F.linear(x, weight, bias)
    try:
        plain, gelu = (PackedLinear(weight, bias, 3, gelu)(x) for gelu in (False, True))
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return torch.allclose(plain, expected, atol=1e-5) and torch.allclose(gelu, F.gelu(expected), atol=1e-5)


def _can_convolve() -> bool:
    """Whether this torch has oneDNN's convolution, as `_can_pack`."""
    x, weight, bias = torch.randn(1, 9, 8), torch.randn(4, 4, 3), torch.randn(4)
    expected = F.gelu(F.conv1d(x.transpose(1, 2), weight, bias, stride=2, padding=1, groups=2)).transpose(1, 2)
    try:
        found = PackedConv1d(weight, bias, padding=1, groups=2, gelu=True)(x, 2)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return torch.allclose(found, expected, atol=1e-5)
