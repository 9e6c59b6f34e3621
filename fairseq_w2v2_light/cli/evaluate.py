"""`w2v2-light evaluate`: word and character error rates of a model, or of texts, against references."""

import argparse
import dataclasses
import json
import math
import unicodedata
from pathlib import Path
from typing import Any, Dict, Iterator, List

from ..data.references import DEFAULT_SPLIT, IDS, Reference, pair, read_hypotheses, read_references
from ..data.sources import parse_columns
from ..data.text import remove_punctuation
from ..files import atomic_path
from ..runtime.scoring import Counts, Scored, alignment_lines
from ..study.evaluation import WINDOW_SECONDS, Result, check_references, recognise, scored
from . import recognition_options
from .stream import display_width

_OF_A_MODEL = (
    *("operating_point", "auto_operating_point", "budget", "measure_again", "dtype", "beam", "lm", "lexicon"),
    *("lexicon_free", "lm_weight", "word_score", "sil_score", "beam_threshold", "dictionary", "threads"),
    *("device", "all_points", "write_to_folder"),
)
# what a report says of a recognition; device: only where it is no CPU
_HOW = ("operating_point", "dtype", "device", "decoder")


def add_arguments(parser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "Counts are of the alignment with the fewest errors and, among those, the most hits; characters include the\n"
        "blanks between words. Nothing is normalised but white space, unless an option asks for it; then accents are\n"
        "composed (Unicode NFC), too.\n\n"
        "  w2v2-light evaluate DATA --split test --model FOLDER\n"
        "  w2v2-light evaluate table.csv --model FOLDER --auto-operating-point --budget rtf=0.05\n"
        "  w2v2-light evaluate DATA --model FOLDER --all-points --write-to-folder\n"
        "  w2v2-light evaluate references.txt --hypotheses recognised.txt"
    )
    parser.add_argument(
        "references",
        type=Path,
        metavar="REFERENCES",
        help="a folder of manifests, a manifest, a table (.csv, .tsv, .jsonl) with columns path and text, or, with "
        "--hypotheses, lines of text: `TEXT`, `ID TEXT` or `TEXT (ID)`",
    )
    add_split(parser)
    parser.add_argument(
        "--hypotheses", type=Path, metavar="FILE", help="score these texts instead of a model: lines, .jsonl, a table"
    )
    parser.add_argument(
        "--ids",
        choices=IDS,
        default="auto",
        help="where lines of text have an id: none, first (`ID TEXT`), last (`TEXT (ID)`); auto: as they look",
    )
    recognition_options.add_arguments(parser, several_points=True, model_required=False)
    parser.add_argument(
        "--window",
        type=float,
        default=WINDOW_SECONDS,
        metavar="SECONDS",
        help="utterances up to this are heard whole, as by `infer`; longer ones are cut (default: "
        f"{WINDOW_SECONDS:g}; transcribe: 20)",
    )
    parser.add_argument("--all-points", action="store_true", help="evaluate every operating point of the model")
    parser.add_argument(
        "--write-to-folder",
        action="store_true",
        help="record the error rates in the model folder, where --auto-operating-point finds them",
    )
    add_normalisation(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, or a list of them for several points"
    )
    parser.add_argument(
        "--per-utterance",
        type=Path,
        metavar="FILE",
        help="write the alignment of each utterance as text or, if the name ends with .jsonl, as JSON lines",
    )


def add_split(parser) -> None:
    """Which of the references: --split and --columns."""
    parser.add_argument("--split", default="", help="of the folder (default: test), or of the table (default: all)")
    parser.add_argument(
        "--columns", default="", metavar="path=A,text=B", help="names of the columns path and text if others"
    )


def add_normalisation(parser) -> None:
    """Declares the options that `normalised` reads."""
    parser.add_argument("--lowercase", action="store_true", help="compare in lower case")
    parser.add_argument(
        "--remove-punctuation",
        action="store_true",
        help="compare letters, digits and apostrophes only; other signs are white space, as in `prepare`",
    )


