"""Recordings cut into windows: at pauses, in overlapping windows, at digital silence; and windows joined again."""

import numpy as np
import pytest

from fairseq_w2v2_light.runtime.text import Labels
from fairseq_w2v2_light.runtime.windows import Windowing, cut_windows, join_frame

RATE = 1000
SHORT = Windowing(longest=4.0, overlap=1.0)
LABELS = Labels(["<s>", "<pad>", "</s>", "<unk>", "|", "A", "B", "C"])


def sound(seconds, level=0.3, seed=0):
    noise = np.random.RandomState(seed).standard_normal(round(seconds * RATE)).astype(np.float32)
    return noise * np.float32(level)


def hush(seconds, seed=1):
    return sound(seconds, 1e-4, seed)


def windows(*parts, windowing=SHORT, block=None, align=20):
    samples = np.concatenate(parts)
    blocks = [samples[start : start + (block or RATE)] for start in range(0, len(samples), block or RATE)]
    return samples, list(cut_windows(blocks, RATE, align, windowing))


def test_a_recording_that_fits_is_one_window_whatever_is_in_it():
    samples, (window,) = windows(np.zeros(500, np.float32), sound(1), hush(1), np.zeros(1000, np.float32))
    assert (window.samples == samples).all() and window.start == 0 and not window.joins


def test_no_audio_is_no_window():
    assert list(cut_windows([], RATE)) == [] and list(cut_windows([np.zeros(0, np.float32)] * 3, RATE)) == []


def test_one_sample_is_a_window():
    _, (window,) = windows(np.float32([0.5]))
    assert window.samples.tolist() == [0.5]


def test_a_long_recording_is_cut_at_each_long_pause():
    samples, found = windows(sound(2), hush(0.6), sound(1.5), hush(1.0), sound(2))
    assert [window.joins for window in found] == [False] * 3
    starts = [window.start / RATE for window in found]
    ends = [(window.start + len(window.samples)) / RATE for window in found]
    assert starts == pytest.approx([0, 2.45, 4.95], abs=0.05)
    assert ends == pytest.approx([2.15, 4.25, 7.1], abs=0.05)
    for window in found:
        assert (window.samples == samples[window.start :][: len(window.samples)]).all()


def test_shorter_pauses_are_for_stretches_that_are_too_long():
    _, found = windows(sound(2.5), hush(0.35), sound(2.5), hush(0.4), sound(1))
    assert [window.joins for window in found] == [False] * 3
    assert [round(window.start / RATE, 1) for window in found] == [0, 2.7, 5.6]


def test_without_pauses_windows_overlap_and_start_a_multiple_apart():
    samples, found = windows(sound(11), align=60)
    assert [window.joins for window in found] == [False] + [True] * (len(found) - 1)
    assert all(len(window.samples) <= 4 * RATE for window in found)
    for before, after in zip(found, found[1:]):
        shared = before.start + len(before.samples) - after.start
        assert 1.0 * RATE <= shared < 1.0 * RATE + 60 and (after.start - before.start) % 60 == 0
    assert found[-1].start + len(found[-1].samples) == len(samples)


def test_windows_overlap_where_it_is_quiet():
    _, (first, second, *_) = windows(sound(3), hush(0.12), sound(3))
    middle = (second.start + first.start + len(first.samples)) / 2 / RATE
    assert middle == pytest.approx(3.06, abs=0.15)


def test_a_stretch_may_end_with_a_pause_after_windows_that_overlap():
    _, found = windows(sound(6), hush(1), sound(2))
    assert [window.joins for window in found][-2:] == [True, False]
    assert found[-1].start / RATE == pytest.approx(6.85, abs=0.05)


@pytest.mark.parametrize("block", [1, 7, 333, 100000])
def test_blocks_change_nothing(block):
    parts = [sound(5), hush(0.6), sound(1), np.zeros(400, np.float32), sound(6, 0.05), hush(2), sound(1)]
    _, expected = windows(*parts)
    _, found = windows(*parts, block=block)
    assert len(found) == len(expected) > 4
    for one, other in zip(found, expected):
        assert (one.start, one.joins, one.loudness_start) == (other.start, other.joins, other.loudness_start)
        assert (one.samples == other.samples).all() and np.allclose(one.loudness, other.loudness)


@pytest.mark.parametrize("seconds", [0, 0.5, 3.9, 7, 12.3])
@pytest.mark.parametrize("error", [ValueError("broken"), OSError(5, "broken")])
def test_a_recording_that_breaks_ends_there(seconds, error):
    samples = sound(seconds)

    def blocks():
        yield from np.array_split(samples, 7)
        raise error

    found, (_, expected) = [], windows(samples)
    with pytest.raises(type(error), match="broken"):
        found.extend(cut_windows(blocks(), RATE, 20, SHORT))
    assert [(window.start, window.joins) for window in found] == [(window.start, window.joins) for window in expected]
    assert all((one.samples == other.samples).all() for one, other in zip(found, expected))


