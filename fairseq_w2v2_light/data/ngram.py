"""n-gram language models of small corpora, as ARPA files: for users without KenLM's lmplz. Without fairseq.

An interpolated model: the probability of a word w after a history h is

    p(w | h) = a(h, w) + b(h) p(w | h'),        h' being h without its first word,

and the last resort is uniform over the vocabulary, </s> and <unk>. With N the counts, T(h) the number of different
words after h:

Witten-Bell (1991, method C; interpolated as in Chen and Goodman, 1998, section 2), which has nothing to estimate
besides and suits the smallest corpora:

    a = N(h, w) / (N(h) + T(h)),        b = T(h) / (N(h) + T(h))

Kneser-Ney (1995; interpolated as in Chen and Goodman, section 3), better for texts of thousands of sentences: below the
highest order, and but for histories that begin with <s>, C(h, w) is the number of different words that precede (h, w),
else it is N(h, w). The discount of each order is D = n1 / (n1 + 2 n2), n1 and n2 being how many n-grams have a C of 1
and of 2 (Ney, Essen and Kneser, 1994); 0.5 where that is not between 0 and 1:

    a = max(C(h, w) - D, 0) / C(h),        b = D T(h) / C(h)

A history's probabilities sum to 1. As b(h) is also what an unseen word after h is worth, it is ARPA's back-off weight.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, List, Sequence, Set, Tuple, Union

from ..files import atomic_path

ORDERS = (1, 2, 3, 4, 5)
SMOOTHINGS = ("witten-bell", "kneser-ney")
START, END, UNKNOWN = "<s>", "</s>", "<unk>"
# What an ARPA file has for the probability of <s>, which never follows anything.
_NEVER = -99.0

Words = Tuple[str, ...]


@dataclass(frozen=True)
class Ngram:
    """An n-gram with back-off.

    probabilities: for each order (the first is 1), the log10 probability of the last word of every n-gram that was seen
    after the words before it. backoffs: log10 of the back-off weight of every history that was seen, of any length.
    """

    probabilities: Tuple[Dict[Words, float], ...]
    backoffs: Dict[Words, float]

    @property
    def order(self) -> int:
        """The longest n-gram's number of words."""
        return len(self.probabilities)

    @property
    def vocabulary(self) -> List[str]:
        """All words, without <s>, </s> and <unk>."""
        return [word for (word,) in self.probabilities[0] if word not in (START, END, UNKNOWN)]

    def log10(self, word: str, history: Sequence[str] = ()) -> float:
        """log10 p(word | history); words that it does not have count as <unk>."""
        words = [self._known(before) for before in (*history, word)][-self.order :]
        penalty = 0.0
        for first in range(len(words)):
            found = self.probabilities[len(words) - first - 1].get(tuple(words[first:]))
            if found is not None:
                return penalty + found
            penalty += self.backoffs.get(tuple(words[first:-1]), 0.0)
        raise AssertionError("every word has a unigram")

    def score(self, words: Sequence[str]) -> float:
        """log10 of the probability of a sentence, its end included."""
        padded = [START, *words, END]
        return sum(self.log10(padded[end], padded[:end]) for end in range(1, len(padded)))

    def perplexity(self, sentences: Iterable[Sequence[str]]) -> float:
        """10 to the minus mean log10 probability of a word or end of a sentence; NaN of no sentences."""
        total, events = 0.0, 0
        for words in sentences:
            total += self.score(words)
            events += len(words) + 1
        return 10 ** (-total / events) if events else math.nan

    def save(self, path: Union[str, Path]) -> None:
        """Writes an ARPA file in one step."""
        tables = list(self.probabilities)
        if len(tables) == 1:
            # KenLM loads no unigrams alone: one bigram, which says what they say
            tables.append({(START, END): self.log10(END)})
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write("\\data\\\n")
            for order, table in enumerate(tables, start=1):
                file.write(f"ngram {order}={len(table)}\n")
            for order, table in enumerate(tables, start=1):
                file.write(f"\n\\{order}-grams:\n")
                for words, probability in sorted(table.items()):
                    backoff = "" if order == len(tables) else f"\t{self.backoffs.get(words, 0.0):.7f}"
                    file.write(f"{probability:.7f}\t{' '.join(words)}{backoff}\n")
            file.write("\n\\end\\\n")

    def _known(self, word: str) -> str:
        return word if (word,) in self.probabilities[0] else UNKNOWN


