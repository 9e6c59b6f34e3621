"""Transcripts as files: plain text, JSON, subtitles (SubRip, WebVTT), and NIST's CTM."""

from __future__ import annotations

import json
import math
import os
import textwrap
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple

from .alignment import TimedWord
from .recognizer import Transcript

# what subtitlers keep to: two lines of 42 characters, seven seconds at most, one at least
LINE_CHARACTERS = 42
LINES = 2
LONGEST_CUE = 7.0
SHORTEST_CUE = 1.0
# a pause of this many seconds ends a cue
CUE_PAUSE = 0.8
# a cue is parted in its middle rather than at a pause that is this much shorter than another, in seconds
_BALANCE = 0.5
SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt", "ctm": ".ctm"}


@dataclass(frozen=True)
class Cue:
    """A subtitle: its lines, and when it is shown, in milliseconds."""

    start: int
    end: int
    lines: Tuple[str, ...]


def render(transcript: Transcript, form: str, recording: str = "") -> str:
    """The whole content of a file of one of `SUFFIXES`' formats, which ends with a line end unless it is empty.

    text: a line. json: an object on one line with source, text, seconds, words (word, start, end, confidence; in
    seconds) and error (null). srt, vtt: see `cues`. ctm: a line for each word: `recording` (empty: the file's name
    without its suffix; white space becomes `_`), channel 1, start, duration, word, confidence. Raises ValueError for
    another format.
    """
    if form not in _WRITERS:
        raise ValueError(f"format: found {form!r}, expected one of {', '.join(_WRITERS)}")
    return _ctm(transcript, recording) if form == "ctm" else _WRITERS[form](transcript)


def printable(name: str) -> str:
    """A file's name as UTF-8 text, where it may hold bytes that are none."""
    return os.fsencode(name).decode("utf-8", "replace")


def one_line(text: str) -> str:
    """`printable` with control characters and line ends as escapes, \\n or \\x1b, and a backslash as two."""
    return "".join(
        character.encode("unicode_escape").decode()
        if character == "\\" or unicodedata.category(character) in ("Cc", "Zl", "Zp")
        else character
        for character in printable(text)
    )


def cues(words: Sequence[TimedWord]) -> List[Cue]:
    """Subtitles of up to two lines of 42 characters (but for longer words) and 7 s, parted at pauses where possible.

    They never overlap, and each is shown for a second where the next one leaves so much time.
    """
    groups: List[Sequence[TimedWord]] = []
    stack = [list(group) for group in reversed(_at_pauses(words))]
    while stack:
        group = stack.pop()
        if len(group) == 1 or _fits(group):
            groups.append(group)
        else:
            middle = _break(group)
            stack += [group[middle:], group[:middle]]
    found: List[Cue] = []
    for index, group in enumerate(groups):
        start = max(_milliseconds(group[0].start), found[-1].end if found else 0)
        end = max(_milliseconds(group[-1].end), start + 1)
        following = _milliseconds(groups[index + 1][0].start) if index + 1 < len(groups) else math.inf
        end = max(end, min(start + _milliseconds(SHORTEST_CUE), following))
        found.append(Cue(start, int(end), tuple(_lines(group))))
    return found


def _text(transcript: Transcript) -> str:
    return transcript.text + "\n"


def _json(transcript: Transcript) -> str:
    words = [
        {
            "word": word.text,
            "start": round(word.start, 3),
            "end": round(word.end, 3),
            "confidence": round(word.confidence, 4),
        }
        for word in transcript.words
    ]
    values = {
        "source": printable(transcript.source),
        "text": transcript.text,
        "seconds": round(transcript.seconds, 3),
        "words": words,
        "error": None if transcript.error is None else printable(transcript.error),
    }
    return json.dumps(values, ensure_ascii=False) + "\n"


def _srt(transcript: Transcript) -> str:
    return "\n".join(
        f"{number}\n{_time(cue.start, ',')} --> {_time(cue.end, ',')}\n"
        + "".join(line.replace("-->", "->") + "\n" for line in cue.lines)
        for number, cue in enumerate(cues(transcript.words), start=1)
    )


def _vtt(transcript: Transcript) -> str:
    blocks = ["WEBVTT\n"]
    for cue in cues(transcript.words):
        lines = [line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in cue.lines]
        blocks.append(f"{_time(cue.start, '.')} --> {_time(cue.end, '.')}\n" + "".join(line + "\n" for line in lines))
    return "\n".join(blocks)


def _ctm(transcript: Transcript, recording: str = "") -> str:
    recording = "_".join(printable(recording or Path(transcript.source).stem).split()) or "unknown"
    lines = []
    for word in transcript.words:
        # of rounded times, or a word might end after the next one's start
        start, end = round(word.start, 3), round(word.end, 3)
        length = max(end - start, 0.001)
        lines.append(f"{recording} 1 {start:.3f} {length:.3f} {word.text} {word.confidence:.4f}\n")
    return "".join(lines)


_WRITERS: Dict[str, Callable[[Transcript], str]] = {
    "text": _text,
    "json": _json,
    "srt": _srt,
    "vtt": _vtt,
    "ctm": _ctm,
}


def _at_pauses(words: Sequence[TimedWord]) -> List[Sequence[TimedWord]]:
    ends = [index for index in range(1, len(words)) if words[index].start - words[index - 1].end >= CUE_PAUSE]
    return [words[start:end] for start, end in zip([0, *ends], [*ends, len(words)]) if start < end]


def _fits(group: Sequence[TimedWord]) -> bool:
    return group[-1].end - group[0].start <= LONGEST_CUE and len(_lines(group)) <= LINES


def _break(group: Sequence[TimedWord]) -> int:
    """Where to part a group that is too long: at a pause, rather in the middle."""

    def worth(index: int) -> float:
        pause = group[index].start - group[index - 1].end
        return pause - _BALANCE * abs(2 * index / len(group) - 1)

    return max(range(1, len(group)), key=worth)


def _lines(group: Sequence[TimedWord]) -> List[str]:
    """Lines of about the same length; no more than are needed."""
    text = " ".join(word.text for word in group)

    def wrapped(width: int) -> List[str]:
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)

    lines = wrapped(LINE_CHARACTERS)
    if len(lines) == LINES:
        for width in range(-(-len(text) // LINES), LINE_CHARACTERS):
            if len(wrapped(width)) == LINES:
                return wrapped(width)
    return lines


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _time(milliseconds: int, mark: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{mark}{rest:03d}"
