"""Decoding with a language model: exactly the hypotheses and scores of an enumeration of every alignment."""

import base64
import itertools
import math
import os
import random
import subprocess
import sys
import zlib
from collections import defaultdict

import numpy as np
import pytest
import torch

from fairseq_w2v2_light.paths import user_dir
from fairseq_w2v2_light.runtime.arpa import check_ngram_file
from fairseq_w2v2_light.runtime.beam import Token
from fairseq_w2v2_light.runtime.lexicon import make_lexicon, read_lexicon
from fairseq_w2v2_light.runtime.lm import LanguageModelDecoder, Weights
from fairseq_w2v2_light.runtime.text import Labels

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
LETTERS = Labels([*SPECIAL, "|", "a", "b"])
PIECES = Labels([*SPECIAL, "\u2581a", "b", "\u2581b"])
WORD_ARPA = """\\data\\
ngram 1=7
ngram 2=6
ngram 3=1

\\1-grams:
-1.0\t<unk>\t0
-99\t<s>\t-0.3
-0.8\t</s>\t0
-0.5\ta\t-0.2
-0.6\tb\t-0.25
-0.9\tab\t-0.15
-1.3\tbb\t-0.1

\\2-grams:
-0.3\t<s> a\t-0.1
-0.4\ta b\t-0.05
-0.2\tb </s>\t0
-0.7\ta a\t0
-0.9\tb b\t0
-0.9\tab </s>\t0

\\3-grams:
-0.15\t<s> a b

\\end\\
"""
LABEL_ARPA = (
    WORD_ARPA.replace("\tab\t", "\t|\t")
    .replace("ab </s>", "| </s>")
    .replace("\tbb\t", "\t\u2581b\t")
    .replace("a b", "a |")
)
# WORD_ARPA's first five words without `ab` and `bb`, by KenLM's build_binary
BINARY = (
    "c-qU&O)OBz$yLZGDJihh*U!#KO-##7%}LQq&d=3P&QD2INXswEO)OC;OD!tS%+FIW<zhg9274f}pAks>2Lg}?BUFYNOdhaD7Gs6dY*3n!0TqDc3"
    "+fd2TDFyf<pi^{FJBTDXJ=->4Y+c?f2=Kjkj(^Sn`>!Js{PabiUmVe!+sFKz;Nu)teG?Sojv1Y58*S|1KIm#&6EW48}`9eb9`dTXxV5ieD=&4JD"
    "~jD#-g_$YO8BnA$rg3)oe4ru;);-0!S~&oXJO)nG4?UpJHrm47SI7cfI#C{#)8<X=z}-*m<wd>uRzjV0;D=f!ddLzCX4T^MLN$hb(SWnwM?IU{egl"
    "`amL)A&CJ1Y?f<_"
)
WIDE = dict(beam=5000, beam_threshold=1000.0)
NEEDS_FLASHLIGHT = "needs the decoder: pip install flashlight-text"


@pytest.fixture
def flashlight():
    return pytest.importorskip("flashlight.lib.text.decoder", reason=NEEDS_FLASHLIGHT)


@pytest.fixture
def arpa(tmp_path, flashlight):
    path = tmp_path / "words.arpa"
    path.write_text(WORD_ARPA, encoding="utf-8")
    return path


@pytest.fixture
def label_arpa(tmp_path, flashlight):
    path = tmp_path / "labels.arpa"
    path.write_text(LABEL_ARPA, encoding="utf-8")
    return path


def random_log_probs(frames, labels, seed=0, sharpness=2.0):
    values = np.random.default_rng(seed).normal(size=(frames, len(labels))) * sharpness
    return (values - np.log(np.exp(values).sum(-1, keepdims=True))).astype(np.float32)


# ---- a reference: every alignment, one by one


