"""Multi-head attention whose queries, keys and map may come from anywhere."""

from __future__ import annotations

import math
from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .exporting import is_exporting
from .gating import NO_LAYER_GATES, LayerGates, gated_linear


class KeyValue(NamedTuple):
    """Projected keys and values of some frames: what later chunks of a stream attend to.

    key: (batch, heads, time, head dim), None where a layer reuses another one's map. value: as key.
    """

    key: Optional[Tensor]
    value: Tensor

    def frames(self, start: int, end: int) -> KeyValue:
        """Frames `start` to `end` - 1."""
        return KeyValue(None if self.key is None else self.key[:, :, start:end], self.value[:, :, start:end])


class MultiheadAttention(nn.Module):
    """Scaled dot-product attention with stock fairseq parameter names (q_proj, k_proj, v_proj, out_proj).

    Queries and keys may have different lengths (pooling), keys and values may be those of earlier calls (streaming),
    and a map that another layer computed may be reused (W2V2-Light's second sharing method, our reading of its
    abstract): q_proj, k_proj and the softmax are then skipped.
    """

    def __init__(self, dim: int, heads: int, head_dim: Optional[int] = None, dropout: float = 0.0):
        super().__init__()
        if head_dim is None and dim % heads:
            raise ValueError(f"encoder_attention_heads: {heads} heads do not divide encoder_embed_dim {dim}")
        self.heads = heads
        self.head_dim = head_dim or dim // heads
        self.dropout = dropout
        inner = self.heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(
        self,
        query: Tensor,
        key_value: Tensor,
        key_mask: Optional[Tensor] = None,
        attention_map: Optional[Tensor] = None,
        return_map: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Attends from `query` (B, Tq, C) to `key_value` (B, Tk, C): `project`, then `attend`."""
        queries, memory = self.project(query, key_value, needs_map=attention_map is None)
        return self.attend(queries, memory, key_mask, attention_map, return_map)

    def project(self, query: Tensor, key_value: Tensor, needs_map: bool = True) -> Tuple[Optional[Tensor], KeyValue]:
        """Queries (B, heads, Tq, head dim) of frames `query` (B, Tq, C), and keys and values of `key_value` (B, Tk, C).

        Without `needs_map`, because there is a map, neither queries nor keys.
        """
        queries = self._split(self.q_proj(query)) if needs_map else None
        keys = self._split(self.k_proj(key_value)) if needs_map else None
        return queries, KeyValue(keys, self._split(self.v_proj(key_value)))

    def attend(
        self,
        queries: Optional[Tensor],
        memory: KeyValue,
        key_mask: Optional[Tensor] = None,
        attention_map: Optional[Tensor] = None,
        return_map: bool = False,
        gates: LayerGates = NO_LAYER_GATES,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Attends from `queries` (B, heads, Tq, head dim) to `memory`, Tk frames; the output (B, Tq, C) and the map.

        `key_mask` (B or 1, 1, Tq or 1, Tk) bool is True where a key may be attended to; every query needs one.
        `attention_map` (B, heads, Tq, Tk) replaces the computed map, for which `queries` are None. The returned map
        (before dropout) is None unless `return_map` or a map was given. `gates` multiply what each head found
        (HJ-Pruning, eq. 7) and the output.
        """
        dropout = self.dropout if self.training else 0.0
        if attention_map is None and return_map:
            attention_map = self._map(queries, memory.key, key_mask)
        if attention_map is None:
            mixed = F.scaled_dot_product_attention(queries, memory.key, memory.value, key_mask, dropout)
        else:
            mixed = F.dropout(attention_map, dropout, self.training) @ memory.value
        heads = None if gates.heads is None else gates.heads.repeat_interleave(self.head_dim)
        return gated_linear(self.out_proj, mixed.transpose(1, 2).flatten(2), gates.hidden, heads), attention_map

    def attention_map(self, query: Tensor, key_value: Tensor, key_mask: Optional[Tensor] = None) -> Tensor:
        """The attention weights (B, heads, Tq, Tk); rows sum to 1. The softmax is computed in fp32."""
        queries, memory = self.project(query, key_value)
        return self._map(queries, memory.key, key_mask)

    def _map(self, queries: Tensor, keys: Tensor, key_mask: Optional[Tensor]) -> Tensor:
        scores = (queries / math.sqrt(self.head_dim)) @ keys.transpose(-2, -1)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask, float("-inf"))
        if scores.dtype == torch.float32 and not (scores.requires_grad or is_exporting()):
            # in place: a second tensor of this size takes longer to allocate than to fill
            return torch.softmax(scores, dim=-1, out=scores)
        return torch.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, heads * head_dim) -> (B, heads, T, head_dim)."""
        return x.view(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2)
