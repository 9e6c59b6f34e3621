"""The labels of a CTC model as Hugging Face's tokenizer has them, and back.

Their CTC models use the padding token as blank, fairseq's use `<s>`. As in transformers' own conversion of fairseq's
models the two names change places: our `<s>` is their `<pad>`, our `<pad>` their `<s>`, and no row of the head moves.
A folder from elsewhere may have any order; then the rows move, so that fairseq's four come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from ..runtime.load import SPECIAL_SYMBOLS
from ..runtime.text import Labels
from .huggingface_folder import read_json
from .huggingface_format import ADDED_TOKENS, CONFIG, SPECIAL_TOKENS, TOKENIZER, VOCAB

BLANK_TOKEN = "<pad>"
# fairseq's four, in order, and the role that the token has in transformers which takes each place
_ROLES = ("pad", "bos", "eos", "unk")
_DEFAULTS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_PIECE_BOUNDARY = "\u2581"


def tokens_of(symbols: Sequence[str]) -> List[str]:
    """Hugging Face's token of each label; the first of `symbols` is the blank.

    Their tokenizer joins tokens and strips the text: pieces begin with a space where ours have `▁`, and whole words end
    with one. Raises ValueError for a label that stands twice.
    """
    kind = Labels(symbols).kind
    tokens = [symbol if symbol in SPECIAL_SYMBOLS else _spelled(symbol, kind) for symbol in symbols]
    if BLANK_TOKEN in tokens:
        tokens[tokens.index(BLANK_TOKEN)] = symbols[0]
    tokens[0] = BLANK_TOKEN
    places: Dict[str, int] = {}
    for index, token in enumerate(tokens):
        if token in places:
            raise ValueError(
                f"labels {places[token]} and {index} are both {token!r} in Hugging Face's vocabulary, which needs "
                "another token for each; change the dictionary"
            )
        places[token] = index
    return tokens


def _spelled(symbol: str, kind: str) -> str:
    if kind == "word":
        return symbol + " "
    symbol = symbol.replace(" ", "")
    return symbol.replace(_PIECE_BOUNDARY, " ") if kind == "sentencepiece" else symbol


def token_ids(vocabulary: Sequence[str]) -> Dict[str, Optional[int]]:
    """The index of each special token that transformers knows, by its role; None where no label has it."""
    return {role: vocabulary.index(token) if token in vocabulary else None for role, token in _DEFAULTS.items()}


def special_tokens(vocabulary: Sequence[str]) -> Dict[str, Optional[str]]:
    """The keys `pad_token` and so on of transformers' tokenizer files."""
    return {f"{role}_token": token if token in vocabulary else None for role, token in _DEFAULTS.items()}


@dataclass(frozen=True)
class HeadLabels:
    """Labels in fairseq's order.

    symbols: the blank `<s>` first, then `<pad>`, `</s>`, `<unk>` and the others in the folder's order. rows: the row of
    the folder's head that makes each one's logit; None for one of the four that the folder does not have. unnamed: how
    many rows had no token, and so are called madeupword0000 and on, as fairseq calls what fills a dictionary.
    """

    symbols: List[str]
    rows: List[Optional[int]]
    unnamed: int


def read_labels(folder: Path, config: Mapping[str, Any], count: int) -> HeadLabels:
    """The labels of a folder whose head has `count` rows.

    Tokens beyond the head's rows (which transformers adds to a vocabulary) are left out. Raises FileNotFoundError when
    vocab.json is missing; ValueError that names file and token for a malformed vocabulary, for one whose blank is not
    clear, and for text that our labels cannot spell.
    """
    settings = read_json(folder, TOKENIZER, {})
    tokens = _read_tokens(folder, settings, count)
    file = folder / VOCAB
    places = {token: index for index, token in tokens.items()}
    roles = _roles(folder, settings, places)
    roles["pad"] = _blank(config, roles["pad"], count, folder)

    taken = {}
    for place, role in enumerate(_ROLES):
        row = roles[role]
        if row is not None and row not in taken:
            taken[row] = place
    # a token that has fairseq's name for a place that is still free
    for place, symbol in enumerate(SPECIAL_SYMBOLS):
        row = places.get(symbol)
        if place not in taken.values() and row is not None and row not in taken:
            taken[row] = place
    rows: List[Optional[int]] = [None] * len(SPECIAL_SYMBOLS)
    for row, place in taken.items():
        rows[place] = row
    others = [row for row in range(count) if row not in taken]
    spell = _speller(settings, [tokens[row] for row in others if row in tokens], folder)
    symbols, unnamed = list(SPECIAL_SYMBOLS), 0
    for row in others:
        if row in tokens:
            symbol = spell(tokens[row])
        else:
            symbol, unnamed = f"madeupword{unnamed:04d}", unnamed + 1
        if symbol in symbols:
            raise ValueError(
                f"{file}: token {tokens.get(row)!r} (id {row}) is '{symbol}' in a fairseq dictionary, which has that "
                "already; rename one of the two"
            )
        symbols.append(symbol)
    return HeadLabels(symbols, rows + others, unnamed)


