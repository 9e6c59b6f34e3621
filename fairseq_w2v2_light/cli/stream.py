"""`w2v2-light stream`: transcribes a file or a microphone while the audio arrives."""

import argparse
import contextlib
import io
import json
import math
import os
import signal
import sys
import threading
import time
import unicodedata
from dataclasses import replace
from typing import Iterable, Iterator, Optional, TypeVar

from ..runtime.audio import Pace, block_length, check_audio, pcm_blocks, wav_blocks
from ..runtime.timings import Timings, report

STANDARD_INPUT = "-"
RECORD = "arecord -f S16_LE -r 16000 -t raw | w2v2-light stream - --model CHECKPOINT"
DEFAULT_COLUMNS = 80

Item = TypeVar("Item")


def add_arguments(parser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"From a microphone: {RECORD}\n\n"
        "Standard output holds finished text only: a line for each segment as soon as the speaker pauses, the last at\n"
        "the end. Standard error gets the closing report and, if it is a terminal, the unfinished line as it grows.\n"
        "With --format json every line of standard output is an object with type, text, start, end (seconds) and\n"
        "words (word, start, end): a `segment` for each segment, then one `final` with everything. With --partials\n"
        "there is also a `partial` each time the unfinished segment changes.\n"
        "Ctrl-C (or SIGTERM) ends the recording, not the transcript: what was heard is finished and printed, exit\n"
        "code 130 (143). A second one ends the program at once."
    )
    parser.add_argument(
        "source",
        metavar="FILE|-",
        help="an audio file, or - for raw 16-bit little-endian mono PCM on standard input",
    )
    parser.add_argument("--model", required=True, metavar="CHECKPOINT", help="a fine-tuned streaming checkpoint")
    parser.add_argument(
        "--operating-point", default="", metavar="POINT", help="e.g. s1q1k1c24 (default: the model's own)"
    )
    parser.add_argument("--beam", type=int, default=1, metavar="N", help="prefixes kept (default: 1, greedy)")
    parser.add_argument(
        "--endpoint-silence",
        type=float,
        metavar="SECONDS",
        help="close a segment after so much silence; 0: never (default: 1)",
    )
    parser.add_argument("--dictionary", metavar="FILE", help="dict.ltr.txt, for a checkpoint that holds none")
    parser.add_argument(
        "--sample-rate", type=int, metavar="HZ", help="of the PCM on standard input (default: the model's)"
    )
    parser.add_argument(
        "--block", type=float, default=20.0, metavar="MS", help="audio read at once (default: 20); changes no text"
    )
    parser.add_argument(
        "--simulate-realtime", action="store_true", help="hand the audio over no faster than it was spoken"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of standard output")
    parser.add_argument(
        "--words", action="store_true", help="text format: a line for each word, START<tab>END<tab>WORD in seconds"
    )
    parser.add_argument(
        "--partials",
        action="store_true",
        help="print the unfinished segment each time it changes: lines on standard error, or JSON objects",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        help="of the products: float32, bfloat16 or int8 (default: auto, as the model is stored)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--quiet", action="store_true", help="no report and no notes on standard error")


def run(args) -> int:
    _check_options(args)
    live = args.source == STANDARD_INPUT
    if live:
        standard_input = _open_standard_input()
    else:
        check_audio(args.source)  # before the model, which takes longer to load

    recognizer = load_recognizer(args)
    screen = Screen(sys.stderr or io.StringIO(), args.quiet)  # None where the shell closed it, 2>&-
    if live and standard_input.isatty():
        screen.note(f"reading 16-bit PCM from the terminal; a recorder can be piped in: {RECORD}")
    transcript = Transcript(sys.stdout, screen, args.format, args.words, args.partials)

    rate, block_seconds = recognizer.sample_rate, args.block / 1000
    if live:
        stream_rate = args.sample_rate or rate
        samples = block_length(block_seconds, stream_rate)
        blocks = pcm_blocks(standard_input, samples, rate, stream_rate, note=screen.note)
    else:
        blocks = wav_blocks(args.source, block_seconds, rate)
    pace = Pace(rate) if args.simulate_realtime else None

    timings = Timings()
    try:
        with StopSignals() as stop:
            seconds = transcribe(recognizer, blocks, transcript, timings, stop, pace)
    finally:
        screen.show("")
    for line in report(timings, seconds, recognizer.latency_ms):
        screen.note(line)
    return 128 + stop.received if stop.received else 0


def transcribe(recognizer, blocks: Iterable, transcript, timings, stop, pace=None) -> float:
    """Feeds (time,) float32 blocks to a recogniser and prints what it makes of them; returns the seconds heard.

    pace: a Pace that holds the blocks back to the speed of speech; the delay of the text is then measured too. When
    the audio cannot be read on, what was heard is finished and printed before the error is raised.
    """
    failure = None
    chunks = heard = 0
    source = iter(pace.hold_back(blocks) if pace else blocks)
    while True:
        try:
            block = stop.next(source)
        except (ValueError, OSError) as error:
            failure = error
            break
        if block is None:
            break
        heard += len(block)
        began = time.perf_counter()
        partial = recognizer.accept(block)
        timings.accepted(time.perf_counter() - began, partial.chunks)
        transcript.update(partial)
        for _ in range(partial.chunks):
            chunks += 1
            if pace:
                timings.delays.append(pace.since(chunks * recognizer.chunk_samples))
    began = time.perf_counter()
    final = recognizer.finish()
    timings.compute += time.perf_counter() - began
    transcript.finish(final)
    if pace and heard and not stop.received:
        timings.final_delay = pace.since(heard)
    if failure is not None:
        raise failure
    return final.seconds


class Screen:
    """Standard error: on a terminal one line that is rewritten in place, and whole lines anywhere."""

    def __init__(self, stream, quiet: bool = False):
        self.stream, self.quiet = stream, quiet
        self.rewrites = stream.isatty()
        self._shown = ""

    def show(self, text: str) -> None:
        """Replaces the line in place; where the terminal is too narrow only the end of `text` is seen."""
        text = last_columns(text, _columns(self.stream) - 1) if self.rewrites else ""
        if text != self._shown:
            self.stream.write(f"\r{' ' * display_width(self._shown)}\r{text}")
            self.stream.flush()
            self._shown = text

    def note(self, line: str) -> None:
        """Prints a line of information, unless quiet."""
        if not self.quiet:
            self.line(line)

    def line(self, text: str) -> None:
        """Prints a whole line; what was shown in place goes."""
        self.show("")
        self.stream.write(text + "\n")
        self.stream.flush()


class Transcript:
    """Standard output: finished segments as lines of text, of words with times, or of JSON."""

    def __init__(self, stream, screen: Screen, form: str = "text", words: bool = False, partials: bool = False):
        self.stream, self.screen = stream, screen
        self.form, self.words, self.partials = form, words, partials
        self._segments = 0
        self._last_partial = ""

    def update(self, partial) -> None:
        """Prints the segments that a Partial closes, and shows the unfinished one."""
        self._print_segments(partial.segments)
        if partial.segments:
            self._last_partial = ""
        if partial.text != self._last_partial:
            self._last_partial = partial.text
            self._print_partial(partial)
            self.screen.show(partial.text)

    def finish(self, final) -> None:
        """Prints the segments of a Final that are not printed yet."""
        self.screen.show("")
        self._print_segments(final.segments[self._segments :])
        if self.form == "json":
            self._print_object("final", final.text, 0.0, final.seconds, final.words)

    def _print_segments(self, segments) -> None:
        for segment in segments:
            self._segments += 1
            if not segment.text:
                continue
            if self.form == "json":
                self._print_object("segment", segment.text, segment.start, segment.end, segment.words)
            elif self.words:
                self._print(*(f"{word.start:.2f}\t{word.end:.2f}\t{word.text}" for word in segment.words))
            else:
                self._print(segment.text)

    def _print_partial(self, partial) -> None:
        if not self.partials:
            return
        if self.form == "json":
            start = partial.words[0].start if partial.words else partial.seconds
            self._print_object("partial", partial.text, start, partial.seconds, partial.words)
        elif partial.text and not self.screen.rewrites:
            self.screen.line(partial.text)

    def _print_object(self, kind: str, text: str, start: float, end: float, words) -> None:
        times = [{"word": word.text, "start": round(word.start, 3), "end": round(word.end, 3)} for word in words]
        values = {"type": kind, "text": text, "start": round(start, 3), "end": round(end, 3), "words": times}
        self._print(json.dumps(values, ensure_ascii=False))

    def _print(self, *lines: str) -> None:
        self.screen.show("")  # the two may be the same terminal
        self.stream.write("".join(line + "\n" for line in lines))
        self.stream.flush()


class StopSignals:
    """Within it SIGINT and SIGTERM end the reading instead of the program; a second one acts as it did before.

    received: the number of the signal, 0 if there was none.
    """

    def __init__(self):
        self.received = 0
        self._reading = False
        self._before = {}

    def __enter__(self):
        # Python lets only the main thread handle signals
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:
                    self._before[number] = before or signal.SIG_DFL
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        self._restore()

    def next(self, items: Iterator[Item]) -> Optional[Item]:
        """The next of `items`; None after the last, and once a signal has come, also while waiting for the item."""
        try:
            try:
                self._reading = True
                return None if self.received else next(items, None)
            finally:
                self._reading = False
        except _Stopped:
            return None

    def _handle(self, number, frame):
        self.received = number
        self._restore()
        # anywhere else it would leave the recogniser in the middle of a chunk
        if self._reading:
            raise _Stopped

    def _restore(self):
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}


