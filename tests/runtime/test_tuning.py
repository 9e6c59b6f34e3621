"""Sweeps over the weights of a language model decoder."""

from types import SimpleNamespace

import numpy as np
import pytest

from fairseq_w2v2_light.runtime.beam import Token
from fairseq_w2v2_light.runtime.lm import Weights
from fairseq_w2v2_light.runtime.text import Labels
from fairseq_w2v2_light.runtime.tuning import draw, error_totals, grid, sweep

LABELS = Labels(["<s>", "<pad>", "</s>", "<unk>", "|", "a", "b"])


class Fake:
    """Decodes `a` with a positive word score, else `b`; the language model weight adds an `a` to utterances."""

    labels = LABELS

    def __init__(self, weights=None):
        self.weights = weights or Weights()

    def with_weights(self, weights):
        return Fake(weights)

    def decode(self, log_probs):
        index = 5 if self.weights.word_score > 0 else 6
        tokens = (Token(index, 0, 1), Token(4, 1, 2))
        return tokens + (Token(5, 2, 3),) * int(self.weights.lm_weight)


def test_a_grid_has_every_combination_once():
    weights = grid([1, 2], [0, 0, -1], [0.5])
    assert weights == [Weights(1, 0, 0.5), Weights(1, -1, 0.5), Weights(2, 0, 0.5), Weights(2, -1, 0.5)]


def test_random_combinations_lie_between_the_ends_and_follow_the_seed():
    drawn = draw(50, [0, 1, 4], [-2, 2], [1], seed=3)
    assert drawn == draw(50, [0, 1, 4], [-2, 2], [1], seed=3) != draw(50, [0, 1, 4], [-2, 2], [1], seed=4)
    assert all(0 <= w.lm_weight <= 4 and -2 <= w.word_score <= 2 and w.sil_score == 1 for w in drawn)
    assert len({w.lm_weight for w in drawn}) > 30


def test_the_best_trial_comes_first_and_the_earlier_one_of_equals():
    frames, told = [np.zeros((3, 7))] * 2, []
    candidates = grid([0, 1, 2], [-1, 1, 2], [0])
    trials = sweep(Fake(), frames, ["a", "a"], candidates, told.append)
    assert [trial.weights for trial in told] == candidates
    assert trials[0].weights == Weights(0, 1, 0) and trials[1].weights == Weights(0, 2, 0)
    assert trials[0].totals.words.errors == 0
    errors = [trial.errors for trial in trials]
    assert errors == sorted(errors) and errors[-1][0] == 4


def test_equal_word_errors_are_told_apart_by_characters():
    frames = [np.zeros((3, 7))]
    trials = sweep(Fake(), frames, ["b aaaa"], [Weights(1, -1, 0), Weights(3, -1, 0)])
    assert [trial.totals.words.errors for trial in trials] == [1, 1]
    assert [trial.weights.lm_weight for trial in trials] == [3, 1]


def test_as_many_references_as_utterances():
    with pytest.raises(ValueError, match="1 utterances with 2 references"):
        error_totals(SimpleNamespace(decode=None), LABELS, [np.zeros((3, 7))], ["a", "b"])


def test_weights_that_are_no_numbers():
    with pytest.raises(ValueError, match="sil_score is inf"):
        Weights(sil_score=float("inf"))
