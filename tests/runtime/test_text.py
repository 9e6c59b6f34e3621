"""What labels spell, against fairseq's own post-processing."""

import random

import pytest
from fairseq.data import Dictionary
from fairseq.data.data_utils import post_process

from fairseq_w2v2_light.runtime.incremental import Token
from fairseq_w2v2_light.runtime.text import Labels, Word

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
LETTERS = SPECIAL + ["|", "E", "T", "A", "'"]
PIECES = SPECIAL + ["\u2581", "\u2581NEW", "\u2581YORK", "S", "\u2581A\u2581B"]
WORDS = SPECIAL + ["one", "two"]


def spelled_by_infer(symbols, indices, how):
    dictionary = Dictionary()
    for symbol in symbols[len(SPECIAL) :]:
        dictionary.add_symbol(symbol)
    assert dictionary.symbols == symbols
    return post_process(dictionary.string(indices), how)


def tokens_of(*indices):
    """Token i at frames [10 i, 10 i + 3)."""
    return [Token(index, 10 * i, 10 * i + 3) for i, index in enumerate(indices)]


@pytest.mark.parametrize(
    "symbols, kind, how",
    [(LETTERS, "letter", "letter"), (PIECES, "sentencepiece", "sentencepiece"), (WORDS, "word", "none")],
)
def test_any_labels_spell_what_infer_prints(symbols, kind, how):
    labels = Labels(symbols)
    assert labels.kind == kind
    rng = random.Random(0)
    for length in range(30):
        indices = [rng.randrange(len(symbols)) for _ in range(length)]
        assert labels.text(indices) == spelled_by_infer(symbols, indices, how)


@pytest.mark.parametrize("symbols", [LETTERS, PIECES, WORDS])
def test_words_are_those_of_the_text(symbols):
    labels, rng = Labels(symbols), random.Random(1)
    for length in range(30):
        tokens = tokens_of(*(rng.randrange(len(symbols)) for _ in range(length)))
        text = labels.text(token.index for token in tokens)
        assert [word.text for word in labels.words(tokens, 0.02)] == text.split()


def test_a_word_of_letters_lasts_from_its_first_to_its_last_letter():
    # | A T | | E
    words = Labels(LETTERS).words(tokens_of(4, 7, 6, 4, 4, 5), 0.02)
    assert words == [Word("AT", 10 * 0.02, 23 * 0.02), Word("E", 50 * 0.02, 53 * 0.02)]


def test_a_lone_boundary_piece_is_no_part_of_the_word_it_begins():
    words = Labels(PIECES).words(tokens_of(5, 7, 4, 7), 1.0)
    assert words == [Word("NEWS", 0.0, 13.0), Word("S", 30.0, 33.0)]


def test_a_piece_may_hold_two_words():
    assert Labels(PIECES).words(tokens_of(8, 7), 1.0) == [Word("A", 0.0, 3.0), Word("BS", 0.0, 13.0)]


def test_each_other_symbol_is_a_word():
    assert Labels(WORDS).words(tokens_of(5, 4), 1.0) == [Word("two", 0.0, 3.0), Word("one", 10.0, 13.0)]


@pytest.mark.parametrize("symbols", [LETTERS, PIECES, WORDS])
def test_whole_words_can_be_spelled_as_they_come(symbols):
    labels, rng = Labels(symbols), random.Random(2)
    for _ in range(20):
        tokens, words, rest = tokens_of(*(rng.randrange(4, len(symbols)) for _ in range(40))), [], []
        for token in tokens:
            rest.append(token)
            whole = labels.whole_words(rest)
            words += labels.words(rest[:whole], 1.0)
            rest = rest[whole:]
        assert words + labels.words(rest, 1.0) == labels.words(tokens, 1.0)


@pytest.mark.parametrize(
    "symbols, indices, whole",
    [
        (LETTERS, (5, 6, 4, 7), 3),
        (LETTERS, (5, 6), 0),
        (PIECES, (5, 7, 6, 7), 2),
        (PIECES, (5, 7), 0),
        (WORDS, (4, 5), 2),
    ],
)
def test_whole_words_are_all_but_a_last_one_that_may_go_on(symbols, indices, whole):
    assert Labels(symbols).whole_words(tokens_of(*indices)) == whole


def test_unknown_is_spelled_as_it_stands():
    assert Labels(LETTERS).text([7, 3, 4, 5]) == "A<unk> E"


def test_pad_and_end_are_never_decoded():
    assert Labels(LETTERS).never == (1, 2)
    assert Labels(["<pad>", "<s>", "</s>", "|", "a"], blank=0).never == (2,)


def test_word_boundaries_are_silent():
    assert Labels(LETTERS).silent == (4,)
    assert Labels(PIECES).silent == (4,)
    assert Labels(WORDS).silent == ()


def test_an_index_of_no_symbol_is_named():
    with pytest.raises(ValueError, match="label 9: there are 9 symbols"):
        Labels(LETTERS).text([9])
    with pytest.raises(ValueError, match="label -1"):
        Labels(LETTERS).words([Token(-1, 0, 1)], 0.02)


def test_a_blank_that_is_no_symbol_is_named():
    with pytest.raises(ValueError, match="blank is 9; expected an index below 9"):
        Labels(LETTERS, blank=9)
