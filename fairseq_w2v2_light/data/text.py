"""Transcripts to labels: normalisation, letters, sentencepiece, dictionaries."""

import re
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Iterable, List, Sequence

from fairseq_w2v2_light.data.manifest import SPECIAL_SYMBOLS

NORMALISATIONS = ("upper", "lower", "none")
NORMALISATION_HELP = (
    "upper (default): upper-case, keep letters, digits and apostrophes, turn other punctuation into white space, "
    "collapse white space; lower: the same in lower case; none: collapse white space only"
)
WORD_BOUNDARY = "|"
TYPOGRAPHIC_APOSTROPHES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'", "\uff07": "'"})
SENTENCEPIECE_BLANK = "\u2581"


def normalise_text(text: str, how: str = "upper") -> str:
    """Normalises a transcript; see NORMALISATION_HELP. Unicode is composed (NFC) first.

    >>> normalise_text("  It’s half-past\\ttwo. ")
    "IT'S HALF PAST TWO"
    """
    if how not in NORMALISATIONS:
        raise ValueError(f"normalisation {how!r}: expected one of {', '.join(NORMALISATIONS)}")
    text = unicodedata.normalize("NFC", text)
    if how == "none":
        return " ".join(text.split())
    return remove_punctuation(text.upper() if how == "upper" else text.lower())


def remove_punctuation(text: str) -> str:
    """Keeps letters, digits and apostrophes; other signs become white space, which is collapsed."""
    text = text.translate(TYPOGRAPHIC_APOSTROPHES)
    kept = "".join(char if char == "'" or unicodedata.category(char)[0] in "LNM" else " " for char in text)
    return " ".join(word for word in kept.split() if word.strip("'"))


def reserved_symbol(text: str) -> str:
    """The first reserved character of a normalised transcript, '' if none: `|` and sentencepiece's blank."""
    return next((char for char in text if char in (WORD_BOUNDARY, SENTENCEPIECE_BLANK)), "")


def letters(text: str) -> str:
    """Letter labels as fairseq writes them.

    >>> letters("SO I")
    'S O | I |'
    """
    return " ".join(text.replace(" ", WORD_BOUNDARY) + WORD_BOUNDARY)


def dictionary_text(train_labels: Iterable[str], other_symbols: Iterable[str] = ()) -> str:
    """The text of a fairseq dictionary: symbols of `train_labels`, most frequent first, then `other_symbols` with 0.

    Equal counts are in code point order, so that the same labels always give the same dictionary.
    """
    counts = Counter(symbol for line in train_labels for symbol in line.split())
    counts.update(dict.fromkeys(other_symbols, 0))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return "".join(f"{symbol} {count}\n" for symbol, count in ordered)


def train_sentencepiece(texts: Sequence[str], vocab_size: int, model_type: str = "unigram") -> bytes:
    """Trains a sentencepiece model on normalised transcripts; returns the bytes of `spm.model`.

    Every character of the texts is covered and nothing is normalised again, so that pieces spell the transcript
    exactly. Raises ValueError when the texts do not hold `vocab_size` pieces, or too few for their characters.
    """
    import sentencepiece

    characters = len(set("".join(texts)) - {" "})
    # Besides one piece a character: the word boundary and <unk>, <s>, </s>.
    fewest = characters + 4
    if vocab_size < fewest:
        raise ValueError(
            f"--vocab-size {vocab_size}: the training text has {characters} different characters; "
            f"expected at least {fewest}"
        )
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "spm"
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_prefix=str(prefix),
                vocab_size=vocab_size,
                model_type=model_type,
                character_coverage=1.0,
                normalization_rule_name="identity",
                max_sentence_length=1 << 20,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            largest = re.search(r"<= (\d+)", str(error))
            remedy = f"choose {largest.group(1)} at most" if largest else f"choose a smaller one ({error})"
            raise ValueError(
                f"--vocab-size {vocab_size}: too large for the training text ({len(texts)} lines, "
                f"{sum(len(text.split()) for text in texts)} words); {remedy}"
            ) from None
        return prefix.with_suffix(".model").read_bytes()


class SentencePieces:
    """Encodes transcripts with a trained sentencepiece model (bytes of `spm.model`)."""

    def __init__(self, model: bytes):
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def symbols(self) -> List[str]:
        """All pieces but the special ones, which fairseq's dictionary adds itself."""
        pieces = [self._processor.id_to_piece(index) for index in range(self._processor.get_piece_size())]
        return [piece for piece in pieces if piece not in SPECIAL_SYMBOLS]

    def encode(self, text: str) -> str:
        """Pieces separated by blanks; '▁' begins a word."""
        return " ".join(self._processor.encode(text, out_type=str))
