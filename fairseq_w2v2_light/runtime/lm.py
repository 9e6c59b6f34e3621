"""CTC decoding with an n-gram language model: flashlight's beam search and KenLM, both optional, without fairseq.

decoder = LanguageModelDecoder(Labels(model.symbols), "words.arpa", lm_weight=2.0)
tokens = decoder.decode(log_probs)          # label indices with their frames
best = decoder.nbest(log_probs, 10)[0]      # with words and scores
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from .arpa import NgramFile, check_ngram_file
from .beam import Token
from .lexicon import Lexicon, Spelling, held_endings, load_lexicon
from .text import Labels, Word

PathLike = Union[str, Path]

_WORD_END = "|"
# Log-probability of what cannot be: flashlight adds and compares scores, where -inf would make NaN.
_IMPOSSIBLE = -1e4
# Of the column that stands for silence where the labels have none: worse than anything impossible.
_NO_SILENCE = -1e6
# flashlight's Trie keeps no more words of one spelling.
_MAX_HOMOPHONES = 6

_log = logging.getLogger(__name__)


class SpokenWord(NamedTuple):
    """A word of the language model, and its frames [start, end)."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class LmHypothesis:
    """One decoded utterance.

    tokens: its labels with their frames, in the best alignment. words: its words with their frames, in the lexicon's
    (or the labels') writing. score: log_prob + lm_weight * lm_score + word_score * words + sil_score * frames of `|`.
    log_prob: of the alignment, natural logarithm. lm_score: log10 of the n-gram's probability of the sentence.
    """

    tokens: Tuple[Token, ...]
    words: Tuple[SpokenWord, ...]
    score: float
    log_prob: float
    lm_score: float

    @property
    def text(self) -> str:
        """The words with blanks between."""
        return " ".join(word.text for word in self.words)


@dataclass(frozen=True)
class Weights:
    """What a hypothesis' score adds to the log-probability of its best alignment.

    lm_weight: times log10 of the n-gram's probability (fairseq's decoding.lmweight: log10, as KenLM counts).
    word_score: for every word (decoding.wordscore). sil_score: for every frame of `|` (decoding.silweight).
    Raises ValueError for values that are not finite.
    """

    lm_weight: float = 2.0
    word_score: float = -1.0
    sil_score: float = 0.0

    def __post_init__(self):
        for name in ("lm_weight", "word_score", "sil_score"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}; expected a finite number")