class Backoff:
    """log10 probabilities of an ARPA text, by the definition of back-off."""

    def __init__(self, text):
        self.values = {}
        for line in text.splitlines():
            fields = line.split("\t")
            if len(fields) > 1:
                self.values[tuple(fields[1].split())] = float(fields[0]), float(fields[2]) if len(fields) > 2 else 0.0

    def word(self, history, word):
        word = word if (word,) in self.values else "<unk>"
        history = history[-2:]
        if (*history, word) in self.values:
            return self.values[(*history, word)][0]
        return self.values.get(history, (0, 0.0))[1] + self.word(history[1:], word)

    def sentence(self, words):
        padded = ("<s>", *words, "</s>")
        return sum(self.word(padded[:end], padded[end]) for end in range(1, len(padded)))


def collapsed(path):
    """Runs of a path of symbols, blanks left out."""
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != "<s>")


def word_sequences(runs, lexicon):
    """All sequences of words whose spellings, one after the other, are runs of symbols: (symbol, frames).

    The last symbol of a word may be said twice, the second time for one frame: what flashlight takes for a longer one.
    """
    if not runs:
        yield ()
    symbols = tuple(symbol for symbol, _ in runs)
    for word, spellings in lexicon.items():
        for spelling in spellings:
            size = len(spelling)
            if symbols[:size] == spelling:
                for rest in word_sequences(runs[size:], lexicon):
                    yield (word, *rest)
            if symbols[: size + 1] == spelling + spelling[-1:] and runs[size][1] == 1:
                for rest in word_sequences(runs[size + 1 :], lexicon):
                    yield (word, *rest)


def every_path(log_probs, labels):
    """Each path of symbols that may be decoded, with its log-probability."""
    symbols = [(index, symbol) for index, symbol in enumerate(labels.symbols) if symbol not in SPECIAL[1:]]
    for path in itertools.product(symbols, repeat=len(log_probs)):
        yield tuple(symbol for _, symbol in path), sum(float(log_probs[t, i]) for t, (i, _) in enumerate(path))


def closings(path):
    """A path of letters with a last frame in which the blank and `|` are certain."""
    return [(*path, "<s>"), (*path, "|")]


def enumerate_letters(log_probs, lexicon, text, weights):
    """The best score of every sequence of words; lexicon: words with the letters that spell them."""
    best = defaultdict(lambda: -math.inf)
    lm = Backoff(text)
    for path, log_prob in every_path(log_probs, LETTERS):
        for closed in closings(path):
            symbols = "".join(collapsed(closed))
            if symbols and not symbols.endswith("|"):
                continue
            spoken = [word for word in symbols.split("|") if word]
            for words in itertools.product(*([w for w, s in lexicon.items() if s == said] for said in spoken)):
                score = log_prob + weights.lm_weight * lm.sentence(words) + weights.word_score * len(words)
                best[words] = max(best[words], score + weights.sil_score * closed.count("|"))
    return best


def enumerate_pieces(log_probs, lexicon, text, weights):
    best = defaultdict(lambda: -math.inf)
    lm = Backoff(text)
    for path, log_prob in every_path(log_probs, PIECES):
        runs = [(symbol, len(list(run))) for symbol, run in itertools.groupby(path)]
        for words in word_sequences([run for run in runs if run[0] != "<s>"], lexicon):
            score = log_prob + weights.lm_weight * lm.sentence(words) + weights.word_score * len(words)
            best[words] = max(best[words], score)
    return best


def enumerate_labels(log_probs, labels, text, weights):
    """The best score of every labelling."""
    best = defaultdict(lambda: -math.inf)
    lm = Backoff(text)
    for path, log_prob in every_path(log_probs, labels):
        for closed in closings(path) if labels is LETTERS else [path]:
            # flashlight begins in silence: `|` in the first frame is none that the language model hears of
            heard = collapsed(("|", *closed))[1:] if closed[:1] == ("|",) else collapsed(closed)
            score = log_prob + weights.lm_weight * lm.sentence(heard) + weights.sil_score * closed.count("|")
            best[heard] = max(best[heard], score)
    return best


def assert_same(found, expected, count):
    """The `count` best of both are the same, with the same scores."""
    ordered = sorted(expected.items(), key=lambda item: -item[1])[:count]
    assert [words for words, _ in found[:count]] == [words for words, _ in ordered]
    assert [score for _, score in found[:count]] == pytest.approx([score for _, score in ordered], abs=2e-4)


