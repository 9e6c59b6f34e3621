"""`w2v2-light transcribe`: recordings to text, JSON, subtitles or CTM."""

import argparse
import io
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from ..files import atomic_write_text
from ..runtime.audio import duration
from . import recognition_options
from .stream import STANDARD_INPUT, Screen

AUDIO_SUFFIXES = frozenset(
    ".aif .aifc .aiff .amr .au .caf .flac .mp3 .nist .oga .ogg .opus .rf64 .snd .sph .voc .w64 .wav .wave".split()
)
FORMATS = ("text", "json", "srt", "vtt", "ctm")
EXIT_FAILED = 1
_BAR_COLUMNS = 30
_SUBTITLES = ("srt", "vtt")


@dataclass(frozen=True)
class Recording:
    """A source: its path (`-`: standard input), and its output's path in the folder of --out, without a suffix."""

    path: str
    output: Path


def add_arguments(parser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "Audio of any format that libsndfile reads, at any rate, with any number of channels (averaged). Folders are\n"
        "searched for audio files, folders inside them too. A recording named twice is transcribed once.\n\n"
        "Without --out the results go to standard output, in the order of the arguments: text is a line for each\n"
        "recording, after its name and a tab where there are several (a tab, line end or backslash of the name as\n"
        "\\t, \\n, \\\\); json an object on a line. With --out each recording has a file of its own there, named and\n"
        "placed as the recording.\n"
        "A recording that cannot be read stops none of the others: they are listed at the end, and the exit code is\n"
        "1. On standard output stands what was read of it before; with --out it gets no file."
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="FILE|DIR|-",
        help="audio files, folders, or - for standard input: raw 16-bit little-endian mono PCM, or any audio file",
    )
    recognition_options.add_arguments(parser)
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the results (default: text)")
    parser.add_argument("--out", metavar="DIR", help="write a file for each recording here")
    parser.add_argument("--sample-rate", type=int, metavar="HZ", help="of raw PCM (default: the model's)")
    parser.add_argument(
        "--batch-seconds",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="audio that the network hears at once (default: 20); more takes more memory, and changes no text",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no report on standard error")


def load_recognizer(args, recordings: Sequence[Recording] = ()):
    """The Recognizer that parsed options describe, for `recordings`."""
    paths = [None if recording.path == STANDARD_INPUT else recording.path for recording in recordings]
    return recognition_options.recognizer(args, _note(args), paths)


def _note(args):
    return (lambda line: None) if args.quiet else recognition_options.note


def run(args) -> int:
    _check_options(args)
    recordings = find_recordings(args.sources)
    _check_outputs(args, recordings)
    recognizer = load_recognizer(args, recordings)

    from ..runtime.formats import SUFFIXES, one_line, render
    from ..runtime.recognizer import AudioStream

    screen = Screen(sys.stderr or io.StringIO(), args.quiet)  # None where the shell closed it, 2>&-
    bar = _Bar(screen, [recording.path for recording in recordings] if _shows_progress(screen) else None)
    sources = [
        AudioStream(_standard_input(), args.sample_rate or 0) if recording.path == STANDARD_INPUT else recording.path
        for recording in recordings
    ]
    outputs = Counter(recording.output for recording in recordings)
    failed: List[str] = []
    seconds = 0.0
    began = time.perf_counter()
    try:
        transcripts = recognizer.transcribe(sources, args.batch_seconds, bar.show)
        for recording, transcript in zip(recordings, transcripts):
            seconds += transcript.seconds
            if transcript.error is not None:
                failed.append(one_line(transcript.error))
            unique = outputs[recording.output] == 1
            content = render(transcript, args.format, str(recording.output) if unique else recording.path)
            if args.out is None:
                name = one_line(recording.path) + "\t" if args.format == "text" and len(recordings) > 1 else ""
                screen.show("")  # the two may be the same terminal
                sys.stdout.write(name + content)
                sys.stdout.flush()
            elif transcript.error is None:
                path = Path(args.out) / f"{recording.output}{SUFFIXES[args.format]}"
                atomic_write_text(path, content)
    finally:
        screen.show("")
    took = time.perf_counter() - began
    factor = f", real-time factor {took / seconds:.3f}" if seconds else ""
    count = f"{len(recordings)} recording{'s' if len(recordings) > 1 else ''}"
    screen.note(f"{count}, {seconds:.1f} s of audio in {took:.1f} s ({recognizer.dtype}, {recognizer.point}{factor})")
    recognition_options.compare_with_budget(args, took, seconds, _note(args))
    if failed:
        screen.line(f"{len(failed)} of {count} could not be read:")
        for message in failed:
            screen.line(f"  {message}")
    return EXIT_FAILED if failed else 0


def find_recordings(sources: Sequence[str]) -> List[Recording]:
    """The recordings that arguments name, in order, each once, folders searched.

    Outputs that would have the same name keep the suffixes of their recordings. Raises ValueError for a folder without
    any.
    """
    found: Dict[str, Recording] = {}
    for source in sources:
        if source == STANDARD_INPUT:
            found.setdefault(source, Recording(source, Path("stdin")))
        elif os.path.isdir(source):
            files = _audio_files(source)
            if not files:
                raise ValueError(f"{source}: found no audio file there ({', '.join(sorted(AUDIO_SUFFIXES))})")
            for path in files:
                found.setdefault(os.path.realpath(path), Recording(path, Path(os.path.relpath(path, source))))
        else:
            found.setdefault(os.path.realpath(source), Recording(source, Path(os.path.basename(source))))
    recordings = list(found.values())
    stems = Counter(_stem(recording.output) for recording in recordings)
    return [
        replace(recording, output=_stem(recording.output)) if stems[_stem(recording.output)] == 1 else recording
        for recording in recordings
    ]


def _stem(path: Path) -> Path:
    """The path without a suffix of audio."""
    return path.with_suffix("") if path.suffix.lower() in AUDIO_SUFFIXES else path


def _audio_files(folder: str) -> List[str]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.join(place, name)
            for name in sorted(names)
            if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES and not name.startswith(".")
        ]
    return found


