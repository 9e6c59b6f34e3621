"""Frontend, projection and encoder: what pre-training, CTC and the runtime have in common."""

from __future__ import annotations

from typing import Optional, Tuple

from torch import Tensor, nn

from .config import EncoderConfig
from .encoder import Encoder, EncoderOutput
from .frontend import Frontend
from .masks import FrameMask
from .operating_point import OperatingPoint


class Backbone(nn.Module):
    """Waveform to contextual frames. State names are those of fairseq's Wav2Vec2Model."""

    def __init__(self, config: EncoderConfig):
        nn.Module.__init__(self)
        self.config = config
        self.feature_extractor = Frontend(
            config.conv_layers, config.extractor_norm, config.conv_bias, config.frontend_padding
        )
        self.layer_norm = nn.LayerNorm(config.features_dim)
        self.post_extract_proj = (
            nn.Linear(config.features_dim, config.dim) if config.features_dim != config.dim else None
        )
        self.encoder = Encoder(config)

    def features(self, wave: Tensor, lengths: Optional[Tensor] = None) -> Tuple[Tensor, Optional[FrameMask]]:
        """(batch, samples) -> frames (batch, time, channel) before any norm, and their mask (None: nothing padded)."""
        frames, lengths = self.feature_extractor(wave, lengths)
        return frames, None if lengths is None else FrameMask.from_lengths(lengths, frames.size(1))

    def project(self, frames: Tensor) -> Tensor:
        """Normalised frames (batch, time, frontend channel) -> encoder input (batch, time, channel)."""
        return frames if self.post_extract_proj is None else self.post_extract_proj(frames)

    def encode(
        self, wave: Tensor, lengths: Optional[Tensor] = None, point: Optional[OperatingPoint] = None
    ) -> Tuple[EncoderOutput, Optional[FrameMask]]:
        """Inference from `wave` (batch, samples), of which `lengths` (batch,) samples are valid (None: all).

        Raises ValueError for an operating point that the model was not trained for.
        """
        points = self.config.operating_points
        point = points.default if point is None else points.check(point)
        frames, mask = self.features(wave, lengths)
        return self.encoder(self.project(self.layer_norm(frames)), mask, point), mask
