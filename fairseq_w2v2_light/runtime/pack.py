"""A network laid out for inference in fp32 on a CPU: it computes the same, in less time.

oneDNN, or MKL for large Linears on Intel's CPUs, runs what torch composes: Linears and convolutions whose weights are
ordered for it once instead of in every call, channels innermost in memory, and the GELU applied to a result that is
still in the cache. Positions, whose kernels are long, are products of spectra. Weight norm, the frontend's GroupNorm
and the means of its LayerNorms go into the weights.
"""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.activations import get_activation
from ..nn.attention import KeyValue, MultiheadAttention
from ..nn.config import EncoderConfig
from ..nn.encoder import Encoder
from ..nn.frontend import ChannelLayerNorm, ConvBlock, Frontend, TimeGroupNorm, frame_lengths, receptive_field
from ..nn.gates import Gates
from ..nn.layer import EncoderLayer
from ..nn.positions import ConvPositions
from ..nn.squeeze import Unsqueeze
from .cpu import multiplies_by_mkl, random_tensors
from .ctc import CtcModel
from .fourier import FourierConv1d, can_transform, fourier_serves
from .mkl import MklWeight, mkl_serves
from .widen import widen_

# oneDNN's names of no activation, and of the exact GELU, with its algorithm
_NO_ACTIVATION, _GELU = ("none", ""), ("gelu", "none")
# the fewest rows and columns of a weight that MKL multiplies faster; with a GELU, which oneDNN has in its product
_MKL_LEAST, _MKL_LEAST_GELU = 384, 512
# the largest weight that torch's own product, which is MKL's on Intel's CPUs, multiplies faster than oneDNN: 512 KiB
_PLAIN_MOST = 2**17
# the most rows for which it is that with a GELU too, and the most values of a GELU that is torch's own: oneDNN takes 30
# and 10 us to start
_FEW_ROWS, _FEW_VALUES = 32, 2**14
# the fewest channels in and out of a layer of three taps and stride 2 that is faster in pairs of frames
_PAIRS_LEAST = 512
# the fewest channels of a first layer for which copied windows are faster
_COPY_LEAST = 32
# the largest of the weights of queries, keys and values that are packed twice, together and apart: 576 KiB each
_APART_MOST = 384 * 384
# frames of the frontend at a time, fewest and most: 2.56 s, where its first layer has 512 channels, to 10.24 s
PIECE_FRAMES = (128, 512)
# what the first layer makes of a piece: 16 MiB
PIECE_VALUES = 2**22


class PackedLinear(nn.Module):
    """nn.Linear, with a GELU behind it or without; `rows`: how many frames it will mostly see, which oneDNN asks for.

    The weight is not a parameter any more: it can be neither saved, moved nor trained. MKL orders a large one on
    Intel's CPUs for few threads, where its products take up to a tenth less time than oneDNN's.
    """

    def __init__(self, weight: Tensor, bias: Optional[Tensor], rows: int, gelu: bool = False):
        super().__init__()
        weight = weight.detach().contiguous()
        self.register_buffer("bias", _copy(bias), persistent=False)
        self._gelu = gelu
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
        return _gelu_(y) if self._gelu else y


def _multiply(x: Tensor, packed: Tensor, bias: Optional[Tensor], gelu: bool) -> Tensor:
    """oneDNN's Linear: (..., in) -> (..., out); packed: its order of the weight."""
    activation, algorithm = _GELU if gelu else _NO_ACTIVATION
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], algorithm)


