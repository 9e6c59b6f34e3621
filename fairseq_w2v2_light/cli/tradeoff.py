"""`w2v2-light tradeoff`: word error rate against cost, of several models at their operating points."""

import argparse
import json
import math
import os
from pathlib import Path
from typing import List, Sequence, Tuple

from ..data.references import DEFAULT_SPLIT, read_references
from ..data.sources import parse_columns
from ..nn.operating_point import OperatingPoint
from . import recognition_options
from .evaluate import add_normalisation, add_split, normalised

_DTYPES = ("auto", "float32", "bfloat16", "int8")


def add_arguments(parser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "Every model transcribes the split at each of its operating points, greedily, as `evaluate` does; then all\n"
        "are timed in turns on the same audio. Prints a Markdown table; with --out, a folder gets tradeoff.csv,\n"
        "tradeoff.png and tradeoff.html, a page that needs nothing else.\n\n"
        "  w2v2-light tradeoff DATA model.pt --out tradeoff\n"
        "  w2v2-light tradeoff DATA plain=a/checkpoint_last.pt light=b/checkpoint_last.pt@s1q1k1,s2q1k2\n"
        "  w2v2-light tradeoff DATA model.pt pruned.pt --split valid --operating-points own --dtype float32,int8"
    )
    parser.add_argument(
        "references",
        type=Path,
        metavar="DATA",
        help="a folder of manifests, a manifest, or a table (.csv, .tsv, .jsonl) with columns path and text",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL[@POINTS]",
        help="a fine-tuned checkpoint or a model folder; its name (default: the part of its path that the others do "
        "not share); its own operating points, as of --operating-points",
    )
    add_split(parser)
    parser.add_argument(
        "--operating-points",
        default="all",
        metavar="POINT[,POINT...]",
        help="of every model without @POINTS: a list such as s1q1k1,s2q1k2; all that each was trained for (all, the "
        "default); or the one that each runs at by default (own)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar="DTYPE[,DTYPE...]",
        help=f"in which the models compute: {', '.join(_DTYPES)} (default: auto, as model folders say)",
    )
    parser.add_argument("--dictionary", metavar="FILE", help="dict.ltr.txt, for checkpoints that hold none")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help="length of the pieces that are timed, for which MACs are counted (default: 10)",
    )
    parser.add_argument("--pieces", type=int, default=3, metavar="N", help="how many are timed (default: 3)")
    parser.add_argument(
        "--repeats", type=int, default=7, metavar="N", help="timings to take the median of (default: 7)"
    )
    add_normalisation(parser)
    parser.add_argument("--title", default="", help="of the page and the plot")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for tradeoff.csv, tradeoff.png, tradeoff.html")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(args) -> int:
    dtypes = _check_options(args)
    references = read_references(args.references, args.split, parse_columns(args.columns))

    import torch

    from ..study.tradeoff import format_table, measure_tradeoff, write_tradeoff

    if args.out is not None:
        if args.out.exists() and not args.out.is_dir():
            raise ValueError(f"--out {args.out}: a file; expected a folder")
        args.out.mkdir(parents=True, exist_ok=True)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    result = measure_tradeoff(
        candidates(args.models, args.operating_points),
        references,
        dtypes,
        args.dictionary,
        args.seconds,
        args.pieces,
        args.repeats,
        lambda text: normalised(args, text),
        recognition_options.note,
    )
    # before the files, which a full disk may refuse after hours of work
    print(json.dumps(result.record(), indent=2, ensure_ascii=False) if args.json else format_table(result), flush=True)
    if args.out is not None:
        split = args.split or (DEFAULT_SPLIT if args.references.is_dir() else "")
        title = args.title or f"Accuracy and cost on {args.references.resolve().name} {split}".strip()
        write_tradeoff(result, args.out, title, recognition_options.note)
    return 0


def _check_options(args) -> List[str]:
    """The dtypes; raises ValueError for an option that cannot be."""
    for name in ("threads", "pieces", "repeats"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: found {value}, expected 1 or more")
    if not (math.isfinite(args.seconds) and args.seconds > 0):
        raise ValueError(f"--seconds: found {args.seconds:g}, expected a positive number")
    dtypes = [dtype.strip() for dtype in args.dtype.split(",")]
    unknown = next((dtype for dtype in dtypes if dtype not in _DTYPES), None)
    if unknown is not None:
        raise ValueError(f"--dtype: found '{unknown}', expected some of {', '.join(_DTYPES)}")
    return dtypes


def candidates(texts: Sequence[str], points: str):
    """The models that `[NAME=]MODEL[@POINTS]` names; `points` are those of the ones without.

    A text that is a path as a whole is one, whatever signs it has.
    """
    from ..study.tradeoff import Candidate

    parts = [_parts(text, points) for text in texts]
    names = short_names([path for _, path, _ in parts])
    return [Candidate(name or short, path, own) for (name, path, own), short in zip(parts, names)]


def _parts(text: str, points: str) -> Tuple[str, str, str]:
    name = ""
    head, at, tail = text.rpartition("@")
    if at and not os.path.exists(text) and _are_points(tail):
        text, points = head, tail
    if "=" in text and not os.path.exists(text):
        name, _, text = text.partition("=")
    model, _, tail = text.rpartition("@")
    if not os.path.exists(text) and os.path.exists(model):
        try:
            [OperatingPoint.parse(point) for point in tail.split(",")]
        except ValueError as error:
            raise ValueError(f"{text}: {error}; expected a list of operating points behind @, all or own") from None
    return name.strip(), text, points


def _are_points(text: str) -> bool:
    try:
        return text in ("all", "own") or all(OperatingPoint.parse(point) for point in text.split(","))
    except ValueError:
        return False


def short_names(paths: Sequence[str]) -> List[str]:
    """The parts of paths that tell them apart: `plain`, `light` of plain/a.pt and light/a.pt; of one, its last part."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    if len(set(parts)) == 1:
        return [parts[0][-1] for _ in parts]
    first = len(os.path.commonprefix(parts))
    rest = [own[first:] for own in parts]
    last = len(os.path.commonprefix([own[::-1] for own in rest]))
    return ["/".join(own[: len(own) - last] or full[-1:]) for own, full in zip(rest, parts)]
