"""Incremental CTC decoding: the whole utterance at once and frame by frame are the same."""

import io
import random
import time

import numpy as np
import pytest
import torch

from fairseq_w2v2_light.runtime.decode import best_alignment, greedy, prefix_beam_search
from fairseq_w2v2_light.runtime.incremental import BeamState, GreedyState, Token, decoder_from_dict

NEVER = (1,)


def random_log_probs(time, symbols, seed=0, sharpness=2.0):
    logits = torch.randn(time, symbols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (sharpness * logits).log_softmax(-1)


def certain(text, symbols=4):
    """One frame a digit, which is all but certainly that symbol."""
    log_probs = np.full((len(text), symbols), -30.0)
    log_probs[np.arange(len(text)), [int(digit) for digit in text]] = 0.0
    return log_probs


def split_at_random(log_probs, rng):
    """Pieces of 0 to 7 frames."""
    while len(log_probs):
        count = rng.randint(0, 7)
        yield log_probs[:count]
        log_probs = log_probs[count:]


def starts(**beam_options):
    return [GreedyState.start(0, NEVER), BeamState.start(0, 6, NEVER, **beam_options)]


def both(name):
    return pytest.mark.parametrize("start", starts(max_pending=12), ids=["greedy", "beam"])(name)


def observed(state):
    return state.tokens, state.frames, state.trailing_silence, state.segment_start, state.is_empty


def flat(value):
    """A saved state as nested lists, for comparison."""
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


@both
@pytest.mark.parametrize("seed", range(5))
def test_the_division_of_the_frames_changes_nothing(start, seed):
    log_probs = random_log_probs(150, 6, seed)
    whole = start.advance(log_probs)
    state = start
    for chunk in split_at_random(log_probs, random.Random(seed)):
        state = state.advance(chunk)
    assert flat(state.to_dict()) == flat(whole.to_dict())
    assert observed(state) == observed(whole)


@both
@pytest.mark.parametrize("seed", range(5))
def test_when_a_state_is_drained_changes_nothing(start, seed):
    log_probs, rng = random_log_probs(150, 6, seed), random.Random(seed)
    stable, state = (), start
    for chunk in split_at_random(log_probs, rng):
        state = state.advance(chunk)
        if rng.random() < 0.5:
            drained, state = state.drain()
            stable += drained
    last, state = state.flush()
    assert stable + last == start.advance(log_probs).flush()[0]


@both
def test_an_old_state_may_be_advanced_in_another_way(start):
    log_probs, other = random_log_probs(40, 5, 1), random_log_probs(40, 5, 2)
    old = start.advance(log_probs[:20])
    before = flat(old.to_dict())
    first, second = old.advance(log_probs[20:]), old.advance(other)
    old.drain(), old.flush()
    assert flat(old.to_dict()) == before
    assert observed(first) == observed(start.advance(log_probs))
    assert observed(second) == observed(start.advance(torch.cat([log_probs[:20], other])))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_that_of_whole_utterances(seed):
    log_probs = random_log_probs(80, 5, seed)
    expected = greedy(log_probs[None])[0]
    state = GreedyState.start(0)
    for frame in log_probs:
        state = state.advance(frame[None])
    assert tuple(token.index for token in state.tokens) == expected.tokens
    assert tuple(token.start for token in state.tokens) == expected.frames


@pytest.mark.parametrize("seed", range(8))
def test_a_wide_beam_finds_the_best_labelling_and_its_best_alignment(seed):
    log_probs = random_log_probs(7, 4, seed, sharpness=1.0)
    expected = prefix_beam_search(log_probs[None], beam=3000, max_symbols=None, min_log_prob=None)[0][0]
    state = BeamState.start(0, 3000, max_symbols=None, min_log_prob=None)
    for frame in log_probs:
        state = state.advance(frame[None])
    tokens = state.tokens
    assert tuple(token.index for token in tokens) == expected.tokens
    assert tuple(token.start for token in tokens) == best_alignment(log_probs, expected.tokens)


@pytest.mark.parametrize("seed", range(5))
def test_a_narrow_beam_is_the_search_over_whole_utterances(seed):
    log_probs = random_log_probs(120, 8, seed, sharpness=3.0)
    # nbest=1: the one that the search itself puts first.
    expected = prefix_beam_search(log_probs[None], beam=5, nbest=1)[0][0].tokens
    stable, state = (), BeamState.start(0, 5)
    for chunk in log_probs.split(7):
        drained, state = state.advance(chunk).drain()
        stable += drained
    assert tuple(token.index for token in stable + state.tokens) == expected


@both
def test_tokens_have_the_frames_of_their_runs(start):
    state = start.advance(certain("0022300200"))
    assert state.tokens == (Token(2, 2, 4), Token(3, 4, 5), Token(2, 7, 8))


def test_the_alignment_of_a_repeated_token_has_a_blank_between():
    # Most alignments are those of 2 2, but the best path, 2 throughout, is one of 2.
    log_probs = certain("22222")
    log_probs[1:4] = np.log([[0.28, 0.1, 0.52, 0.1], [0.32, 0.1, 0.48, 0.1], [0.30, 0.1, 0.50, 0.1]])
    state = BeamState.start(0, 50).advance(log_probs)
    assert state.tokens == (Token(2, 0, 2), Token(2, 3, 5))


@both
@pytest.mark.parametrize("seed", range(5))
def test_frames_of_tokens_are_in_order(start, seed):
    tokens = start.advance(random_log_probs(300, 6, seed)).tokens
    bounds = [frame for token in tokens for frame in (token.start, token.end)]
    assert bounds == sorted(bounds)
    assert 0 <= bounds[0] and bounds[-1] <= 300


@both
def test_a_run_goes_on_over_a_drain(start):
    _, state = start.advance(certain("0322")).drain()
    assert state.advance(certain("20")).tokens[-1] == Token(2, 2, 5)


@both
def test_a_drained_token_is_repeated_only_after_a_blank(start):
    stable, state = start.advance(certain("03220")).drain()
    more, state = state.advance(certain("00")).drain()
    again = state.advance(certain("2"))
    assert [token.index for token in stable + more + again.tokens] == [3, 2, 2]
    stable, state = start.advance(certain("0322")).drain()
    assert [token.index for token in stable + state.advance(certain("22")).tokens] == [3, 2]


def test_greedy_drains_all_but_a_token_that_may_go_on():
    stable, state = GreedyState.start(0).advance(certain("0223")).drain()
    assert stable == (Token(2, 1, 3),)
    assert state.tokens == (Token(3, 3, 4),)
    stable, state = state.advance(certain("0")).drain()
    assert stable == (Token(3, 3, 4),)
    assert state.tokens == ()


def test_the_beam_drains_what_all_its_prefixes_share():
    # After 2 3, the next token is 2 or 3: nobody knows.
    unsure = np.log(np.array([[0.02, 1e-9, 0.49, 0.49]]))
    log_probs = np.concatenate([certain("02030"), unsure, certain("0")])
    stable, state = BeamState.start(0, 3, NEVER).advance(log_probs).drain()
    assert [token.index for token in stable] == [2]
    assert [token.index for token in state.tokens][:1] == [3]


@both
@pytest.mark.parametrize("seed", range(3))
def test_what_was_drained_is_never_revised(start, seed):
    log_probs = random_log_probs(200, 6, seed)
    stable, state = (), start
    for chunk in log_probs.split(3):
        drained, state = state.advance(chunk).drain()
        stable += drained
    assert stable == start.advance(log_probs).tokens[: len(stable)]
    assert len(stable) > 20


@both
def test_a_flush_ends_the_labelling_and_keeps_counting_frames(start):
    tokens, state = start.advance(certain("0220")).flush()
    assert tokens == (Token(2, 1, 3),)
    assert observed(state) == ((), 4, 0, 4, True)
    # A fresh labelling: what was the last token may come at once.
    assert state.advance(certain("20")).tokens == (Token(2, 4, 5),)


@both
def test_trailing_silence_counts_since_the_last_token_or_flush(start):
    assert start.advance(certain("000")).trailing_silence == 3
    state = start.advance(certain("0020")).advance(certain("00"))
    assert state.trailing_silence == 3
    assert state.flush()[1].advance(certain("00")).trailing_silence == 2
    assert state.advance(certain("3")).trailing_silence == 0


@pytest.mark.parametrize("start", [GreedyState.start(0, silent=(3,)), BeamState.start(0, 4, silent=(3,))])
def test_a_silent_label_is_decoded_but_is_no_speech(start):
    state = start.advance(certain("0300"))
    assert state.tokens == (Token(3, 1, 2),)
    assert state.trailing_silence == 4
    assert state.is_empty
    assert not start.advance(certain("0302")).is_empty


@both
def test_a_state_whose_tokens_are_all_drained_is_not_empty(start):
    _, state = start.advance(certain("020300")).drain()
    assert not state.is_empty
    assert not state.drain()[1].is_empty


@both
def test_what_is_never_decoded_is_not_decoded(start):
    log_probs = certain("0120")
    log_probs[1, 3] = -1.0
    assert [token.index for token in start.advance(log_probs).tokens] == [3, 2]


@both
@pytest.mark.parametrize("symbols", [5, 40])
def test_a_saved_state_goes_on_identically(start, symbols):
    log_probs = random_log_probs(60, symbols, seed=3)
    _, state = start.advance(log_probs[:31]).drain()
    file = io.BytesIO()
    torch.save(state.to_dict(), file)
    file.seek(0)
    restored = decoder_from_dict(torch.load(file, weights_only=True))
    assert flat(restored.to_dict()) == flat(state.to_dict())
    expected, found = state.advance(log_probs[31:]), restored.advance(log_probs[31:])
    assert flat(found.to_dict()) == flat(expected.to_dict())
    assert observed(found) == observed(expected)


def saved_size(state):
    file = io.BytesIO()
    torch.save(state.to_dict(), file)
    return file.getbuffer().nbytes


@pytest.mark.parametrize("start", [GreedyState.start(0), BeamState.start(0, 4, max_pending=20)])
def test_a_drained_state_stays_small(start):
    sizes, state = [], start
    for seed in range(40):
        _, state = state.advance(random_log_probs(50, 6, seed, sharpness=1.0)).drain()
        sizes.append(saved_size(state))
    assert max(sizes[20:]) <= max(sizes[:20]) * 1.2


def test_no_more_than_max_pending_tokens_are_undecided():
    # 2 or 3, which nothing decides, and then 60 certain tokens.
    unsure = np.log(np.array([[1e-9, 1e-9, 0.501, 0.499]]))
    log_probs = np.concatenate([unsure, certain("023" * 30)])
    free = BeamState.start(0, 2, max_pending=1000).advance(log_probs)
    assert free.drain()[0] == ()
    stable, bound = BeamState.start(0, 2, max_pending=10).advance(log_probs).drain()
    assert len(bound.tokens) <= 10
    assert stable + bound.tokens == free.tokens


def test_a_chunk_takes_little_time():
    log_probs = random_log_probs(24, 32, sharpness=4.0).float()

    def seconds(state, times):
        start = time.process_time()
        for _ in range(times):
            _, state = state.advance(log_probs).drain()
        return (time.process_time() - start) / times

    assert seconds(GreedyState.start(0, NEVER), 50) < 1e-3
    assert seconds(BeamState.start(0, 10, NEVER), 10) < 20e-3


@both
def test_numpy_and_torch_in_any_precision_are_the_same(start):
    log_probs = random_log_probs(30, 5).float()
    expected = observed(start.advance(log_probs.numpy()))
    assert observed(start.advance(log_probs)) == expected
    assert observed(start.advance(log_probs.double().requires_grad_())) == expected
    assert start.advance(log_probs.bfloat16()).frames == 30


@both
def test_an_impossible_frame_keeps_what_was_decoded(start):
    state = start.advance(np.concatenate([certain("02"), np.full((1, 4), -np.inf), certain("0")]))
    assert [token.index for token in state.tokens] == [2]


def test_an_impossible_frame_adds_nothing_without_pruning_either():
    start = BeamState.start(0, 3, NEVER, max_symbols=None, min_log_prob=None)
    state = start.advance(np.concatenate([certain("02"), np.full((1, 4), -np.inf)]))
    assert [token.index for token in state.tokens] == [2]


@both
@pytest.mark.parametrize(
    "log_probs, message",
    [
        (np.zeros(4), r"shape \(4,\); expected \(time, symbols\)"),
        (np.zeros((3, 1)), r"never is \(1,\); expected indices below 1 symbols"),
        (np.full((2, 4), np.nan), "NaN"),
    ],
)
def test_bad_log_probs_are_named(start, log_probs, message):
    with pytest.raises(ValueError, match=message):
        start.advance(log_probs)


@pytest.mark.parametrize("options, message", [({"beam": 0}, "beam is 0"), ({"max_pending": 0}, "max_pending is 0")])
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BeamState.start(0, **{"beam": 4, **options})


def test_what_is_no_saved_state_is_named():
    with pytest.raises(ValueError, match="decoder is None; expected one of greedy, beam"):
        decoder_from_dict({})
    saved = BeamState.start(0, 4).to_dict()
    del saved["settled"]
    with pytest.raises(ValueError, match="beam decoder state without 'settled'"):
        decoder_from_dict(saved)
