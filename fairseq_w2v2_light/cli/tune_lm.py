"""`w2v2-light tune-lm`: finds the weights of a language model on a development set."""

import argparse
import json
import math
from pathlib import Path
from typing import Any, Dict, List

from ..data.progress import progress
from ..data.references import read_references
from ..data.sources import parse_columns
from ..files import atomic_write_text
from .recognition_options import add_device

DEFAULT_SPLIT = "valid"
SHOWN = 15
WEIGHTS = ("lm_weight", "word_score", "sil_score")
# Around fairseq's own 2 and -1, on both sides.
DEFAULTS = {"lm_weight": "0,0.5,1,1.5,2,3,4", "word_score": "-2,-1,0,1,2", "sil_score": "0"}


def add_arguments(parser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "The network runs once; then every utterance is decoded with every combination of weights. Nothing is written\n"
        "unless --out asks for it.\n\n"
        "  w2v2-light tune-lm DATA --model FOLDER --lm words.arpa\n"
        "  w2v2-light tune-lm DATA --model FOLDER --lm words.arpa --random 60 --lm-weight 0,5 --word-score=-5,5\n\n"
        "A list that begins with a negative number needs the equals sign: --word-score=-2,0,2"
    )
    parser.add_argument(
        "references",
        type=Path,
        metavar="DATA",
        help="a folder of manifests, a manifest, or a table (.csv, .tsv, .jsonl) with columns path and text",
    )
    parser.add_argument("--split", default="", help=f"of the folder (default: {DEFAULT_SPLIT}), or of the table")
    parser.add_argument("--columns", default="", metavar="path=A,text=B", help="names of the table's columns if others")
    parser.add_argument("--model", required=True, metavar="FOLDER|CHECKPOINT", help="a model folder, or a checkpoint")
    parser.add_argument("--lm", required=True, metavar="FILE", help="a KenLM n-gram, .arpa or .bin")
    parser.add_argument("--lexicon", metavar="FILE", help="the words that --lm may find, with their spelling")
    parser.add_argument(
        "--lexicon-free", action="store_true", help="--lm is an n-gram over the labels; words are not limited"
    )
    meanings = {
        "lm_weight": "of the log10 probability",
        "word_score": "added for each word",
        "sil_score": "added for each frame of `|`",
    }
    for name in WEIGHTS:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=DEFAULTS[name],
            metavar="A,B,...",
            help=f"{meanings[name]}: values to try (default: {DEFAULTS[name]})",
        )
    parser.add_argument(
        "--random",
        type=int,
        metavar="N",
        help="try N combinations drawn between the smallest and largest of those values instead of all",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --random (default: 0)")
    parser.add_argument("--beam", type=int, default=50, metavar="N", help="hypotheses kept (default: 50)")
    parser.add_argument(
        "--beam-threshold",
        type=float,
        default=50.0,
        metavar="X",
        help="how far behind the best one may be (default: 50)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N utterances")
    parser.add_argument("--operating-point", default="", metavar="POINT", help="e.g. s2q1k2 (default: the model's own)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "int8"))
    add_device(parser)
    parser.add_argument("--dictionary", metavar="FILE", help="dict.ltr.txt, for a checkpoint that holds none")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every trial")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write that JSON object to a file, too")


def run(args) -> int:
    candidates = _candidates(args)
    split = args.split or (DEFAULT_SPLIT if args.references.is_dir() else "")
    references = read_references(args.references, split, parse_columns(args.columns))[: args.limit]
    if any(reference.path is None for reference in references):
        raise ValueError(f"{args.references}: lines of text name no audio; give a manifest folder or a table")
    if not any(reference.text.split() for reference in references):
        raise ValueError(f"{args.references}: the references hold no words; the word error rate is undefined")

    from ..runtime.lm import LanguageModelDecoder
    from ..runtime.recognizer import GreedyDecoder, Recognizer
    from ..runtime.tuning import error_totals, sweep

    recognizer = Recognizer.from_pretrained(
        args.model,
        args.operating_point,
        args.dtype,
        threads=args.threads,
        dictionary=args.dictionary,
        device=args.device or "cpu",
    )
    # before the network runs: what is wrong with the files shows at once
    decoder = LanguageModelDecoder(
        recognizer.labels,
        args.lm,
        args.lexicon,
        beam=args.beam,
        beam_threshold=args.beam_threshold,
        lexicon_free=args.lexicon_free,
    )
    log_probs = list(_emissions(recognizer, references))
    texts = [reference.text for reference in references]
    greedy = error_totals(GreedyDecoder(recognizer.labels), recognizer.labels, log_probs, texts)
    trials = sweep(decoder, log_probs, texts, progress(candidates, "weights", len(candidates)))
    about = {
        "model": str(args.model),
        "operating_point": str(recognizer.point),
        "lm": str(args.lm),
        "lexicon": None if args.lexicon is None else str(args.lexicon),
        "lexicon_free": args.lexicon_free,
        "references": f"{args.references}{f'/{split}' if split else ''}",
        "utterances": len(references),
        "words": greedy.words.reference,
    }
    result = {**about, "greedy": _rates(greedy), "best": _values(trials[0]), "trials": [_values(t) for t in trials]}
    if args.out is not None:
        atomic_write_text(args.out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=2, ensure_ascii=False) if args.json else "\n".join(_table(result)))
    return 0


