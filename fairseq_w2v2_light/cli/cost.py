"""`w2v2-light cost`: parameters, bytes, MACs, memory and latency of a recipe, a checkpoint or a model folder."""

import json

from ..study.cost import LETTERS, LONGEST, cost, format_cost, load_subject
from ..study.latency import format_latency, latency


def add_arguments(parser) -> None:
    parser.add_argument(
        "source", help="a recipe (YAML path, or name such as pretraining/sew_tiny) , a checkpoint, or a model folder"
    )
    parser.add_argument("overrides", nargs="*", help="model.KEY=VALUE, e.g. model.unique_layers=12")
    parser.add_argument("--seconds", type=float, help="seconds of audio (default: 10)")
    parser.add_argument(
        "--operating-point", default="", help="e.g. s2q1k2, streaming s1q1k1c24 (default: the model's own)"
    )
    parser.add_argument(
        "--vocabulary", type=int, help=f"labels of the CTC head, for fine-tuning recipes (default: {LETTERS})"
    )
    parser.add_argument(
        "--latency",
        action="store_true",
        help="print the algorithmic latency of a streaming model instead, with its parts; why others have none",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args) -> int:
    if args.latency and args.seconds is not None:
        raise ValueError("--latency does not depend on --seconds; leave one out")
    seconds = 10.0 if args.seconds is None else args.seconds
    if not 0 < seconds <= LONGEST:
        raise ValueError(f"--seconds: found {seconds:g}, expected a positive number, at most {LONGEST:,}")
    if args.vocabulary is not None and args.vocabulary < 1:
        raise ValueError(f"--vocabulary: found {args.vocabulary}, expected 1 or more labels")
    subject = load_subject(args.source, args.overrides, args.vocabulary)
    if args.vocabulary not in (None, subject.vocabulary):
        own = f"its {subject.vocabulary} labels" if subject.vocabulary else "no CTC head"
        raise ValueError(f"--vocabulary: '{args.source}' has {own}; leave the option out")
    if args.latency:
        result, form = latency(subject, args.operating_point), format_latency
    else:
        result, form = cost(subject, seconds, args.operating_point, dry_run=True), format_cost
    print(json.dumps(result, indent=2) if args.json else form(result))
    return 0
