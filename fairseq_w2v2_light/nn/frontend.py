"""The convolutional frontend: waveform in, frames out."""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import convolve_by_products, trains_on_cpu
from .exporting import is_exporting
from .gating import gated
from .norms import LayerNorm, wide_layer_norm
from .precision import convolve

ConvLayer = Tuple[int, int, int]


def frame_lengths(samples, conv_layers: Sequence[ConvLayer]):
    """Frames that the frontend makes of `samples` (int or Tensor): floor((n - kernel) / stride) + 1 per layer."""
    for _, kernel, stride in conv_layers:
        samples = (samples - kernel) // stride + 1
    return samples


def receptive_field(conv_layers: Sequence[ConvLayer]) -> Tuple[int, int]:
    """Samples that one frame hears, and samples from one frame to the next; (400, 320) for stock wav2vec 2.0."""
    field, hop = 1, 1
    for _, kernel, stride in conv_layers:
        field += (kernel - 1) * hop
        hop *= stride
    return field, hop


class ChannelLayerNorm(nn.Sequential):
    """LayerNorm over the channels of (batch, channel, time), computed in fp32.

    Stock state names: the norm is element 1 of its Sequential (`conv_layers.0.2.1.weight`).
    """

    def __init__(self, channels: int, width: int = 0):
        super().__init__(nn.Identity(), LayerNorm(channels, width))

    def forward(self, x: Tensor, lengths: Optional[Tensor] = None, gate: Optional[Tensor] = None) -> Tensor:
        norm = self[1]
        weight, bias = gated(norm.weight.float(), gate), gated(norm.bias.float(), gate)
        y = wide_layer_norm(x.transpose(1, 2).float(), weight, bias, norm.eps, norm.width)
        return y.type_as(x).transpose(1, 2)


class TimeGroupNorm(nn.GroupNorm):
    """GroupNorm with one group per channel: statistics over time, in fp32, of the valid frames only.

    Without lengths it is stock fairseq's Fp32GroupNorm. Stock takes padding into the statistics of a padded batch
    (pytorch/audio#2242, fairseq#3227); here an utterance gets the same result in any batch.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels)

    def forward(self, x: Tensor, lengths: Optional[Tensor] = None, gate: Optional[Tensor] = None) -> Tensor:
        """(batch, channel, time) -> the same; `lengths` (batch,) in frames. `gate` (channel,) multiplies the result."""
        y = x.float()
        weight, bias = gated(self.weight.float(), gate), gated(self.bias.float(), gate)
        if lengths is None:
            return F.group_norm(y, self.num_groups, weight, bias, self.eps).type_as(x)
        valid = (torch.arange(x.size(-1), device=x.device) < lengths.unsqueeze(1)).unsqueeze(1)
        count = lengths.view(-1, 1, 1)
        mean = (y * valid).sum(-1, keepdim=True) / count
        centred = (y - mean) * valid
        variance = centred.square().sum(-1, keepdim=True) / count
        y = centred * (variance + self.eps).rsqrt() * weight[:, None] + bias[:, None]
        return y.type_as(x)

    def of_convolution(
        self, conv: nn.Conv1d, wave: Tensor, lengths: Optional[Tensor] = None, gate: Optional[Tensor] = None
    ) -> Tensor:
        """`forward` of `conv` of `wave` (batch, 1, samples), in one product: (batch, channel, time).

        A channel's variance over time follows from the covariance C of the samples that its kernel w hears: it is
        w C w'. So the norm goes into the weights, and neither it nor its gradient ever reads what the convolution alone
        would have made, the largest tensor of the network. A bias, which the norm takes away, may not be there.
        """
        heard = wave.squeeze(1).unfold(-1, conv.kernel_size[0], conv.stride[0]).double()
        valid = torch.ones_like(heard[..., :1])
        if lengths is not None:
            valid[torch.arange(heard.size(1), device=heard.device) >= lengths.unsqueeze(1)] = 0
        count = valid.sum(1, keepdim=True)
        centred = (heard - (heard * valid).sum(1, keepdim=True) / count) * valid
        covariance = centred.transpose(1, 2) @ centred / count
        kernel = conv.weight.squeeze(1).double()
        variance = (kernel @ covariance * kernel).sum(-1)
        scale = gated(self.weight.double(), gate) * (variance + self.eps).rsqrt()
        bias = gated(self.bias.double(), gate).expand(len(wave), 1, -1)
        # the bias as a tap that hears ones, so that it takes no pass of its own over the result
        taps = torch.cat([(kernel * scale.unsqueeze(-1)).transpose(1, 2), bias], dim=1)
        heard = torch.cat([centred, torch.ones_like(valid)], dim=-1)
        return (heard.to(wave.dtype) @ taps.to(wave.dtype)).transpose(1, 2)


class PlainConv1d(nn.Conv1d):
    """nn.Conv1d that a CPU computes right in bfloat16, and whose gradient it computes fast."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        if trains_on_cpu(x):
            return convolve(lambda *inputs: convolve_by_products(*inputs, self.stride[0]), x, weight, bias)
        return convolve(super()._conv_forward, x, weight, bias)


