"""Long recordings as windows that a network can hear at once: cut at pauses, or overlapping where there are none.

    windows = cut_windows(wav_blocks("talk.mp3", 1.0, 16000), 16000, align=320)

A pause is a stretch of time in which the recording is hardly louder than its own background. What stands between two
pauses is a stretch of speech; one longer than a window is cut into windows that overlap, and what the network says of
them is joined at a frame where both say the same (`join_frame`). A recording that fits into one window is never cut.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Iterable, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from .text import Labels

_STEP_SECONDS = 0.01
_PRE_EMPHASIS = 0.97  # takes offset and hum out of the energies
_SMOOTH_STEPS = 5
_DIGITAL_SILENCE_SECONDS = 0.25  # longer than the closure of any stop, which 8-bit audio may have no signal in
_SILENCE_DB = -110.0  # digital silence, which says nothing of the background
_FLOOR_PERCENT, _LEVEL_PERCENT = 5, 98
_LEAST_CONTRAST_DB = 15.0  # with less between background and speech no pause is certain
# a pause is this much louder than the background at most: a quarter of the contrast, within these
_LEAST_MARGIN_DB, _MOST_MARGIN_DB = 6.0, 12.0
_QUIET_SECONDS = 0.2
_AGREEMENT_FRAMES = 15


@dataclass(frozen=True)
class Windowing:
    """Where a recording is cut, in seconds.

    longest: of a window; memory grows with it. pause: one of this length ends a stretch in any case. short_pause: one
    of this length does where the stretch would become longer than a window. edge: how much of a pause a window keeps
    at its ends; what is left of the pause is not heard. overlap: of two windows where there is no pause.

    Raises ValueError for seconds that are not positive, and for an overlap of a third of `longest` or more.
    """

    longest: float = 20.0
    pause: float = 0.5
    short_pause: float = 0.3
    edge: float = 0.15
    overlap: float = 4.0

    def __post_init__(self):
        for name in ("longest", "pause", "short_pause", "edge", "overlap"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; expected seconds above 0")
        if not self.overlap < self.longest / 3:
            raise ValueError(f"overlap is {self.overlap}; expected less than a third of longest={self.longest}")


_DEFAULT = Windowing()


@dataclass(frozen=True)
class Window:
    """Audio for one run of the network.

    samples: (n,) float32. start: index of the first one in the recording. joins: whether it overlaps the window before;
    else a stretch begins here. loudness: (steps,) how much louder than a pause each step is, in dB (below 0: a pause).
    step: samples of a step. loudness_start: index of the first step's first sample.
    """

    samples: np.ndarray
    start: int
    joins: bool
    loudness: np.ndarray
    step: int
    loudness_start: int


def cut_windows(
    blocks: Iterable[np.ndarray], sample_rate: int, align: int = 1, windowing: Windowing = _DEFAULT
) -> Iterator[Window]:
    """Cuts a stream of (time,) float32 blocks into windows; keeps about one window of audio.

    align: windows that overlap start a multiple of this many samples apart. How the stream is divided into blocks
    changes nothing. No audio, no window. What digital silence, samples of exactly 0, parts was not recorded together:
    each part is cut as if it were a recording of its own, and the silence is not heard. Where reading fails with
    ValueError or OSError the recording ends, and the error is raised after its last window.
    """
    stream = _UntilFailure(blocks)
    yield from _cut_parts(iter(stream), sample_rate, align, windowing)
    if stream.error is not None:
        raise stream.error


class _UntilFailure:
    """A stream of blocks that ends where it cannot be read on; error: why it could not, or None."""

    def __init__(self, blocks: Iterable[np.ndarray]):
        self._blocks = blocks
        self.error: Optional[Exception] = None

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            yield from self._blocks
        except (ValueError, OSError) as error:
            self.error = error


def _cut_parts(blocks: Iterator[np.ndarray], sample_rate: int, align: int, windowing: Windowing) -> Iterator[Window]:
    """`cut_windows` of a stream that ends without an error."""
    longest = round(windowing.longest * sample_rate)
    head, samples = [], 0
    while samples <= longest:
        block = next(blocks, None)
        if block is None:
            yield from _cut(head, sample_rate, align, windowing)
            return
        head.append(block)
        samples += len(block)
    silence = max(1, round(_DIGITAL_SILENCE_SECONDS * sample_rate))
    for start, part in _parts(itertools.chain(head, blocks), silence):
        for window in _cut(part, sample_rate, align, windowing):
            yield replace(window, start=window.start + start, loudness_start=window.loudness_start + start)


def _parts(blocks: Iterable[np.ndarray], silence: int) -> Iterator[Tuple[int, Iterator[np.ndarray]]]:
    """What `silence` or more zeros part in a stream: index of the first sample, blocks; to be read in this order."""
    blocks = iter(blocks)
    position, rest = 0, np.zeros(0, dtype=np.float32)  # rest: begins at `position`
    while True:
        # skip zeros
        while True:
            sounding = np.flatnonzero(rest)
            if len(sounding):
                position, rest = position + int(sounding[0]), rest[sounding[0] :]
                break
            position += len(rest)
            rest = next(blocks, None)
            if rest is None:
                return
        start = position

        def part() -> Iterator[np.ndarray]:
            nonlocal position, rest
            zeros = 0  # so many came last, and are held back
            while rest is not None:
                sounding = np.flatnonzero(rest)
                # lengths of the runs of zeros before each sample that is none
                runs = np.diff(sounding, prepend=-1 - zeros) - 1
                cuts = np.flatnonzero(runs >= silence)
                if len(cuts):
                    before = int(sounding[cuts[0] - 1]) + 1 if cuts[0] else 0
                    if before:
                        yield _with_zeros(zeros, rest[:before])
                    position += int(sounding[cuts[0]])
                    rest = rest[sounding[cuts[0]] :]
                    return
                last = int(sounding[-1]) + 1 if len(sounding) else 0
                if last:
                    yield _with_zeros(zeros, rest[:last])
                    zeros = 0
                zeros += len(rest) - last
                position += len(rest)
                if zeros >= silence:
                    rest = rest[:0]
                    return
                rest = next(blocks, None)
            if zeros:
                yield np.zeros(zeros, dtype=np.float32)

        blocks_of_part = part()
        yield start, blocks_of_part
        for _ in blocks_of_part:
            pass
        if rest is None:
            return


def _with_zeros(count: int, samples: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(count, dtype=np.float32), samples]) if count else samples


def _cut(blocks: Iterable[np.ndarray], sample_rate: int, align: int, windowing: Windowing) -> Iterator[Window]:
    """`cut_windows` of a recording without digital silence."""
    step = max(1, round(_STEP_SECONDS * sample_rate))
    longest, overlap = (round(seconds * sample_rate) for seconds in (windowing.longest, windowing.overlap))
    pause, short_pause, edge = (
        max(1, round(seconds * sample_rate / step))
        for seconds in (windowing.pause, windowing.short_pause, windowing.edge)
    )
    audio = _LookAhead(blocks, step)
    start, origin, joins = 0, 0, False
    while True:
        end, ended = audio.read(start, start + longest + pause * step)
        if end <= start:
            return
        fits = ended and end - start <= longest
        view = _View(audio.energies(start, end), start // step)
        if fits and start == 0:
            yield audio.window(start, end, joins, view)
            return
        runs = view.pauses()
        if not joins and runs and runs[0].start * step <= start:
            # silence that the recording begins with, or what is left of a pause
            speech = (runs[0].end - edge) * step
            if speech > start:
                start = origin = speech
                continue
            runs = runs[1:]

        first, last = start + (overlap if joins else step), start + longest - edge * step
        found = next((run for run in runs if run.steps >= pause and run.end * step > first), None)
        if not fits and (found is None or found.start * step > last):
            after = max(first, start + longest // 4)
            short = [run for run in runs if run.steps >= short_pause and after <= run.start * step <= last]
            found = max(short, key=lambda run: (run.steps, run.start), default=None)
        if found is not None:
            middle = (found.start + found.end) // 2 * step
            cut = max(min(middle, (found.start + edge) * step), first)
            yield audio.window(start, cut, joins, view)
            if ended and found.end >= view.end:
                return
            start = origin = max(cut, middle, (found.end - edge) * step)
            joins = False
        elif fits:
            yield audio.window(start, end, joins, view)
            return
        else:
            centre = view.quietest(start + longest // 2, start + longest - overlap // 2, step)
            yield audio.window(start, centre + overlap // 2, joins, view)
            start = origin + (centre - overlap // 2 - origin) // align * align
            joins = True


def join_frame(before: np.ndarray, after: np.ndarray, labels: Labels) -> int:
    """The frame at which to go over from one window to the next, where the two agree most.

    before, after: (frames, symbols) log-probabilities that the two windows have for the same frames. Returns 0 to
    `frames`: so many frames are the first window's. That is a frame of blanks in both windows, with the least
    difference between them around it, best between two words and far from the ends, where either window lacks context.
    """
    frames = len(before)
    if frames < 3:
        return frames // 2
    difference = 0.5 * np.abs(np.exp(before) - np.exp(after)).sum(axis=1)
    reach = min(_AGREEMENT_FRAMES, frames // 2)
    kernel = np.bartlett(2 * reach + 1)[1:-1]
    padded = np.pad(difference, len(kernel) // 2, mode="edge")
    cost = np.convolve(padded, kernel / kernel.sum(), mode="valid")
    best = before.argmax(axis=1), after.argmax(axis=1)
    cost += 1.0 * ((best[0] != labels.blank) | (best[1] != labels.blank))
    cost += 0.1 * ~np.minimum(*(_between_words(symbols, labels) for symbols in best))
    cost += 0.2 * np.abs(np.linspace(-1, 1, frames)) ** 3
    return int(cost.argmin())


def _between_words(best: np.ndarray, labels: Labels) -> np.ndarray:
    """(frames,) bool: whether the labels last heard before and next heard after a frame belong to different words."""
    positions = np.arange(len(best))
    spoken = best != labels.blank
    last = np.maximum.accumulate(np.where(spoken, positions, -1))
    following = np.minimum.accumulate(np.where(spoken, positions, len(best))[::-1])[::-1]
    return np.array(
        [
            before >= 0 and after < len(best) and labels.separates(int(best[before]), int(best[after]))
            for before, after in zip(last, following)
        ]
    )


class _LookAhead:
    """What of a stream of blocks was read and is still needed: samples, and the power of each whole step."""

    def __init__(self, blocks: Iterable[np.ndarray], step: int):
        self._blocks, self._step = iter(blocks), step
        self._samples = np.zeros(0, dtype=np.float32)
        self._first = 0  # index of the first sample kept, a multiple of the step
        self._energies: List[float] = []  # since the recording began, in dB
        self._first_energy = 0
        self._ended = False

    def read(self, start: int, limit: int) -> Tuple[int, bool]:
        """Has the samples from `start` to `limit` ready; where they end, and whether the recording ends there."""
        keep = max(0, start // self._step - 1)  # one step more, whose last sample the next step's energy needs
        if keep * self._step > self._first:
            self._samples = self._samples[keep * self._step - self._first :]
            self._energies = self._energies[keep - self._first_energy :]
            self._first, self._first_energy = keep * self._step, keep
        blocks = [self._samples]
        end = self._first + len(self._samples)
        while end <= limit and not self._ended:
            block = next(self._blocks, None)
            if block is None:
                self._ended = True
            else:
                blocks.append(block)
                end += len(block)
        if len(blocks) > 1:
            self._samples = np.concatenate(blocks)
            self._measure()
        return min(end, limit), self._ended and end <= limit

    def _measure(self) -> None:
        known = self._first_energy + len(self._energies)
        begin = known * self._step - self._first
        steps = (len(self._samples) - begin) // self._step
        if steps < 1:
            return
        samples = self._samples[begin : begin + steps * self._step]
        previous = self._samples[begin - 1] if begin else samples[0]
        flat = samples - _PRE_EMPHASIS * np.concatenate([[previous], samples[:-1]]).astype(np.float32)
        power = np.square(flat.reshape(steps, self._step), dtype=np.float64).mean(axis=1)
        self._energies.extend((10 * np.log10(power + 1e-15)).tolist())

    def energies(self, start: int, end: int) -> np.ndarray:
        """(steps,) dB of the whole steps from the one that has sample `start` to sample `end`."""
        first = start // self._step
        return np.array(self._energies[first - self._first_energy : end // self._step - self._first_energy])

    def window(self, start: int, end: int, joins: bool, view: "_View") -> Window:
        samples = self._samples[start - self._first : end - self._first].copy()
        steps = -(-end // self._step) - view.start
        return Window(samples, start, joins, view.loudness[:steps], self._step, view.start * self._step)


class _Run(NamedTuple):
    """Steps of a pause, from `start` to before `end`, counted since the recording began."""

    start: int
    end: int

    @property
    def steps(self) -> int:
        return self.end - self.start


class _View:
    """How loud some steps are, smoothed, compared with what counts as a pause among them.

    start, end: the first of the steps, and the one after the last, counted since the recording began.
    """

    def __init__(self, energies: np.ndarray, start: int):
        self.start, self.end = start, start + len(energies)
        self.loudness = np.zeros(0)
        if not len(energies):
            return
        smooth = 10 * np.log10(_moving_average(10 ** (energies / 10), _SMOOTH_STEPS))
        sounding = smooth[smooth > _SILENCE_DB]
        floor, level = np.percentile(sounding, (_FLOOR_PERCENT, _LEVEL_PERCENT)) if len(sounding) else (0.0, 0.0)
        if level - floor < _LEAST_CONTRAST_DB:
            threshold = smooth.min() - 1
        else:
            threshold = floor + min(max((level - floor) / 4, _LEAST_MARGIN_DB), _MOST_MARGIN_DB)
        self.loudness = smooth - threshold

    def pauses(self) -> List[_Run]:
        quiet = np.concatenate([[False], self.loudness < 0, [False]])
        changes = np.flatnonzero(quiet[1:] != quiet[:-1]).tolist()
        return [_Run(self.start + begin, self.start + end) for begin, end in zip(changes[::2], changes[1::2])]

    def quietest(self, first: int, last: int, step: int) -> int:
        """The sample from `first` to `last` around which it is quietest."""
        steps = max(1, round(_QUIET_SECONDS / _STEP_SECONDS))
        power = _moving_average(10 ** (self.loudness / 10), steps)
        choices = power[first // step - self.start : max(last // step, first // step + 1) - self.start]
        return first // step * step + int(choices.argmin()) * step


def _moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """(n,): the mean over up to `width` values around each of (n,) values."""
    ones = np.ones(width)
    return (
        np.convolve(values, ones)[width // 2 :][: len(values)]
        / (np.convolve(np.ones(len(values)), ones)[width // 2 :][: len(values)])
    )