def _read_tokens(folder: Path, settings: Mapping[str, Any], count: int) -> Dict[int, str]:
    """The token of each id, as far as the files name it."""
    tokens: Dict[int, str] = {}
    vocabulary = read_json(folder, VOCAB)
    entries: List[Tuple[str, Any, str]] = [(token, index, VOCAB) for token, index in vocabulary.items()]
    entries += [(token, index, ADDED_TOKENS) for token, index in read_json(folder, ADDED_TOKENS, {}).items()]
    added = settings.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise ValueError(
            f"{folder / TOKENIZER}: added_tokens_decoder: found a {type(added).__name__}, expected an object"
        )
    for index, entry in added.items():
        number = int(index) if index.isascii() and index.isdigit() and len(index) < 10 else index
        entries.append((_content(entry), number, TOKENIZER))
    for token, index, name in entries:
        if isinstance(index, dict):
            raise ValueError(
                f"{folder / name}: {token!r} is a vocabulary of its own, one of several languages; expected one "
                "vocabulary of tokens and ids"
            )
        if type(index) is not int or index < 0 or not isinstance(token, str):
            raise ValueError(f"{folder / name}: token {token!r}: found id {index!r}, expected a number of 0 or more")
        if index >= count:
            continue
        # with gaps in a vocabulary, transformers gives tokens that it adds the ids of others, which take precedence
        if tokens.setdefault(index, token) != token and name == VOCAB:
            raise ValueError(f"{folder / name}: tokens {tokens[index]!r} and {token!r} have one id, {index}")
    return tokens


def _content(entry: Any) -> Any:
    """The text of a token that may be an object with `content`."""
    return entry.get("content") if isinstance(entry, dict) else entry


def _roles(folder: Path, settings: Mapping[str, Any], places: Mapping[str, int]) -> Dict[str, Optional[int]]:
    """The row of each special token."""
    listed = read_json(folder, SPECIAL_TOKENS, {})
    found = {}
    for role in _ROLES:
        key = f"{role}_token"
        token = _content(settings.get(key, listed.get(key, _DEFAULTS[role])))
        found[role] = places.get(token) if isinstance(token, str) else None
    return found


def _blank(config: Mapping[str, Any], named: Optional[int], count: int, folder: Path) -> int:
    """The row of CTC's blank: the tokenizer's padding token and the configuration's must be one."""
    configured = config.get("pad_token_id")
    blank = configured if named is None else named
    if type(blank) is not int or not 0 <= blank < count:
        raise ValueError(
            f"{folder}: no padding token, which is CTC's blank: none in {VOCAB}, {CONFIG} has pad_token_id={configured}"
        )
    if configured is not None and configured != blank:
        raise ValueError(
            f"{folder}: which token is CTC's blank? {CONFIG} says pad_token_id={configured}, but the tokenizer's "
            f"padding token has id {blank} in {VOCAB}; correct one of them"
        )
    return blank


def _speller(settings: Mapping[str, Any], tokens: Sequence[str], folder: Path) -> Callable[[str], str]:
    """The function from a token to our label for it."""
    delimiter = _content(settings.get("word_delimiter_token", "|"))
    replacement = settings.get("replace_word_delimiter_char", " ")
    has_delimiter = delimiter in tokens
    spaced = [token for token in tokens if token != delimiter and (" " in token or token[:1] == _PIECE_BOUNDARY)]
    are_words = bool(spaced) and all(token[-1:] == " " and token.strip(" ") for token in tokens if token != delimiter)
    # a single space beside pieces that begin with one is a piece, too
    parts_words = has_delimiter and not (delimiter == " " and spaced)
    if parts_words and replacement != " ":
        raise ValueError(
            f"{folder / TOKENIZER}: replace_word_delimiter_char: found {replacement!r}, expected ' ', which is what "
            "our labels have between words"
        )
    if parts_words and spaced:
        raise ValueError(
            f"{folder / VOCAB}: token {spaced[0]!r} begins a word, and {delimiter!r} ends one; labels of ours have one "
            "way to part words"
        )
    if parts_words and delimiter != "|" and "|" in tokens:
        raise ValueError(
            f"{folder / VOCAB}: '|' is a token, but the word delimiter is {delimiter!r}; rename the former"
        )
    if spaced and not are_words and not any(token[:1] in (" ", _PIECE_BOUNDARY) for token in spaced):
        raise ValueError(
            f"{folder / VOCAB}: token {spaced[0]!r} holds a space; expected one at the start of a piece, or at the end "
            "of each word"
        )
    lowers = bool(settings.get("do_lower_case", False))

    def spell(token: str) -> str:
        if parts_words and token == delimiter:
            return "|"
        text = token[:-1] if are_words else token.replace(" ", _PIECE_BOUNDARY)
        text = text.lower() if lowers else text
        if text.split() != [text]:
            raise ValueError(
                f"{folder / VOCAB}: token {token!r}: a label of fairseq is a text without white space; rename it"
            )
        return text

    return spell
