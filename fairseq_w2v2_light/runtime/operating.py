"""The operating point for a budget: the most accurate one that is fast enough on this machine, as measured here.

Speed is the real-time factor of a model, seconds of compute for a second of audio, of utterances of ten seconds one by
one. They are noise: what a network computes does not depend on what it hears. All points are measured in turns, so
that noise of the machine meets them alike, and each is taken to be as slow as nine in ten of its runs were not.
A measurement is kept on disk, for this model on this machine.

Accuracy is the word error rate that `w2v2-light evaluate --all-points --write-to-folder` recorded in a model folder;
where not every point has one, the point with more multiply-accumulates is taken for the more accurate one.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import re
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
from .folder import CONFIG, WEIGHTS, is_model_folder, read_config
from .timings import percentile

SECONDS = 10
# runs of each point: as many as fit into the time limit, within these bounds
FEWEST_ROUNDS, MOST_ROUNDS = 5, 20
TIME_LIMIT = 60.0
_SLOW = 90  # percentile
_LONG = 10.0  # seconds to wait without a word
_CACHE_VERSION = 1

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
    macs = {point: _whole_macs(config, point, labels, sample_rate) for point in points}
    entries = recorded(about, config)
    measured = {point: float(entries[point]["wer"]) for point in points if point in entries}
    of = {str(entries[point].get("references", "")) for point in measured}
    if len(measured) == len(points) and len(of) == 1:
        references = of.pop()
        order = sorted(points, key=lambda point: (measured[point], macs[point]))
        return Ranking(tuple(order), "WER", measured, f"by WER{references and f' on {references}'}")
    order = sorted(points, key=lambda point: (-macs[point], -(point.chunk or math.inf)))
    if len(points) == 1:
        why = "the only one"
    elif not measured:
        why = "by MACs, as no WERs are recorded"
    elif len(of) > 1:
        why = "by MACs, as the recorded WERs are of different references"
    else:
        why = f"by MACs, as WERs are recorded of {len(measured)} of {len(points)} points"
    return Ranking(tuple(order), "MACs", macs, why)


def _whole_macs(config: EncoderConfig, point: OperatingPoint, labels: int, sample_rate: int) -> int:
    """MACs with the whole utterance in one chunk, as files are transcribed."""
    whole = dataclasses.replace(config, operating_points=dataclasses.replace(config.operating_points, chunk=(0,)))
    point = dataclasses.replace(point, chunk=0)
    return sum(count_macs(whole, SECONDS * sample_rate, point, labels).values())


@dataclass(frozen=True)
class Speed:
    """Real-time factors of a point. median: of its runs. slow: what nine in ten of its runs kept."""

    median: float
    slow: float


def measure(
    run: Run,
    points: Sequence[OperatingPoint],
    sample_rate: int = 16000,
    clock: Callable[[], float] = time.perf_counter,
    note: Callable[[str], None] = lambda line: None,
) -> Dict[OperatingPoint, Speed]:
    """Runs every point on ten seconds of noise, in turns, once more than counts; takes about a minute at most, or the
    time of six runs of each point where that is more.

    run: takes a point and (samples,) float32. note: is told how long it will take, if that is long.
    """
    noise = np.random.default_rng(0).normal(0, 0.1, SECONDS * sample_rate).astype(np.float32)
    began = clock()
    for point in points:
        run(point, noise)
    first = clock() - began
    expected = max(min(TIME_LIMIT, MOST_ROUNDS * first), FEWEST_ROUNDS * first)
    if expected > _LONG:
        note(f"this takes about {expected:.0f} s")
    times: Dict[OperatingPoint, List[float]] = {point: [] for point in points}
    began = clock()
    for rounds in range(MOST_ROUNDS):
        if rounds >= FEWEST_ROUNDS and clock() - began > TIME_LIMIT:
            break
        for point in points:
            start = clock()
            run(point, noise)
            times[point].append((clock() - start) / SECONDS)
    return {point: Speed(percentile(values, 50), percentile(values, _SLOW)) for point, values in times.items()}


@dataclass(frozen=True)
class Choice:
    """The point for a budget, and on what grounds. measured: when, for a message."""

    point: OperatingPoint
    ranking: Ranking
    speeds: Dict[OperatingPoint, Speed]
    budget: float
    measured: str

    def line(self) -> str:
        """One line: what was chosen, and why."""
        fitting = sum(self.speeds[point].slow <= self.budget for point in self.ranking.points)
        total = len(self.ranking.points)
        grounds = (
            f"the most accurate ({self.ranking.why}) of the {fitting} of {total} points that keep rtf={self.budget:g}"
            if total > 1
            else f"the only one of the model; it keeps rtf={self.budget:g}"
        )
        return f"operating point {self.point}: {grounds}: rtf {self.speeds[self.point].slow:.4g} here, {self.measured}"

    def table(self) -> List[str]:
        """A header and a line for each point, the most accurate first."""
        return speed_table(self.ranking, self.speeds, self.budget, self.point)


def speed_table(
    ranking: Ranking,
    speeds: Mapping[OperatingPoint, Speed],
    budget: float,
    chosen: Optional[OperatingPoint] = None,
) -> List[str]:
    """Lines with the speed and the accuracy of every point, and whether it keeps the budget."""
    unit = "WER %" if ranking.by == "WER" else "GMACs"
    rows = [("point", "rtf", "median", "fits", unit, "")]
    for point in ranking.points:
        speed, value = speeds[point], ranking.values[point]
        value = f"{value:.2f}" if ranking.by == "WER" else f"{value / 1e9:.4g}"
        fits = "yes" if speed.slow <= budget else "no"
        rows.append(
            (str(point), f"{speed.slow:.4g}", f"{speed.median:.4g}", fits, value, "<" if point == chosen else "")
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def choose(
    ranking: Ranking, speeds: Mapping[OperatingPoint, Speed], budget: float, measured: str = "measured now"
) -> Choice:
    """The most accurate point that keeps the budget; raises ValueError, naming the fastest point, where none does."""
    for point in ranking.points:
        if speeds[point].slow <= budget:
            return Choice(point, ranking, dict(speeds), budget, measured)
    fastest = min(ranking.points, key=lambda point: speeds[point].slow)
    # what would be kept, rounded up to two digits
    exponent = math.floor(math.log10(speeds[fastest].slow)) - 1
    enough = math.ceil(speeds[fastest].slow / 10**exponent) * 10**exponent
    raise ValueError(
        f"--budget rtf={budget:g}: no operating point is that fast here ({measured}): the fastest, {fastest}, has a "
        f"real-time factor of {speeds[fastest].slow:.4g}; give --budget rtf={enough:.2g} or more, or more --threads, "
        "--dtype bfloat16 where the CPU has it, `w2v2-light quantize` the model to int8, or take a smaller one"
    )


def machine(threads: int, torch_version: str) -> Dict[str, str]:
    """What the speed of a model depends on besides the model."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": str(available),
        "threads": str(threads),
        "torch": str(torch_version),
        "fairseq_w2v2_light": __version__,
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else f"{platform.machine()} {platform.processor()}".strip()


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
            point: Speed(*(float(values["points"][str(point)][name]) for name in ("median", "slow")))
            for point in points
        }
        date = datetime.date.fromisoformat(values["date"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    sane = all(0 < speed.median <= speed.slow and math.isfinite(speed.slow) for speed in speeds.values())
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
    return speeds, "measured now"


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
