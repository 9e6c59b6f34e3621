"""Frontend, projection and encoder: what pre-training, CTC and the runtime have in common."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from .config import EncoderConfig
from .encoder import Encoder, EncoderOutput
from .frontend import Frontend
from .gates import Gates
from .gating import NO_GATES, GateValues
from .masks import FrameMask
from .norms import LayerNorm
from .operating_point import OperatingPoint


class Backbone(nn.Module):
    """Waveform to contextual frames. State names are those of fairseq's Wav2Vec2Model."""

    def __init__(self, config: EncoderConfig):
        nn.Module.__init__(self)
        self.config = config
        self.feature_extractor = Frontend(
            config.conv_layers, config.extractor_norm, config.conv_bias, config.frontend_padding, config.conv_norm_dims
        )
        self.layer_norm = LayerNorm(config.features_dim, config.conv_norm_dims[-1] if config.conv_norm_dims else 0)
        self.post_extract_proj = nn.Linear(config.features_dim, config.dim) if config.projects else None
        self.encoder = Encoder(config)
        self.gates = Gates(config) if config.prune_units else None

    def gate_values(self) -> GateValues:
        """The gates for one call: drawn in training, but not under no_grad (frozen updates); else decided."""
        if self.gates is None:
            return NO_GATES
        return self.gates() if torch.is_grad_enabled() else self.gates.decided()

    def features(
        self, wave: Tensor, lengths: Optional[Tensor] = None, gates: GateValues = NO_GATES
    ) -> Tuple[Tensor, Optional[FrameMask]]:
        """(batch, samples) -> frames (batch, time, channel) before any norm, and their mask (None: nothing padded)."""
        frames, lengths = self.feature_extractor(wave, lengths, gates.conv)
        return frames, None if lengths is None else FrameMask.from_lengths(lengths, frames.size(1))

    def normalise(self, frames: Tensor, gates: GateValues = NO_GATES) -> Tensor:
        """The LayerNorm between frontend and projection, (batch, time, frontend channel)."""
        return self.layer_norm(frames, None if gates.conv is None else gates.conv[-1])

    def project(self, frames: Tensor) -> Tensor:
        """Normalised frames (batch, time, frontend channel) -> encoder input (batch, time, channel)."""
        return frames if self.post_extract_proj is None else self.post_extract_proj(frames)

    def encode(
        self,
        wave: Tensor,
        lengths: Optional[Tensor] = None,
        point: Optional[OperatingPoint] = None,
        keep_layers: bool = True,
        last_layer: Optional[int] = None,
    ) -> Tuple[EncoderOutput, Optional[FrameMask]]:
        """Inference from `wave` (batch, samples), of which `lengths` (batch,) samples are valid (None: all).

        Without `keep_layers`, the result has the last frames alone. last_layer: see Encoder.

        Raises ValueError for an operating point that the model was not trained for.
        """
        points = self.config.operating_points
        point = points.default if point is None else points.check(point)
        gates = self.gate_values()
        frames, mask = self.features(wave, lengths, gates)
        x = self.project(self.normalise(frames, gates))
        return self.encoder(x, mask, point, last_layer, gates, keep_layers), mask
