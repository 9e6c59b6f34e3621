"""`w2v2-light lm`: an n-gram language model of a small text, for decoding with `--lm` or `decoding.type=kenlm`."""

import argparse
from pathlib import Path

from ..data.ngram import ORDERS, SMOOTHINGS, estimate, read_sentences


def add_arguments(parser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "  w2v2-light lm DATA/train.wrd words.arpa             words, for decoding with a lexicon\n"
        "  w2v2-light lm DATA/train.ltr letters.arpa --order 5 labels, for decoding without one\n\n"
        "In memory and in Python: for millions of words, use KenLM's lmplz."
    )
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="a sentence a line, words separated")
    parser.add_argument("out", type=Path, metavar="OUT", help="the ARPA file to write")
    parser.add_argument("--order", type=int, choices=ORDERS, default=3, help="words of an n-gram (default: 3)")
    parser.add_argument(
        "--smoothing",
        choices=SMOOTHINGS,
        default=SMOOTHINGS[0],
        help="how unseen words get their share: witten-bell (default) for the smallest texts, kneser-ney for larger",
    )
    parser.add_argument("--words", type=Path, metavar="FILE", help="words to know besides those of the text")
    parser.add_argument("--test", type=Path, metavar="TEXT", help="print the perplexity of this text, too")


def run(args) -> int:
    sentences = [words for path in args.texts for words in read_sentences(path)]
    held_out = read_sentences(args.test) if args.test else None
    vocabulary = {word for line in read_sentences(args.words) for word in line} if args.words else set()
    ngram = estimate(sentences, args.order, vocabulary, args.smoothing)
    ngram.save(args.out)
    sizes = ", ".join(f"{len(table)} {order}-grams" for order, table in enumerate(ngram.probabilities, start=1))
    print(f"n-gram: {args.out}")
    shorter = "" if ngram.order == args.order else f" (the sentences are too short for {args.order})"
    print(f"  order {ngram.order}{shorter}, {args.smoothing}: {sizes}")
    print(f"  {len(sentences)} sentences, {sum(map(len, sentences))} words, {len(ngram.vocabulary)} different ones")
    print(f"  perplexity on them: {ngram.perplexity(sentences):.2f} per word")
    if held_out is not None:
        known = set(ngram.vocabulary)
        total = sum(map(len, held_out))
        unknown = sum(word not in known for words in held_out for word in words)
        share = f"{unknown} of its {total} words unknown"
        print(f"  perplexity on {args.test}: {ngram.perplexity(held_out):.2f} per word, {share}")
    return 0
