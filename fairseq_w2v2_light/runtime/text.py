"""What a CTC model's labels spell: text, and words with their times. Without fairseq."""

import re
from dataclasses import dataclass
from typing import Iterable, List, Optional, Sequence, Tuple

from .beam import Token

_LETTER_BOUNDARY = "|"
_PIECE_BOUNDARY = "\u2581"
# What fairseq leaves out of any text, and the labels that it adds to every dictionary but trains no model to output.
_SILENT = ("<s>", "</s>")
_NEVER = ("<pad>", "</s>")


@dataclass(frozen=True)
class Word:
    """One word, and when it was spoken: seconds since the stream began."""

    text: str
    start: float
    end: float


class Labels:
    """The symbols of a CTC model, in the order of its outputs.

    symbols: all symbols of a fairseq dictionary, `<s>`, `<pad>`, `</s>` and `<unk>` included. blank: index of CTC's
    blank. kind: how they spell words, by what is among them: "sentencepiece" (a piece that begins with `▁` begins a
    word), "letter" (`|` ends a word), else "word" (each is one). Raises ValueError where `blank` is no index.

    The text of tokens is that of `w2v2-light infer` (common_eval.post_process=letter, =sentencepiece, or =none for
    words): `<s>` and `</s>` are left out, `<pad>` and `<unk>` are spelled as they stand. Decoders here never output
    those in `never`; infer's viterbi decoder would, if a model did.
    """

    def __init__(self, symbols: Sequence[str], blank: int = 0):
        self.symbols: Tuple[str, ...] = tuple(symbols)
        if not 0 <= blank < len(self.symbols):
            raise ValueError(f"blank is {blank}; expected an index below {len(self.symbols)}, the number of symbols")
        self.blank = blank
        if any(symbol.startswith(_PIECE_BOUNDARY) for symbol in self.symbols):
            self.kind = "sentencepiece"
        elif _LETTER_BOUNDARY in self.symbols:
            self.kind = "letter"
        else:
            self.kind = "word"
        self._spelled = tuple(self._spell(index) for index in range(len(self.symbols)))

    def __len__(self) -> int:
        return len(self.symbols)

    @property
    def never(self) -> Tuple[int, ...]:
        """Indices of outputs that are no labels, and must not be decoded: `<pad>` and `</s>`."""
        return tuple(index for index, symbol in enumerate(self.symbols) if symbol in _NEVER and index != self.blank)

    @property
    def silent(self) -> Tuple[int, ...]:
        """Indices of labels in which nothing is spoken: `|`, a piece that is `▁` alone."""
        silent = (index for index, spelled in enumerate(self._spelled) if not spelled.strip())
        return tuple(index for index in silent if index != self.blank and index not in self.never)

    def text(self, indices: Iterable[int]) -> str:
        """What the labels spell; raises ValueError for an index of no symbol."""
        return "".join(self._spelling(index) for index in indices).strip()

    def words(self, tokens: Sequence[Token], seconds_per_frame: float) -> List[Word]:
        """The words that decoded tokens spell, from the start of the first letter to the end of the last one.

        Their texts are those of `text`, split at white space. Raises ValueError for an index of no symbol.
        """
        return [
            Word(text, tokens[first].start * seconds_per_frame, tokens[last].end * seconds_per_frame)
            for text, first, last in self.spans([token.index for token in tokens])
        ]

    def spans(self, indices: Sequence[int]) -> List[Tuple[str, int, int]]:
        """Each word that labels spell, and the positions in `indices` of its first and its last label.

        Raises ValueError for an index of no symbol.
        """
        spelled = [self._spelling(index) for index in indices]
        owners = [position for position, spelling in enumerate(spelled) for _ in spelling]
        return [
            (match.group(), owners[match.start()], owners[match.end() - 1])
            for match in re.finditer(r"\S+", "".join(spelled))
        ]

    def whole_words(self, tokens: Sequence[Token]) -> int:
        """How many of the first tokens spell words that no token after `tokens` adds to.

        `words` of those tokens and `words` of all that follows are, together, `words` of everything.
        """
        following = None
        for count in range(len(tokens), 0, -1):
            if self.separates(tokens[count - 1].index, following):
                return count
            following = tokens[count - 1].index
        return 0

    def separates(self, index: int, following: Optional[int] = None) -> bool:
        """Whether a word ends with label `index`, where label `following` comes next (None: not known)."""
        begins = "" if following is None else self._spelling(following)
        return self._spelling(index)[-1:].isspace() or begins[:1].isspace()

    def _spelling(self, index: int) -> str:
        if not 0 <= index < len(self.symbols):
            raise ValueError(
                f"label {int(index)}: there are {len(self.symbols)} symbols; is this the model's dictionary?"
            )
        return self._spelled[index]

    def _spell(self, index: int) -> str:
        symbol = self.symbols[index]
        if index == self.blank or symbol in _SILENT:
            return ""
        if self.kind == "word":
            return symbol + " "
        boundary = _LETTER_BOUNDARY if self.kind == "letter" else _PIECE_BOUNDARY
        return symbol.replace(" ", "").replace(boundary, " ")