class _Stopped(BaseException):
    """Ends a read that waits for audio."""


def last_columns(text: str, columns: int) -> str:
    """The longest end of `text` that takes up to `columns` columns of a terminal."""
    width = 0
    for start in range(len(text), 0, -1):
        width += display_width(text[start - 1])
        if width > columns:
            return text[start:]
    return text


def display_width(text: str) -> int:
    """Columns of a terminal that `text` takes: none for combining marks, two for wide East Asian characters."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _columns(stream) -> int:
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_COLUMNS
    return DEFAULT_COLUMNS


def _check_options(args) -> None:
    if not (math.isfinite(args.block) and args.block > 0):
        raise ValueError(f"--block: found {args.block:g} ms, expected a positive number")
    for name in ("beam", "threads", "sample_rate"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: found {value}, expected 1 or more")
    silence = args.endpoint_silence
    if silence is not None and not (math.isfinite(silence) and silence >= 0):
        raise ValueError(f"--endpoint-silence: found {silence:g} seconds, expected 0 (never) or a positive number")
    if sys.stdout is None:
        raise ValueError("standard output is closed; expected a file, pipe or terminal that takes the text")
    if args.sample_rate is not None and args.source != STANDARD_INPUT:
        raise ValueError(f"--sample-rate: for PCM on standard input only; {args.source} says its own")


def _open_standard_input():
    try:
        return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    except (AttributeError, OSError, ValueError):
        raise ValueError("standard input is closed; expected raw 16-bit PCM there, or the name of a file") from None


def load_recognizer(args):
    """The StreamingRecognizer that parsed options describe."""
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    from ..runtime.streaming import StreamingRecognizer

    return StreamingRecognizer.from_checkpoint(
        args.model,
        operating_point=args.operating_point,
        beam=args.beam,
        endpointing=endpointing_of(args.endpoint_silence),
        dictionary=args.dictionary,
        dtype=args.dtype,
    )


def endpointing_of(silence: Optional[float]):
    """The Endpointing that closes a segment after `silence` seconds; None of 0, the default rules of None."""
    from ..runtime.endpoint import Endpointing

    rules = Endpointing()
    if silence is None:
        return rules
    return replace(rules, silence=silence, before_speech=max(silence, rules.before_speech)) if silence else None
