"""CTC decoding against the enumeration of every alignment."""

import itertools
import math
import time

import pytest
import torch

from fairseq_w2v2_light.runtime.decode import (
    Hypothesis,
    best_alignment,
    greedy,
    labelling_log_probs,
    prefix_beam_search,
)


def random_log_probs(*shape, seed=0, sharpness=1.0):
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (sharpness * logits).log_softmax(-1)


def collapse(path, blank):
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != blank)


def enumerate_labellings(log_probs, blank):
    """{labelling: (log-probability, best path)} by walking every path through (time, symbols)."""
    totals, best = {}, {}
    frames, symbols = log_probs.shape
    for path in itertools.product(range(symbols), repeat=frames):
        score = sum(log_probs[t, s].item() for t, s in enumerate(path))
        labelling = collapse(path, blank)
        totals[labelling] = totals.get(labelling, 0.0) + math.exp(score)
        if labelling not in best or score > best[labelling][0]:
            best[labelling] = (score, path)
    return {labelling: (math.log(total), best[labelling][1]) for labelling, total in totals.items()}


def first_frames(path, blank):
    return tuple(t for t, s in enumerate(path) if s != blank and (t == 0 or path[t - 1] != s))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("blank", [0, 2])
def test_a_wide_beam_finds_every_labelling_with_its_exact_probability(seed, blank):
    log_probs = random_log_probs(1, 5, 3, seed=seed)
    expected = enumerate_labellings(log_probs[0], blank)
    found = prefix_beam_search(log_probs, blank=blank, beam=400, nbest=400, max_symbols=None, min_log_prob=None)[0]
    assert {h.tokens for h in found} == set(expected)
    for h in found:
        assert h.score == pytest.approx(expected[h.tokens][0], abs=1e-9)
    scores = [h.score for h in found]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("seed", range(20))
def test_a_small_beam_returns_the_most_probable_labelling(seed):
    log_probs = random_log_probs(1, 6, 3, seed=seed)
    expected = max(enumerate_labellings(log_probs[0], 0).items(), key=lambda item: item[1][0])
    best = prefix_beam_search(log_probs, beam=12, nbest=1)[0][0]
    assert best.tokens == expected[0]
    assert best.score == pytest.approx(expected[1][0], abs=1e-9)


def test_the_beam_beats_greedy_where_alignments_add_up():
    # Hannun's example: the best path is blank, blank; the best labelling is "a".
    log_probs = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]], dtype=torch.float64).log()
    assert greedy(log_probs)[0].tokens == ()
    best = prefix_beam_search(log_probs, beam=2)[0][0]
    assert best.tokens == (1,)
    assert math.exp(best.score) == pytest.approx(0.64)


def test_a_repeated_label_needs_a_blank_between():
    # Symbols: blank, a. Certain path a blank a is "aa"; a a is "a".
    certain = torch.full((2, 3, 2), -40.0)
    for t, (first, second) in enumerate([(1, 1), (0, 1), (1, 1)]):
        certain[0, t, first] = certain[1, t, second] = 0.0
    assert [h.tokens for h in greedy(certain)] == [(1, 1), (1,)]
    assert [h[0].tokens for h in prefix_beam_search(certain, beam=4)] == [(1, 1), (1,)]


@pytest.mark.parametrize("seed", range(6))
def test_frames_are_those_of_the_most_probable_alignment(seed):
    log_probs = random_log_probs(1, 6, 3, seed=seed)
    labellings = enumerate_labellings(log_probs[0], 0)
    for tokens, (_, path) in labellings.items():
        assert best_alignment(log_probs[0], tokens) == first_frames(path, 0)
    assert greedy(log_probs)[0].frames == best_alignment(log_probs[0], greedy(log_probs)[0].tokens)


def test_greedy_takes_the_argmax_of_each_frame_and_scores_the_labelling():
    log_probs = random_log_probs(1, 6, 3, seed=3)
    path = tuple(log_probs[0].argmax(-1).tolist())
    score = enumerate_labellings(log_probs[0], 0)[collapse(path, 0)][0]
    hypothesis = greedy(log_probs)[0]
    assert hypothesis == Hypothesis(collapse(path, 0), pytest.approx(score, abs=1e-9), first_frames(path, 0))


