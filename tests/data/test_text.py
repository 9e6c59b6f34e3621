import pytest

from fairseq_w2v2_light.data.text import (
    SentencePieces,
    dictionary_text,
    letters,
    normalise_text,
    reserved_symbol,
    train_sentencepiece,
)

TEXTS = ["THE CAT SAT", "THE DOG SAT", "A CAT RAN", "THE DOG RAN ON THE MAT"] * 5


@pytest.mark.parametrize(
    "text, how, expected",
    [
        ("  It’s half-past\ttwo. ", "upper", "IT'S HALF PAST TWO"),
        ("Ça va? «Oui»", "upper", "ÇA VA OUI"),
        ("Straße 9", "lower", "straße 9"),
        ("rock ' roll", "upper", "ROCK ROLL"),
        ("A|B", "upper", "A B"),
        ("Keep, this!  As is", "none", "Keep, this! As is"),
        ("... !", "upper", ""),
        ("e\u0301te\u0301", "lower", "été"),
    ],
)
def test_normalisation(text, how, expected):
    assert normalise_text(text, how) == expected


def test_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="normalisation 'title': expected one of upper, lower, none"):
        normalise_text("a", "title")


def test_letters_end_every_word_with_a_boundary():
    assert letters("SO I") == "S O | I |"


def test_reserved_symbols_are_found():
    assert (reserved_symbol("A|B"), reserved_symbol("AB")) == ("|", "")


def test_dictionary_is_sorted_by_count_and_stable():
    assert dictionary_text(["B A |", "C A |"], ["Z", "A"]) == "A 2\n| 2\nB 1\nC 1\nZ 0\n"


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_sentencepieces_spell_the_text(model_type):
    pieces = SentencePieces(train_sentencepiece(TEXTS, 18, model_type))
    encoded = pieces.encode("THE CAT RAN")
    assert set(encoded.split()) <= set(pieces.symbols())
    assert encoded.replace(" ", "").replace("\u2581", " ").strip() == "THE CAT RAN"
    assert not {"<s>", "</s>", "<unk>", "<pad>"} & set(pieces.symbols())


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_vocabulary_too_large_for_the_text_is_explained(model_type):
    with pytest.raises(ValueError, match=r"5000: too large for the training text \(20 lines, 75 words\); choose .*\d+"):
        train_sentencepiece(TEXTS, 5000, model_type)


def test_a_vocabulary_too_small_for_the_characters_is_explained():
    with pytest.raises(ValueError, match=r"--vocab-size 5: .* 12 different characters; expected at least 16"):
        train_sentencepiece(TEXTS, 5)
