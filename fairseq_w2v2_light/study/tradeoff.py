"""Accuracy against cost: word error rates of models at their operating points, beside what they cost. Without fairseq.

What a model costs is its real-time factor on this machine, its MACs, its parameters and the bytes of its weights.
"""

import csv
import dataclasses
import datetime
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from ..data.references import Reference
from ..files import atomic_path, atomic_write_text
from ..nn.counts import count_macs
from ..nn.operating_point import OperatingPoint
from ..runtime.ctc import CtcModel
from ..runtime.folder import bytes_by_dtype, is_model_folder
from ..runtime.load import load_ctc
from ..runtime.operating import machine
from ..runtime.recognizer import Recognizer
from ..runtime.scoring import Totals
from .evaluation import WINDOW_SECONDS, check_references, recognise, require_words
from .speed import interleaved_factors

FILES = ("tradeoff.csv", "tradeoff.html", "tradeoff.png")
# of a model's `points`
ALL, OWN = "all", "own"


class Axis(NamedTuple):
    """A cost. key: the field of `Row`. name, short: for people. unit: of its values divided by `scale`."""

    key: str
    name: str
    short: str
    unit: str
    scale: float


def axes(seconds: float = 10.0) -> Tuple[Axis, ...]:
    """The costs that a row has, MACs of `seconds` of audio."""
    return (
        Axis("real_time_factor", "real-time factor", "RTF", "seconds of compute per second of audio", 1),
        Axis("macs", "GMACs", "MACs", f"GMACs for {seconds:g} s of audio", 1e9),
        Axis("parameters", "parameters", "params", "million parameters", 1e6),
        Axis("bytes", "size", "size", "MiB of weights", 2**20),
    )


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    path: a fine-tuned checkpoint or a model folder. points: texts of operating points; or "all": every one that it was
    trained for with the same pooling in all layers; or "own": the one that it runs at by default.
    """

    name: str
    path: Union[str, Path]
    points: Union[str, Sequence[str]] = ALL


@dataclass(frozen=True)
class Row:
    """A model at an operating point.

    dtype: that the weights were in. parameters: stored, without gates. bytes: that the weights take in `dtype`, as a
    model folder holds them. macs: of an utterance as long as those that were timed; a streaming model's as it streams.
    real_time_factor: seconds of compute per second of audio. speed_up: how many times as fast as the first row. wer,
    cer: percent (cer None where the references have no characters). substitutions, deletions, insertions: of words;
    words: of the references. pareto: keys of the axes on whose Pareto front it is.
    """

    model: str
    operating_point: str
    dtype: str
    parameters: int
    bytes: int
    macs: int
    real_time_factor: float
    speed_up: float
    wer: float
    cer: Optional[float]
    substitutions: int
    deletions: int
    insertions: int
    words: int
    path: str = ""
    pareto: Tuple[str, ...] = ()

    def record(self) -> Dict[str, Any]:
        """The row as JSON-ready values; `pareto` as one boolean for each axis, `pareto_macs` for one."""
        values = dataclasses.asdict(self)
        fronts = values.pop("pareto")
        path = values.pop("path")
        return {**values, **{f"pareto_{axis.key}": axis.key in fronts for axis in axes()}, "path": path}


@dataclass
class Tradeoff:
    """What was measured. about: on which references, how and where; JSON values."""

    rows: List[Row]
    about: Dict[str, Any]

    def record(self) -> Dict[str, Any]:
        """All of it as JSON-ready values."""
        return {**self.about, "rows": [row.record() for row in self.rows]}


def measure_tradeoff(
    candidates: Sequence[Candidate],
    references: List[Reference],
    dtypes: Sequence[str] = ("auto",),
    dictionary: Optional[Union[str, Path]] = None,
    seconds: float = 10.0,
    pieces: int = 3,
    repeats: int = 7,
    normalise: Callable[[str], str] = str,
    report: Callable[[str], None] = print,
) -> Tradeoff:
    """Transcribes the audio of `references` with every model at its points, in every dtype, and measures the costs.

    Greedy decoding, utterances whole up to 40 s. Then all are timed in turns, on the same `pieces` of `seconds`; they
    are in memory together. dtypes: see `runtime.prepare_`; those that come to the same are measured once. dictionary:
    of checkpoints that hold none. normalise: makes of a text what is compared. report: is told how it goes on. Raises
    ValueError and FileNotFoundError that name the model or file, before anything is transcribed wherever possible.
    """
    name, times = Counter(candidate.name for candidate in candidates).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{times} models are called {name!r}; give each a name of its own, NAME=PATH")
    check_references(references)
    require_words(references, normalise)
    runs = _load(candidates, dtypes, dictionary, seconds)
    results = {}
    for number, (key, run) in enumerate(runs.items(), start=1):
        name, dtype, point = key
        run.recognizer.point = run.point
        results[key] = recognise(run.recognizer, references, normalise, {"operating_point": point}, report)
        wer = results[key].totals.words.rate
        report(f"[{number}/{len(runs)}] {name} at {point}, {dtype}: WER {wer:.2f} %")
    report(f"timing: {1 + repeats} turns of {pieces} x {seconds:g} s")
    factors = interleaved_factors(
        {key: (run.recognizer.model, run.point) for key, run in runs.items()},
        [reference.path for reference in references],
        *(seconds, pieces, repeats),
    )
    first = next(iter(factors.values()))
    rows = [_row(key, run, results[key].totals, factors[key], first) for key, run in runs.items()]
    total = next(iter(results.values()))
    about = {
        "references": references[0].where.rpartition(":")[0],
        "utterances": len(references),
        "words": total.totals.words.reference,
        "audio_seconds": round(total.audio, 3),
        "seconds": seconds,
        "pieces": pieces,
        "repeats": repeats,
        "date": datetime.date.today().isoformat(),
        **machine(torch.get_num_threads(), torch.__version__),
    }
    return Tradeoff(with_fronts(rows), about)


class _Run(NamedTuple):
    """One row to be: a model at a point; parameters, bytes and MACs as it is stored, not as `prepare_` lays it out."""

    path: str
    recognizer: Recognizer
    point: OperatingPoint
    macs: int
    parameters: int
    bytes: int


_Key = Tuple[str, str, str]  # model, dtype, operating point


def _load(candidates, dtypes, dictionary, seconds: float) -> Dict[_Key, _Run]:
    """The models, ready to run, each at its points in each dtype; raises as `measure_tradeoff` does."""
    runs: Dict[_Key, _Run] = {}
    for candidate in candidates:
        own = None if is_model_folder(candidate.path) else dictionary
        stored = load_ctc(candidate.path, own)
        parameters, symbols = _parameters(stored), len(stored.symbols)
        sizes = bytes_by_dtype(stored.config, symbols)
        samples = round(seconds * stored.sample_rate)
        for dtype in dtypes:
            recognizer = Recognizer.from_pretrained(candidate.path, dtype=dtype, dictionary=own)
            recognizer.windowing = dataclasses.replace(recognizer.windowing, longest=WINDOW_SECONDS)
            for point in _points(candidate, stored):
                macs = sum(count_macs(stored.config, samples, point, symbols).values())
                run = _Run(str(candidate.path), recognizer, point, macs, parameters, sizes[recognizer.dtype])
                runs.setdefault((candidate.name, recognizer.dtype, str(point)), run)
    return runs


def _row(key: _Key, run: _Run, counts: Totals, factor: float, first: float) -> Row:
    """What came out of a run; factor, first: real-time factors of it and of the first one."""
    name, dtype, point = key
    return Row(
        model=name,
        operating_point=point,
        dtype=dtype,
        parameters=run.parameters,
        bytes=run.bytes,
        macs=run.macs,
        real_time_factor=factor,
        speed_up=first / factor,
        wer=counts.words.rate,
        cer=counts.characters.rate,
        substitutions=counts.words.substitutions,
        deletions=counts.words.deletions,
        insertions=counts.words.insertions,
        words=counts.words.reference,
        path=run.path,
    )


def _parameters(model: CtcModel) -> int:
    """Of a model in floats, also where its weights are int8, and without gates: pruning removes them."""
    with torch.device("meta"):
        floats = CtcModel(dataclasses.replace(model.config, prune_units=()), model.symbols)
    return sum(value.numel() for value in floats.parameters())


def _points(candidate: Candidate, model: CtcModel) -> List[OperatingPoint]:
    """The operating points that a candidate asks for; raises ValueError for one that it was not trained for."""
    space = model.config.operating_points
    if candidate.points == OWN or candidate.points == ALL and model.point != space.default:
        # it was fine-tuned at its own point alone
        return [model.point]
    if candidate.points == ALL:
        return list(space.points())
    texts = candidate.points.split(",") if isinstance(candidate.points, str) else candidate.points
    try:
        return list(dict.fromkeys(space.check(OperatingPoint.parse(text)) for text in texts))
    except ValueError as error:
        raise ValueError(f"{candidate.path}: {error}") from error


def with_fronts(rows: Sequence[Row]) -> List[Row]:
    """The rows, each with the axes on whose Pareto front it is.

    There, no other row is cheaper and at least as accurate, or more accurate and at most as expensive.
    """
    found = []
    for row in rows:
        fronts = [
            axis.key for axis in axes() if not any(_dominates(_place(other, axis), _place(row, axis)) for other in rows)
        ]
        found.append(dataclasses.replace(row, pareto=tuple(fronts)))
    return found


def _place(row: Row, axis: Axis) -> Tuple[float, float]:
    return getattr(row, axis.key), row.wer


def _dominates(one: Tuple[float, float], other: Tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def cells(rows: Sequence[Row], seconds: float = 10.0) -> Tuple[List[str], List[List[str]]]:
    """Headings and rows of the table, as people read it."""
    names = {axis.key: axis.short for axis in axes()}
    head = ["model", "operating point", "dtype", "parameters", "MiB", f"GMACs ({seconds:g} s)", "real-time factor"]
    head += ["speed-up", "WER %", "CER %", "S", "D", "I", "words", "Pareto front"]
    table = []
    for row in rows:
        table.append(
            [
                row.model,
                row.operating_point,
                row.dtype,
                f"{row.parameters / 1e6:.2f} M",
                f"{row.bytes / 2**20:.2f}",
                f"{row.macs / 1e9:.2f}",
                f"{row.real_time_factor:.4f}",
                f"{row.speed_up:.2f}",
                f"{row.wer:.2f}",
                "-" if row.cer is None else f"{row.cer:.2f}",
                *(str(count) for count in (row.substitutions, row.deletions, row.insertions, row.words)),
                ", ".join(names[key] for key in row.pareto) or "-",
            ]
        )
    return head, table


def labels(rows: Sequence[Row]) -> List[str]:
    """What to write beside the points of rows: what tells those of a model apart, or the model's name."""
    found = []
    for row in rows:
        own = [other for other in rows if other.model == row.model]
        parts = [
            getattr(row, key) for key in ("operating_point", "dtype") if len({getattr(one, key) for one in own}) > 1
        ]
        found.append(" ".join(parts) or row.model)
    return found