def run(args) -> int:
    _check_options(args)
    references = read_references(args.references, args.split, parse_columns(args.columns), args.ids)
    if args.hypotheses is not None:
        texts = pair(references, read_hypotheses(args.hypotheses, ids=args.ids))
        results = [scored(references, texts, lambda text: normalised(args, text))]
    else:
        results = list(_recognised(args, references))
    if args.per_utterance is not None:
        write_per_utterance(args.per_utterance, results[0])
    if args.json:
        values = [as_json(result) for result in results]
        print(json.dumps(values if len(values) > 1 else values[0], indent=2, ensure_ascii=False))
    else:
        print("\n".join(table(results)))
    return 0


def _recognised(args, references: List[Reference]) -> Iterator[Result]:
    """Runs the model at every point asked for, and records the results if wanted."""
    recognition_options.check(args)
    check_references(references)
    paths = [reference.path for reference in references]
    recognizer = recognition_options.recognizer(args, recordings=paths, longest=args.window)
    recognizer.windowing = dataclasses.replace(recognizer.windowing, longest=args.window)
    entries = []
    for point in recognition_options.points(args, recognizer, args.all_points):
        recognizer.point = point
        about = recognition_options.describe(args, recognizer)
        result = recognise(recognizer, references, lambda text: normalised(args, text), about, recognition_options.note)
        recognition_options.compare_with_budget(args, result.compute, result.audio)
        entries.append(_entry(args, result))
        yield result
    if args.write_to_folder:
        from ..runtime.operating import record

        record(args.model, entries)


def normalised(args, text: str) -> str:
    """A text as the options of normalisation want it; without any, as it is."""
    if args.lowercase or args.remove_punctuation:
        text = unicodedata.normalize("NFC", text)
    text = text.lower() if args.lowercase else text
    return remove_punctuation(text) if args.remove_punctuation else text


def table(results: List[Result]) -> List[str]:
    """Lines for people: words and characters of one result, or a line for each of several."""
    first = results[0].totals
    wrong = f"{first.utterances} utterances"
    if len(results) == 1:
        heads = ["", "rate %", "substitutions", "deletions", "insertions", "errors", "of"]
        rows = [heads]
        for name, counts in (("WER", first.words), ("CER", first.characters)):
            rows.append([name, _percent(counts), *_numbers(counts), str(counts.errors), str(counts.reference)])
        lines = _columns(rows)
        speed = f"; {_speed(results[0])}" if results[0].about else ""
        return [*lines, f"{wrong}, {first.wrong} with errors{speed}"]
    rows = [["point", "WER %", "CER %", "S", "D", "I", "utterances with errors", "real-time factor"]]
    for result in results:
        counts = result.totals
        rates = [_percent(counts.words), _percent(counts.characters)]
        factor = f"{result.compute / result.audio:.4f}" if result.audio else "-"
        rows.append([result.about["operating_point"], *rates, *_numbers(counts.words), str(counts.wrong), factor])
    about = results[0].about
    how = ", ".join(about[key] for key in _HOW[1:] if key in about)
    said = f"{first.words.reference} words, {results[0].audio:.1f} s of audio; {how}"
    return [*_columns(rows), f"{wrong}, {said}"]


def as_json(result: Result) -> Dict[str, Any]:
    """JSON values of a result: rates in percent (null of no characters), counts, times in seconds."""
    counts = result.totals
    values: Dict[str, Any] = {
        "wer": counts.words.rate,
        "cer": counts.characters.rate,
        "words": _counts_as_json(counts.words),
        "characters": _counts_as_json(counts.characters),
        "utterances": counts.utterances,
        "utterances_with_errors": counts.wrong,
    }
    if result.about:
        factor = result.compute / result.audio if result.audio else None
        values.update(result.about, audio_seconds=result.audio, compute_seconds=result.compute, real_time_factor=factor)
    return values


