"""Lexicons: the words that a language model decoder may output, and how each is spelled with a model's labels."""

from __future__ import annotations

import heapq
import logging
import math
import re
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Tuple, Union

from .arpa import NgramFile
from .text import Labels

PathLike = Union[str, Path]
Spelling = Tuple[int, ...]
Lexicon = Dict[str, List[Spelling]]

_WORD_END = "|"
_PIECE_BOUNDARY = "\u2581"
# How many ways to cut a word into pieces are kept. The model was trained on one of them, that of sentencepiece's own
# probabilities, which the labels do not tell.
_SPELLINGS = 4

_log = logging.getLogger(__name__)


class Speller:
    """Spells words with a model's labels.

    Letters: `A B |`. Sentencepieces: the most plausible divisions into pieces, up to 4, by the pieces' ranks (labels
    stand in the order of their frequency, which falls with the rank by Zipf's law). Words: themselves. A word that has
    no spelling as it stands is tried in upper and in lower case.
    """

    def __init__(self, labels: Labels):
        self.labels = labels
        excluded = {labels.blank, *labels.never}
        self.indices = {
            symbol: index
            for index, symbol in enumerate(labels.symbols)
            if index not in excluded and symbol not in ("<s>", "<unk>")
        }
        self._longest = max(map(len, self.indices), default=0)

    def spell(self, word: str) -> List[Spelling]:
        """The spellings of a word, most plausible first. Raises ValueError that names the symbol it cannot be made of.

        The message has no file or line: the caller knows them.
        """
        for written in dict.fromkeys((word, word.upper(), word.lower())):
            spellings = self._spell(written)
            if spellings:
                return spellings
        raise ValueError(f"word {word!r} cannot be spelled with the model's labels: {self._reason(word)}")

    def _spell(self, word: str) -> List[Spelling]:
        if self.labels.kind == "sentencepiece":
            return self._pieces(_PIECE_BOUNDARY + word)
        symbols = [*word, _WORD_END] if self.labels.kind == "letter" else [word]
        if any(symbol not in self.indices for symbol in symbols) or _WORD_END in symbols[:-1]:
            return []
        return [tuple(self.indices[symbol] for symbol in symbols)]

    def _pieces(self, text: str) -> List[Spelling]:
        """The divisions of `text` into pieces with the smallest sums of log ranks, up to `_SPELLINGS`."""
        best: List[List[Tuple[float, Spelling]]] = [[(0.0, ())]]
        for end in range(1, len(text) + 1):
            found = []
            for start in range(max(0, end - self._longest), end):
                index = self.indices.get(text[start:end])
                if index is not None:
                    cost = math.log(index + 1)
                    found += [(before + cost, spelling + (index,)) for before, spelling in best[start]]
            best.append(heapq.nsmallest(_SPELLINGS, found))
        return [spelling for _, spelling in best[-1]]

    def _reason(self, word: str) -> str:
        if self.labels.kind == "word":
            return "it is no label"
        known = set("".join(self.indices)) - {_WORD_END, _PIECE_BOUNDARY}
        unknown = [character for character in word if character not in known]
        if unknown:
            return f"no label has {unknown[0]!r}"
        return "no sequence of labels makes it up"