def test_frames_past_the_length_change_nothing():
    log_probs = random_log_probs(3, 9, 4, seed=1)
    lengths = torch.tensor([9, 4, 0])
    noisy = log_probs.clone()
    noisy[1, 4:] = random_log_probs(5, 4, seed=2)
    noisy[2] = random_log_probs(9, 4, seed=4)
    assert greedy(noisy, lengths) == greedy(log_probs, lengths)
    assert prefix_beam_search(noisy, lengths, beam=5, nbest=3) == prefix_beam_search(log_probs, lengths, 0, 5, 3)
    assert greedy(log_probs, lengths)[1] == greedy(log_probs[1:2, :4])[0]


def test_an_utterance_without_frames_is_the_empty_labelling():
    log_probs, lengths = random_log_probs(1, 3, 4), torch.tensor([0])
    assert greedy(log_probs, lengths) == [Hypothesis((), 0.0, ())]
    assert prefix_beam_search(log_probs, lengths, beam=3) == [[Hypothesis((), 0.0, ())]]


def test_impossible_symbols_are_never_decoded():
    log_probs = torch.tensor([[[0.5, 0.5, 0.0]] * 3]).log()
    found = prefix_beam_search(log_probs, beam=10, nbest=10, max_symbols=None, min_log_prob=None)[0]
    assert {h.tokens for h in found} == {(), (1,), (1, 1)}
    assert sum(math.exp(h.score) for h in found) == pytest.approx(1.0, abs=1e-6)


def test_frames_that_are_certainly_blank_add_nothing():
    # A fairseq CTC model marks padding by blank = 0, everything else -inf.
    log_probs = random_log_probs(1, 7, 3, seed=5)
    padded = torch.full((1, 10, 3), -math.inf, dtype=torch.float64)
    padded[..., 0] = 0.0
    padded[:, :7] = log_probs
    wanted = prefix_beam_search(log_probs, beam=8, nbest=4)[0]
    got = prefix_beam_search(padded, beam=8, nbest=4)[0]
    assert [h.tokens for h in got] == [h.tokens for h in wanted]
    assert [h.score for h in got] == pytest.approx([h.score for h in wanted])


def test_pruning_leaves_peaky_outputs_alone():
    log_probs = random_log_probs(2, 40, 20, seed=0, sharpness=6.0)
    pruned = prefix_beam_search(log_probs, beam=8, nbest=3, max_symbols=8, min_log_prob=-12.0)
    full = prefix_beam_search(log_probs, beam=8, nbest=3, max_symbols=None, min_log_prob=None)
    assert [[h.tokens for h in n] for n in pruned] == [[h.tokens for h in n] for n in full]


def test_pruning_every_symbol_leaves_the_empty_labelling():
    log_probs = random_log_probs(1, 4, 3)
    assert [h.tokens for h in prefix_beam_search(log_probs, beam=4, min_log_prob=1.0)[0]] == [()]


def test_a_labelling_longer_than_the_frames_has_no_probability():
    log_probs = random_log_probs(3, 4)
    assert labelling_log_probs(log_probs, [(1, 1), (1, 1, 1), ()])[1] == -math.inf
    with pytest.raises(ValueError, match="3 tokens do not fit into 3 frames"):
        best_alignment(log_probs, (1, 1, 1))


def test_ten_seconds_of_speech_take_well_under_a_second():
    log_probs = random_log_probs(1, 500, 32, sharpness=2.0)
    prefix_beam_search(log_probs[:, :5], beam=10)
    start = time.process_time()
    prefix_beam_search(log_probs, beam=10, nbest=5)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(log_probs=torch.zeros(3, 4)), r"shape \(3, 4\); expected \(batch, time, symbols\)"),
        (dict(log_probs=torch.zeros(1, 3, 4), lengths=torch.tensor([4])), r"lengths is \[4\]; expected 1 .* 0 to 3"),
        (dict(log_probs=torch.zeros(1, 3, 4), blank=4), "blank is 4; expected an index below 4"),
        (dict(log_probs=torch.full((1, 3, 4), math.nan)), "NaN"),
        (dict(log_probs=torch.zeros(1, 3, 4), beam=0), "beam is 0"),
        (dict(log_probs=torch.zeros(1, 3, 4), beam=2, nbest=3), "nbest is 3; expected 1 to beam=2"),
        (dict(log_probs=torch.zeros(1, 3, 4), max_symbols=0), "max_symbols is 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        prefix_beam_search(**arguments)