@pytest.mark.parametrize("weights", [Weights(2.0, -1.0, 0.0), Weights(0.7, 1.5, -0.4), Weights(3.0, 0.0, 0.6)])
@pytest.mark.parametrize("frames", (1, 2, 5))
def test_letters_with_a_lexicon(arpa, frames, weights):
    lexicon = {"a": "a", "b": "b", "ab": "ab", "bb": "bb"}
    for seed in range(3):
        log_probs = random_log_probs(frames, LETTERS, seed)
        decoder = LanguageModelDecoder(
            LETTERS, arpa, None, weights.lm_weight, weights.word_score, weights.sil_score, **WIDE
        )
        hypotheses = decoder.nbest(log_probs, 1000)
        found = [(tuple(word.text for word in hypothesis.words), hypothesis.score) for hypothesis in hypotheses]
        expected = enumerate_letters(log_probs, lexicon, WORD_ARPA, weights)
        assert len(found) == len(expected)
        assert_same(found, expected, len(found))
        for hypothesis in hypotheses:
            words = [word.text for word in hypothesis.words]
            assert hypothesis.lm_score == pytest.approx(Backoff(WORD_ARPA).sentence(words), abs=1e-5)
            # words of letters are what their labels spell
            assert LETTERS.text(token.index for token in hypothesis.tokens) == " ".join(words) == hypothesis.text


def test_words_of_one_spelling_and_words_that_the_ngram_lacks(arpa, tmp_path):
    (tmp_path / "lexicon").write_text("a a\nA a |\nb b\nxyz a b |\n")
    lexicon = {"a": "a", "A": "a", "b": "b", "xyz": "ab"}
    log_probs, weights = random_log_probs(4, LETTERS, 7), Weights(1.0, 0.5, 0.0)
    decoder = LanguageModelDecoder(LETTERS, arpa, tmp_path / "lexicon", **WIDE).with_weights(weights)
    found = [(tuple(w.text for w in hypothesis.words), hypothesis.score) for hypothesis in decoder.nbest(log_probs, 99)]
    expected = enumerate_letters(log_probs, lexicon, WORD_ARPA, weights)
    assert dict(found) == pytest.approx(dict(expected), abs=2e-4)


@pytest.mark.parametrize("frames", (1, 3, 5))
def test_sentencepieces_with_a_lexicon(arpa, frames):
    pieces = {"a": [("\u2581a",)], "b": [("\u2581b",)], "ab": [("\u2581a", "b")]}
    (arpa.parent / "words").write_text("a\nb\nab\n")
    weights = Weights(1.5, 0.5, 0.0)
    decoder = LanguageModelDecoder(PIECES, arpa, arpa.parent / "words", **WIDE).with_weights(weights)
    for seed in range(3):
        log_probs = random_log_probs(frames, PIECES, seed)
        hypotheses = decoder.nbest(log_probs, 1000)
        found = [(tuple(word.text for word in hypothesis.words), hypothesis.score) for hypothesis in hypotheses]
        expected = enumerate_pieces(log_probs, pieces, WORD_ARPA, weights)
        assert len(found) == len(expected)
        assert_same(found, expected, 20)
        for hypothesis in hypotheses:
            assert PIECES.text(token.index for token in hypothesis.tokens) == hypothesis.text


@pytest.mark.parametrize("labels", (LETTERS, PIECES), ids=("letters", "sentencepieces"))
def test_without_a_lexicon(label_arpa, labels):
    for seed, weights in enumerate([Weights(2.0, -1.0, 0.0), Weights(0.8, -1.0, 0.5), Weights(1.0, -1.0, -0.5)]):
        log_probs = random_log_probs(5, labels, seed)
        decoder = LanguageModelDecoder(labels, label_arpa, lexicon_free=True, **WIDE).with_weights(weights)
        expected = defaultdict(lambda: -math.inf)
        for labelling, score in enumerate_labels(log_probs, labels, LABEL_ARPA, weights).items():
            words = tuple(labels.text(labels.symbols.index(symbol) for symbol in labelling).split())
            expected[words] = max(expected[words], score)
        found = [
            (tuple(word.text for word in hypothesis.words), hypothesis.score)
            for hypothesis in decoder.nbest(log_probs, 1000)
        ]
        assert len(found) == len(expected)
        assert_same(found, expected, 20)