def _gelu_(x: Tensor) -> Tensor:
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
        self.register_buffer("weight", _channels_last(_copy(weight)), persistent=False)
        self.register_buffer("bias", _copy(bias), persistent=False)
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
    """Frontend that runs an utterance in pieces, whose activations stay in the cache, as products without copies.

    Pieces overlap by what the first frame of one hears of the one before. Only the valid frames of a padded batch are
    computed; the others are 0. In bfloat16 pieces have one of 40 numbers of frames, the last one of an utterance
    zeros behind it: oneDNN's products are prepared for every number of rows, which takes a small network longer than
    the products, and about a thousand are kept.
    """

    def __init__(self, frontend: Frontend):
        nn.Module.__init__(self)
        self.shapes, self.padding = frontend.shapes, frontend.padding
        self.conv_layers = nn.ModuleList(PackedConvLayer(block) for block in frontend.conv_layers)
        self._idle: List[Workspace] = []  # one for each thread that ever was here at the same time

    def convolve(
        self, wave: Tensor, lengths: Optional[Tensor] = None, gates: Optional[Sequence[Optional[Tensor]]] = None
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """See Frontend; there are no gates."""
        wave = wave.contiguous()
        batch, samples = wave.shape
        x = wave.new_zeros(batch, frame_lengths(samples, self.shapes), self.shapes[-1][0])
        try:
            space = self._idle.pop()
        except IndexError:
            space = Workspace()
        for row, heard in enumerate([samples] * batch if lengths is None else lengths.tolist()):
            self._hear(wave[row, :heard], x[row], space)
        self._idle.append(space)
        return x, None if lengths is None else frame_lengths(lengths, self.shapes)

    def _hear(self, wave: Tensor, frames: Tensor, space: Workspace) -> None:
        """Writes what an utterance, `wave` (samples,), makes to the first of `frames` (time, channel)."""
        field, hop = receptive_field(self.shapes)
        first, *others = self.conv_layers
        weight, bias = first.normalised(wave)
        count = frame_lengths(wave.size(0), self.shapes)
        first_values = hop // first.stride * first.weight.size(-1)
        piece = min(max(PIECE_FRAMES[0], PIECE_VALUES // first_values), PIECE_FRAMES[1])
        for start in range(0, count, piece):
            end = min(start + piece, count)
            samples = (self._prepared(end - start) - 1) * hop + field
            heard = wave[start * hop : start * hop + samples]
            if heard.size(0) < samples:
                heard = F.pad(heard, (0, samples - heard.size(0)))
            x = first(heard.unsqueeze(1), weight, bias, space)
            for layer in others:
                x = layer(x, layer.weight, layer.bias, space)
            frames[start:end] = x[: end - start]

    def _prepared(self, frames: int) -> int:
        """How many frames a piece of so many is run with."""
        if self.conv_layers[-1].weight.dtype == torch.float32:
            return frames
        step = 8 if frames <= 128 else 16
        return -(-frames // step) * step


class Workspace:
    """Memory that the layers of a frontend write to in turns.

    What one wrote is still in the cache for the next, and none waits for new memory, which costs a small network an
    eighth of its frontend's time.
    """

    def __init__(self):
        self._used: Dict[torch.dtype, Tuple[Tensor, Tensor]] = {}
        self._scratch = torch.empty(0)

    def take(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """(rows, columns) of any values, in the precision of `like`; what was taken the time before stays as it is."""
        last, oldest = self._used.get(like.dtype) or (torch.empty(0), torch.empty(0))
        oldest = _at_least(oldest, rows * columns, like.dtype)
        self._used[like.dtype] = oldest, last
        return oldest[: rows * columns].view(rows, columns)

    def scratch(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) of any values in fp32, until the next call."""
        self._scratch = _at_least(self._scratch, rows * columns, torch.float32)
        return self._scratch[: rows * columns].view(rows, columns)


def _at_least(memory: Tensor, values: int, dtype: torch.dtype) -> Tensor:
    """`memory`, or new of `values` where it has fewer."""
    if memory.numel() >= values:
        return memory
    with torch.inference_mode(False):  # it may serve calls inside and outside of that mode
        return torch.empty(values, dtype=dtype)


class PackedConvLayer(nn.Module):
    """ConvBlock over (time, channel): each `stride` taps of the kernel make one product with `stride` frames a row.

    weight: (kernel, in channel, channel). centred: whether weight and bias have mean 0 over the channels, as then has
    what they make, so that a LayerNorm after them needs no mean, and can work where its input lies.
    """

    def __init__(self, block: ConvBlock):
        super().__init__()
        conv, norm = block[0], block[2] if len(block) == 4 else None
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]
        self.layer_norm = norm[1] if isinstance(norm, ChannelLayerNorm) else None
        self.group_norm = norm if isinstance(norm, TimeGroupNorm) else None
        weight, bias = conv.weight.detach().permute(2, 1, 0).contiguous(), _copy(conv.bias)
        self.centred = self.layer_norm is not None and self.layer_norm.width == weight.size(-1)
        if self.centred:
            weight = weight - weight.mean(-1, keepdim=True)
            bias = None if bias is None else bias - bias.mean()
            self._gain, self._shift = norm[1].weight.detach(), norm[1].bias.detach()
            self._eps = torch.tensor(norm[1].eps)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        in_pairs = self.kernel == 3 and self.stride == 2 and min(weight.shape[1:]) >= _PAIRS_LEAST
        # the sum of the taps that a frame of a pair shares with the other one, see _convolve_pairs
        self._shared = weight[0] + weight[2] if in_pairs else None

    def forward(self, x: Tensor, weight: Tensor, bias: Optional[Tensor], space: Workspace) -> Tensor:
        """(time, in channel), contiguous -> (frames, channel), with the layer's own weight and bias or `normalised`.

        The result may lie in `space`, and `x`, too, if nothing was taken from there since; `x` of more than one channel
        may hold something else after that.
        """
        frames = (x.size(0) - self.kernel) // self.stride + 1
        y = space.take(x, frames, weight.size(-1))
        paired = 0 if self._shared is None else frames - frames % 2
        if x.size(1) == 1 and y.size(1) >= _COPY_LEAST:
            self._convolve_wave(x, weight, bias, y, space)
        elif paired < frames:
            self._convolve(x[paired * self.stride :], weight, bias, y[paired:])
        if paired:
            self._convolve_pairs(x, weight, bias, y[:paired], space)
        if self.centred:
            y = self._scale_(y)
        elif self.layer_norm is not None:
            y = self.layer_norm(y)
        return _gelu_(y)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Optional[Tensor], y: Tensor) -> None:
        frames, channels = y.size(0), x.size(1)
        for tap in range(0, self.kernel, self.stride):
            part = weight[tap : tap + self.stride].flatten(0, 1)
            heard = _rows(x, frames, self.stride * channels, part.size(0), tap * channels)
            if tap:
                y.addmm_(heard, part)
            else:
                _product(heard, part, bias, y)

    def _convolve_wave(self, x: Tensor, weight: Tensor, bias: Optional[Tensor], y: Tensor, space: Workspace) -> None:
        """One product with copied windows, which are small beside what they make, and a 1 in each for the bias."""
        weight = weight.flatten(0, 1) if bias is None else torch.cat([weight.flatten(0, 1), bias.unsqueeze(0)])
        heard = space.scratch(y.size(0), weight.size(0))
        heard[:, : self.kernel] = _rows(x, y.size(0), self.stride, self.kernel, 0)
        heard[:, self.kernel :] = 1
        torch.mm(heard, weight, out=y)

    def _convolve_pairs(self, x: Tensor, weight: Tensor, bias: Optional[Tensor], y: Tensor, space: Workspace) -> None:
        """Three taps a, b, c and stride 2, for two frames at once with 5 products instead of 6; changes `x`.

        Of e0 o0 e1 o1 e2 the frames are a e0 + b o0 + c e1 and a e1 + b o1 + c e2. What both have of (a + c) e1 is
        computed once, and they are that plus a (e0 - e1) + b o0 and b o1 + c (e2 - e1): Winograd's F(2, 2) for the
        taps a and c (Lavin and Gray, arXiv 1509.09308).
        """
        (_, channels), (frames, out) = x.shape, y.shape
        pairs, row = frames // 2, 4 * channels
        e0, e1, e2 = (_rows(x, pairs, row, channels, at * channels) for at in (0, 2, 4))
        first, second = (_rows(y, pairs, 2 * out, out, at * out) for at in (0, 1))
        _product(e1, self._shared, bias, first)
        second.copy_(first)
        # a pair's e2 is the e0 of the next
        ahead = torch.sub(e2, e1, out=space.scratch(pairs, channels))
        e0.sub_(e1)
        first.addmm_(_rows(x, pairs, row, 2 * channels, 0), weight[:2].flatten(0, 1))
        e2.copy_(ahead)
        second.addmm_(_rows(x, pairs, row, 2 * channels, 3 * channels), weight[1:].flatten(0, 1))

    def _scale_(self, x: Tensor) -> Tensor:
        """The LayerNorm of `x` (time, channel), each row of which has mean 0, in place."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        variance = torch.addcmul(self._eps, norm, norm, value=1 / x.size(-1), out=norm)
        return torch.addcmul(self._shift, x.mul_(variance.rsqrt_()), self._gain, out=x)

    def normalised(self, wave: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Weight and bias of the first layer; with its GroupNorm over `wave` (samples,), if it has one.

        A channel's mean and variance over time follow from those of the samples that its kernel hears: with their mean
        m and covariance C they are w m and w C w'. In double precision: a difference of squares leaves few digits.
        """
        norm = self.group_norm
        if norm is None:
            return self.weight, self.bias
        windows = wave.unfold(0, self.kernel, self.stride)
        # with a 1 behind each window, the mean is among the products
        heard = windows.new_ones(windows.size(0), self.kernel + 1, dtype=torch.double)
        heard[:, :-1] = windows
        products = heard.t() @ heard / heard.size(0)
        mean = products[-1, :-1]
        covariance = products[:-1, :-1] - torch.outer(mean, mean)
        kernel = self.weight[:, 0].double()
        variance = (kernel * (covariance @ kernel)).sum(0).clamp(min=0)
        scale = norm.weight.double() * (variance + norm.eps).rsqrt()
        # a bias of the convolution goes with the mean
        return (self.weight * scale).float(), (norm.bias - scale * (mean @ kernel)).float()


def _rows(x: Tensor, rows: int, step: int, width: int, offset: int) -> Tensor:
    """(rows, width) of a contiguous `x`, from `offset` on: a row begins `step` values after the one before."""
    return x.as_strided((rows, width), (step, 1), x.storage_offset() + offset)


def _product(x: Tensor, weight: Tensor, bias: Optional[Tensor], y: Tensor) -> None:
    """Writes `x` times `weight`, plus `bias`, to `y`."""
    if bias is None:
        torch.mm(x, weight, out=y)
    else:
        torch.addmm(bias, x, weight, out=y)


class PackedPositions(nn.Module):
    """ConvPositions whose weight is normalised once: products of spectra, for few taps or frames a direct convolution.

    conv: the direct one. Spectra of the weight are made when a stride first occurs, which takes 0.1 s in LARGE.
    """

    def __init__(self, positions: ConvPositions):
        super().__init__()
        conv = positions[0]
        self.kernel, self.causal, self.groups = conv.kernel, conv.causal, conv.groups
        self.channels = conv.bias.numel()
        self.register_buffer("places", conv.places, persistent=False)
        padding = 0 if conv.causal else conv.kernel // 2
        self.conv = PackedConv1d(conv.weight(), conv.bias, padding, conv.groups, gelu=True)
        # in fp32, whatever becomes of `conv`
        self._weight, self._bias = self.conv.weight.squeeze(2), self.conv.bias
        self._fourier: Optional[Dict[int, FourierConv1d]] = {} if can_transform() else None

    def forward(
        self, x: Tensor, stride: int = 1, past: Optional[Tensor] = None, gate: Optional[Tensor] = None
    ) -> Tensor:
        """See ConvPositions; there is no gate."""
        frames = -(-x.size(1) // stride)
        if past is not None:
            x = torch.cat([past, x], dim=1)
        if self.places is not None:
            x = x.new_zeros(x.size(0), x.size(1), self.channels).index_copy(2, self.places, x)
        # a few frames of a stream are less work than the spectrum of a block
        whole = past is None or frames * stride >= self.kernel
        convolve = self._of_spectra if whole and self.spectra_serve(stride) else self._direct
        y = convolve(x, stride, frames, past is not None)
        return y if self.places is None else y.index_select(2, self.places)

    def spectra_serve(self, stride: int) -> bool:
        """Whether whole utterances are products of spectra at this stride."""
        return self._fourier is not None and fourier_serves(self._weight, stride)

    def _of_spectra(self, x: Tensor, stride: int, frames: int, streams: bool) -> Tensor:
        before = 0 if streams else self.kernel - 1 if self.causal else self.kernel // 2
        if stride not in self._fourier:
            with torch.inference_mode(False), torch.no_grad():  # it may serve calls inside and outside of that mode
                self._fourier[stride] = FourierConv1d(self._weight, self._bias, self.groups, stride)
        return _gelu_(self._fourier[stride](x, before, frames))

    def _direct(self, x: Tensor, stride: int, frames: int, streams: bool) -> Tensor:
        # frames of x itself, not of the past
        time, before = x.size(1) - (self.kernel - 1 if streams else 0), 0
        padded = familiar_length(time)
        if not streams:
            before = self.kernel - 1 if self.causal else 0
            # as many frames as taps: the weight's order for few frames is for streams only
            padded = max(padded, self.kernel * stride)
        return self.conv(F.pad(x, (0, 0, before, padded - time)), stride)[:, :frames]


class PackedUnsqueeze(Unsqueeze):
    """Unsqueeze with one packed Linear for each of `factors`, the ones that it will be asked for."""

    def __init__(self, unsqueeze: Unsqueeze, rows: int, factors: Sequence[int]):
        nn.Module.__init__(self)
        self.dim, self.factor, self.residual = unsqueeze.dim, unsqueeze.factor, unsqueeze.residual
        self.linears = nn.ModuleDict(
            {
                str(factor): PackedLinear(*unsqueeze.weights(factor), -(-rows // factor), gelu=True)
                for factor in factors
                if factor > 1
            }
        )

    def forward(self, x: Tensor, factor: int, time: int, gate: Optional[Tensor] = None) -> Tensor:
        """See Unsqueeze; there is no gate."""
        return self.spread(self.linears[str(factor)](x), x, factor, time)


class PackedAttention(MultiheadAttention):
    """MultiheadAttention whose queries, keys and values of the same frames are one product.

    A frame's row of the result is longer than it need be where it would take a multiple of 4 KiB: all frames of a head
    would then share a few places of the cache. Of LARGE's attention that is a sixth of the time. With `apart` they are
    products of their own where queries are of other frames, as pooling makes them; that takes the weights twice.
    """

    def __init__(self, attention: MultiheadAttention, rows: int, apart: bool = False):
        nn.Module.__init__(self)
        self.heads, self.head_dim, self.dropout = attention.heads, attention.head_dim, attention.dropout
        linears = attention.q_proj, attention.k_proj, attention.v_proj
        weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
        gap = 16 if weight.size(0) * weight.element_size() % 4096 == 0 else 0
        self.in_proj = PackedLinear(F.pad(weight, (0, 0, 0, gap)), F.pad(bias, (0, gap)), rows)
        self.apart = apart
        if apart:
            self.q_proj, self.k_proj, self.v_proj = (
                PackedLinear(linear.weight, linear.bias, rows) for linear in linears
            )
        self.out_proj = PackedLinear(attention.out_proj.weight, attention.out_proj.bias, rows)

    def project(self, query: Tensor, key_value: Tensor, needs_map: bool = True) -> Tuple[Optional[Tensor], KeyValue]:
        """See MultiheadAttention."""
        if self.apart and key_value is not query:
            return super().project(query, key_value, needs_map)
        asking = self.in_proj(query)
        asked = asking if key_value is query else self.in_proj(key_value)
        inner = self.heads * self.head_dim
        queries, keys, values = (
            self._split(rows.narrow(-1, part * inner, inner)) for part, rows in enumerate((asking, asked, asked))
        )
        return (queries, KeyValue(keys, values)) if needs_map else (None, KeyValue(None, values))


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
    if isinstance(model, CtcModel):
        widen_(model)
    _pack_children(model, rows, _can_convolve())
    return True


def _pack_children(module: nn.Module, rows: int, convolutions: bool) -> None:
    if isinstance(module, EncoderLayer):
        _pack_ffn(module, rows)
    if isinstance(module, Encoder):
        always, ever = _asks_itself(module.config)
        for layer in module.layers:
            # a Linear: neither packed already nor of another precision
            if isinstance(getattr(layer.self_attn, "q_proj", None), nn.Linear):
                small = layer.self_attn.q_proj.weight.numel() <= _APART_MOST
                if always or ever and small:
                    layer.self_attn = PackedAttention(layer.self_attn, rows, apart=not always)
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child.weight, child.bias, rows))
        elif isinstance(child, Unsqueeze):
            if not isinstance(child, PackedUnsqueeze):
                setattr(module, name, PackedUnsqueeze(child, rows, module.config.operating_points.squeeze))
        elif isinstance(child, Frontend):
            if not isinstance(child, PackedFrontend):
                setattr(module, name, PackedFrontend(child))
        elif isinstance(child, ConvPositions):
            if convolutions:
                setattr(module, name, PackedPositions(child))
        else:
            _pack_children(child, rows, convolutions)


def _asks_itself(config: EncoderConfig) -> Tuple[bool, bool]:
    """Whether queries, keys and values are of the same frames: in every layer and at every point, and at any at all."""
    queries, keys = (set(pools) for pools in (config.operating_points.query, config.operating_points.key_value))
    makes_maps = config.attention_map_every == 1
    return makes_maps and len(queries | keys) == 1, makes_maps and bool(queries & keys)


def _pack_ffn(layer: EncoderLayer, rows: int) -> None:
    """Moves the layer's GELU, if it is one, into its first Linear."""
    if isinstance(layer.fc1, nn.Linear) and layer.activation is F.gelu:
        layer.fc1 = PackedLinear(layer.fc1.weight, layer.fc1.bias, rows, gelu=True)
        layer.activation = get_activation("linear")


def _can_pack() -> bool:
    """Whether this torch has oneDNN's packed product (an internal name of torch), and it computes a product."""
    x, weight, bias = random_tensors((3, 8), (4, 8), (4,))
    expected = F.linear(x, weight, bias)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        plain, gelu = (_multiply(x, packed, bias, gelu) for gelu in (False, True))
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return torch.allclose(plain, expected, atol=1e-5) and torch.allclose(gelu, F.gelu(expected), atol=1e-5)


def _can_convolve() -> bool:
    """Whether this torch has oneDNN's convolution, as `_can_pack`."""
    x, weight, bias = random_tensors((1, 9, 8), (4, 4, 3), (4,))
    expected = F.gelu(F.conv1d(x.transpose(1, 2), weight, bias, stride=2, padding=1, groups=2)).transpose(1, 2)
    try:
        found = PackedConv1d(weight, bias, padding=1, groups=2, gelu=True)(x, 2)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return torch.allclose(found, expected, atol=1e-5)
