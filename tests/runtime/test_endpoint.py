"""Endpointing: where segments end is a function of the frames alone."""

import math
import random

import numpy as np
import pytest
import torch

from fairseq_w2v2_light.runtime.endpoint import Endpointing, advance_segments
from fairseq_w2v2_light.runtime.incremental import BeamState, GreedyState, Token

NEVER = math.inf
# A frame a second, so that seconds are frames.
SECOND = 1.0


def certain(text, symbols=4):
    """One frame a digit, which is all but certainly that symbol."""
    log_probs = np.full((len(text), symbols), -30.0)
    log_probs[np.arange(len(text)), [int(digit) for digit in text]] = 0.0
    return log_probs


def both(name):
    return pytest.mark.parametrize("start", [GreedyState.start(0), BeamState.start(0, 5)], ids=["greedy", "beam"])(name)


def segments(start, text, endpointing):
    return advance_segments(start, certain(text), endpointing, SECOND)


@both
def test_silence_after_a_token_ends_the_segment(start):
    closed, state = segments(start, "022000030", Endpointing(silence=3, before_speech=9))
    assert closed == [(Token(2, 1, 3),)]
    assert state.segment_start == 6
    assert state.tokens == (Token(3, 7, 8),)


@both
def test_shorter_silence_does_not(start):
    closed, state = segments(start, "0220030", Endpointing(silence=3, before_speech=9))
    assert closed == []
    assert [token.index for token in state.tokens] == [2, 3]


@both
def test_silence_with_nothing_decoded_closes_no_segment(start):
    closed, state = segments(start, "0" * 23, Endpointing(silence=2, before_speech=5))
    assert closed == []
    assert (state.segment_start, state.trailing_silence, state.frames) == (20, 3, 23)


@both
def test_a_long_segment_ends_at_its_next_pause(start):
    endpointing = Endpointing(silence=9, before_speech=9, longest=6, pause=2)
    closed, state = segments(start, "02002302302300", endpointing)
    assert [len(tokens) for tokens in closed] == [7]
    assert state.frames == state.segment_start == 14


@both
def test_a_long_segment_without_a_pause_goes_on(start):
    closed, _ = segments(start, "23" * 20, Endpointing(longest=6, pause=1, silence=9, before_speech=9))
    assert closed == []


@both
def test_infinity_switches_a_rule_off(start):
    closed, _ = segments(start, "02" + "0" * 50, Endpointing(NEVER, NEVER, NEVER))
    assert closed == []


@both
def test_without_endpointing_no_segment_ends(start):
    closed, state = advance_segments(start, certain("02" + "0" * 50), None, SECOND)
    assert closed == []
    assert [token.index for token in state.tokens] == [2]


@both
def test_a_segment_whose_tokens_are_drained_is_closed_all_the_same(start):
    stable, state = start.advance(certain("02030")).drain()
    closed, _ = segments(state, "0000", Endpointing(silence=3, before_speech=9))
    assert len(closed) == 1
    assert [token.index for token in stable + closed[0]] == [2, 3]


def test_word_boundaries_alone_are_no_segment():
    start = GreedyState.start(0, silent=(3,))
    closed, state = segments(start, "030003000", Endpointing(silence=2, before_speech=6))
    assert closed == []
    assert state.segment_start == 6


def test_seconds_become_frames():
    closed, _ = advance_segments(GreedyState.start(0), certain("2" + 50 * "0"), Endpointing(), 0.02)
    assert closed == [(Token(2, 0, 1),)]
    closed, _ = advance_segments(GreedyState.start(0), certain("2" + 49 * "0"), Endpointing(), 0.02)
    assert closed == []


@both
@pytest.mark.parametrize("seed", range(6))
def test_the_division_of_the_frames_changes_no_segment(start, seed):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    # Speech and silence by turns; the beam is unsure of either.
    bias = torch.tensor([6.0 * ((t // 9) % 2) for t in range(300)])
    logits = 2.0 * torch.randn(300, 5, generator=generator)
    logits[:, 0] += bias
    log_probs = logits.log_softmax(-1)
    endpointing = Endpointing(silence=5, before_speech=8, longest=25, pause=2)

    whole, end = advance_segments(start, log_probs, endpointing, SECOND)
    assert len(whole) > 3

    found, stable, state = [], (), start
    position = 0
    while position < len(log_probs):
        count = rng.randint(0, 40)
        closed, state = advance_segments(state, log_probs[position : position + count], endpointing, SECOND)
        position += count
        for tokens in closed:
            found.append(stable + tokens)
            stable = ()
        drained, state = state.drain()
        stable += drained
    assert found == whole
    assert stable + state.tokens == end.tokens
    assert (state.frames, state.segment_start, state.trailing_silence) == (
        end.frames,
        end.segment_start,
        end.trailing_silence,
    )


@pytest.mark.parametrize("name", ["silence", "before_speech", "longest", "pause"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_rule_of_no_time_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; expected seconds above 0"):
        Endpointing(**{name: value})


def test_contradictory_rules_are_named():
    with pytest.raises(ValueError, match="before_speech is 5.0; expected at least 6.0"):
        Endpointing(silence=6.0)
