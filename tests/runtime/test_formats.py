"""Transcripts as text, JSON, subtitles and CTM, read again by validators that know only the formats."""

import json
import re

import numpy as np
import pytest

from fairseq_w2v2_light.runtime.alignment import TimedWord
from fairseq_w2v2_light.runtime.formats import SUFFIXES, cues, one_line, printable, render
from fairseq_w2v2_light.runtime.recognizer import Transcript


def transcript(words, source="some where/a b.wav", error=None):
    words = tuple(words)
    return Transcript(" ".join(word.text for word in words), words, 9.5, source, error)


def spoken(count, seed=0, pause=0.05, text=None):
    """Words one after another, most with hardly a pause."""
    generator = np.random.RandomState(seed)
    clock, words = 0.1, []
    for _ in range(count):
        length = 0.1 + 0.5 * generator.rand()
        words.append(TimedWord(text or "x" * generator.randint(1, 12), clock, clock + length, generator.rand()))
        clock += length + (1.5 if generator.rand() < 0.1 else pause * generator.rand())
    return words


def milliseconds(text, mark):
    match = re.fullmatch(rf"(\d\d+):([0-5]\d):([0-5]\d){re.escape(mark)}(\d\d\d)", text)
    assert match, text
    hours, minutes, seconds, rest = map(int, match.groups())
    return ((hours * 60 + minutes) * 60 + seconds) * 1000 + rest


def check_times(times):
    for start, end in times:
        assert start < end
    for (_, end), (start, _) in zip(times, times[1:]):
        assert end <= start


def read_srt(content):
    if not content:
        return []
    assert content.endswith("\n") and not content.endswith("\n\n")
    found = []
    for number, block in enumerate(content[:-1].split("\n\n"), start=1):
        count, times, *lines = block.split("\n")
        assert count == str(number) and lines and all(line.strip() for line in lines)
        assert not any("-->" in line for line in lines)
        start, end = times.split(" --> ")
        found.append((milliseconds(start, ","), milliseconds(end, ","), lines))
    check_times([cue[:2] for cue in found])
    return found


def read_vtt(content):
    header, *blocks = content.rstrip("\n").split("\n\n")
    assert header == "WEBVTT" and content.endswith("\n")
    found = []
    for block in blocks:
        times, *lines = block.split("\n")
        assert lines and all(line.strip() for line in lines)
        for line in lines:
            assert "<" not in line and ">" not in line and not re.search(r"&(?!(amp|lt|gt);)", line)
        start, end = times.split(" --> ")
        lines = [line.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for line in lines]
        found.append((milliseconds(start, "."), milliseconds(end, "."), lines))
    check_times([cue[:2] for cue in found])
    return found


@pytest.mark.parametrize("form, read", [("srt", read_srt), ("vtt", read_vtt)])
@pytest.mark.parametrize("count", [0, 1, 2, 500])
def test_subtitles_are_valid_and_hold_every_word(form, read, count):
    words = spoken(count)
    found = read(render(transcript(words), form))
    assert " ".join(line for *_, lines in found for line in lines).split() == [word.text for word in words]
    assert bool(found) == bool(words)


@pytest.mark.parametrize("seed", range(5))
def test_subtitles_can_be_read(seed):
    words = spoken(400, seed)
    found = cues(words)
    for cue in found:
        assert 1 <= len(cue.lines) <= 2 and all(len(line) <= 42 for line in cue.lines)
        assert cue.end - cue.start <= 7000
    position = 0
    for cue, following in zip(found, [*found[1:], None]):
        count = len(" ".join(cue.lines).split())
        first, last = words[position], words[position + count - 1]
        position += count
        assert cue.start == pytest.approx(first.start * 1000, abs=1) and cue.end >= last.end * 1000 - 1
        # a short one stays for a second where there is time
        if cue.end > last.end * 1000 + 1:
            assert cue.end - cue.start <= 1000
        elif cue.end - cue.start < 999:
            assert following is not None and following.start <= cue.start + 1000


def test_subtitles_part_at_pauses():
    words = [TimedWord(f"w{n}", n * 0.5 + 2.0 * (n >= 3), n * 0.5 + 0.45 + 2.0 * (n >= 3), 1.0) for n in range(6)]
    assert [cue.lines for cue in cues(words)] == [("w0 w1 w2",), ("w3 w4 w5",)]


