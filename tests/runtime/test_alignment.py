"""Word times and confidences from tokens and from how loud the audio is."""

import itertools

import numpy as np
import pytest

from fairseq_w2v2_light.runtime.alignment import REACH, forced_tokens, timed_words, token_confidences
from fairseq_w2v2_light.runtime.beam import Token
from fairseq_w2v2_light.runtime.text import Labels

LABELS = Labels(["<s>", "<pad>", "</s>", "<unk>", "|", "A", "B"])
BAR, A, B = 4, 5, 6


def words(tokens, loudness, confidences=None, first_frame=0.0, origin=0.0):
    confidences = [1.0] * len(tokens) if confidences is None else confidences
    return timed_words(LABELS, tokens, confidences, first_frame, 0.02, np.asarray(loudness, float), origin, 0.01)


def loud(seconds, *pauses):
    steps = np.full(round(seconds * 100), 20.0)
    for start, end in pauses:
        steps[round(start * 100) : round(end * 100)] = -3.0
    return steps


def test_a_word_reaches_to_the_pauses_around_it():
    (word,) = words([Token(A, 20, 21), Token(B, 24, 26)], loud(1, (0, 0.37), (0.54, 1)))
    assert word.text == "AB"
    assert word.start == pytest.approx(0.37) and word.end == pytest.approx(0.54)


def test_but_not_far_beyond_its_spikes():
    (word,) = words([Token(A, 20, 21), Token(B, 24, 26)], loud(1, (0, 0.1), (0.9, 1)))
    assert word.start == pytest.approx(0.40 - REACH) and word.end == pytest.approx(0.52 + REACH)


def test_without_a_pause_words_part_at_the_quietest_spot():
    steps = loud(1)
    steps[43] = 5.0
    first, second = words([Token(A, 20, 21), Token(BAR, 21, 22), Token(B, 23, 26)], steps)
    assert first.end == pytest.approx(0.43) == second.start
    # nothing is known of what is before the first word and after the last one
    assert first.start == pytest.approx(0.40) and second.end == pytest.approx(0.52)


def test_times_count_from_the_origin_of_the_recording():
    tokens, steps = [Token(A, 20, 21)], loud(1, (0, 0.37), (0.44, 1))
    (word,) = words(tokens, steps)
    (later,) = words(tokens, steps, first_frame=100.0, origin=100.0)
    assert (later.start, later.end) == pytest.approx((word.start + 100, word.end + 100))


@pytest.mark.parametrize("steps", [0, 1, 30])
def test_loudness_may_be_missing(steps):
    (word,) = words([Token(A, 20, 21)], loud(steps / 100))
    assert (word.start, word.end) == pytest.approx((0.4, 0.42))


@pytest.mark.parametrize("first_frame", [0.0, 0.0025625, 0.0075])  # frames need not begin where steps of loudness do
@pytest.mark.parametrize("level", [2, 50])  # some pauses, none
def test_words_never_overlap(first_frame, level):
    generator = np.random.RandomState(0)
    for _ in range(200):
        frames = np.sort(generator.choice(100, 20, replace=False)).tolist()
        tokens = [Token(generator.choice([BAR, A, B]), frame, frame + 1) for frame in frames]
        found = words(tokens, generator.standard_normal(200) * 5 + level, first_frame=first_frame)
        assert all(word.start < word.end for word in found)
        assert all(one.end <= two.start + 1e-9 for one, two in zip(found, found[1:]))


def test_confidence_is_the_geometric_mean_of_the_labels():
    tokens = [Token(A, 0, 1), Token(BAR, 1, 2), Token(A, 2, 3), Token(B, 3, 4)]
    first, second = words(tokens, loud(1), [0.5, 0.1, 0.9, 0.4])
    assert first.confidence == pytest.approx(0.5) and second.confidence == pytest.approx(0.6)
    assert words(tokens[:1], loud(1), [0.0])[0].confidence == 0.0


def test_a_labels_confidence_is_its_highest_probability():
    log_probs = np.log(np.float32([[0.6, 0.4], [0.3, 0.7], [0.2, 0.8], [0.9, 0.1]]))
    tokens = [Token(1, 0, 3), Token(0, 3, 3), Token(1, 4, 4)]  # a decoder may give a label no frame, or one too many
    assert token_confidences(log_probs, tokens) == pytest.approx([0.8, 0.9, 0.0])


def test_no_tokens_are_no_words():
    assert words([], loud(1)) == ()


def spelled(path):
    """The labels of a CTC path of symbols, 0 being the blank, with their frames."""
    runs, frame = [], 0
    for index, group in itertools.groupby(path):
        length = len(list(group))
        runs += [(index, frame, frame + length)] if index else []
        frame += length
    return runs


@pytest.mark.parametrize("labels", [(1,), (1, 2), (1, 1), (2, 2, 1), (1, 2, 1)])
@pytest.mark.parametrize("frames", [3, 5, 7])
def test_forced_labels_stand_where_the_best_of_all_paths_has_them(labels, frames):
    log_probs = np.log(np.random.RandomState(len(labels) + frames).dirichlet(np.ones(3), frames))
    paths = [
        path for path in itertools.product(range(3), repeat=frames) if [run[0] for run in spelled(path)] == [*labels]
    ]
    if not paths:
        with pytest.raises(ValueError, match=f"found {frames} frames for {len(labels)} labels; .* and 4 frames"):
            forced_tokens(log_probs, labels, 0)
        return
    best = max(paths, key=lambda path: log_probs[np.arange(frames), path].sum())
    assert forced_tokens(log_probs, labels, 0) == spelled(best)


def test_no_labels_cannot_be_forced():
    with pytest.raises(ValueError, match="expected labels"):
        forced_tokens(np.zeros((3, 3)), [], 0)