def _emissions(recognizer, references):
    """Log-probabilities of each utterance; raises ValueError that names the one whose audio cannot be read."""
    import numpy as np

    from ..runtime.audio import wav_blocks

    together, pending = [], 0
    last = len(references)
    for number, reference in enumerate(progress(references, "audio", last), start=1):
        try:
            blocks = list(wav_blocks(reference.path, 10.0, recognizer.sample_rate))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{reference.where}: {error}") from None
        together.append(np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32))
        pending += len(together[-1])
        # enough to sort by length, and little to hold
        if pending >= 300 * recognizer.sample_rate or number == last:
            yield from recognizer.log_probs(together)
            together, pending = [], 0


def _candidates(args) -> List[Any]:
    for name in ("random", "limit", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: found {value}, expected 1 or more")
    values = {name: _numbers(name, getattr(args, name)) for name in WEIGHTS}
    if args.lexicon_free:
        if args.lexicon is not None:
            raise ValueError("--lexicon-free: decodes without a lexicon; leave --lexicon out")
        if args.word_score != DEFAULTS["word_score"]:
            raise ValueError("--word-score: decoding without a lexicon has none; leave it out, tune --sil-score")
        values["word_score"] = [0.0]

    from ..runtime.tuning import draw, grid

    if args.random is not None:
        return draw(args.random, *values.values(), seed=args.seed)
    return grid(*values.values())


def _numbers(name: str, text: str) -> List[float]:
    option = f"--{name.replace('_', '-')}"
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: found {text!r}, expected numbers with commas between, such as 0,1.5,2") from None
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{option}: found {text!r}, expected finite numbers")
    return values


def _rates(totals) -> Dict[str, Any]:
    words = totals.words
    return {
        "wer": words.rate,
        "cer": totals.characters.rate,
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
    }


def _values(trial) -> Dict[str, Any]:
    return {**{name: getattr(trial.weights, name) for name in WEIGHTS}, **_rates(trial.totals)}


def _table(result: Dict[str, Any]) -> List[str]:
    heads = ["lm weight", "word score", "sil score", "WER %", "CER %", "S", "D", "I"]
    rows = [heads, ["greedy", "", "", *_cells(result["greedy"])]]
    rows += [[*(f"{trial[name]:g}" for name in WEIGHTS), *_cells(trial)] for trial in result["trials"][:SHOWN]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    left = len(result["trials"]) - SHOWN
    if left > 0:
        lines.append(f"... and {left} worse ones (--json prints all)")
    best = result["best"]
    lines.append(f"{result['references']}: {result['utterances']} utterances, {result['words']} words")
    lines.append("best: " + " ".join(f"--{name.replace('_', '-')} {best[name]:g}" for name in WEIGHTS))
    keys = {"lm_weight": "lmweight", "word_score": "wordscore", "sil_score": "silweight"}
    lines.append("in infer: " + " ".join(f"decoding.{key}={best[name]:g}" for name, key in keys.items()))
    return lines


def _cells(values: Dict[str, Any]) -> List[str]:
    rates = ["-" if values[name] is None else f"{values[name]:.2f}" for name in ("wer", "cer")]
    return [*rates, *(str(values[name]) for name in ("substitutions", "deletions", "insertions"))]