def test_a_word_longer_than_a_line_stands_alone():
    words = [TimedWord(text, n, n + 0.9, 1.0) for n, text in enumerate(["a", "b" * 100, "c", "d"])]
    lines = [line for cue in cues(words) for line in cue.lines]
    assert "b" * 100 in lines and all(len(cue.lines) <= 2 for cue in cues(words))


def test_many_words_without_any_pause_are_parted_quickly():
    words = [TimedWord("aa", n * 0.1, n * 0.1 + 0.1, 1.0) for n in range(20000)]
    assert sum(len(" ".join(cue.lines).split()) for cue in cues(words)) == 20000


def test_words_of_no_length_still_give_valid_times():
    words = [TimedWord("a", 1.0, 1.0, 1.0)] * 40 + [TimedWord("b", 0.5, 0.5, 1.0)]
    read_srt(render(transcript(words), "srt"))
    read_vtt(render(transcript(words), "vtt"))


def test_hours_are_counted():
    word = TimedWord("late", 3600 * 101 + 61.001, 3600 * 101 + 62.9996, 1.0)
    assert "101:01:01,001 --> 101:01:03,000\n" in render(transcript([word]), "srt")


@pytest.mark.parametrize("text", ["<unk>", "&amp;", "-->", "a&b<c>", "ß\u0301"])
def test_any_label_can_be_a_subtitle(text):
    (cue,) = read_vtt(render(transcript([TimedWord(text, 0, 1, 1)]), "vtt"))
    assert cue[2] == [text]
    assert len(read_srt(render(transcript([TimedWord(text, 0, 1, 1)]), "srt"))) == 1


@pytest.mark.parametrize("count", [0, 3])
def test_json_is_one_object_on_a_line(count):
    made = transcript([*spoken(count), TimedWord("é\u2028", 5, 6, 1)] if count else [], error="bad\n")
    content = render(made, "json")
    assert content.count("\n") == 1 and content.endswith("\n")
    values = json.loads(content)
    assert values["text"] == made.text and values["seconds"] == 9.5 and values["source"] == made.source
    assert values["error"] == "bad\n"
    for found, word in zip(values["words"], made.words):
        assert found["word"] == word.text and found["start"] == pytest.approx(word.start, abs=6e-4)
        assert found["end"] == pytest.approx(word.end, abs=6e-4)
        assert found["confidence"] == pytest.approx(word.confidence, abs=6e-5)
    assert len(values["words"]) == len(made.words)


def test_ctm_has_six_columns_in_order_of_time():
    words = spoken(50, pause=0)
    lines = render(transcript(words), "ctm").splitlines()
    previous = 0.0  # word's end
    for line, word in zip(lines, words):
        recording, channel, start, duration, text, confidence = line.split(" ")
        assert (recording, channel, text) == ("a_b", "1", word.text)
        assert float(start) == pytest.approx(word.start, abs=6e-4) and float(start) >= previous - 1e-9
        assert float(duration) == pytest.approx(word.end - word.start, abs=1.1e-3) and float(duration) > 0
        assert 0 <= float(confidence) <= 1
        previous = float(start) + float(duration)
    assert len(lines) == len(words)
    assert render(transcript(words[:1]), "ctm", "x/y z").startswith("x/y_z 1 ")
    assert render(transcript([]), "ctm") == ""


def test_text_is_a_line():
    assert render(transcript(spoken(2, text="é")), "text") == "é é\n" and render(transcript([]), "text") == "\n"


def test_names_that_are_no_text_are_printable():
    assert printable("a\udcff.wav") == "a\ufffd.wav"
    content = render(transcript([], source="a\udcff.wav"), "json")
    assert content.encode() and json.loads(content)["source"] == "a\ufffd.wav"


def test_a_name_is_one_line_whatever_is_in_it():
    assert one_line("a\nb\tc\r\x1b[2J\x7f\x85\u2028\\n.wav") == r"a\nb\tc\r\x1b[2J\x7f\x85\u2028\\n.wav"
    ordinary = "üñí 中文 👩‍🚀 \u00a0 עברית \"q\" 'x'.wav"
    assert one_line(ordinary) == ordinary and one_line("a\udcff.wav") == "a\ufffd.wav"


def test_an_unknown_format_is_an_error():
    with pytest.raises(ValueError, match="'xml', expected one of text, json, srt, vtt, ctm"):
        render(transcript([]), "xml")
    assert list(SUFFIXES) == ["text", "json", "srt", "vtt", "ctm"]