class LanguageModelDecoder:
    """Beam search over labellings with a KenLM n-gram (an ARPA or a binary file), through the package flashlight-text.

    labels: of the CTC model; `<pad>`, `</s>` and `<unk>` are never decoded. lm_path: an n-gram over words, or, with
    lexicon_free, over the labels. lexicon_path: words with their spellings, or words alone (see `read_lexicon`); only
    these are decoded. Without it, the words of the n-gram, spelled automatically. A word of the lexicon that the n-gram
    lacks has the probability of its <unk>. lm_weight, word_score, sil_score: see `Weights`; without a lexicon there is
    no word_score. beam: hypotheses kept after each frame. beam_threshold: those more than this below the best are
    dropped. beam_tokens: labels that extend a hypothesis, the most probable ones of each frame (None: all).

    The search is flashlight's, over best alignments (log_add off). Where the audio ends within a word, the word counts
    as ended. With spellings that do not end in `|` (sentencepieces), the last label of a word counts once even if it
    was said twice, and two of it need no blank between: flashlight does not tell these apart.

    A binary file is KenLM's memory itself: damage is found by trying it in another process, but a file that was made to
    do harm might pass, so take those of people you trust, or ARPA text, which is checked.

    Raises FileNotFoundError, and ValueError: for a broken n-gram or lexicon, naming file and line, for words that the
    labels cannot spell, for an n-gram that knows none of the words, and where flashlight-text is not installed.
    """

    def __init__(
        self,
        labels: Labels,
        lm_path: PathLike,
        lexicon_path: Optional[PathLike] = None,
        lm_weight: float = 2.0,
        word_score: float = -1.0,
        sil_score: float = 0.0,
        beam: int = 50,
        beam_threshold: float = 50.0,
        beam_tokens: Optional[int] = None,
        lexicon_free: bool = False,
    ):
        for name, value in (("beam", beam), ("beam_tokens", beam_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more")
        if not beam_threshold > 0:
            raise ValueError(f"beam_threshold is {beam_threshold}; expected a positive number")
        if lexicon_free and lexicon_path is not None:
            raise ValueError(f"{lexicon_path}: decoding without a lexicon takes none; give one or the other")
        self.labels = labels
        self.weights = Weights(lm_weight, word_score, sil_score)
        self.beam, self.beam_threshold, self.beam_tokens = beam, beam_threshold, beam_tokens
        self.lexicon_free = lexicon_free
        require_flashlight()
        ngram = check_ngram_file(lm_path)
        self._columns = _Columns(labels)
        if lexicon_free:
            self._words: List[str] = [labels.symbols[index] for index in self._columns.indices]
            self._lexicon: Lexicon = {}
            self._lm = _open_kenlm(lm_path, self._words, ngram)
            self._check_label_ngram(lm_path, ngram)
            self._trie = None
        else:
            self._lexicon = load_lexicon(lm_path, lexicon_path, ngram, labels)
            self._words = list(self._lexicon)
            self._lm = _open_kenlm(lm_path, self._words, ngram)
            self._check_word_ngram(lm_path, lexicon_path, ngram)
            self._trie = self._build_trie()
        self._decoder = self._build_decoder()

    def with_weights(self, weights: Weights) -> LanguageModelDecoder:
        """A decoder with other weights, which shares the language model and the lexicon of this one."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.weights = weights
        other._decoder = other._build_decoder()
        return other

    def decode(self, log_probs: Union[np.ndarray, Tensor]) -> Tuple[Token, ...]:
        """The labels of the best hypothesis with their frames; log_probs: (frames, labels), natural logarithms.

        Raises ValueError for another shape and for NaN.
        """
        return self.best(log_probs).tokens

    def best(self, log_probs: Union[np.ndarray, Tensor]) -> LmHypothesis:
        """The best hypothesis; log_probs and errors as for `decode`."""
        return self.nbest(log_probs, 1)[0]

    def words(self, log_probs: Union[np.ndarray, Tensor], seconds_per_frame: float) -> List[Word]:
        """The words of the best hypothesis, in the lexicon's writing, with their times in seconds."""
        spoken = self.best(log_probs).words
        return [Word(word.text, word.start * seconds_per_frame, word.end * seconds_per_frame) for word in spoken]

    def nbest(self, log_probs: Union[np.ndarray, Tensor], count: int) -> List[LmHypothesis]:
        """Up to `count` hypotheses that differ in their words, best first; always at least one.

        log_probs and errors as for `decode`. No frames have no words.
        """
        if count < 1:
            raise ValueError(f"count is {count}; expected 1 or more")
        emissions = self._columns.emissions(log_probs)
        frames = len(emissions) - self._columns.closing_frames
        if frames == 0:
            _, lm_score = self._lm.finish(self._lm.start(False))
            return [LmHypothesis((), (), self.weights.lm_weight * lm_score, 0.0, lm_score)]
        results = self._decoder.decode(emissions.ctypes.data, *emissions.shape)
        hypotheses: Dict[Tuple[str, ...], LmHypothesis] = {}
        for result in results:
            hypothesis = self._hypothesis(result, frames, len(emissions))
            hypotheses.setdefault(tuple(word.text for word in hypothesis.words), hypothesis)
            if len(hypotheses) == count:
                break
        return list(hypotheses.values())

    def _check_label_ngram(self, lm_path: PathLike, ngram: NgramFile) -> None:
        symbols = [self._words[column] for column in range(len(self._words)) if column != _Columns.blank]
        unknown = _unknown_words(symbols, ngram, self._lm, self._words)
        remedy = (
            "decoding without a lexicon needs an n-gram over the labels, made from the label files (train.ltr), not "
            "from words"
        )
        if len(unknown) == len(symbols):
            raise ValueError(f"{lm_path}: the n-gram has none of the model's labels; {remedy}")
        if _WORD_END in unknown:
            raise ValueError(f"{lm_path}: the n-gram lacks the label '{_WORD_END}', which ends words; {remedy}")
        if unknown:
            _log.warning("%s: the n-gram lacks %d of %d labels: %s", lm_path, len(unknown), len(symbols), unknown[:20])

    def _check_word_ngram(self, lm_path: PathLike, lexicon_path: Optional[PathLike], ngram: NgramFile) -> None:
        unknown = _unknown_words(self._words, ngram, self._lm, self._words)
        if len(unknown) == len(self._words):
            raise ValueError(
                f"{lm_path}: the n-gram knows none of the {len(unknown)} words of {lexicon_path}, the first is "
                f"{unknown[0]!r}; expected the same words, in the same upper or lower case"
            )
        if unknown:
            _log.warning(
                "%s: the n-gram lacks %d of %d words of %s, which get the probability of <unk>; the first is %r",
                lm_path,
                len(unknown),
                len(self._words),
                lexicon_path,
                unknown[0],
            )

    def _build_trie(self):
        from flashlight.lib.text.decoder import SmearingMode, Trie

        trie = Trie(self._columns.width, self._columns.silence)
        start = self._lm.start(False)
        scores = [self._lm.score(start, index)[1] for index in range(len(self._words))]
        homophones: Dict[Spelling, int] = {}
        dropped = 0
        # the likeliest words first: flashlight keeps six of one spelling
        for index in sorted(range(len(self._words)), key=lambda index: -scores[index]):
            for spelling in held_endings(self._lexicon[self._words[index]], self.labels):
                homophones[spelling] = homophones.get(spelling, 0) + 1
                if homophones[spelling] > _MAX_HOMOPHONES:
                    dropped += 1
                else:
                    trie.insert(self._columns.of(spelling), index, scores[index])
        if dropped:
            _log.warning(
                "%d spellings have more than %d words: only the likeliest are decoded", dropped, _MAX_HOMOPHONES
            )
        trie.smear(SmearingMode.MAX)
        return trie

    def _build_decoder(self):
        from flashlight.lib.text.decoder import (
            CriterionType,
            LexiconDecoder,
            LexiconDecoderOptions,
            LexiconFreeDecoder,
            LexiconFreeDecoderOptions,
        )

        columns, weights = self._columns, self.weights
        shared = dict(
            beam_size=self.beam,
            beam_size_token=min(self.beam_tokens or columns.width, columns.width),
            beam_threshold=self.beam_threshold,
            lm_weight=weights.lm_weight,
            sil_score=weights.sil_score,
            log_add=False,
            criterion_type=CriterionType.CTC,
        )
        if self.lexicon_free:
            options = LexiconFreeDecoderOptions(**shared)
            return LexiconFreeDecoder(options, self._lm, columns.silence, columns.blank, [])
        # with this unk_score there are no words but those of the lexicon, whichever index stands for the others
        options = LexiconDecoderOptions(**shared, word_score=weights.word_score, unk_score=-math.inf)
        return LexiconDecoder(options, self._trie, self._lm, columns.silence, columns.blank, 0, [], False)

    def _hypothesis(self, result: Any, frames: int, rows: int) -> LmHypothesis:
        # flashlight puts a frame before the first and one after the last
        path, word_ends = result.tokens[1 : rows + 1], result.words[1 : rows + 1]
        tokens = self._columns.tokens(path)
        if self.lexicon_free:
            tokens = self._trimmed(tokens, frames)
            words = [
                SpokenWord(word.text, round(word.start), round(word.end)) for word in self.labels.words(tokens, 1.0)
            ]
        else:
            tokens, words = self._spoken(tokens, word_ends, frames)
            tokens = self._trimmed(tokens, frames)
        return LmHypothesis(tuple(tokens), tuple(words), result.score, result.emittingModelScore, result.lmScore)

    def _spoken(
        self, tokens: List[Token], word_ends: Sequence[int], frames: int
    ) -> Tuple[List[Token], List[SpokenWord]]:
        """The tokens as the lexicon spells them, and the words they make up; word_ends: the word that ends, a frame."""
        spelled: List[Token] = []
        words: List[SpokenWord] = []
        rest = tokens
        for frame, index in enumerate(word_ends):
            if index < 0:
                continue
            own = [token for token in rest if token.start <= frame]
            # a run that goes on beyond the word is silence, or the last label, which the next word cannot begin with
            rest = rest[len(own) :]
            if self._columns.silence_label is not None:
                while own and own[0].index == self._columns.silence_label:
                    own = own[1:]
            else:
                own = _as_spelled(own, self._lexicon[self._words[index]])
            voiced = [token for token in own if token.index != self._columns.silence_label] or own
            words.append(SpokenWord(self._words[index], voiced[0].start, min(voiced[-1].end, frames)))
            spelled += own
        return spelled, words

    def _trimmed(self, tokens: Sequence[Token], frames: int) -> List[Token]:
        """Without the closing frame, and `|` once between words."""
        kept: List[Token] = []
        for token in tokens:
            silent = token.index == self._columns.silence_label
            if token.start >= frames or (silent and (not kept or kept[-1].index == token.index)):
                continue
            kept.append(token._replace(end=min(token.end, frames)))
        return kept


class _Columns:
    """The labels that may be decoded, as columns of flashlight's input; column 0 is the blank.

    indices: the label of each column. silence: the column of `|`, or one more that is never chosen. silence_label: the
    index of `|`, None without. closing_frames: 1 where a frame that is `|` or blank for certain is put at the end.
    """

    blank = 0

    def __init__(self, labels: Labels):
        excluded = {labels.blank, *labels.never}
        kept = [
            index
            for index, symbol in enumerate(labels.symbols)
            if index not in excluded and symbol not in ("<s>", "<unk>")
        ]
        if not kept:
            raise ValueError(f"found no label to decode among {list(labels.symbols)}")
        self.labels = labels
        self.indices = [labels.blank, *kept]
        self._column = {index: column for column, index in enumerate(self.indices)}
        ends_words = labels.kind == "letter"
        self.silence_label = labels.symbols.index(_WORD_END) if ends_words else None
        self.silence = self._column[self.silence_label] if ends_words else len(self.indices)
        self.width = len(self.indices) + (not ends_words)
        self.closing_frames = int(ends_words)

    def of(self, spelling: Spelling) -> List[int]:
        """The columns of a spelling."""
        return [self._column[index] for index in spelling]

    def emissions(self, log_probs: Union[np.ndarray, Tensor]) -> np.ndarray:
        """(frames + closing_frames, width) float32, contiguous, of (frames, labels)."""
        if isinstance(log_probs, Tensor):
            log_probs = log_probs.detach().to("cpu", torch.float32).numpy()
        log_probs = np.asarray(log_probs)
        if log_probs.ndim != 2 or log_probs.shape[1] != len(self.labels):
            raise ValueError(f"log_probs has shape {log_probs.shape}; expected (frames, {len(self.labels)})")
        if np.isnan(log_probs).any() or (log_probs == np.inf).any():
            raise ValueError("log_probs has NaN or infinite values: the model, or its input, is broken")
        emissions = np.full((len(log_probs) + self.closing_frames, self.width), _NO_SILENCE, dtype=np.float32)
        emissions[:, : len(self.indices)] = _IMPOSSIBLE
        np.maximum(log_probs[:, self.indices], _IMPOSSIBLE, out=emissions[: len(log_probs), : len(self.indices)])
        if self.closing_frames:
            emissions[-1, [self.blank, self.silence]] = 0.0
        return emissions

    def tokens(self, path: Sequence[int]) -> List[Token]:
        """The labels of an alignment, a column a frame: repetitions merged, blanks left out."""
        tokens, start = [], 0
        for frame in range(1, len(path) + 1):
            if frame == len(path) or path[frame] != path[start]:
                if path[start] != self.blank and path[start] < len(self.indices):
                    tokens.append(Token(self.indices[path[start]], start, frame))
                start = frame
        return tokens


def _as_spelled(tokens: List[Token], spellings: Sequence[Spelling]) -> List[Token]:
    """Takes back what `held_endings` allowed: the last label said twice for one, or as one run for two."""
    found = tuple(token.index for token in tokens)
    if found in spellings:
        return tokens
    if found[:-1] in spellings:
        first, second = tokens[-2:]
        return [*tokens[:-2], first._replace(end=second.end)]
    last = tokens[-1]
    middle = max(last.start, last.end - 1)
    return [*tokens[:-1], last._replace(end=middle), last._replace(start=middle)]


def require_flashlight() -> None:
    """Raises ValueError that says what to install, unless flashlight's decoder and its KenLM can be imported."""
    try:
        import flashlight.lib.text.decoder.kenlm  # noqa: F401
    except ImportError as error:
        detail = "" if isinstance(error, ModuleNotFoundError) else f" ({' '.join(str(error).split())})"
        raise ValueError(
            "decoding with a language model needs the Python package flashlight-text: "
            f"`pip install flashlight-text`{detail}"
        ) from None


def _open_kenlm(path: PathLike, words: Sequence[str], ngram: NgramFile):
    """KenLM over `words`, a word's index its position; behind them stands <unk>."""
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    words = [*words, *([] if "<unk>" in words else ["<unk>"])]
    if ngram.binary:
        _try_binary(path, words)
    dictionary = Dictionary()
    for index, word in enumerate(words):
        dictionary.add_entry(word, index)
    try:
        return KenLM(str(path), dictionary)
    except (RuntimeError, UnicodeDecodeError, MemoryError) as error:
        raise ValueError(f"{path}: KenLM cannot load it: {_reason(error)}") from None


# Loads a binary file and asks it for words after words, chosen at random.
_TRIAL = """
import random, sys
from flashlight.lib.text.decoder.kenlm import KenLM
from flashlight.lib.text.dictionary import Dictionary
words = sys.stdin.buffer.read().decode("utf-8").split("\\n")
dictionary = Dictionary()
for index, word in enumerate(words):
    dictionary.add_entry(word, index)
try:
    lm = KenLM(sys.argv[1], dictionary)
except Exception as error:
    print(error)
    sys.exit(3)
draw = random.Random(0)
for index in draw.sample(range(len(words)), min(len(words), 5000)):
    state, _ = lm.score(lm.start(True), index)
    lm.finish(state)
for _ in range(2000):
    state = lm.start(False)
    for _ in range(8):
        state, _ = lm.score(state, draw.randrange(len(words)))
    lm.finish(state)
"""


def _try_binary(path: PathLike, words: Sequence[str]) -> None:
    """Raises ValueError where KenLM cannot use a binary file, tried in a process of its own.

    KenLM follows the addresses in such a file without looking: one that is damaged ends the process, or never ends.
    """
    seconds = 30 + Path(path).stat().st_size / 1e7
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    remedy = "build it again from the ARPA file with KenLM's build_binary"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRIAL, str(path)],
            input="\n".join(words).encode("utf-8"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{path}: KenLM did not get done with it in {seconds:.0f} s: it is damaged; {remedy}"
        ) from None
    if done.returncode == 3:
        raise ValueError(f"{path}: KenLM cannot load it: {_reason(done.stdout.decode('utf-8', 'replace'))}; {remedy}")
    if done.returncode != 0:
        raise ValueError(f"{path}: KenLM crashed on it (exit code {done.returncode}): it is damaged; {remedy}")


def _reason(error: Any) -> str:
    """KenLM's message on one line, without the place in its source."""
    return " ".join(str(error).split()).split("threw ")[-1]


def _unknown_words(words: Sequence[str], ngram: NgramFile, lm: Any, all_words: Sequence[str]) -> List[str]:
    """Those of `words` that the n-gram lacks; all of one score with <unk>, where the file does not tell its words."""
    if ngram.words is not None:
        known = {*ngram.words, "<unk>"}
        return [word for word in words if word not in known]
    nothing = lm.start(True)
    position = {word: index for index, word in enumerate(all_words)}
    unknown = lm.score(nothing, position.get("<unk>", len(all_words)))[1]
    return [word for word in words if lm.score(nothing, position[word])[1] == unknown]
