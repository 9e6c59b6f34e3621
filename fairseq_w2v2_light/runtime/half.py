"""bfloat16 where a CPU multiplies it: twice the speed of fp32 and more, in products alone.

Linears, convolutions and attention take bfloat16 and add up in fp32. What is sensitive stays in fp32: the residuals
between the layers, every norm, the softmax, the first convolution, which reads samples, and the CTC head.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.attention import KeyValue, MultiheadAttention
from ..nn.backbone import Backbone
from ..nn.frontend import ConvBlock, windows
from ..nn.gating import NO_LAYER_GATES, LayerGates
from ..nn.positions import WeightNormConv1d
from .pack import FrozenPositions

HALF = torch.bfloat16
# what Linux calls the instructions: Intel's and AMD's, Arm's
_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@functools.lru_cache(maxsize=None)
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16; without, they are several times slower than fp32."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        check = getattr(torch.cpu, name, None)  # not in torch 2.1
        if check is not None and platform.machine().lower() in ("x86_64", "amd64") and check():
            return True
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").lower().splitlines()
    except OSError:
        return False
    return any(line.startswith(("flags", "features")) and _FLAGS & set(line.split()) for line in lines)


class HalfLinear(nn.Module):
    """nn.Linear for inference in bfloat16 on a CPU: any floats in, `dtype` out; `rows`: see runtime/pack.py."""

    def __init__(self, weight: Tensor, bias: Optional[Tensor], rows: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype
        weight = weight.detach().to(HALF).contiguous()
        self.packs = _can_pack()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packs else weight
        self.bias = None if bias is None else bias.detach().to(HALF)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        x = x.to(HALF)
        if self.packs:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        else:
            y = F.linear(x, self.weight, self.bias)
        return y.to(self.dtype)


@functools.lru_cache(maxsize=None)
def _can_pack() -> bool:
    """Whether this torch has oneDNN's packed product of bfloat16, and it computes a product."""
    x, weight = torch.randn(3, 8).to(HALF), torch.randn(4, 8).to(HALF)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return torch.allclose(y.float(), F.linear(x.float(), weight.float()), atol=0.1)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False


class HalfConvBlock(nn.Module):
    """ConvBlock whose convolution is a product in bfloat16, (batch, channel, time) with the channels innermost.

    first: the block that reads samples; its convolution stays in fp32. The GELU is in bfloat16; last: but not that of
    the block whose output leaves the frontend.
    """

    def __init__(self, block: ConvBlock, rows: int, first: bool, last: bool):
        super().__init__()
        conv = block[0]
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]
        self.conv = conv if first else HalfLinear(conv.weight.transpose(1, 2).flatten(1), conv.bias, rows, HALF)
        self.norm = block[2] if len(block) == 4 else None
        self.dtype = torch.float32 if last else HALF

    def forward(self, x: Tensor, lengths: Optional[Tensor] = None, gate: Optional[Tensor] = None) -> Tensor:
        """(batch, in channel, time) -> (batch, channel, time); `lengths` (batch,): the valid frames after it."""
        if isinstance(self.conv, HalfLinear):
            x = self.conv(windows(x, self.kernel, self.stride)).transpose(1, 2)
        else:
            x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x, lengths)
        return F.gelu(x.transpose(1, 2).to(self.dtype).contiguous()).transpose(1, 2)


class HalfPositions(nn.Module):
    """WeightNormConv1d in bfloat16: any floats in, fp32 out."""

    def __init__(self, conv: WeightNormConv1d):
        super().__init__()
        # in a list: no child, which packing would replace
        self._conv = [FrozenPositions(conv).to(HALF)]
        self.kernel, self.causal = conv.kernel, conv.causal

    def forward(
        self, x: Tensor, stride: int = 1, past: Optional[Tensor] = None, gate: Optional[Tensor] = None
    ) -> Tensor:
        """(batch, channel, time) -> (batch, channel, ceil(time / stride))"""
        return self._conv[0](x.to(HALF), stride, None if past is None else past.to(HALF)).float()


class HalfAttention(MultiheadAttention):
    """MultiheadAttention whose queries, keys, values and maps are bfloat16; its Linears are what they are."""

    def __init__(self, attention: MultiheadAttention):
        nn.Module.__init__(self)
        self.heads, self.head_dim, self.dropout = attention.heads, attention.head_dim, attention.dropout
        for name, linear in attention.named_children():
            setattr(self, name, linear)

    def attend(
        self,
        query: Tensor,
        memory: KeyValue,
        key_mask: Optional[Tensor] = None,
        attention_map: Optional[Tensor] = None,
        return_map: bool = False,
        gates: LayerGates = NO_LAYER_GATES,
    ):
        # the memory of a stream is fp32
        memory = KeyValue(None if memory.key is None else memory.key.to(HALF), memory.value.to(HALF))
        return super().attend(query, memory, key_mask, attention_map, return_map, gates)

    def _split(self, x: Tensor) -> Tensor:
        return super()._split(x.to(HALF))


def half_around_(backbone: Backbone, rows: int) -> None:
    """Makes frontend, positions and attention compute in bfloat16, in place, and leaves the Linears as they are."""
    frontend, encoder = backbone.feature_extractor, backbone.encoder
    blocks, last = frontend.conv_layers, len(frontend.conv_layers) - 1
    frames = rows
    for index in range(last, -1, -1):
        stride = blocks[index][0].stride[0]
        blocks[index] = HalfConvBlock(blocks[index], frames, index == 0, index == last)
        frames *= stride
    encoder.pos_conv[0] = HalfPositions(encoder.pos_conv[0])
    for layer in encoder.layers:
        if layer.self_attn is not None:
            layer.self_attn = HalfAttention(layer.self_attn)


def half_linears_(backbone: Backbone, rows: int) -> None:
    """Makes the Linears of a network compute in bfloat16, in place."""
    encoder = backbone.encoder
    if backbone.post_extract_proj is not None:
        backbone.post_extract_proj = _half(backbone.post_extract_proj, rows)
    if encoder.upsample is not None:
        encoder.upsample[0] = _half(encoder.upsample[0], rows)
    for layer in encoder.layers:
        attention = layer.self_attn
        if attention is not None:
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(attention, name, _half(getattr(attention, name), rows, HALF))
            attention.out_proj = _half(attention.out_proj, rows)
        if layer.fc1 is not None:
            layer.fc1, layer.fc2 = _half(layer.fc1, rows, HALF), _half(layer.fc2, rows)


def _half(linear: nn.Linear, rows: int, dtype: torch.dtype = torch.float32) -> HalfLinear:
    return HalfLinear(linear.weight, linear.bias, rows, dtype)
