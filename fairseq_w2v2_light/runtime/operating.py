"""The operating point for a budget: the most accurate one that is fast enough on this machine, as measured here.

Speed is the real-time factor of a model, seconds of compute for a second of audio, of utterances of ten seconds one by
one. They are noise: what a network computes does not depend on what it hears. All points are measured in turns, so
that noise of the machine meets them alike, and each is taken to be as slow as nine in ten of its runs were not.
A measurement is kept on disk, for this model on this machine.

Recordings of other lengths take other times: each batch of them costs what a call does besides its audio (much of a
small network's time, the more so for a length that oneDNN has not met), padding is computed, and attention grows with
the length. Where the recordings are known, their real-time factor is estimated from all three.

Accuracy is the word error rate that `w2v2-light evaluate --all-points --write-to-folder` recorded in a model folder;
where not every point has one, the point with more multiply-accumulates is taken for the more accurate one.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from .. import __version__
from ..files import atomic_write_text
from ..nn.config import EncoderConfig
from ..nn.counts import count_macs
from ..nn.operating_point import OperatingPoint
from .checkpoint import PathLike
from .cpu import cpu_name
from .folder import CONFIG, WEIGHTS, is_model_folder, read_config
from .recognizer import BATCH_SECONDS, LENGTH_GRID_SECONDS, batched
from .timings import percentile
from .windows import Windowing

SECONDS = 10
# runs of each point: as many as fit into the time limit, within these bounds
FEWEST_ROUNDS, MOST_ROUNDS = 5, 20
TIME_LIMIT = 60.0
_SLOW = 90  # percentile
# short utterances, a longer one each round, until they begin again
_SHORT_SECONDS, _SHORT_STEP, _SHORT_LENGTHS = 1.0, LENGTH_GRID_SECONDS, 8
_LONG = 10.0  # seconds to wait without a word
# what is looked at of the recordings to be transcribed; headers may promise years
_MOST_RECORDINGS, _LONGEST_RECORDING = 500, 3600.0
_CACHE_VERSION = 2
NOW = "measured now"

Run = Callable[[OperatingPoint, np.ndarray], Any]


def parse_budget(text: str) -> float:
    """The largest real-time factor that "rtf=0.05" allows; raises ValueError for another form."""
    name, _, value = text.partition("=")
    try:
        budget = float(value)
    except ValueError:
        budget = math.nan
    if name.strip() != "rtf" or not (math.isfinite(budget) and budget > 0):
        raise ValueError(
            f"--budget {text}: expected rtf=FACTOR, the seconds of compute that a second of audio may take, such as "
            "rtf=0.05"
        )
    return budget


def trained_points(
    config: EncoderConfig, own: OperatingPoint, about: Optional[Mapping[str, Any]] = None
) -> List[OperatingPoint]:
    """The points to choose from, least reduction first.

    own: that of the model. Where it is not the least reduced one, the model was fine-tuned at it alone, and it is all
    there is. Otherwise: every point with the same pooling in all layers, and those that `about` (of a model folder)
    has a word error rate of. Of a streaming model, the largest chunk only: on whole files a smaller one saves nothing.
    """
    space = config.operating_points
    if own != space.default:
        return [own]
    points = [point for point in space.points() if point.chunk == space.default_chunk]
    return points + [point for point in recorded(about, config) if point not in points]


def recorded(about: Optional[Mapping[str, Any]], config: EncoderConfig) -> Dict[OperatingPoint, Dict[str, Any]]:
    """What a model folder's `about` says of the points that it has a word error rate of: `wer` in percent, and more.

    Entries of another form, and of points that the model was not trained for, are left out.
    """
    entries = (about or {}).get("operating_points")
    found = {}
    for entry in entries if isinstance(entries, list) else []:
        wer = entry.get("wer") if isinstance(entry, dict) else None
        if isinstance(wer, bool) or not isinstance(wer, (int, float)) or not (math.isfinite(wer) and wer >= 0):
            continue
        try:
            found[config.operating_points.check(OperatingPoint.parse(entry.get("point")))] = entry
        except ValueError:
            continue
    return found


@dataclass(frozen=True)
class Ranking:
    """Operating points by accuracy.

    points: the most accurate first. by: what tells, "WER" in percent, or "MACs" of ten seconds. values: these, of each
    point. why: the ground of the order, for a message.
    """

    points: Tuple[OperatingPoint, ...]
    by: str
    values: Dict[OperatingPoint, float]
    why: str


def rank(
    config: EncoderConfig,
    points: Sequence[OperatingPoint],
    labels: int,
    about: Optional[Mapping[str, Any]] = None,
    sample_rate: int = 16000,
) -> Ranking:
    """Orders points by recorded word error rates, if all have one and of the same references; else by MACs.

    labels: of the CTC head. Of equally accurate points the one with fewer MACs comes first; by MACs, the one with the
    larger chunk, which hears more.
    """
    macs = {point: whole_macs(config, point, labels, sample_rate) for point in points}
    entries = recorded(about, config)
    measured = {point: float(entries[point]["wer"]) for point in points if point in entries}
    of = {tuple(str(entries[point].get(key, "")) for key in ("references", "decoder")) for point in measured}
    if len(measured) == len(points) and len(of) == 1:
        references, _ = of.pop()
        order = sorted(points, key=lambda point: (measured[point], macs[point]))
        return Ranking(tuple(order), "WER", measured, f"by WER{references and f' on {references}'}")
    order = sorted(points, key=lambda point: (-macs[point], -(point.chunk or math.inf)))
    if len(points) == 1:
        why = "the only one"
    elif not measured:
        why = "by MACs, as no WERs are recorded"
    elif len(of) > 1:
        why = "by MACs, as the recorded WERs are of different references or decoders"
    else:
        why = f"by MACs, as WERs are recorded of {len(measured)} of {len(points)} points"
    return Ranking(tuple(order), "MACs", macs, why)


def whole_macs(
    config: EncoderConfig, point: OperatingPoint, labels: int, sample_rate: int = 16000, seconds: float = SECONDS
) -> int:
    """MACs with the whole utterance in one chunk, as files are transcribed."""
    whole = dataclasses.replace(config, operating_points=dataclasses.replace(config.operating_points, chunk=(0,)))
    point = dataclasses.replace(point, chunk=0)
    return sum(count_macs(whole, round(seconds * sample_rate), point, labels).values())


@dataclass(frozen=True)
class Speed:
    """What a point takes. median: real-time factor of its runs. slow: the one that nine in ten of its runs kept.

    start: seconds that a batch takes besides its audio, one of a length that is new; also of nine in ten.
    """

    median: float
    slow: float
    start: float = 0.0


def noise_of(sample_rate: int) -> np.ndarray:
    """(samples,) float32: the ten seconds that are heard in a measurement."""
    return np.random.default_rng(0).normal(0, 0.1, SECONDS * sample_rate).astype(np.float32)


def measure(
    run: Run,
    points: Sequence[OperatingPoint],
    sample_rate: int = 16000,
    clock: Callable[[], float] = time.perf_counter,
    note: Callable[[str], None] = lambda line: None,
) -> Dict[OperatingPoint, Speed]:
    """Runs every point on ten seconds of noise and on a few, in turns, once more than counts; takes about a minute at
    most, or the time of six runs of each point where that is more.

    run: takes a point and (samples,) float32. note: is told how long it will take, if that is long.
    """
    noise = noise_of(sample_rate)

    def seconds(point: OperatingPoint, samples: np.ndarray) -> float:
        start = clock()
        run(point, samples)
        return clock() - start

    first = sum(seconds(point, noise) for point in points)
    expected = max(min(TIME_LIMIT, MOST_ROUNDS * first), FEWEST_ROUNDS * first)
    if expected > _LONG:
        note(f"this takes about {expected:.0f} s")
    factors: Dict[OperatingPoint, List[float]] = {point: [] for point in points}
    shorts: Dict[OperatingPoint, List[Tuple[float, float]]] = {point: [] for point in points}  # of audio, of compute
    began = clock()
    for rounds in range(MOST_ROUNDS):
        if rounds >= FEWEST_ROUNDS and clock() - began > TIME_LIMIT:
            break
        length = _SHORT_SECONDS + rounds % _SHORT_LENGTHS * _SHORT_STEP
        short = noise[: round(length * sample_rate)]
        for point in points:
            factors[point].append(seconds(point, noise) / SECONDS)
            shorts[point].append((length, seconds(point, short)))
    return {point: _speed(factors[point], shorts[point]) for point in points}


def _speed(factors: Sequence[float], shorts: Sequence[Tuple[float, float]]) -> Speed:
    median = percentile(factors, 50)
    starts = [compute - median * audio for audio, compute in shorts]
    return Speed(median, percentile(factors, _SLOW), max(0.0, percentile(starts, _SLOW)))


@dataclass(frozen=True)
class Workload:
    """The recordings that a point is chosen for.

    lengths: seconds of some or all of them; 0: not known, taken for ten. longest: seconds that are heard at once.
    """

    lengths: Tuple[float, ...] = ()
    longest: float = Windowing().longest

    @classmethod
    def of(
        cls, recordings: Sequence[Any], duration: Callable[[Any], float], longest: Optional[float] = None
    ) -> Workload:
        """Of recordings, of which no more than a few hundred are opened."""
        some = recordings[:: -(-len(recordings) // _MOST_RECORDINGS) or 1]
        return cls(tuple(map(duration, some)), Windowing().longest if longest is None else longest)

    def __str__(self) -> str:
        mean = sum(length or SECONDS for length in self.lengths) / max(1, len(self.lengths))
        if len(self.lengths) == 1:
            return f"for a recording of {mean:.1f} s"
        return f"for recordings of {mean:.1f} s on average" if self.lengths else f"for utterances of {SECONDS} s"

    def factor(self, speed: Speed, macs: Callable[[float], float] = lambda seconds: seconds) -> float:
        """The real-time factor to be expected; macs: of an utterance of some seconds."""
        windows: List[float] = []
        for length in self.lengths:
            length = min(length or SECONDS, _LONGEST_RECORDING)
            windows += [self.longest] * int(length // self.longest)
            windows += [length % self.longest] if length % self.longest else []
        if not windows:
            return speed.slow
        compute, per_mac = 0.0, speed.slow * SECONDS / macs(SECONDS)
        for rows in batched(windows, BATCH_SECONDS):
            padded = math.ceil(windows[rows[0]] / LENGTH_GRID_SECONDS) * LENGTH_GRID_SECONDS
            # short utterances are not taken to cost less than their share of a longer one
            own = max(macs(padded), macs(SECONDS) * padded / SECONDS)
            compute += speed.start + per_mac * own * len(rows)
        return compute / sum(windows)


@dataclass(frozen=True)
class Choice:
    """The point for a budget, and on what grounds. factors: real-time factors to be expected of `workload`, by point.
    measured: when, for a message."""

    point: OperatingPoint
    ranking: Ranking
    speeds: Dict[OperatingPoint, Speed]
    budget: float
    measured: str
    factors: Dict[OperatingPoint, float]
    workload: Workload

    def line(self) -> str:
        """One line: what was chosen, and why."""
        fitting = sum(self.factors[point] <= self.budget for point in self.ranking.points)
        total = len(self.ranking.points)
        grounds = (
            f"the most accurate ({self.ranking.why}) of the {fitting} of {total} points that keep rtf={self.budget:g}"
            if total > 1
            else f"the only one of the model; it keeps rtf={self.budget:g}"
        )
        return (
            f"operating point {self.point}: {grounds}: rtf {self.factors[self.point]:.4g} {self.workload} here, "
            f"{self.measured}"
        )

    def table(self) -> List[str]:
        """A header and a line for each point, the most accurate first: speed, whether it keeps the budget, accuracy."""
        unit = "WER %" if self.ranking.by == "WER" else "GMACs"
        rows = [("point", "rtf", f"of {SECONDS} s", "median", "fits", unit, "")]
        for point in self.ranking.points:
            speed, value = self.speeds[point], self.ranking.values[point]
            factors = (f"{factor:.4g}" for factor in (self.factors[point], speed.slow, speed.median))
            fits = "yes" if self.factors[point] <= self.budget else "no"
            value = f"{value:.2f}" if self.ranking.by == "WER" else f"{value / 1e9:.4g}"
            rows.append((str(point), *factors, fits, value, "<" if point == self.point else ""))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def choose(
    ranking: Ranking,
    speeds: Mapping[OperatingPoint, Speed],
    budget: float,
    measured: str = NOW,
    workload: Workload = Workload(),
    macs: Callable[[OperatingPoint, float], float] = lambda point, seconds: seconds,
) -> Choice:
    """The most accurate point that keeps the budget; raises ValueError, naming the fastest point, where none does.

    workload: the recordings that are to keep it. macs: of a point and an utterance of some seconds.
    """
    factors = {point: workload.factor(speeds[point], functools.partial(macs, point)) for point in ranking.points}
    for point in ranking.points:
        if factors[point] <= budget:
            return Choice(point, ranking, dict(speeds), budget, measured, factors, workload)
    fastest = min(ranking.points, key=factors.__getitem__)
    # what would be kept, rounded up to two digits
    exponent = math.floor(math.log10(factors[fastest])) - 1
    enough = math.ceil(factors[fastest] / 10**exponent) * 10**exponent
    raise ValueError(
        f"--budget rtf={budget:g}: no operating point is that fast here ({measured}): the fastest, {fastest}, has a "
        f"real-time factor of {factors[fastest]:.4g} {workload}; give --budget rtf={enough:.2g} or more, "
        "--dtype bfloat16 where the CPU or GPU has it, on a CPU more --threads or a model that `w2v2-light quantize` "
        "made int8, or take a smaller one"
    )


def machine(threads: int, torch_version: str) -> Dict[str, str]:
    """What the speed of a model depends on besides the model."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_name(),
        "cores": str(available),
        "threads": str(threads),
        "torch": str(torch_version),
        "fairseq_w2v2_light": __version__,
    }


