"""bfloat16 where a CPU multiplies it: twice the speed of fp32 and more, in products alone.

Linears, convolutions and attention take bfloat16 and add up in fp32. What is sensitive stays in fp32: the residuals
between the layers, every norm, the softmax, the first convolution, which reads samples, and the CTC head; and so do
positions that are products of spectra, which bfloat16 would not make faster.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Optional, Set, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.activations import get_activation
from ..nn.attention import KeyValue, MultiheadAttention
from ..nn.backbone import Backbone
from ..nn.gating import NO_LAYER_GATES, LayerGates
from .cpu import random_tensors
from .pack import PackedPositions
from .packed_frontend import CentredNorm, FusedConvLayer, PackedConvLayer, PackedFrontend, Workspace
from .products import PackedConv1d
from .unsqueeze import WholeUnsqueeze

HALF = torch.bfloat16
_INTEL = ("x86_64", "amd64")


@functools.lru_cache(maxsize=None)
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16; without, they are several times slower than fp32."""
    # Linux's names of Intel's and AMD's, and Arm's
    return _has("_is_amx_tile_supported", {"amx_bf16"}) or _has("_is_avx512_bf16_supported", {"avx512_bf16", "bf16"})


def _has(check: str, flags: Set[str]) -> bool:
    """Whether torch, or Linux, says so of this CPU."""
    supported = getattr(torch.cpu, check, None)  # not in torch 2.1
    if supported is not None and platform.machine().lower() in _INTEL:
        return bool(supported())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").lower().splitlines()
    except OSError:
        return False
    return any(line.startswith(("flags", "features")) and flags & set(line.split()) for line in lines)


class HalfLinear(nn.Module):
    """nn.Linear for inference in bfloat16 on a CPU, with a GELU behind it or without: any floats in, `dtype` out.

    rows: how many frames it will mostly see.
    """

    def __init__(self, linear: nn.Linear, rows: int, dtype: torch.dtype = torch.float32, gelu: bool = False):
        super().__init__()
        self.dtype, self.gelu = dtype, gelu
        weight = linear.weight.detach().to(HALF).contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if _can_pack() else None
        self.weight = weight if self.packed is None else None
        self.bias = None if linear.bias is None else linear.bias.detach().to(HALF)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        x = x.to(HALF)
        if self.packed is None:
            y = F.linear(x, self.weight, self.bias)
            y = F.gelu(y) if self.gelu else y
        else:
            activation = ("gelu", [], "none") if self.gelu else ("none", [], "")
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *activation)
        return y.to(self.dtype)


@functools.lru_cache(maxsize=None)
def _can_pack() -> bool:
    """Whether this torch has oneDNN's packed product of bfloat16, and it computes a product."""
    x, weight = (value.to(HALF) for value in random_tensors((3, 8), (4, 8)))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, None, "gelu", [], "none")
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return torch.allclose(y.float(), F.gelu(F.linear(x.float(), weight.float())), atol=0.1)


class HalfConv1d(PackedConv1d):
    """PackedConv1d in bfloat16: any floats in, fp32 out."""

    def __init__(self, conv: PackedConv1d):
        nn.Module.__init__(self)
        self.register_buffer("weight", conv.weight.to(HALF), persistent=False)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.to(HALF), persistent=False)
        self._padding, self._groups, self._gelu = conv._padding, conv._groups, conv._gelu
        self._packed = {}

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        """(batch, time, in channel) -> (batch, frames, channel)"""
        return super().forward(x.to(HALF), stride).float()


def half_conv(conv: PackedConv1d, rows: int) -> PackedConv1d:
    """`conv` in bfloat16; in fp32, as it was, where this torch has no such convolution or computes it wrong.

    oneDNN 3.12 does, without a word, with few channels in a group and a long kernel: 12 channels and 128 taps, for one.
    rows: how many frames it will mostly see.
    """
    half = HalfConv1d(conv)
    channels, kernel = conv.weight.size(1) * conv._groups, conv.weight.size(3)
    for x in random_tensors((1, kernel, channels), (1, kernel + rows, channels)):
        expected = conv(x)
        try:
            error = half(x) - expected
        except (AttributeError, RuntimeError, NotImplementedError, TypeError):
            return conv
        # rounding leaves 0.3 %
        if not bool(error.square().mean() <= 1e-3 * expected.square().mean()):
            return conv
    return half


