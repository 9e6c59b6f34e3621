"""Word and character error rates: hypotheses against references, with substitutions, deletions and insertions.

An alignment has the fewest errors and, among those that have, the most hits; that settles how many substitutions,
deletions and insertions there are. NIST's sclite weighs them 4, 3 and 3 and so prefers hits, too; jiwer and
editdistance find as many errors, but may call a deletion and an insertion two substitutions. Where several alignments
are left, equal tokens at both ends are aligned with each other, and gaps stand as early as they can.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

HIT, SUBSTITUTION, DELETION, INSERTION = "hit", "substitution", "deletion", "insertion"
_LETTERS = {HIT: "", SUBSTITUTION: "S", DELETION: "D", INSERTION: "I"}
# Bytes for what the search of an alignment remembers; longer utterances are divided.
_LARGEST_TABLE = 1 << 24
_DIAGONAL, _DELETE, _INSERT = 0, 1, 2


@dataclass(frozen=True)
class Counts:
    """What an alignment has: tokens that agree, that were replaced, left out and added."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference(self) -> int:
        """Tokens of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> Optional[float]:
        """Errors in percent of the reference's tokens, above 100 where much was added; None where it has none."""
        return 100 * self.errors / self.reference if self.reference else None

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )


class Step(NamedTuple):
    """One column of an alignment; `reference` is None of an insertion, `hypothesis` of a deletion."""

    kind: str
    reference: Optional[str]
    hypothesis: Optional[str]


def count(reference: Sequence[str], hypothesis: Sequence[str]) -> Counts:
    """Hits and errors of one sequence of tokens against another; a text is a sequence of characters.

    Takes time for the reference's tokens times the errors, between what both begin with and what both end with.
    """
    first, last = _agreement(reference, hypothesis)
    search = _Search(reference[first : len(reference) - last], hypothesis[first : len(hypothesis) - last])
    errors, substitutions = search.errors, search.substitutions()
    gaps, surplus = errors - substitutions, len(reference) - len(hypothesis)
    deletions, insertions = (gaps + surplus) // 2, (gaps - surplus) // 2
    return Counts(len(reference) - substitutions - deletions, substitutions, deletions, insertions)


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> List[Step]:
    """The alignment that `count` counts, in order."""
    first, last = _agreement(reference, hypothesis)
    search = _Search(reference[first : len(reference) - last], hypothesis[first : len(hypothesis) - last])
    moves = [_DIAGONAL] * first + search.moves() + [_DIAGONAL] * last
    steps, row, column = [], 0, 0
    for move in moves:
        said = reference[row] if move != _INSERT else None
        heard = hypothesis[column] if move != _DELETE else None
        row += move != _INSERT
        column += move != _DELETE
        if move == _DIAGONAL:
            steps.append(Step(HIT if said == heard else SUBSTITUTION, said, heard))
        else:
            steps.append(Step(DELETION if move == _DELETE else INSERTION, said, heard))
    return steps


def _agreement(one: Sequence[str], other: Sequence[str]) -> Tuple[int, int]:
    """How many tokens both begin with, and how many of the rest both end with."""
    shorter = min(len(one), len(other))
    first = next((index for index in range(shorter) if one[index] != other[index]), shorter)
    rest = shorter - first
    last = next((index for index in range(rest) if one[-1 - index] != other[-1 - index]), rest)
    return first, last


def fewest_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """The Levenshtein distance, many tokens at a time as the bits of integers (Myers 1999, Hyyro 2003)."""
    if not reference:
        return len(hypothesis)
    where: Dict[str, int] = {}
    for index, token in enumerate(reference):
        where[token] = where.get(token, 0) | 1 << index
    every, last = (1 << len(reference)) - 1, 1 << (len(reference) - 1)
    # bits of the reference's tokens at which the distance grows, and shrinks, from the token before
    grows, shrinks, errors = every, 0, len(reference)
    for token in hypothesis:
        equal = where.get(token, 0) | shrinks
        free = (((equal & grows) + grows) ^ grows) | equal
        more, less = shrinks | ~(free | grows) & every, grows & free
        errors += (1 if more & last else 0) - (1 if less & last else 0)
        more = more << 1 | 1
        grows, shrinks = (less << 1 | ~(free | more)) & every, more & free
    return errors


