"""Endpointing: where a stream's frames fall apart into segments (utterances)."""

import math
from dataclasses import dataclass
from typing import List, Optional, Tuple, TypeVar

import numpy as np

from .incremental import DecoderState, LogProbs, Token

State = TypeVar("State", bound=DecoderState)


@dataclass(frozen=True)
class Endpointing:
    """When a segment ends, in seconds; `math.inf` switches a rule off. The rules are those of Kaldi's online decoding.

    silence: after this much silence, where anything was decoded before it. before_speech: after this much silence in
    any case; where nothing was decoded, decoding starts anew. longest: a segment of this length ends at its next pause,
    silence of `pause`; not at any frame of silence, as CTC's blank also stands between the letters of a word.

    Raises ValueError for a value that is not positive, and for `before_speech` below `silence`.
    """

    silence: float = 1.0
    before_speech: float = 5.0
    longest: float = 20.0
    pause: float = 0.2

    def __post_init__(self):
        for name in ("silence", "before_speech", "longest", "pause"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} is {value}; expected seconds above 0, or infinity for never")
        if self.before_speech < self.silence:
            raise ValueError(f"before_speech is {self.before_speech}; expected at least {self.silence}, as silence is")


def advance_segments(
    state: State, log_probs: LogProbs, endpointing: Optional[Endpointing], seconds_per_frame: float
) -> Tuple[List[Tuple[Token, ...]], State]:
    """Decodes more frames, and closes each segment that ends among them.

    log_probs: (time, symbols). endpointing: None never closes any. Returns one tuple of tokens for each closed segment,
    and the state of the open one. The first tuple lacks what was drained from the state before; it may be empty for
    that. A segment in which nothing spoken was decoded is closed without a trace. The segments are a function of the
    frames alone, not of how they are divided over calls.
    """
    if endpointing is None:
        return [], state.advance(log_probs)
    silence, before_speech, longest, pause = (
        _frames(seconds, seconds_per_frame)
        for seconds in (endpointing.silence, endpointing.before_speech, endpointing.longest, endpointing.pause)
    )
    closed: List[Tuple[Token, ...]] = []
    while len(log_probs):
        silences = state.silences(log_probs)
        lengths = state.frames - state.segment_start + np.arange(1, len(silences) + 1)
        ends = (silences == before_speech) | ((lengths >= longest) & (silences >= pause))
        # Whether anything is decoded by then is known on reaching that frame.
        candidates = np.flatnonzero(ends | (silences == silence))
        heard = int(candidates[0]) + 1 if len(candidates) else len(silences)
        state, log_probs = state.advance(log_probs[:heard]), log_probs[heard:]
        if len(candidates) and (ends[heard - 1] or not state.is_empty):
            spoken = not state.is_empty
            tokens, state = state.flush()
            if spoken:
                closed.append(tokens)
    return closed, state


def _frames(seconds: float, seconds_per_frame: float) -> float:
    return seconds if math.isinf(seconds) else max(1, round(seconds / seconds_per_frame))
