"""One Transformer layer: post-LN (base) or pre-LN (large), with pooled attention."""

from __future__ import annotations

from typing import NamedTuple, Optional, Protocol, Union

import torch
from torch import Tensor, nn

from .activations import get_activation
from .attention import KeyValue, MultiheadAttention
from .chunks import ChunkMask
from .gating import NO_LAYER_GATES, LayerGates, gated_linear
from .masks import FrameMask
from .norms import LayerNorm
from .pooling import mean_pool, repeat_frames


class LayerOutput(NamedTuple):
    """What a layer returns.

    x: (batch, time, channel), the layer's output.
    ffn: (batch, time, channel), the FFN's output before its residual (fairseq's `layer_result`).
    attention_map: (batch, heads, query time, key time) or None; with chunks its axes are the places of a ChunkLayout.
    """

    x: Tensor
    ffn: Tensor
    attention_map: Optional[Tensor]


class Past(Protocol):
    """The frames before a chunk, as a layer's attention sees them."""

    def extend(self, own: KeyValue) -> KeyValue:
        """Keys and values of the past, and behind them the chunk's own."""


class EncoderLayer(nn.Module):
    """wav2vec 2.0 Transformer layer with stock fairseq parameter names.

    Query pooling attends from the mean of every `query_pool` frames and repeats the result over them before it is
    added to the residual; key-value pooling attends to the means of `kv_pool` frames. Residual and FFN stay at the
    layer's own rate, so that every layer may pool differently. The abstract of stochastic wav2vec 2.0 (arXiv
    2204.11934) names both poolings and says no more: where and how we pool is our reading.

    A block without heads, or without FFN channels, is left out: the residual passes it by. norm_dim: see nn/norms.py.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        heads: int,
        head_dim: Optional[int] = None,
        norm_first: bool = False,
        activation: str = "gelu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        norm_dim: int = 0,
    ):
        super().__init__()
        self.norm_first = norm_first
        self.activation = get_activation(activation)
        self.self_attn = MultiheadAttention(dim, heads, head_dim, attention_dropout) if heads else None
        self.self_attn_layer_norm = LayerNorm(dim, norm_dim) if heads or not norm_first else None
        self.fc1 = nn.Linear(dim, ffn_dim) if ffn_dim else None
        self.fc2 = nn.Linear(ffn_dim, dim) if ffn_dim else None
        self.final_layer_norm = LayerNorm(dim, norm_dim) if ffn_dim or not norm_first else None
        self.dropout = nn.Dropout(dropout)
        self.activation_dropout = nn.Dropout(activation_dropout)

    def forward(
        self,
        x: Tensor,
        mask: Union[FrameMask, ChunkMask, None] = None,
        query_pool: int = 1,
        kv_pool: int = 1,
        attention_map: Optional[Tensor] = None,
        return_map: bool = False,
        past: Optional[Past] = None,
        gates: LayerGates = NO_LAYER_GATES,
    ) -> LayerOutput:
        """Transforms `x` (batch, time, channel).

        `mask` marks its valid frames, and which of them may attend to which (None: all to all). `past` are frames
        before `x` that it attends to as well. `gates` close heads, FFN channels and hidden channels: a block that has
        none left adds nothing, not its bias either.
        """
        if self.self_attn is None:
            attention_map = None
        else:
            hidden = self.self_attn_layer_norm(x, gates.hidden) if self.norm_first else x
            query = mean_pool(hidden, query_pool, mask)
            key_value = query if kv_pool == query_pool else mean_pool(hidden, kv_pool, mask)
            queries, memory = self.self_attn.project(query, key_value, needs_map=attention_map is None)
            memory = memory if past is None else past.extend(memory)
            hidden, attention_map = self.self_attn.attend(
                queries,
                memory,
                None if mask is None else mask.attention(query_pool, kv_pool),
                attention_map,
                return_map,
                gates,
            )
            x = x + repeat_frames(self.dropout(hidden), query_pool, x.size(1))
        if not self.norm_first:
            x = self.self_attn_layer_norm(x, gates.hidden)

        if self.fc1 is None:
            ffn = torch.zeros_like(x)
        else:
            ffn = self.final_layer_norm(x, gates.hidden) if self.norm_first else x
            ffn = self.activation_dropout(self.activation(self.fc1(ffn)))
            ffn = gated_linear(self.fc2, ffn, gates.hidden, gates.ffn)
            x = x + self.dropout(ffn)
        if not self.norm_first:
            x = self.final_layer_norm(x, gates.hidden)
        return LayerOutput(x, ffn, attention_map)