class _Search:
    """Dynamic programming over the diagonals (column - row) that an alignment with the fewest errors can touch.

    A gap costs `unit`, a substitution 1 more, and `unit` of these are never too many: fewest errors, then fewest
    substitutions. errors: the fewest. low: the first diagonal, of errors + 1 at most.
    """

    _NOWHERE = 1 << 60

    def __init__(self, reference: Sequence[str], hypothesis: Sequence[str]):
        self.reference, self.hypothesis = reference, hypothesis
        self.rows, self.columns = len(reference), len(hypothesis)
        self.errors = fewest_errors(reference, hypothesis)
        self.unit = min(self.rows, self.columns) + 1
        # gaps up to a diagonal and from there to the last one are errors (Ukkonen 1985)
        surplus = self.columns - self.rows
        self.low = -((self.errors - surplus) // 2)
        self.width = (self.errors + surplus) // 2 - self.low + 1

    def substitutions(self) -> int:
        """Of the alignments with the fewest errors, the fewest."""
        return int(self._last_costs()[self.columns - self.rows - self.low]) - self.errors * self.unit

    def moves(self) -> List[int]:
        """How the best alignment goes from the first tokens to the last."""
        if self.rows > 1 and self.rows * self.width > _LARGEST_TABLE:
            return self._moves_of_halves()
        table = np.empty((self.rows, self.width), dtype=np.int8)
        for row, (diagonal, deletion, after) in enumerate(self._costs()):
            table[row] = np.where(after == diagonal, _DIAGONAL, np.where(after == deletion, _DELETE, _INSERT))
        moves, row, column = [], self.rows, self.columns
        while row or column:
            move = int(table[row - 1, column - row - self.low]) if row else _INSERT
            moves.append(move)
            row -= move != _INSERT
            column -= move != _DELETE
        return moves[::-1]

    def _moves_of_halves(self) -> List[int]:
        """From where the best alignment crosses the middle row, which costs alone tell (Hirschberg 1975)."""
        half = self.rows // 2
        forward = self._last_costs(half)
        backward = _Search(self.reference[::-1], self.hypothesis[::-1])._last_costs(self.rows - half)
        column = half + self.low + int((forward + backward[::-1]).argmin())
        first = _Search(self.reference[:half], self.hypothesis[:column])
        return first.moves() + _Search(self.reference[half:], self.hypothesis[column:]).moves()

    def _last_costs(self, rows: Optional[int] = None) -> np.ndarray:
        """(width,) costs of the first `rows` rows (default: all) on each diagonal."""
        costs = self._first_costs()
        for row in self._costs(rows):
            costs = row[-1]
        return costs

    def _first_costs(self) -> np.ndarray:
        diagonals = np.arange(self.low, self.low + self.width)
        return np.where(diagonals < 0, self._NOWHERE, diagonals * self.unit)

    def _costs(self, rows: Optional[int] = None) -> Iterator[Tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields for each row what a diagonal move and a deletion would cost, and what the best does; each (width,)."""
        numbers = {token: number for number, token in enumerate(dict.fromkeys(self.reference))}
        # from the first diagonal's column on, -1 where there is none
        heard = np.full(self.rows + self.width, -1)
        heard[-self.low : self.columns - self.low] = [numbers.get(token, -1) for token in self.hypothesis]
        steps = np.arange(self.width) * self.unit
        costs = self._first_costs()
        for row, token in enumerate(self.reference[:rows]):
            same = heard[row : row + self.width] == numbers[token]
            diagonal = costs + np.where(same, 0, self.unit + 1)
            deletion = np.append(costs[1:] + self.unit, self._NOWHERE)
            # insertions: the best of all diagonals to the left, with a unit for every step
            costs = np.minimum.accumulate(np.minimum(diagonal, deletion) - steps) + steps
            yield diagonal, deletion, costs


def alignment_lines(steps: Sequence[Step], width: Callable[[str], int] = len) -> List[str]:
    """The lines `REF:`, `HYP:` and `Eval:` of an alignment, as sclite prints it: gaps are stars.

    width: columns that a text takes where the lines are shown.
    """
    rows: Tuple[List[str], ...] = ([], [], [])
    for step in steps:
        columns = max(width(step.reference or ""), width(step.hypothesis or ""))
        cells = (step.reference, step.hypothesis, _LETTERS[step.kind])
        for row, cell in zip(rows, cells):
            cell = "*" * columns if cell is None else cell
            row.append(cell + " " * (columns - width(cell)))
    return [f"{name:<5} {' '.join(row)}".rstrip() for name, row in zip(("REF:", "HYP:", "Eval:"), rows)]


@dataclass(frozen=True)
class Scored:
    """One utterance: its texts with single blanks between words, and the counts of words and of characters."""

    name: str
    reference: str
    hypothesis: str
    words: Counts
    characters: Counts

    def alignment(self) -> List[Step]:
        """Of the words."""
        return align(self.reference.split(), self.hypothesis.split())


@dataclass
class Totals:
    """Counts of a corpus. wrong: utterances with any error."""

    utterances: int = 0
    wrong: int = 0
    words: Counts = field(default_factory=Counts)
    characters: Counts = field(default_factory=Counts)


def score(name: str, reference: str, hypothesis: str) -> Scored:
    """Scores one utterance. White space of any kind separates words; characters are those of the words and a single
    blank between two, as jiwer counts them."""
    reference, hypothesis = " ".join(reference.split()), " ".join(hypothesis.split())
    words = count(reference.split(), hypothesis.split())
    return Scored(name, reference, hypothesis, words, count(reference, hypothesis))


def totals(scored: Iterable[Scored]) -> Totals:
    """Adds up utterances; an error rate of the corpus weighs each of them by its length."""
    result = Totals()
    for utterance in scored:
        result.utterances += 1
        result.wrong += utterance.words.errors > 0
        result.words += utterance.words
        result.characters += utterance.characters
    return result
