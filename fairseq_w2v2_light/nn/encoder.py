"""The Transformer encoder: positions, squeeze, layers through a layer map, unsqueeze."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence

import numpy as np
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from .chunks import ChunkLayout, ChunkMask
from .config import EncoderConfig
from .gating import NO_GATES, GateValues, gated, layer_gates
from .layer import EncoderLayer, LayerOutput, Past
from .masks import FrameMask
from .norms import LayerNorm
from .operating_point import OperatingPoint
from .positions import ConvPositions
from .squeeze import Unsqueeze, squeeze


class EncoderOutput(NamedTuple):
    """What the encoder returns.

    x: (batch, time, channel) at the frame rate of the input, whatever the operating point.
    layers: one LayerOutput per layer that ran, at the squeezed frame rate, none where the caller does without; depths:
    the depth of each (layer drop leaves some out). squeezed_mask: their valid frames (None: all).
    """

    x: Tensor
    layers: List[LayerOutput]
    depths: List[int]
    squeezed_mask: Optional[FrameMask]


class Encoder(nn.Module):
    """wav2vec 2.0's Transformer with shared layers, shared attention maps, squeeze and pooling, each off by default.

    Only unique layers are stored; `config.layer_map` says which one runs at each depth. State names are stock
    fairseq's (`pos_conv`, `layers.N`, `layer_norm`) and SEW's (`upsample`).
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.pos_conv = ConvPositions(
            config.dim, config.conv_pos, config.conv_pos_groups, config.streams, config.conv_pos_group_dims
        )
        self.layers = nn.ModuleList(
            EncoderLayer(
                config.dim,
                config.ffn_of(stored),
                config.heads_of(stored),
                config.head_size,
                norm_first=config.norm_first,
                activation=config.activation,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                activation_dropout=config.activation_dropout,
                norm_dim=config.norm_dim,
            )
            for stored in range(config.unique_layers)
        )
        self.layer_norm = LayerNorm(config.dim, config.norm_dim)
        self.upsample = None
        if config.unsqueeze_factor > 1:
            self.upsample = Unsqueeze(config.dim, config.unsqueeze_factor, config.unsqueeze_residual)
        self.apply(_initialise)
        if self.upsample is not None:
            self.upsample.reset_parameters()

    def forward(
        self,
        x: Tensor,
        mask: Optional[FrameMask] = None,
        point: OperatingPoint = OperatingPoint(),
        last_layer: Optional[int] = None,
        gates: GateValues = NO_GATES,
        keep_layers: bool = True,
    ) -> EncoderOutput:
        """Encodes frames `x` (batch, time, channel) at an operating point; `mask` marks the valid frames (None: all).

        With `last_layer`, stops after that depth and leaves out the final norm, as stock does. A channel whose hidden
        gate is closed is zero from here on: all that is added to it, and all that norms make of it. Without
        `keep_layers`, what a layer returned is free as soon as the next one has run.
        """
        config = self.config
        time = x.size(1)
        drop_tail = config.squeeze_tail == "drop"
        if mask is not None:
            x = x * mask.valid.unsqueeze(-1).to(x.dtype)
        x = squeeze(self.enter(x, gates), self.pos_conv, point.squeeze, mask, drop_tail, gate=gates.hidden)
        squeezed_mask = None if mask is None else mask.pooled(point.squeeze, drop_tail)
        if not config.norm_first:
            x = self.norm(x, gates)

        if point.chunk:
            sizes = (frames // point.squeeze for frames in (point.chunk, config.left_context, config.lookahead))
            layout = ChunkLayout(x.size(1), *sizes, device=x.device)
            x = F.dropout(layout.extend(x), config.dropout, self.training)
            chunk_mask = ChunkMask(layout, squeezed_mask)
            x, layers, depths = self.run_layers(x, chunk_mask, point, last_layer, None, gates, keep_layers)
            x = layout.restrict(x)
            layers = [layer._replace(x=layout.restrict(layer.x), ffn=layout.restrict(layer.ffn)) for layer in layers]
        else:
            x = F.dropout(x, config.dropout, self.training)
            x, layers, depths = self.run_layers(x, squeezed_mask, point, last_layer, None, gates, keep_layers)

        if config.norm_first and last_layer is None:
            x = self.norm(x, gates)
        if point.squeeze > 1:
            x = self.upsample(x, point.squeeze, time, gates.hidden)
            if drop_tail and squeezed_mask is not None:
                x = x * _heard_frames(squeezed_mask, point.squeeze, time).to(x.dtype)
        return EncoderOutput(x, layers, depths, squeezed_mask)

    def enter(self, x: Tensor, gates: GateValues) -> Tensor:
        """`x` (batch, time, channel) without its closed channels.

        Only a projection before the encoder could take an open one's factor into its weights.
        """
        if gates.hidden is None or self.config.projects:
            return gated(x, gates.hidden)
        return gated(x, gates.hidden > 0)

    def norm(self, x: Tensor, gates: GateValues = NO_GATES) -> Tensor:
        """The encoder's own LayerNorm: before the layers (post-LN) or after them (pre-LN)."""
        return self.layer_norm(x, gates.hidden)

    def run_layers(
        self,
        x: Tensor,
        mask,
        point: OperatingPoint,
        last_layer: Optional[int] = None,
        past: Optional[Sequence[Past]] = None,
        gates: GateValues = NO_GATES,
        keep_layers: bool = True,
    ):
        """Runs the stack on squeezed frames: (x, one LayerOutput per layer that ran if `keep_layers`, their depths).

        `mask` and `past` (one per depth) are those of `EncoderLayer.forward`.
        """
        config = self.config
        layers: List[LayerOutput] = []
        depths: List[int] = []
        attention_map = None
        dropped = False
        for depth, stored in enumerate(config.layer_map):
            computes_map = depth % config.attention_map_every == 0
            shares_map = computes_map and config.attention_map_every > 1 and depth + 1 < config.depth
            if computes_map:
                attention_map = None
                dropped = self.training and config.layerdrop > 0 and np.random.random() <= config.layerdrop
            if not dropped:
                output = self._run_layer(
                    self.layers[stored],
                    x,
                    mask,
                    point.query_pool(depth),
                    point.kv_pool(depth),
                    attention_map,
                    shares_map,
                    None if past is None else past[depth],
                    layer_gates(gates, stored),
                )
                if keep_layers:
                    layers.append(output)
                depths.append(depth)
                x, attention_map = output.x, output.attention_map
                del output  # or its map would live on beside the next one
            if depth == last_layer:
                break
        return x, layers, depths

    def _run_layer(self, layer, *inputs):
        if self.config.checkpoint_activations and self.training:
            return torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def idle_parameters(self) -> List[nn.Parameter]:
        """Parameters that some operating point or the map sharing leaves without a gradient.

        The unsqueeze layer at squeeze 1, and the query and key projections of stored layers that only reuse maps.
        """
        every = self.config.attention_map_every
        computing = {stored for depth, stored in enumerate(self.config.layer_map) if depth % every == 0}
        idle = [] if self.upsample is None else list(self.upsample.parameters())
        for stored, layer in enumerate(self.layers):
            if stored not in computing and layer.self_attn is not None:
                idle += [*layer.self_attn.q_proj.parameters(), *layer.self_attn.k_proj.parameters()]
        return idle


def _heard_frames(squeezed_mask: FrameMask, factor: int, time: int) -> Tensor:
    """(batch, time, 1) bool: frames of windows that were not dropped; the others are zero, as in SEW."""
    heard = squeezed_mask.valid.repeat_interleave(factor, dim=1)
    return F.pad(heard, (0, factor)).narrow(1, 0, time).unsqueeze(-1)


def _initialise(module: nn.Module) -> None:
    """BERT's initialisation of Linears, as stock fairseq has it: N(0, 0.02), biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