# ---- labels, frames, words


def certain(labels, *symbols, floor=1e-4):
    """Log-probabilities in which a symbol a frame is nearly certain."""
    probabilities = np.full((len(symbols), len(labels)), floor)
    for frame, symbol in enumerate(symbols):
        probabilities[frame, labels.symbols.index(symbol)] = 1 - floor * (len(labels) - 1)
    return np.log(probabilities)


def test_tokens_have_the_frames_of_the_alignment(arpa):
    decoder = LanguageModelDecoder(LETTERS, arpa)
    frames = certain(LETTERS, "<s>", "|", "<s>", "a", "a", "<s>", "b", "|", "|", "<s>", "|", "b", "<s>", "b")
    a, b, end = (LETTERS.symbols.index(symbol) for symbol in "ab|")
    (best,) = decoder.nbest(frames, 1)
    assert best.text == "ab bb" and decoder.decode(frames) == best.tokens
    # no leading `|`, one between words, none at the end, where the audio stops within the word
    assert best.tokens == (
        Token(a, 3, 5), Token(b, 6, 7), Token(end, 7, 9), Token(b, 11, 12), Token(b, 13, 14),
    )  # fmt: skip
    assert [tuple(word) for word in best.words] == [("ab", 3, 7), ("bb", 11, 14)]
    assert [(word.text, word.start, word.end) for word in decoder.words(frames, 0.02)] == [
        ("ab", 3 * 0.02, 7 * 0.02),
        ("bb", 11 * 0.02, 14 * 0.02),
    ]


def test_a_repeated_letter_needs_a_blank_between(arpa):
    decoder = LanguageModelDecoder(LETTERS, arpa, lm_weight=0.0, word_score=0.0)
    assert decoder.best(certain(LETTERS, "b", "b", "|")).text == "b"
    assert decoder.best(certain(LETTERS, "b", "<s>", "b", "|")).text == "bb"


def test_the_last_piece_of_a_word_may_last(arpa, tmp_path):
    (tmp_path / "words").write_text("a\nab\nabb \u2581a b b\n")
    decoder = LanguageModelDecoder(PIECES, arpa, tmp_path / "words", lm_weight=0.0, word_score=0.0)
    first, b = PIECES.symbols.index("\u2581a"), PIECES.symbols.index("b")
    best = decoder.best(certain(PIECES, "\u2581a", "\u2581a", "<s>", "b", "b", "b", "<s>", "\u2581a", "\u2581a"))
    assert best.tokens[:1] == (Token(first, 0, 2),) and best.tokens[-1:] == (Token(first, 7, 9),)
    assert best.text in ("ab a", "abb a")  # flashlight does not tell them apart
    best = decoder.best(certain(PIECES, "\u2581a", "b", "<s>", "b"))
    assert best.tokens[-1].end == 4 and {token.index for token in best.tokens[1:]} == {b}
    for hypothesis in decoder.nbest(certain(PIECES, "\u2581a", "b", "b"), 5):
        assert PIECES.text(token.index for token in hypothesis.tokens) == hypothesis.text


def test_special_symbols_are_never_decoded(arpa, label_arpa):
    for symbol in SPECIAL[1:]:
        frames = certain(LETTERS, symbol, "a", symbol, "|", symbol)
        for decoder in (
            LanguageModelDecoder(LETTERS, arpa),
            LanguageModelDecoder(LETTERS, label_arpa, lexicon_free=True),
        ):
            indices = {token.index for token in decoder.decode(frames)}
            assert indices <= {LETTERS.symbols.index("a"), LETTERS.symbols.index("b"), LETTERS.symbols.index("|")}