def format_table(result: Tradeoff) -> str:
    """The rows as a Markdown table."""
    head, table = cells(result.rows, result.about["seconds"])
    rows = [head, ["---"] * len(head), *table]
    return "\n".join("| " + " | ".join(_markdown(cell) for cell in row) + " |" for row in rows)


def _markdown(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def describe(about: Dict[str, Any]) -> str:
    """One sentence: what was measured, how and where."""
    plural = "" if about["threads"] == "1" else "s"
    return (
        f"{about['references']}: {about['utterances']:,} utterances, {about['words']:,} words, "
        f"{about['audio_seconds'] / 60:.1f} minutes. Real-time factor: from waveform to logits, {about['pieces']} "
        f"pieces of {about['seconds']:g} s one by one, median of {about['repeats']} interleaved runs, "
        f"{about['threads']} thread{plural}, {about['cpu']}, torch {about['torch']}, {about['date']}."
    )


def write_tradeoff(result: Tradeoff, out: Path, title: str, report: Callable[[str], None] = print) -> None:
    """Writes tradeoff.csv, tradeoff.html (one self-contained page) and tradeoff.png into the folder `out`.

    Where matplotlib is missing the PNG is left out, and `report` told so.
    """
    from .plot import plot_tradeoff
    from .tradeoff_page import page

    records = [row.record() for row in result.rows]
    names = dict(zip(("csv", "html", "png"), (out / name for name in FILES)))
    with atomic_path(names["csv"]) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    atomic_write_text(names["html"], page(result, title))
    try:
        plot_tradeoff(result, names["png"], title)
    except ValueError as error:
        names["png"].unlink(missing_ok=True)  # that of another run
        report(f"{names['png']}: left out: {error}")
