"""When each decoded word was spoken, and how certain it is: from CTC's alignment and from how loud the audio is.

CTC outputs a label as a spike: one or a few frames somewhere within the sound, blanks around them. So the spikes of a
word's first and last label lie inside the word, and the audio says how far it reaches beyond them: to the next pause;
between two words without a pause, to the quietest spot between their spikes; but never further than `REACH`, about half
of the length of a sound, as the network did not hear the word there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Sequence, Tuple

import numpy as np

from .beam import Token
from .text import Labels

REACH = 0.05  # seconds


@dataclass(frozen=True)
class TimedWord:
    """One word, when it was spoken (seconds since the recording began), and its confidence from 0 to 1."""

    text: str
    start: float
    end: float
    confidence: float


def token_confidences(log_probs: np.ndarray, tokens: Sequence[Token]) -> List[float]:
    """For each token, its highest probability in any of its frames; log_probs: (frames, symbols) from frame 0."""
    return [
        float(np.exp(log_probs[token.start : max(token.end, token.start + 1), token.index].max(initial=-np.inf)))
        for token in tokens
    ]


def forced_tokens(log_probs: np.ndarray, indices: Sequence[int], blank: int) -> List[Token]:
    """Where given labels stand in the most probable CTC path that spells them (Viterbi).

    log_probs: (frames, symbols). indices: the labels, without blanks. Raises ValueError where there are too few frames:
    each label needs one, and two equal labels in a row one more between them.
    """
    labels = np.asarray(indices, dtype=np.int64)
    repeated = np.append(False, labels[1:] == labels[:-1])
    frames, least = len(log_probs), len(labels) + int(repeated.sum())
    if frames < least or not len(labels):
        raise ValueError(f"found {frames} frames for {len(labels)} labels; expected labels, and {least} frames or more")
    # states: blank, first label, blank, second label, ..., blank
    states = np.full(2 * len(labels) + 1, blank)
    states[1::2] = labels
    may_skip = np.zeros(len(states), dtype=bool)
    may_skip[1::2] = ~repeated  # the blank before it
    may_skip[1] = False
    scores = np.where(np.arange(len(states)) < 2, log_probs[0, states], -np.inf)
    steps = np.zeros((frames, len(states)), dtype=np.int8)
    for frame in range(1, frames):
        arrivals = np.stack([scores, _shifted(scores, 1), np.where(may_skip, _shifted(scores, 2), -np.inf)])
        steps[frame] = arrivals.argmax(axis=0)
        scores = arrivals.max(axis=0) + log_probs[frame, states]
    state = len(states) - (1 if scores[-1] >= scores[-2] else 2)
    path = np.empty(frames, dtype=np.int64)
    for frame in range(frames - 1, -1, -1):
        path[frame] = state
        state -= steps[frame, state]
    heard = [np.flatnonzero(path == 2 * position + 1) for position in range(len(labels))]
    return [Token(int(label), int(at[0]), int(at[-1]) + 1) for label, at in zip(labels, heard)]


def _shifted(scores: np.ndarray, states: int) -> np.ndarray:
    """(n,): each score is that of so many states before."""
    return np.concatenate([np.full(states, -np.inf), scores[:-states]])


def timed_words(
    labels: Labels,
    tokens: Sequence[Token],
    confidences: Sequence[float],
    first_frame: float,
    frame_seconds: float,
    loudness: np.ndarray,
    origin: float,
    step_seconds: float,
) -> Tuple[TimedWord, ...]:
    """The words of decoded tokens, whose confidence is the geometric mean of their labels'.

    tokens: with frames of `frame_seconds` each. first_frame: when frame 0 begins, in seconds. loudness: (steps,) in dB
    above a pause of each step of `step_seconds`. origin: when the first of them begins.
    """
    spans = labels.spans([token.index for token in tokens])
    starts = np.array([first_frame + tokens[first].start * frame_seconds for _, first, _ in spans])
    ends = np.array([first_frame + tokens[last].end * frame_seconds for _, _, last in spans])
    limit = origin + len(loudness) * step_seconds
    grown_starts, grown_ends = starts.copy(), ends.copy()
    for gap in range(len(spans) + 1):
        begins = ends[gap - 1] if gap else origin
        finishes = starts[gap] if gap < len(spans) else limit
        first, last = (round((second - origin) / step_seconds) for second in (begins, finishes))
        steps = loudness[max(first, 0) : max(last, 0)]
        if not len(steps):
            continue
        quiet = np.flatnonzero(steps < 0)
        if len(quiet):
            until, since = quiet[0], quiet[-1] + 1
        elif 0 < gap < len(spans):
            until = since = steps.argmin()
        else:
            continue
        seconds = origin + (max(first, 0) + np.array([until, since])) * step_seconds
        # a gap need not begin and end where steps do
        until, since = np.clip(seconds, begins, finishes)
        if gap:
            grown_ends[gap - 1] = min(until, begins + REACH)
        if gap < len(spans):
            grown_starts[gap] = max(since, finishes - REACH)
    return tuple(
        TimedWord(text, max(0.0, float(start)), float(end), _geometric_mean(confidences[first : last + 1]))
        for (text, first, last), start, end in zip(spans, grown_starts, grown_ends)
    )


def _geometric_mean(values: Sequence[float]) -> float:
    """Of values from 0 to 1."""
    with np.errstate(divide="ignore"):
        return float(np.clip(np.exp(np.log(np.asarray(values)).mean()), 0.0, 1.0))