def _check_options(args) -> None:
    if args.sample_rate is not None and args.sample_rate < 1:
        raise ValueError(f"--sample-rate: found {args.sample_rate}, expected 1 or more")
    if not 0 < args.batch_seconds < float("inf"):
        raise ValueError(f"--batch-seconds: found {args.batch_seconds:g}, expected a positive number")
    if args.sample_rate is not None and STANDARD_INPUT not in args.sources:
        raise ValueError("--sample-rate: for PCM on standard input (-) only; files say their own")
    if args.out is None and sys.stdout is None:
        raise ValueError("standard output is closed; expected a file, pipe or terminal there, or --out")
    if STANDARD_INPUT in args.sources:
        _standard_input()
    recognition_options.check(args)


def _check_outputs(args, recordings: Sequence[Recording]) -> None:
    if args.out is None:
        if args.format in _SUBTITLES and len(recordings) > 1:
            raise ValueError(
                f"--format {args.format}: found {len(recordings)} recordings, whose subtitles cannot stand in one "
                "file; give a folder for them, --out DIR"
            )
        return
    if os.path.lexists(args.out) and not os.path.isdir(args.out):
        raise ValueError(f"--out {args.out}: found a file, expected a folder")
    first: Dict[Path, str] = {}
    for recording in recordings:
        other = first.setdefault(recording.output, recording.path)
        if other != recording.path:
            raise ValueError(
                f"{other} and {recording.path}: both would be written to {Path(args.out) / recording.output}; name "
                "the folder above them, or transcribe them into two folders"
            )


def _standard_input():
    try:
        return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    except (AttributeError, OSError, ValueError):
        raise ValueError("standard input is closed; expected audio there, or the name of a file") from None


def _shows_progress(screen: Screen) -> bool:
    return screen.rewrites and not screen.quiet


class _Bar:
    """How far the transcription is, on a terminal; paths: of all recordings, None: shows nothing."""

    def __init__(self, screen: Screen, paths: Optional[Sequence[str]]):
        self._screen, self._shown = screen, paths is not None
        known = [duration(path) for path in paths or () if path != STANDARD_INPUT]
        self._total = sum(known) if STANDARD_INPUT not in (paths or ()) else 0.0

    def show(self, seconds: float) -> None:
        if not self._shown:
            return
        if self._total:
            share = min(1.0, seconds / self._total)
            done = round(share * _BAR_COLUMNS)
            bar = f"[{'#' * done}{'.' * (_BAR_COLUMNS - done)}] {share:4.0%}  "
            self._screen.show(f"{bar}{_clock(seconds)} of {_clock(self._total)}")
        else:
            self._screen.show(f"{_clock(seconds)} transcribed")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
