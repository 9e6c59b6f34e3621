"""`w2v2-light bench`: latency, throughput and memory of models on this machine, beside others with the same weights."""

import itertools
import json
import os
from dataclasses import asdict
from typing import List, Sequence, Tuple

import torch

from ..study.bench import (
    DTYPES,
    IMPLEMENTATIONS,
    OURS,
    Contender,
    Setting,
    as_json,
    check,
    compare,
    format_machine,
    format_table,
    machine,
    operating_points,
)
from ..study.peers import PEERS


def add_arguments(parser) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a recipe (random weights), checkpoint or model folder; model.KEY=VALUE behind a recipe changes it",
    )
    parser.add_argument("--seconds", nargs="+", type=float, help="of audio in an utterance (default: 10)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1], help="utterances in a call (default: 1)")
    parser.add_argument("--threads", nargs="+", type=int, help="of the CPU (default: torch's own choice)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="of our rows (default: float32)"
    )
    parser.add_argument(
        "--operating-points", nargs="+", default=[""], help="such as s2q1k2, or all (default: each model's own)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument(
        "--against",
        nargs="+",
        choices=(*PEERS, "all", "none"),
        default=["none"],
        help="others to run with the same weights (default: none)",
    )
    parser.add_argument("--compile", action="store_true", help="a row with torch.compile for each one of ours, too")
    parser.add_argument("--repeats", type=int, help="turns that are timed (default: 9)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak of memory, which takes a while")
    parser.add_argument("--training", action="store_true", help="updates of pre-training instead, beside stock fairseq")
    parser.add_argument("--updates", type=int, help="with --training: updates that are timed (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--smoke", action="store_true", help="1 s of audio and one turn: whether it runs at all")


def run(args) -> int:
    models = parse_models(args.models)
    for option, values in (("--threads", args.threads), ("--batch-sizes", args.batch_sizes)):
        if values and min(values) < 1:
            raise ValueError(f"{option}: found {min(values)}, expected 1 or more")
    settings = [
        Setting(seconds, size, threads, args.device)
        for threads, seconds, size in itertools.product(
            args.threads or [torch.get_num_threads()], args.seconds or [1.0 if args.smoke else 10.0], args.batch_sizes
        )
    ]
    repeats = args.repeats if args.repeats is not None else 1 if args.smoke else 9
    for setting in settings:
        check(setting, repeats)
    if args.training:
        return run_training(args, models, settings)
    if args.updates is not None:
        raise ValueError(f"--updates: found {args.updates}, but it counts updates of training; add --training")
    contenders = [
        contender
        for source, overrides in models
        for contender in contenders_of(source, overrides, args, " ".join((source, *overrides)) if models[1:] else "")
    ]
    found = machine(args.device)
    if not args.json:
        print(format_machine(found))
    tables = []
    for setting in settings:
        table = compare(contenders, setting, repeats, memory=not args.no_memory)
        tables.append(as_json(table))
        if not args.json:
            print(f"\n{format_table(table)}", flush=True)
    if args.json:
        print(json.dumps({"machine": found, "repeats": repeats, "tables": tables}, indent=2))
    return 0


def parse_models(words: Sequence[str]) -> List[Tuple[str, Tuple[str, ...]]]:
    """Models, each with the overrides that follow it; raises ValueError for overrides that follow none."""
    models: List[Tuple[str, Tuple[str, ...]]] = []
    for word in words:
        key, equals, _ = word.partition("=")
        if not os.path.exists(word) and equals and key.isidentifier():
            raise ValueError(f"'{word}': neither a model nor an override of one; expected model.{word}")
        if os.path.exists(word) or not (word.startswith("model.") and equals):
            models.append((word, ()))
        elif models:
            models[-1] = (models[-1][0], (*models[-1][1], word))
        else:
            raise ValueError(f"'{word}': found an override before any model; expected it behind its recipe")
    return models


def contenders_of(source: str, overrides: Tuple[str, ...], args, name: str) -> List[Contender]:
    """The rows of one model: the others in fp32 (and bfloat16, where that is asked for), then ours."""
    points = operating_points(source, overrides, args.operating_points)
    against = list(PEERS) if "all" in args.against else [peer for peer in args.against if peer != "none"]
    floats = [dtype for dtype in args.dtypes if dtype != "int8"] or ["float32"]
    rows = []
    for point in points:
        for peer in against:
            is_onnx = peer.startswith("onnx")
            dtypes = ["int8" if peer == "onnx-int8" else "float32"] if is_onnx else floats
            rows += [(peer, dtype, point, False) for dtype in dtypes]
        for dtype, compiled in itertools.product(args.dtypes, (False, True) if args.compile else (False,)):
            rows.append((OURS, dtype, point, compiled))
    return [
        Contender(
            " ".join(filter(None, [name, IMPLEMENTATIONS[kind], dtype, point, "compiled" if compiled else ""])),
            *(source, overrides, kind, dtype, point, compiled),
        )
        for kind, dtype, point, compiled in rows
    ]


def run_training(args, models, settings) -> int:
    """Times updates of training; prints a table a recipe and setting."""
    from ..study.training import compare_updates, format_updates

    refused = {"--dtypes": args.dtypes != ["float32"], "--operating-points": args.operating_points != [""]}
    refused.update({"--against": args.against != ["none"], "--compile": args.compile})
    refused["--repeats (--updates)"] = args.repeats is not None
    if any(refused.values()):
        options = ", ".join(option for option, given in refused.items() if given)
        raise ValueError(f"--training: updates are compared with stock fairseq's, in fp32; leave out {options}")
    updates = args.updates if args.updates is not None else 1 if args.smoke else 5
    found, tables = machine(args.device), []
    if not args.json:
        print(format_machine(found))
    for (source, overrides), setting in itertools.product(models, settings):
        numbers = setting.seconds, setting.batch_size, setting.threads
        memory, device = not args.no_memory, setting.device
        rows = compare_updates(source, overrides, *numbers, updates, memory=memory, device=device)
        entry = {"recipe": source, "overrides": overrides, "setting": asdict(setting)}
        tables.append({**entry, "rows": [asdict(row) for row in rows]})
        if not args.json:
            name, (seconds, size, threads) = " ".join((source, *overrides)), numbers
            print(f"\n{name}: {size} x {seconds:g} s, {threads} threads, {updates} updates\n\n{format_updates(rows)}")
    if args.json:
        print(json.dumps({"machine": found, "updates": updates, "tables": tables}, indent=2))
    return 0
