"""The frontend laid out for inference on a CPU: an utterance in pieces, whose activations stay in the cache."""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.frontend import ChannelLayerNorm, ConvBlock, Frontend, TimeGroupNorm, frame_lengths, receptive_field
from ..nn.norms import LayerNorm
from .cpu import multiplies_by_mkl
from .products import PackedConv1d, PackedLinear, copied, gelu_, linear_of

# the fewest channels in and out of a layer of three taps and stride 2 that is faster in pairs of frames
_PAIRS_LEAST = 512
# the fewest channels of a first layer for which copied windows are faster
_COPY_LEAST = 32
# the bytes after which a cache's first level begins again
_SAME_PLACES = 4096
# frames of the frontend at a time, fewest and most: 2.56 s, where its first layer has 512 channels, to 10.24 s
PIECE_FRAMES = (128, 512)
# what the first layer makes of a piece: 16 MiB
PIECE_VALUES = 2**22


class PackedFrontend(Frontend):
    """Frontend that runs an utterance in pieces, whose activations stay in the cache, as products.

    Pieces overlap by what the first frame of one hears of the one before. Only the valid frames of a padded batch are
    computed; the others are 0. Where oneDNN multiplies, pieces have one of 50 numbers of frames, the last one of an
    utterance zeros behind it: its products are prepared for every number of rows, which takes a small network longer
    than the products, and about a thousand are kept.
    """

    def __init__(self, frontend: Frontend, rows: int, convolutions: bool):
        nn.Module.__init__(self)
        self.shapes, self.padding = frontend.shapes, frontend.padding
        first, *others = map(PackedConvLayer, frontend.conv_layers)
        if not multiplies_by_mkl():
            others = [FusedConvLayer(layer, rows, convolutions) for layer in others]
        self.conv_layers = nn.ModuleList([first, *others])
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
            x = first.convolve(heard.unsqueeze(1), weight, bias, space)
            for layer in others:
                x = layer(x, space)
            frames[start:end] = x[: end - start]

    def _prepared(self, frames: int) -> int:
        """How many frames a piece of so many is run with."""
        if not self.conv_layers[-1].prepares:
            return frames
        step = 1 if frames <= 8 else 4 if frames <= 32 else 8 if frames <= 128 else 16
        return -(-frames // step) * step


class Workspace:
    """Memory that the layers of a frontend write to in turns.

    What one wrote is still in the cache for the next, and none waits for new memory, which costs a small network an
    eighth of its frontend's time.
    """

    def __init__(self):
        self._used: Dict[torch.dtype, Tuple[Tensor, Tensor]] = {}
        self._scratch: Dict[torch.dtype, Tensor] = {}

    def take(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """(rows, columns) of any values, in the precision of `like`; what was taken the time before stays as it is."""
        last, oldest = self._used.get(like.dtype) or (torch.empty(0), torch.empty(0))
        oldest = _at_least(oldest, rows * columns, like.dtype)
        self._used[like.dtype] = oldest, last
        return oldest[: rows * columns].view(rows, columns)

    def scratch(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """(rows, columns) of any values, in the precision of `like`, until the next call."""
        memory = _at_least(self._scratch.get(like.dtype, torch.empty(0)), rows * columns, like.dtype)
        self._scratch[like.dtype] = memory
        return memory[: rows * columns].view(rows, columns)


def _at_least(memory: Tensor, values: int, dtype: torch.dtype) -> Tensor:
    """`memory`, or new of `values` where it has fewer."""
    if memory.numel() >= values:
        return memory
    with torch.inference_mode(False):  # it may serve calls inside and outside of that mode
        return torch.empty(values, dtype=dtype)


class PackedConvLayer(nn.Module):
    """ConvBlock over (time, channel): each `stride` taps of the kernel make one product with `stride` frames a row.

    weight: (kernel, in channel, channel). norm: what comes before the GELU. centred: whether weight and bias have mean
    0 over the channels, as then has what they make.
    """

    # whether another number of frames takes long the first time
    prepares = False

    def __init__(self, block: ConvBlock):
        super().__init__()
        conv, norm = block[0], block[2] if len(block) == 4 else None
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]
        self.norm = norm[1] if isinstance(norm, ChannelLayerNorm) else None
        self.group_norm = norm if isinstance(norm, TimeGroupNorm) else None
        weight, bias = conv.weight.detach().permute(2, 1, 0).contiguous(), copied(conv.bias)
        self.centred = self.norm is not None and self.norm.width == weight.size(-1)
        if self.centred:
            weight = weight - weight.mean(-1, keepdim=True)
            bias = None if bias is None else bias - bias.mean()
            self.norm = CentredNorm(self.norm)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        in_pairs = self.kernel == 3 and self.stride == 2 and min(weight.shape[1:]) >= _PAIRS_LEAST
        # the sum of the taps that a frame of a pair shares with the other one, see _convolve_pairs
        self._shared = weight[0] + weight[2] if in_pairs else None

    def forward(self, x: Tensor, space: Workspace) -> Tensor:
        """(time, in channel), contiguous -> (frames, channel).

        The result may lie in `space`, and `x`, too, if nothing was taken from there since; `x` of more than one channel
        may hold something else after that.
        """
        return self.convolve(x, self.weight, self.bias, space)

    def convolve(self, x: Tensor, weight: Tensor, bias: Optional[Tensor], space: Workspace) -> Tensor:
        """As `forward`, with the layer's own weight and bias or what `normalised` made of them."""
        frames = (x.size(0) - self.kernel) // self.stride + 1
        y = space.take(x, frames, weight.size(-1))
        paired = 0 if self._shared is None else frames - frames % 2
        if x.size(1) == 1 and y.size(1) >= _COPY_LEAST:
            self._convolve_wave(x, weight, bias, y, space)
        elif paired < frames:
            self._convolve(x[paired * self.stride :], weight, bias, y[paired:])
        if paired:
            self._convolve_pairs(x, weight, bias, y[:paired], space)
        return gelu_(y if self.norm is None else self.norm(y))

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
        heard = space.scratch(x, y.size(0), weight.size(0))
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
        ahead = torch.sub(e2, e1, out=space.scratch(x, pairs, channels))
        e0.sub_(e1)
        first.addmm_(_rows(x, pairs, row, 2 * channels, 0), weight[:2].flatten(0, 1))
        e2.copy_(ahead)
        second.addmm_(_rows(x, pairs, row, 2 * channels, 3 * channels), weight[1:].flatten(0, 1))

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


class FusedConvLayer(nn.Module):
    """ConvBlock over (time, channel) as one convolution of oneDNN's, its GELU in it where no norm is.

    For CPUs whose products in torch are not MKL's: there the two products of a PackedConvLayer take up to half as long
    again. Where a stride is a multiple of 4 KiB, frames share a few places of the cache, and what each of them hears is
    copied and multiplied; without `convolutions`, in a torch that has none of oneDNN's, everywhere.
    """

    prepares = True

    def __init__(self, layer: PackedConvLayer, rows: int, convolutions: bool):
        super().__init__()
        self.kernel, self.stride, self.norm = layer.kernel, layer.stride, layer.norm
        weight, gelu = layer.weight.permute(2, 1, 0), self.norm is None
        apart = self.stride * weight.size(1) * weight.element_size() % _SAME_PLACES
        if convolutions and self.kernel != self.stride and apart:
            self.product = PackedConv1d(weight, layer.bias, gelu=gelu)
        else:
            self.product = PackedLinear(weight.transpose(1, 2).flatten(1), layer.bias, rows, gelu)

    def forward(self, x: Tensor, space: Workspace) -> Tensor:
        """(time, in channel), contiguous -> (frames, channel)."""
        if isinstance(self.product, PackedConv1d):
            y = self.product(x.unsqueeze(0), self.stride)[0]
        else:
            y = self.product(self._windows(x, space))
        return y if self.norm is None else gelu_(self.norm(y))

    def _windows(self, x: Tensor, space: Workspace) -> Tensor:
        """What each frame hears: (frames, kernel * in channel)."""
        frames, channels = (x.size(0) - self.kernel) // self.stride + 1, x.size(1)
        heard = _rows(x, frames, self.stride * channels, self.kernel * channels, 0)
        return heard if self.kernel == self.stride else space.scratch(x, *heard.shape).copy_(heard)

    def as_linear(self) -> nn.Linear:
        """Without the norm and the GELU, of windows."""
        if isinstance(self.product, PackedLinear):
            return self.product.unpacked()
        weight = self.product.weight.squeeze(2).transpose(1, 2).flatten(1)
        return linear_of(weight, self.product.bias)


class CentredNorm(nn.Module):
    """The LayerNorm `whole` of rows each of which has mean 0, in place."""

    def __init__(self, whole: LayerNorm):
        super().__init__()
        self.whole = whole
        self._gain, self._shift = whole.weight.detach(), whole.bias.detach()
        self._eps = torch.tensor(whole.eps)

    def forward(self, x: Tensor) -> Tensor:
        """(time, channel) -> the same."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        variance = torch.addcmul(self._eps, norm, norm, value=1 / x.size(-1), out=norm)
        return torch.addcmul(self._shift, x.mul_(variance.rsqrt_()), self._gain, out=x)


def _rows(x: Tensor, rows: int, step: int, width: int, offset: int) -> Tensor:
    """(rows, width) of a contiguous `x`, from `offset` on: a row begins `step` values after the one before."""
    return x.as_strided((rows, width), (step, 1), x.storage_offset() + offset)


def _product(x: Tensor, weight: Tensor, bias: Optional[Tensor], y: Tensor) -> None:
    """Writes `x` times `weight`, plus `bias`, to `y`."""
    if bias is None:
        torch.mm(x, weight, out=y)
    else:
        torch.addmm(bias, x, weight, out=y)