def test_nothing_but_pauses_is_left_out():
    samples, found = windows(sound(5), hush(3), sound(0.2), hush(0.7), sound(9), hush(0.3), sound(0.1), hush(1))
    heard = np.zeros(len(samples), bool)
    for window in found:
        heard[window.start : window.start + len(window.samples)] = True
    assert np.abs(samples[~heard]).max() < 1e-3 and heard[np.abs(samples) > 1e-3].all()


def test_quiet_speech_after_loud_speech_is_heard():
    samples, found = windows(sound(3), hush(1), sound(3, 0.003), hush(1), sound(3))
    heard = np.zeros(len(samples), bool)
    for window in found:
        heard[window.start : window.start + len(window.samples)] = True
    assert heard[4 * RATE : 7 * RATE].all()


@pytest.mark.parametrize("level", [0.0, 1e-4, 0.3])
def test_an_even_recording_has_no_pauses(level):
    samples, found = windows(sound(13, level))
    if level:
        assert found[0].start == 0 and found[-1].start + len(found[-1].samples) == len(samples)
        assert all(window.joins for window in found[1:])
    else:
        assert found == []  # nothing was recorded


def test_parts_between_digital_silence_are_cut_as_recordings_of_their_own():
    parts = [sound(3, seed=2), sound(0.5, seed=3), sound(9, seed=4), np.concatenate([sound(1), hush(0.7), sound(1)])]
    expected, start = [], 0
    joined = [np.zeros(700, np.float32)]
    for part, zeros in zip(parts, (250, 999, 5000, 800)):
        start = sum(map(len, joined))
        expected += [(start + window.start, window) for window in windows(part)[1]]
        joined += [part, np.zeros(zeros, np.float32)]
    for block in (3, 1000):
        _, found = windows(*joined, block=block)
        assert [(window.start, len(window.samples)) for window in found] == [
            (start, len(window.samples)) for start, window in expected
        ]
        for window, (_, alone) in zip(found, expected):
            assert (window.samples == alone.samples).all() and window.joins == alone.joins


def test_zeros_in_the_closure_of_a_stop_part_nothing():
    _, found = windows(sound(3), np.zeros(200, np.float32), sound(3))
    assert found[1].joins


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(longest=0.0), "longest"),
        (dict(pause=float("nan")), "pause"),
        (dict(edge=-1.0), "edge"),
        (dict(overlap=7.0), "overlap is 7.0; expected less than a third of longest=20.0"),
    ],
)
def test_windowing_says_what_is_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        Windowing(**values)


def log_probs(symbols, certainty=0.95):
    """(frames, symbols): each frame's symbol, by its letter (. for blank), with that probability."""
    indices = [LABELS.blank if symbol == "." else LABELS.symbols.index(symbol) for symbol in symbols]
    probabilities = np.full((len(indices), len(LABELS)), (1 - certainty) / (len(LABELS) - 1), np.float32)
    probabilities[np.arange(len(indices)), indices] = certainty
    return np.log(probabilities)


def joined(before, after):
    join = join_frame(log_probs(before), log_probs(after), LABELS)
    return before[:join] + after[join:]


def test_windows_that_agree_join_between_words():
    text = ".A.B.|..B.C.|..A.A.|..C.B.|."
    join = join_frame(log_probs(text), log_probs(text), LABELS)
    assert text[join] == "." and text[:join].rstrip(".")[-1] == "|"


def test_windows_join_where_they_agree():
    # the first lacks context at its end, the second at its beginning
    before = "A.|..B.|..A.|..C.|..B..B..C."
    after = "..C..C.|..A.|..C.|..B.|..C.|"
    assert joined(before, after).replace(".", "") == "A|B|A|C|B|C|"


@pytest.mark.parametrize("shift", [1, 2])
def test_no_label_is_lost_or_doubled_where_spikes_are_frames_apart(shift):
    word = "..A..B..|...C..A..|....B..C..|..."
    blanks = [position for position, symbol in enumerate(word) if symbol == "."]
    for position in blanks:
        # the second window's spikes come earlier from here on
        after = word[:position] + word[position + 1 :].replace("...", "." * (3 - shift), 1)
        after = after.ljust(len(word), ".")
        assert joined(word, after).replace(".", "") == word.replace(".", "")


@pytest.mark.parametrize("frames", [0, 1, 2, 3])
def test_few_frames_join_somewhere(frames):
    few = log_probs("." * frames) if frames else np.zeros((0, len(LABELS)), np.float32)
    assert 0 <= join_frame(few, few, LABELS) <= frames