class HalfConvLayer(PackedConvLayer):
    """PackedConvLayer, but the first, in bfloat16, its LayerNorm in fp32: any floats in, bfloat16 out."""

    prepares = True

    def __init__(self, layer: PackedConvLayer):
        nn.Module.__init__(self)
        self.kernel, self.stride = layer.kernel, layer.stride
        self.register_buffer("weight", layer.weight.to(HALF), persistent=False)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(HALF), persistent=False)
        self.norm = _whole(layer.norm)
        # its products are too fast for sums beside them to pay
        self._shared = None

    def forward(self, x: Tensor, space: Workspace) -> Tensor:
        """(time, in channel) -> (frames, channel)"""
        return super().forward(x.to(HALF).contiguous(), space)


class HalfFusedConvLayer(FusedConvLayer):
    """FusedConvLayer in bfloat16, its LayerNorm in fp32: any floats in, bfloat16 out."""

    def __init__(self, layer: FusedConvLayer, rows: int):
        nn.Module.__init__(self)
        self.kernel, self.stride, self.norm = layer.kernel, layer.stride, _whole(layer.norm)
        self.product = HalfLinear(layer.as_linear(), rows, HALF, gelu=self.norm is None)

    def forward(self, x: Tensor, space: Workspace) -> Tensor:
        """(time, in channel) -> (frames, channel)"""
        return super().forward(x.to(HALF).contiguous(), space)


def _whole(norm: Optional[nn.Module]) -> Optional[nn.Module]:
    """For rows that, rounded, are not quite centred."""
    return norm.whole if isinstance(norm, CentredNorm) else norm


class HalfAttention(MultiheadAttention):
    """MultiheadAttention whose queries, keys, values and maps are bfloat16; its Linears are what they are."""

    def __init__(self, attention: MultiheadAttention):
        nn.Module.__init__(self)
        self.heads, self.head_dim, self.dropout = attention.heads, attention.head_dim, attention.dropout
        for name, linear in attention.named_children():
            setattr(self, name, linear)

    def attend(
        self,
        queries: Optional[Tensor],
        memory: KeyValue,
        key_mask: Optional[Tensor] = None,
        attention_map: Optional[Tensor] = None,
        return_map: bool = False,
        gates: LayerGates = NO_LAYER_GATES,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        # what a stream remembers is fp32
        memory = KeyValue(None if memory.key is None else memory.key.to(HALF), memory.value.to(HALF))
        return super().attend(queries, memory, key_mask, attention_map, return_map, gates)

    def _split(self, x: Tensor) -> Tensor:
        return super()._split(x.to(HALF))


def half_around_(backbone: Backbone, rows: int) -> None:
    """Makes attention, and what is packed of frontend and positions, compute in bfloat16, in place.

    The first layer of the frontend, which hears samples, stays in fp32, and so do all Linears that do, and positions
    that are products of spectra, which take no more time.
    """
    frontend, encoder = backbone.feature_extractor, backbone.encoder
    for layer in encoder.layers:
        if layer.self_attn is not None:
            layer.self_attn = HalfAttention(layer.self_attn)
    if isinstance(frontend, PackedFrontend):
        for index in range(1, len(frontend.conv_layers)):
            layer = frontend.conv_layers[index]
            half = HalfFusedConvLayer(layer, rows) if isinstance(layer, FusedConvLayer) else HalfConvLayer(layer)
            frontend.conv_layers[index] = half
    positions, config = encoder.pos_conv, encoder.config
    if isinstance(positions, PackedPositions):
        strides = config.operating_points.squeeze
        if config.streams or not all(map(positions.spectra_serve, strides)):
            positions.conv = half_conv(positions.conv, rows)


def half_linears_(backbone: Backbone, rows: int) -> None:
    """Makes the Linears of a network compute in bfloat16, in place."""
    encoder = backbone.encoder
    if backbone.post_extract_proj is not None:
        backbone.post_extract_proj = HalfLinear(backbone.post_extract_proj, rows)
    if encoder.upsample is not None:
        encoder.upsample = WholeUnsqueeze(encoder.upsample, HalfLinear(encoder.upsample[0], rows))
    for layer in encoder.layers:
        attention = layer.self_attn
        if attention is not None:
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(attention, name, HalfLinear(getattr(attention, name), rows, HALF))
            attention.out_proj = HalfLinear(attention.out_proj, rows)
        if layer.fc1 is not None:
            gelu = layer.activation is F.gelu
            layer.fc1 = HalfLinear(layer.fc1, rows, HALF, gelu)
            layer.fc2 = HalfLinear(layer.fc2, rows)
            layer.activation = get_activation("linear") if gelu else layer.activation