def test_frames_of_every_number_and_kind(arpa, label_arpa):
    for decoder in (LanguageModelDecoder(LETTERS, arpa), LanguageModelDecoder(LETTERS, label_arpa, lexicon_free=True)):
        log_probs = random_log_probs(9, LETTERS)
        assert decoder.decode(log_probs[:0]) == ()
        (empty,) = decoder.nbest(log_probs[:0], 3)
        assert empty.words == () and empty.lm_score == pytest.approx(-0.3 - 0.8) and empty.score == 2 * empty.lm_score
        assert len(decoder.decode(log_probs[:1])) <= 1
        expected = decoder.decode(log_probs)
        assert decoder.decode(torch.from_numpy(log_probs)) == expected
        assert decoder.decode(log_probs.astype(np.float64)[:, ::-1][:, ::-1]) == expected
        assert decoder.decode(torch.from_numpy(log_probs).requires_grad_()) == expected
        assert isinstance(decoder.decode(torch.from_numpy(log_probs).bfloat16()), tuple)
        silence = np.full((5, len(LETTERS)), -np.inf)
        assert decoder.decode(silence) is not None
        silence[:, 0] = 0
        assert decoder.decode(silence) == ()
        for bad in (np.nan, np.inf):
            with pytest.raises(ValueError, match="NaN or infinite"):
                decoder.decode(np.where(np.arange(7) == 5, bad, log_probs))
        with pytest.raises(ValueError, match=r"shape \(9, 6\); expected \(frames, 7\)"):
            decoder.decode(log_probs[:, :6])


def test_a_long_utterance(arpa):
    log_probs = random_log_probs(3000, LETTERS, sharpness=4.0)
    tokens = LanguageModelDecoder(LETTERS, arpa).decode(log_probs)
    assert len(tokens) > 100 and all(one.end <= other.start for one, other in zip(tokens, tokens[1:]))
    assert tokens[-1].end <= 3000