def write_per_utterance(path: Path, result: Result) -> None:
    """Writes texts, counts and alignment of every utterance, in order: JSON lines, or text as sclite prints it."""
    write = _json_line if path.suffix.lower() in (".jsonl", ".json", ".ndjson") else _text_block
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for utterance in result.scored:
            file.write(write(utterance))


def _json_line(utterance: Scored) -> str:
    values = {
        "id": utterance.name,
        "reference": utterance.reference,
        "hypothesis": utterance.hypothesis,
        "wer": utterance.words.rate,
        "cer": utterance.characters.rate,
        "words": _counts_as_json(utterance.words),
        "characters": _counts_as_json(utterance.characters),
        "alignment": [list(step) for step in utterance.alignment()],
    }
    return json.dumps(values, ensure_ascii=False) + "\n"


def _text_block(utterance: Scored) -> str:
    counts = utterance.words
    numbers = " ".join(map(str, (counts.hits, counts.substitutions, counts.deletions, counts.insertions)))
    lines = [f"id: ({utterance.name})", f"Scores: (#C #S #D #I) {numbers}"]
    return "\n".join([*lines, *alignment_lines(utterance.alignment(), display_width), "", ""])


def _counts_as_json(counts: Counts) -> Dict[str, int]:
    return {**dataclasses.asdict(counts), "errors": counts.errors, "reference": counts.reference}


def _percent(counts: Counts) -> str:
    return "-" if counts.rate is None else f"{counts.rate:.2f}"


def _numbers(counts: Counts) -> List[str]:
    return [str(number) for number in (counts.substitutions, counts.deletions, counts.insertions)]


def _columns(rows: List[List[str]]) -> List[str]:
    """Rows as lines, first cells to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def _speed(result: Result) -> str:
    factor = f"real-time factor {result.compute / result.audio:.4f}" if result.audio else "no audio"
    how = ", ".join(result.about[key] for key in _HOW if key in result.about)
    return f"{result.audio:.1f} s of audio in {result.compute:.1f} s: {factor} ({how})"


def _entry(args, result: Result) -> Dict[str, Any]:
    """What a model folder records of a result."""
    counts = result.totals
    names = ("lowercase", "remove_punctuation")
    how = "".join(f", {name.replace('_', ' ')}" for name in names if getattr(args, name))
    source = args.references.resolve()
    split = f"/{args.split or DEFAULT_SPLIT}" if source.is_dir() else f" {args.split}" if args.split else ""
    return {
        "point": result.about["operating_point"],
        "wer": round(counts.words.rate, 3),
        "cer": None if counts.characters.rate is None else round(counts.characters.rate, 3),
        "references": f"{source.name}{split}{how}",
        "words": counts.words.reference,
        "dtype": result.about["dtype"],
        "decoder": result.about["decoder"],
    }


def _check_options(args) -> None:
    if (args.model is None) == (args.hypotheses is None):
        raise ValueError("expected either --model, to transcribe the audio, or --hypotheses, to score texts")
    if args.hypotheses is not None:
        given = [name for name in _OF_A_MODEL if getattr(args, name) not in (None, "", False, "auto")]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')}: for --model only; --hypotheses are texts already")
    if not (math.isfinite(args.window) and args.window > 0):
        raise ValueError(f"--window: found {args.window:g} seconds, expected a positive number")
    several = args.all_points or "," in args.operating_point
    if several and args.per_utterance is not None:
        raise ValueError(
            "--per-utterance: of one operating point only; leave it out, or name one with --operating-point"
        )
    if args.all_points and (args.operating_point or args.auto_operating_point):
        raise ValueError("--all-points evaluates every operating point; choose one or the other")
    if args.write_to_folder:
        from ..runtime.folder import is_model_folder

        if not is_model_folder(args.model):
            raise ValueError(f"--write-to-folder: {args.model} is no model folder; make one with `w2v2-light export`")
