"""Algorithmic latency of a streaming network, from its receptive field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from .config import EncoderConfig
from .frontend import receptive_field
from .operating_point import OperatingPoint


@dataclass(frozen=True)
class Latency:
    """How long the frames of a chunk wait for audio, in samples.

    Frame t stands for samples hop * t to hop * (t + 1) - 1. `total` is the smallest number L such that no output frame
    depends on a sample that comes L or more samples after the frame's first one: the wait of a chunk's first frame, and
    the sum of `frontend` (from the frame's first sample to the end of its window), `positions` (0: causal), `chunk`
    (the other frames of the chunk) and `lookahead`. `mean` is the wait of a frame on average. Compute time is no part
    of it.
    """

    frontend: int
    positions: int
    chunk: int
    lookahead: int
    mean: float

    @property
    def total(self) -> int:
        return self.frontend + self.positions + self.chunk + self.lookahead


def algorithmic_latency(config: EncoderConfig, point: Optional[OperatingPoint] = None) -> Optional[Latency]:
    """The latency of a network at an operating point (None: its default); None when it hears the whole utterance.

    Squeeze and pooling do not change it: their windows lie within a chunk. Raises ValueError for a point that the model
    was not trained for.
    """
    point = config.operating_points.default if point is None else config.operating_points.check(point)
    if not point.chunk:
        return None
    field, hop = receptive_field(config.conv_layers)
    frontend = field - config.frontend_padding
    chunk, lookahead = (point.chunk - 1) * hop, config.lookahead * hop
    return Latency(frontend, 0, chunk, lookahead, frontend + chunk / 2 + lookahead)