def test_other_weights_share_the_model(arpa):
    decoder = LanguageModelDecoder(LETTERS, arpa)
    other = decoder.with_weights(Weights(0.0, 5.0, 0.0))
    log_probs = random_log_probs(30, LETTERS)
    assert len(other.best(log_probs).words) > len(decoder.best(log_probs).words)
    assert decoder.weights == Weights() and other.weights.word_score == 5.0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(beam=0), "beam is 0"),
        (dict(beam_tokens=0), "beam_tokens is 0"),
        (dict(beam_threshold=0.0), "beam_threshold is 0.0"),
        (dict(lm_weight=float("nan")), "lm_weight is nan"),
        (dict(lexicon_free=True, lexicon_path="words"), "give one or the other"),
    ],
)
def test_bad_options(arpa, options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelDecoder(LETTERS, arpa, **options)
    with pytest.raises(ValueError, match="count is 0"):
        LanguageModelDecoder(LETTERS, arpa).nbest(random_log_probs(3, LETTERS), 0)


# ---- lexicons


def test_words_are_spelled_automatically():
    lexicon, left_out = make_lexicon(["ab", "BA", "a|b", "\u00fc"], LETTERS, "lm.arpa")
    assert lexicon == {"ab": [(5, 6, 4)], "BA": [(6, 5, 4)]} and left_out == ["a|b", "\u00fc"]
    labels = Labels([*SPECIAL, "\u2581", "\u2581th", "e", "\u2581the", "t", "h"])
    lexicon, _ = make_lexicon(["the"], labels, "lm.arpa")
    spelled = [tuple(labels.symbols[index] for index in spelling) for spelling in lexicon["the"]]
    assert set(spelled) == {("\u2581the",), ("\u2581th", "e"), ("\u2581", "t", "h", "e")} and spelled[0] == (
        "\u2581the",
    )
    assert make_lexicon(["x", "y"], Labels([*SPECIAL, "x"]), "lm.arpa") == ({"x": [(4,)]}, ["y"])
    with pytest.raises(
        ValueError, match=r"lm.arpa: none of its words .*word 'c' cannot be spelled .* no label has 'c'"
    ):
        make_lexicon(["c", "d"], LETTERS, "lm.arpa")


def test_lexicon_files(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("\ufeffab\ta b |\r\nab a b\n\nbee b |\nba\nbee\tb b |\n", encoding="utf-8")
    assert read_lexicon(path, LETTERS) == {"ab": [(5, 6, 4)], "bee": [(6, 4), (6, 6, 4)], "ba": [(6, 5, 4)]}


@pytest.mark.parametrize(
    "content, message",
    [
        ("a a |\nxy x y |\n", r"lexicon.txt:2: word 'xy' is spelled with 'x', .* model's labels: \| a b"),
        ("a a |\nxy\n", "lexicon.txt:2: word 'xy' cannot be spelled .* no label has 'x'"),
        ("a <pad> |\n", "lexicon.txt:1: word 'a' is spelled with '<pad>'"),
        ("a a | b |\n", "lexicon.txt:1: .* inside its spelling"),
        ("a |\n", "lexicon.txt:1: .* inside its spelling"),
        ("</s> a\n", "lexicon.txt:1: found </s>"),
        ("<unk>\n", "lexicon.txt:1: found <unk> without a spelling"),
        ("\n \n", "lexicon.txt: the lexicon is empty"),
        (b"\xff\n", "lexicon.txt: not a lexicon: it is no UTF-8 text"),
    ],
)
def test_bad_lexicons(tmp_path, content, message):
    path = tmp_path / "lexicon.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_lexicon(path, LETTERS)
    with pytest.raises(FileNotFoundError, match="none: no such lexicon"):
        read_lexicon(tmp_path / "none", LETTERS)
    with pytest.raises(ValueError, match="found a folder"):
        read_lexicon(tmp_path, LETTERS)


def test_a_lexicon_in_another_case_than_the_ngram(arpa, tmp_path):
    (tmp_path / "words").write_text("A a |\nAB a b |\n")
    with pytest.raises(ValueError, match=r"words.arpa: the n-gram knows none of the 2 words .* upper or lower case"):
        LanguageModelDecoder(LETTERS, arpa, tmp_path / "words")


def test_many_words_of_one_spelling(tmp_path, flashlight, caplog):
    words = [f"w{number}" for number in range(9)]
    (tmp_path / "words").write_text("".join(f"{word} a |\n" for word in words))
    unigrams = "".join(f"-{2 - number / 10}\t{word}\t0\n" for number, word in enumerate(words))
    (tmp_path / "lm.arpa").write_text(
        f"\\data\\\nngram 1=12\nngram 2=1\n\n\\1-grams:\n-9\t<unk>\t0\n-99\t<s>\t0\n-1\t</s>\t0\n{unigrams}\n"
        "\\2-grams:\n-1\t<s> </s>\n\n\\end\\\n"
    )
    decoder = LanguageModelDecoder(LETTERS, tmp_path / "lm.arpa", tmp_path / "words")
    assert "only the likeliest are decoded" in caplog.text
    found = {hypothesis.text for hypothesis in decoder.nbest(certain(LETTERS, "a", "|"), 20)}
    assert {f"w{number}" for number in range(3, 9)} <= found and "w0" not in found


# ---- n-gram files


def test_label_ngrams_that_do_not_fit(tmp_path, flashlight, label_arpa, arpa, caplog):
    with pytest.raises(ValueError, match="labels.arpa: the n-gram has none of the model's labels"):
        LanguageModelDecoder(Labels([*SPECIAL, "x", "y"]), label_arpa, lexicon_free=True)
    with pytest.raises(ValueError, match=r"words.arpa: the n-gram lacks the label '\|'"):
        LanguageModelDecoder(LETTERS, arpa, lexicon_free=True)
    LanguageModelDecoder(Labels([*SPECIAL, "|", "a", "z"]), label_arpa, lexicon_free=True)
    assert "lacks 1 of 3 labels: ['z']" in caplog.text
    with pytest.raises(ValueError, match="decode without a lexicon"):
        LanguageModelDecoder(Labels([*SPECIAL, "|", "x"]), arpa)


def cut(text, *without):
    return "\n".join(line for line in text.splitlines() if line not in without) + "\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"lm.arpa:0: the file ends here, expected \\data\\"),
        ("a b c\n", r"lm.arpa:1: not an n-gram file: found 'a b c'"),
        (WORD_ARPA.replace("1=7", "1=8"), r"lm.arpa:14: found the end of the section after 7 1-grams, expected 8"),
        (WORD_ARPA.replace("1=7", "1=6"), r"lm.arpa:13: found more than the 6 1-grams that the header counts"),
        (WORD_ARPA.replace("2=6", "2=999999999999"), r"lm.arpa:22: found the end of the section after 6 2-grams"),
        (WORD_ARPA.replace("ngram 2=6", "ngram 3=6"), r"lm.arpa:3: found 'ngram 3=6', expected ngram 2=COUNT"),
        (WORD_ARPA.replace("ngram 1=7", "ngram 1=x"), r"lm.arpa:2: found 'ngram 1=x', expected ngram 1=COUNT"),
        (WORD_ARPA.replace("-0.6\tb", "-0.6x\tb"), r"lm.arpa:11: found '-0.6x', expected a log10 probability"),
        (WORD_ARPA.replace("-0.6\tb", "0.6\tb"), r"lm.arpa:11: found '0.6', expected a log10 probability of 0 or less"),
        (WORD_ARPA.replace("-0.6\tb", "nan\tb"), r"lm.arpa:11: found 'nan'"),
        (WORD_ARPA.replace("-0.25", "inf"), r"lm.arpa:11: found 'inf', expected a finite back-off weight"),
        (WORD_ARPA.replace("a b\t-0.05", "a"), r"lm.arpa:17: .* expected log10 probability, 2 words"),
        (WORD_ARPA.replace("\\end\\", ""), r"the file ends here, expected \\end\\"),
        (WORD_ARPA.replace("\\2-grams:", "\\4-grams:"), r"lm.arpa:15: found '\\\\4-grams:', expected \\2-grams:"),
        (WORD_ARPA.replace("</s>\t0\n-0.5", "x\t0\n-0.5"), "its 1-grams lack </s>"),
        (WORD_ARPA.replace("-1.3\tbb", "-1.3\ta"), "a word stands twice"),
        (WORD_ARPA.replace("\tbb", "\tb\0b"), "a zero byte"),
        (
            WORD_ARPA[: WORD_ARPA.index("\\2-grams")].replace("ngram 2=6\nngram 3=1\n", "") + "\\end\\\n",
            "an n-gram of order 1",
        ),
        (WORD_ARPA.replace("ngram 3=1", "\n".join(f"ngram {n}=1" for n in range(3, 9))), "an n-gram of order 8"),
        (WORD_ARPA.replace("-0.7\ta a", "-0.7\tz z"), "KenLM cannot load it"),
        ("x" * 2_000_000, "a line is longer"),
    ],
)
def test_broken_arpa_files(tmp_path, flashlight, text, message):
    path = tmp_path / "lm.arpa"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        LanguageModelDecoder(LETTERS, path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_ngrams(tmp_path, flashlight):
    with pytest.raises(FileNotFoundError, match="none.arpa: no such language model"):
        LanguageModelDecoder(LETTERS, tmp_path / "none.arpa")
    with pytest.raises(ValueError, match="found a folder"):
        LanguageModelDecoder(LETTERS, tmp_path)
    (tmp_path / "lm.arpa").write_bytes(WORD_ARPA.encode().replace(b"\tbb", b"\tb\xff"))
    with pytest.raises(ValueError, match=r"lm.arpa:13: .* expected a word in UTF-8"):
        LanguageModelDecoder(LETTERS, tmp_path / "lm.arpa")
    (tmp_path / "lm.gz").write_bytes(b"\x1f\x8b\x08\0\0\0")
    with pytest.raises(ValueError, match="lm.gz: not a whole gzip file"):
        LanguageModelDecoder(LETTERS, tmp_path / "lm.gz")


def test_mutated_arpa_files_are_refused_or_decode(tmp_path, flashlight):
    draw, source, loaded = random.Random(0), WORD_ARPA.encode(), 0
    log_probs = random_log_probs(6, LETTERS)
    for _ in range(150):
        content = bytearray(source)
        for _ in range(draw.choice((1, 1, 3))):
            place = draw.randrange(len(content))
            kind = draw.randrange(4)
            if kind == 0:
                content[place] = draw.randrange(256)
            elif kind == 1:
                del content[place : place + draw.randrange(1, 20)]
            elif kind == 2:
                content[place:place] = bytes(draw.choice(b"0123456789-.\t\n \\") for _ in range(draw.randrange(1, 6)))
            else:
                content[place] = draw.choice(b"0123456789-\t\n ")
        (tmp_path / "lm.arpa").write_bytes(content)
        try:
            decoder = LanguageModelDecoder(LETTERS, tmp_path / "lm.arpa")
        except ValueError as error:
            assert "lm.arpa" in str(error)
        else:
            assert isinstance(decoder.decode(log_probs), tuple)
            loaded += 1
    assert 0 < loaded < 75


def binary_file(tmp_path):
    path = tmp_path / "lm.bin"
    path.write_bytes(zlib.decompress(base64.b85decode(BINARY)))
    return path


def test_a_binary_file(tmp_path, flashlight):
    path = binary_file(tmp_path)
    found = check_ngram_file(path)
    assert (found.order, found.binary, found.words) == (3, True, ("a", "b"))
    log_probs = random_log_probs(12, LETTERS)
    (tmp_path / "words").write_text("a\nb\n")
    (tmp_path / "lm.arpa").write_text(WORD_ARPA)
    expected = LanguageModelDecoder(LETTERS, tmp_path / "lm.arpa", tmp_path / "words").best(log_probs)
    for lexicon in (None, tmp_path / "words"):
        best = LanguageModelDecoder(LETTERS, path, lexicon).best(log_probs)
        assert best.words == expected.words and best.score == pytest.approx(expected.score, abs=1e-4)
    with pytest.raises(ValueError, match="knows none of the 1 words"):
        (tmp_path / "words").write_text("aa\n")
        LanguageModelDecoder(LETTERS, path, tmp_path / "words")


def test_broken_binary_files(tmp_path, flashlight):
    path = binary_file(tmp_path)
    content = path.read_bytes()
    (tmp_path / "words").write_text("a\nb\n")
    for damaged, message in [
        (content[:100], "cut off in its header"),
        (content.replace(b"version 5", b"version 4"), "of version '4', expected 5"),
        (content[:88] + b"\x09" + content[89:], "of order 9, expected 2 to 6"),
        (content[:108] + b"\xff" * 7 + content[115:], "a damaged header"),
        (content[:300], "lm.bin: KenLM"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            LanguageModelDecoder(LETTERS, path, tmp_path / "words")
    # a file that was built without its words
    path.write_bytes(content[: content.rindex(b"<unk>\0")])
    with pytest.raises(ValueError, match="does not tell its words; give a lexicon"):
        LanguageModelDecoder(LETTERS, path)


# ---- without other packages


def test_flashlight_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder.kenlm", None)
    (tmp_path / "lm.arpa").write_text(WORD_ARPA)
    with pytest.raises(ValueError, match="needs the Python package flashlight-text: `pip install flashlight-text`"):
        LanguageModelDecoder(LETTERS, tmp_path / "lm.arpa")


WITHOUT = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fairseq", "hydra", "omegaconf", "kenlm", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import numpy as np
from fairseq_w2v2_light.runtime.lm import LanguageModelDecoder
from fairseq_w2v2_light.runtime.text import Labels
decoder = LanguageModelDecoder(Labels(["<s>", "<pad>", "</s>", "<unk>", "|", "a", "b"]), sys.argv[1])
frames = np.log(np.eye(7)[[0, 5, 6, 4, 5]] * 0.99 + 0.001)
print(decoder.best(frames).text)
"""


def test_neither_fairseq_nor_the_package_kenlm_is_needed(arpa):
    env = {**os.environ, "PYTHONPATH": str(user_dir().parent)}
    command = [sys.executable, "-c", WITHOUT, str(arpa)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "ab a\n"
