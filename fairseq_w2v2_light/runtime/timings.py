"""How fast speech was recognised, and how long its text was waited for."""

import math
from dataclasses import dataclass, field
from typing import List, Optional, Sequence


@dataclass
class Timings:
    """What recognition took, all in seconds.

    compute: in total. chunks: compute of each chunk; chunks that one call ran share its time equally. delays: from the
    last sample of each chunk (its look-ahead not counted) to its text; final_delay: from the last sample of all to the
    last text; both only where the audio came at the speed of speech.
    """

    compute: float = 0.0
    chunks: List[float] = field(default_factory=list)
    delays: List[float] = field(default_factory=list)
    final_delay: Optional[float] = None

    def accepted(self, seconds: float, chunks: int) -> None:
        """Counts one call that ran `chunks` chunks."""
        self.compute += seconds
        self.chunks.extend([seconds / max(chunks, 1)] * chunks)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that at least `percent` % of them do not exceed (nearest rank); NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(math.ceil(len(values) * percent / 100), 1) - 1]


def report(timings: Timings, seconds: float, latency_ms: float) -> List[str]:
    """Lines that say how fast `seconds` of audio were recognised."""
    factor = f" (real-time factor {timings.compute / seconds:.3f})" if seconds > 0 else ""
    lines = [
        f"audio {seconds:.2f} s, compute {timings.compute:.2f} s{factor}, algorithmic latency {latency_ms:g} ms",
    ]
    if timings.chunks:
        lines.append(f"compute per chunk: {_spread(timings.chunks)}")
    if timings.delays:
        lines.append(f"delay from a chunk's last sample to its text: {_spread(timings.delays)}")
    if timings.final_delay is not None:
        lines.append(f"delay from the last sample to the final text: {timings.final_delay * 1000:.1f} ms")
    return lines


def _spread(values: Sequence[float]) -> str:
    median, worst = (percentile(values, percent) * 1000 for percent in (50, 99))
    count = f"{len(values)} chunk{'s' if len(values) > 1 else ''}"
    return f"median {median:.1f} ms, 99th percentile {worst:.1f} ms ({count})"