def read_lexicon(path: PathLike, labels: Labels) -> Lexicon:
    """Reads a lexicon: a word a line, then its spelling (`WORD  W O R D |`); several lines a word are alternatives.

    A line that is a word alone has it spelled automatically, so a list of words is a lexicon, too. With letters, a
    spelling that lacks the final `|` gets it. Empty lines are passed over. Raises FileNotFoundError when the file is
    missing, and ValueError that names the file, line and symbol of a spelling that the model's labels cannot make.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: found a folder, expected a lexicon: a file of lines `WORD  W O R D |`")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such lexicon; expected a file of lines `WORD  W O R D |`, or of words")
    speller = Speller(labels)
    lexicon: Lexicon = {}
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                fields = [field for field in re.split(r"[ \t\r\n]+", line) if field]
                if fields:
                    spellings = lexicon.setdefault(fields[0], [])
                    for spelling in _spellings(fields, speller, f"{path}:{number}"):
                        if spelling not in spellings:
                            spellings.append(spelling)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a lexicon: it is no UTF-8 text ({error})") from None
    if not lexicon:
        raise ValueError(f"{path}: the lexicon is empty; expected lines `WORD  W O R D |`, or words")
    return lexicon


def _spellings(fields: Sequence[str], speller: Speller, where: str) -> List[Spelling]:
    word, symbols = fields[0], list(fields[1:])
    if word in ("<s>", "</s>"):
        raise ValueError(f"{where}: found {word}, which begins or ends a sentence; expected a word")
    if word == "<unk>" and not symbols:
        raise ValueError(f"{where}: found <unk> without a spelling; expected a word, or a line `<unk>  SYMBOLS...`")
    if not symbols:
        try:
            return speller.spell(word)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; leave it out, or give a spelling that sounds like it") from None
    for symbol in symbols:
        if symbol not in speller.indices:
            raise ValueError(
                f"{where}: word {word!r} is spelled with {symbol!r}, which is not among the model's labels: "
                f"{_listed(speller.indices)}"
            )
    if speller.labels.kind == "letter":
        if _WORD_END in symbols[:-1] or symbols == [_WORD_END]:
            raise ValueError(f"{where}: word {word!r}: found {_WORD_END!r} inside its spelling, expected it at the end")
        symbols += [] if symbols[-1] == _WORD_END else [_WORD_END]
    return [tuple(speller.indices[symbol] for symbol in symbols)]


def make_lexicon(words: Iterable[str], labels: Labels, where: str) -> Tuple[Lexicon, List[str]]:
    """Spells the words of a language model; returns the lexicon, and the words that the labels cannot spell.

    Raises ValueError, naming `where` the words are from, when none of them can be spelled.
    """
    speller = Speller(labels)
    lexicon: Lexicon = {}
    left_out: List[str] = []
    reason = "it has no words"
    for word in words:
        try:
            lexicon[word] = speller.spell(word)
        except ValueError as error:
            reason = reason if left_out else str(error)
            left_out.append(word)
    if not lexicon:
        raise ValueError(
            f"{where}: none of its words can be spelled with the model's labels ({reason}); expected an n-gram over "
            "words of these labels; for an n-gram over the labels themselves, decode without a lexicon"
        )
    return lexicon, left_out


def load_lexicon(lm_path: PathLike, lexicon_path: Optional[PathLike], ngram: NgramFile, labels: Labels) -> Lexicon:
    """The lexicon of a file or, without one, of the n-gram's own words; warns of words that cannot be spelled.

    Raises as `read_lexicon` and `make_lexicon` do, and ValueError where there is neither.
    """
    if lexicon_path is not None:
        return read_lexicon(lexicon_path, labels)
    if ngram.words is None:
        raise ValueError(
            f"{lm_path}: this binary file does not tell its words; give a lexicon, or a list of words, one a line"
        )
    lexicon, left_out = make_lexicon(ngram.words, labels, str(lm_path))
    if left_out:
        _log.warning(
            "%s: %d of %d words cannot be spelled with the model's labels and are never decoded, the first is %r",
            lm_path,
            len(left_out),
            len(ngram.words),
            left_out[0],
        )
    return lexicon


def held_endings(spellings: Sequence[Spelling], labels: Labels) -> List[Spelling]:
    """What flashlight has to be given for spellings of a word, so that its last label may last.

    flashlight's search leaves a word in the first frame of its last label, so a second frame of that label would have
    nowhere to be; and it does not ask for a blank between the last two labels. A spelling with its last label doubled
    thus holds that label for as long as it lasts. Spellings that end in `|` need none: flashlight's silence lasts.
    """
    if labels.kind == "letter":
        return list(spellings)
    doubled = [spelling + spelling[-1:] for spelling in spellings]
    return [*spellings, *(spelling for spelling in doubled if spelling not in spellings)]


def _listed(symbols: Iterable[str], most: int = 40) -> str:
    symbols = list(symbols)
    return " ".join(symbols[:most]) + (" ..." if len(symbols) > most else "")