def fingerprint(path: PathLike) -> str:
    """A digest of a model's weights and network: of a checkpoint file, or of a model folder without its `about`."""
    path, digest = Path(path), hashlib.sha256()
    if is_model_folder(path):
        config = {key: value for key, value in read_config(path).items() if key != "about"}
        digest.update(json.dumps(config, sort_keys=True).encode())
        path = path / WEIGHTS
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Optional[Path]:
    """Where measurements are kept, by XDG's rules; None without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "w2v2-light" / "operating-points"


def cache_file(key: Mapping[str, str]) -> Optional[Path]:
    """Where the measurement of `key` (machine, model, dtype, decoder) is kept."""
    folder = cache_folder()
    name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:32]
    return None if folder is None else folder / f"{name}.json"


def read_cache(
    file: Path, key: Mapping[str, str], points: Sequence[OperatingPoint]
) -> Optional[Tuple[Dict[OperatingPoint, Speed], str]]:
    """The speeds of `points` and the date, as `write_cache` kept them; None where it has none, or anything is amiss."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["version"] != _CACHE_VERSION or values["key"] != dict(key):
            return None
        speeds = {
            point: Speed(*(float(values["points"][str(point)][name]) for name in ("median", "slow", "start")))
            for point in points
        }
        date = datetime.date.fromisoformat(values["date"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    sane = all(0 < speed.median <= speed.slow < math.inf and 0 <= speed.start < math.inf for speed in speeds.values())
    return (speeds, f"measured on {date}") if sane else None


def write_cache(file: Path, key: Mapping[str, str], speeds: Mapping[OperatingPoint, Speed]) -> None:
    """Keeps a measurement in one step; raises OSError where the folder cannot be written."""
    values = {
        "version": _CACHE_VERSION,
        "key": dict(key),
        "date": datetime.date.today().isoformat(),
        "points": {str(point): dataclasses.asdict(speed) for point, speed in speeds.items()},
    }
    atomic_write_text(file, json.dumps(values, indent=2) + "\n")


def kept_or_measured(
    run: Run,
    points: Sequence[OperatingPoint],
    key: Mapping[str, str],
    sample_rate: int = 16000,
    again: bool = False,
    note: Callable[[str], None] = lambda line: None,
) -> Tuple[Dict[OperatingPoint, Speed], str]:
    """Speeds of `points` and when they were measured: those on disk, else measured now (always, `again`) and kept.

    note: is told that measuring begins, which takes its time, and where nothing can be kept.
    """
    file = cache_file(key)
    kept = None if again or file is None else read_cache(file, key, points)
    if kept is not None:
        return kept
    where = f"kept in {file}" if file is not None else "not kept: there is no home directory"
    note(f"measuring {len(points)} operating point{'s' * (len(points) > 1)} on this machine, once ({where})")
    speeds = measure(run, points, sample_rate, note=note)
    try:
        if file is not None:
            write_cache(file, key, speeds)
    except OSError as error:
        note(f"{file}: the measurement could not be kept ({error.strerror}); it will be made again the next time")
    return speeds, NOW


def record(folder: PathLike, entries: Sequence[Mapping[str, Any]]) -> None:
    """Writes what was found out about operating points into a model folder's config.json, in one step.

    entries: each with `point` and, among others, `wer`; they are added to what about.operating_points says of the
    point. Raises as `read_config` does, and ValueError for what is no model folder.
    """
    folder = Path(folder)
    if not is_model_folder(folder):
        raise ValueError(f"{folder}: not a model folder, which could hold WERs; make one with `w2v2-light export`")
    config = read_config(folder)
    about = config.get("about")
    about = dict(about) if isinstance(about, dict) else {}
    present = about.get("operating_points")
    by_point = {}
    for entry in present if isinstance(present, list) else []:
        if isinstance(entry, dict):
            by_point[str(entry.get("point"))] = dict(entry)
    for entry in entries:
        by_point.setdefault(str(entry["point"]), {}).update(entry)
    about["operating_points"] = list(by_point.values())
    config["about"] = about
    atomic_write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