def estimate(
    sentences: Iterable[Sequence[str]],
    order: int = 3,
    vocabulary: Iterable[str] = (),
    smoothing: str = "witten-bell",
) -> Ngram:
    """The n-gram of sentences, each a sequence of words (or labels); formulae at the top of this file.

    vocabulary: words to have besides those of the sentences. Where all sentences are too short for an n-gram of
    `order`, the result is of the longest that there is. Raises ValueError for no sentence, another order or smoothing,
    and words that are <s>, </s> or <unk> or hold white space.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order}; expected {ORDERS[0]} to {ORDERS[-1]}")
    if smoothing not in SMOOTHINGS:
        raise ValueError(f"smoothing is {smoothing!r}; expected one of {', '.join(SMOOTHINGS)}")
    words = set(vocabulary)
    counts = _count(sentences, order, words)
    for word in words:
        _check_word(word)
    raw = counts
    if smoothing == "kneser-ney":
        counts = [_continuations(raw, length) for length in range(1, len(raw))] + raw[-1:]
    return _interpolate(counts, sorted(words), smoothing)


def _count(sentences: Iterable[Sequence[str]], order: int, words: Set[str]) -> List[Dict[Words, int]]:
    """For each order, how often every n-gram occurs; <s> stands before each sentence once, and is none by itself.

    Adds the sentences' words to `words`.
    """
    counts: List[Dict[Words, int]] = [Counter() for _ in range(order)]
    for sentence in sentences:
        words.update(sentence)
        padded = (START, *sentence, END)
        for end in range(1, len(padded)):
            for length in range(1, min(order, end + 1) + 1):
                counts[length - 1][padded[end - length + 1 : end + 1]] += 1
    # an empty sentence has an end
    if not counts[0]:
        raise ValueError("found no sentence; an n-gram needs at least one")
    return [table for table in counts if table]


def _continuations(counts: List[Dict[Words, int]], length: int) -> Dict[Words, int]:
    """How many different words precede each n-gram of `length`; its count, where it begins a sentence."""
    preceded = Counter(words[1:] for words in counts[length])
    return {words: count if words[0] == START else preceded[words] for words, count in counts[length - 1].items()}


def _interpolate(counts: List[Dict[Words, int]], vocabulary: List[str], smoothing: str) -> Ngram:
    probabilities: List[Dict[Words, float]] = []
    backoffs: Dict[Words, float] = {}
    uniform = 1.0 / (len(vocabulary) + 2)
    lower: Dict[Words, float] = {}
    for length, table in enumerate(counts, start=1):
        totals: Dict[Words, int] = defaultdict(int)
        types: Dict[Words, int] = defaultdict(int)
        for words, count in table.items():
            totals[words[:-1]] += count
            types[words[:-1]] += 1
        discount = _discount(table) if smoothing == "kneser-ney" else None
        weight = {}
        for history, total in totals.items():
            seen = types[history]
            weight[history] = seen / (total + seen) if discount is None else discount * seen / total
        current = {}
        for words, count in table.items():
            history = words[:-1]
            own = count / (totals[history] + types[history])
            if discount is not None:
                own = max(count - discount, 0.0) / totals[history]
            current[words] = own + weight[history] * (lower[words[1:]] if length > 1 else uniform)
        if length == 1:
            for word in (*vocabulary, UNKNOWN):
                current.setdefault((word,), weight[()] * uniform)
        else:
            backoffs.update((history, math.log10(value)) for history, value in weight.items())
        probabilities.append({words: min(0.0, math.log10(value)) for words, value in current.items()})
        lower = current
    probabilities[0][(START,)] = _NEVER
    return Ngram(tuple(probabilities), backoffs)


def _discount(table: Dict[Words, int]) -> float:
    once, twice = (sum(count == number for count in table.values()) for number in (1, 2))
    discount = once / (once + 2 * twice) if once else 0.0
    return discount if 0.0 < discount < 1.0 else 0.5


def _check_word(word: str) -> None:
    if word in (START, END, UNKNOWN):
        raise ValueError(f"found the word {word}, which an n-gram has for itself; leave it out of the text")
    if word.split() != [word] or "\0" in word:
        raise ValueError(f"found the word {word!r}; expected words without white space")


def read_sentences(path: Union[str, Path]) -> List[Words]:
    """The lines of a UTF-8 text file as words, empty lines left out.

    Raises FileNotFoundError when the file is missing, and ValueError that names file and line of a word which an
    n-gram cannot have, and for a file without words.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: found a folder, expected a text file with a sentence a line")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such text; expected a file with a sentence a line")
    sentences: List[Words] = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                words = tuple(line.split())
                for word in words:
                    try:
                        _check_word(word)
                    except ValueError as error:
                        raise ValueError(f"{path}:{number}: {error}") from None
                if words:
                    sentences.append(words)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not sentences:
        raise ValueError(f"{path}: found no words; expected a sentence a line")
    return sentences