class ChannelsLastConv1d(nn.Conv1d):
    """Conv1d whose output has the channels innermost in memory, where the LayerNorm that follows wants them.

    The same parameters and function as nn.Conv1d, (batch, in channel, time) -> (batch, channel, time). No copy on the
    way when the input comes from another one: in a LayerNorm frontend half the time of conv1d and its transposes.
    Inference on a CPU is one matrix product.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        if is_exporting():  # who runs the graph lays out the memory
            return super()._conv_forward(x, weight, bias)
        kernel, stride = self.kernel_size[0], self.stride[0]
        if self.in_channels == 1:
            return F.linear(x.squeeze(1).unfold(-1, kernel, stride), weight.squeeze(1), bias).transpose(1, 2)
        if trains_on_cpu(x):
            return convolve(lambda *inputs: convolve_by_products(*inputs, stride), x, weight, bias)
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            return F.linear(windows(x, kernel, stride), weight.transpose(1, 2).flatten(1), bias).transpose(1, 2)
        return convolve(self._convolve, x, weight, bias)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        x = x.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        weight = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, bias, (1, self.stride[0])).squeeze(2)


def windows(x: Tensor, kernel: int, stride: int) -> Tensor:
    """What each output frame of a convolution hears: (batch, channel, time) -> (batch, frames, kernel * channel)."""
    return x.transpose(1, 2).unfold(1, kernel, stride).transpose(2, 3).flatten(2)


class ConvBlock(nn.Sequential):
    """Convolution, optional norm, GELU. Stock state names: the convolution is element 0, the norm element 2."""

    def __init__(self, in_channels: int, layer: ConvLayer, norm: Optional[nn.Module], bias: bool):
        channels, kernel, stride = layer
        conv_class = ChannelsLastConv1d if isinstance(norm, ChannelLayerNorm) else PlainConv1d
        conv = conv_class(in_channels, channels, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(conv.weight)
        super().__init__(conv, nn.Identity(), *([] if norm is None else [norm]), nn.GELU())

    def forward(self, x: Tensor, lengths: Optional[Tensor] = None, gate: Optional[Tensor] = None) -> Tensor:
        """(batch, in channel, time) -> (batch, channel, time); `lengths` (batch,) are the valid frames after it.

        gate: (channel,), see Frontend.
        """
        conv, norm = self[0], self[2] if len(self) == 4 else None
        if isinstance(norm, TimeGroupNorm) and conv.in_channels == 1 and conv.bias is None and trains_on_cpu(x):
            return F.gelu(norm.of_convolution(conv, x, lengths, gate).transpose(1, 2)).transpose(1, 2)
        if gate is None or isinstance(norm, TimeGroupNorm):  # which would undo a factor in the weights
            x = conv(x)
        else:
            bias = None if conv.bias is None else gated(conv.bias, gate)
            x = conv._conv_forward(x, gated(conv.weight, gate, dim=0), bias)
        if norm is not None:
            x = norm(x, lengths, gate)
        if isinstance(norm, ChannelLayerNorm):
            return F.gelu(x)
        # torch 2.1 computes garbage on CPUs for the gradient of a contiguous input whose output's is transposed
        return F.gelu(x.transpose(1, 2)).transpose(1, 2)


class Frontend(nn.Module):
    """wav2vec 2.0's convolutional feature extractor, with any layer shapes (SEW's WFE-C among them).

    norm "group" (stock `extractor_mode: default`): TimeGroupNorm after the first layer; "layer" (`layer_norm`):
    LayerNorm after every layer, over `norm_widths` channels (empty: those that there are; see nn/norms.py). Stock state
    names `conv_layers.N.0.weight` and so on. `padding` zeros come before the first sample (streaming models).

    Gates multiply the channels of a layer before its GELU, and before its LayerNorm, too: a closed channel is zero to
    the norm and to the next layer, and an open one's factor can go into the weights. HJ-Pruning (arXiv 2302.14132) says
    no more than "each output channel times its gate".
    """

    def __init__(
        self,
        conv_layers: Sequence[ConvLayer],
        norm: str = "group",
        bias: bool = False,
        padding: int = 0,
        norm_widths: Sequence[int] = (),
    ):
        super().__init__()
        if norm not in ("group", "layer"):
            raise ValueError(f"extractor norm: found '{norm}', expected 'group' or 'layer'")
        self.shapes: List[ConvLayer] = [tuple(layer) for layer in conv_layers]
        self.padding = padding
        self.conv_layers = nn.ModuleList()
        in_channels = 1
        for index, layer in enumerate(self.shapes):
            channels = layer[0]
            block_norm = None
            if norm == "layer":
                block_norm = ChannelLayerNorm(channels, norm_widths[index] if norm_widths else 0)
            elif index == 0:
                block_norm = TimeGroupNorm(channels)
            self.conv_layers.append(ConvBlock(in_channels, layer, block_norm, bias))
            in_channels = channels

    def forward(
        self, wave: Tensor, lengths: Optional[Tensor] = None, gates: Optional[Sequence[Optional[Tensor]]] = None
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Turns `wave` (batch, samples) into frames (batch, time, channel).

        `lengths` (batch,) are the valid samples of each row, None when nothing is padded; the second result holds the
        valid frames in the same way. `gates` are (channels,) of each layer, or None. Raises ValueError when an
        utterance is shorter than one receptive field.
        """
        fewest = receptive_field(self.shapes)[0] - self.padding
        shortest = wave.size(-1) if lengths is None or is_exporting() else int(lengths.min())
        if not is_exporting() and shortest < fewest:
            raise ValueError(
                f"audio of {shortest} samples is too short: the frontend needs at least {fewest} samples "
                f"({fewest / 16:.1f} ms at 16 kHz) to make one frame; drop the utterance or raise task.min_sample_size"
            )
        if self.padding:
            wave = F.pad(wave, (self.padding, 0))
            lengths = None if lengths is None else lengths + self.padding
        return self.convolve(wave, lengths, gates)

    def convolve(
        self, wave: Tensor, lengths: Optional[Tensor] = None, gates: Optional[Sequence[Optional[Tensor]]] = None
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """As `forward`, of samples that follow on those heard before: without padding and checks."""
        x = wave.unsqueeze(1)
        for index, (block, (_, kernel, stride)) in enumerate(zip(self.conv_layers, self.shapes)):
            if lengths is not None:
                lengths = (lengths - kernel) // stride + 1
            x = block(x, lengths, None if gates is None else gates[index])
        return x.transpose(1, 2), lengths
