"""`w2v2-light denominator`: the n-gram graph of LF-MMI from training transcripts."""

import argparse
from pathlib import Path
from typing import List

from ..criterions.denominator import ORDERS, estimate, perplexity
from ..data.manifest import SPECIAL_SYMBOLS, read_dictionary, read_labels, unknown_label_problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the data, the kind of labels, the split and the order of the n-gram."""
    parser.add_argument("data", type=Path, metavar="DATA", help="manifest folder: {split}.{labels}, dict.{labels}.txt")
    parser.add_argument(
        "out", type=Path, nargs="?", metavar="OUT", help="the graph (default: DATA/denominator.{labels}.{order}.npz)"
    )
    parser.add_argument("--labels", default="ltr", metavar="SUFFIX", help="of the label files (default: ltr)")
    parser.add_argument("--split", default="train", metavar="SPLIT", help="whose transcripts to count (default: train)")
    parser.add_argument(
        "--order",
        type=int,
        choices=ORDERS,
        default=2,
        help="labels that a probability looks at: 2 or, for at most 256 labels, 3 (slower; default: 2)",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the graph and prints what it was made of; raises ValueError naming file and line of a bad label."""
    dictionary_path = args.data / f"dict.{args.labels}.txt"
    symbols = list(SPECIAL_SYMBOLS) + list(read_dictionary(dictionary_path))
    path = args.data / f"{args.split}.{args.labels}"
    sequences = _read_sequences(path, symbols, dictionary_path)
    graph = estimate(sequences, symbols, order=args.order)
    out = args.out or args.data / f"denominator.{args.labels}.{args.order}.npz"
    graph.save(out)
    print(f"denominator graph: {out}")
    print(f"  order {graph.order}, {len(graph.labels)} labels of {dictionary_path}")
    print(f"  {len(sequences)} transcripts of {path}: {sum(map(len, sequences))} labels")
    print(f"  perplexity on them: {perplexity(graph, sequences):.2f} per label")
    return 0


def _read_sequences(path: Path, symbols: List[str], dictionary_path: Path) -> List[List[int]]:
    labels = {symbol: index for index, symbol in enumerate(symbols) if symbol not in SPECIAL_SYMBOLS}
    sequences = []
    for number, line in enumerate(read_labels(path), start=1):
        problem = unknown_label_problem(path, number, line, labels, dictionary_path)
        if problem:
            raise ValueError(problem)
        sequences.append([labels[symbol] for symbol in line.split()])
    if not any(sequences):
        raise ValueError(f"{path}: found no label in {len(sequences)} lines; a denominator graph needs transcripts")
    return sequences
