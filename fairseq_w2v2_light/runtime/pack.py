"""A network laid out for inference in fp32 on a CPU: it computes the same, in less time.

What torch composes are products whose weights are ordered once (products.py), channels innermost in memory, the
frontend in pieces (packed_frontend.py). Positions, whose kernels are long, are products of spectra. Weight norm, the
frontend's GroupNorm and the means of its LayerNorms go into the weights.
"""

from __future__ import annotations

from typing import Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.activations import get_activation
from ..nn.attention import KeyValue, MultiheadAttention
from ..nn.config import EncoderConfig
from ..nn.encoder import Encoder
from ..nn.frontend import Frontend
from ..nn.gates import Gates
from ..nn.layer import EncoderLayer
from ..nn.positions import ConvPositions
from ..nn.squeeze import Unsqueeze
from .ctc import CtcModel
from .fourier import FourierConv1d, can_transform, fourier_serves
from .packed_frontend import PackedFrontend
from .products import PackedConv1d, PackedLinear, can_convolve, can_multiply, familiar_length, gelu_
from .widen import widen_

# the largest of the weights of queries, keys and values that are packed twice, together and apart: 576 KiB each
_APART_MOST = 384 * 384


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
        return gelu_(self._fourier[stride](x, before, frames))

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
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32 or not can_multiply():
        return False
    if isinstance(model, CtcModel):
        widen_(model)
    _pack_children(model, rows, can_convolve())
    # what is new begins in training mode, with its dropout
    model.train(model.training)
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
                setattr(module, name, PackedFrontend(child, rows, convolutions))
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
