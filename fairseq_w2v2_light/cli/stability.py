"""`w2v2-light stability`: how much each layer changes its input, and how alike the layers are; models side by side."""

import argparse
import json
from pathlib import Path
from typing import List, Sequence, Tuple

from ..data import manifest
from ..data.progress import progress
from ..data.references import DEFAULT_SPLIT
from ..study.stability import (
    READING,
    as_record,
    format_stability,
    load_model,
    noise,
    plot_stability,
    speech,
    stability,
    write_csv,
)
from .bench import parse_models
from .transcribe import find_recordings


def add_arguments(parser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"This is {READING}: cosine and linear CKA\n"
        "between the input and the output of each layer, and CKA of all depths with each other.\n\n"
        "  w2v2-light stability shared.pt unshared.pt --names shared,unshared --audio DATA --split test --out report\n"
        "  w2v2-light stability trained.pt pretraining/light_stochastic_tiny model.unique_layers=1 --audio a.wav"
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="checkpoints, pre-trained or fine-tuned; model folders; recipes, which get random weights, each with "
        "model.KEY=VALUE behind it",
    )
    parser.add_argument(
        "--audio",
        nargs="+",
        metavar="PATH",
        help="a folder of manifests, manifests (.tsv), audio files or folders of them; longer ones than 20 s are cut "
        "(default: white noise)",
    )
    parser.add_argument("--split", default=DEFAULT_SPLIT, help=f"of a folder of manifests (default: {DEFAULT_SPLIT})")
    parser.add_argument(
        "--utterances", type=int, default=100, metavar="N", help="at most as many files, evenly chosen (default: 100)"
    )
    parser.add_argument("--operating-point", default="", help="for all models, e.g. s2q1k2 (default: each one's own)")
    parser.add_argument("--names", default="", metavar="A,B", help="of the models in tables and plot")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write stability.png and stability.csv there")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with the CKA of all depths")


def run(args) -> int:
    if args.utterances < 1:
        raise ValueError(f"--utterances: found {args.utterances}, expected 1 or more")
    if args.out is not None:
        if args.out.exists() and not args.out.is_dir():
            raise ValueError(f"--out {args.out}: a file; expected a folder")
        from ..study.plot import load_pyplot

        load_pyplot()  # or its absence would be told after all the work
    sources = parse_models(args.models)
    names = _names(args.names, sources)
    waves, audio = noise, "white noise, for want of speech (--audio)"
    if args.audio:
        found = _audio_files(args.audio, args.split)
        chosen = [found[index * len(found) // args.utterances] for index in range(args.utterances)]
        chosen = found if len(found) <= args.utterances else chosen
        waves, audio = speech(chosen), f"{len(chosen)} of {len(found)} recordings of {' '.join(args.audio)}"
    results = []
    for (source, overrides), name in progress(zip(sources, names), "models", len(sources)):
        results.append(stability(load_model(source, overrides, args.operating_point, name), waves))
    if args.json:
        print(
            json.dumps({"analysis": READING, "audio": audio, "models": [as_record(one) for one in results]}, indent=2)
        )
    else:
        print(format_stability(results, audio), flush=True)
    # after the table: a full disk may refuse them
    if args.out is not None:
        write_csv(results, args.out / "stability.csv")
        plot_stability(results, args.out / "stability.png", audio)
    return 0


def _names(text: str, sources: Sequence[Tuple[str, Tuple[str, ...]]]) -> List[str]:
    if not text:
        return [" ".join([source, *overrides]) for source, overrides in sources]
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"--names {text}: found an empty name, expected one for each of {len(sources)} models")
    if len(names) != len(sources):
        raise ValueError(f"--names {text}: found {len(names)} names, expected one for each of {len(sources)} models")
    return names


def _audio_files(places: Sequence[str], split: str) -> List[Path]:
    found: List[Path] = []
    for place in map(Path, places):
        if place.suffix == ".tsv":
            found += manifest.audio_paths(place.parent, place.stem)
        elif place.is_dir() and any(place.glob("*.tsv")):
            found += manifest.audio_paths(place, split)
        elif place.exists():
            found += [Path(recording.path) for recording in find_recordings([str(place)])]
        else:
            raise FileNotFoundError(f"--audio {place}: no such file or folder")
    return found
