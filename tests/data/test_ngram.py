"""n-grams of small corpora: probabilities that sum to one, ARPA files that KenLM reads to the same scores."""

import itertools
import math
import random

import pytest

from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.data.ngram import SMOOTHINGS, estimate, read_sentences
from fairseq_w2v2_light.runtime.arpa import check_ngram_file

CORPUS = ["a b a", "b", "a b b c", "c a", "a b a", "d"]
SENTENCES = [line.split() for line in CORPUS]


def random_sentences(count=60, words="abcdef", longest=7, seed=0):
    draw = random.Random(seed)
    return [[draw.choice(words) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("order", (1, 2, 3, 4, 5))
def test_the_probabilities_after_any_history_sum_to_one(order, smoothing):
    for sentences in (SENTENCES, random_sentences()):
        ngram = estimate(sentences, order, vocabulary=["never"], smoothing=smoothing)
        following = [*ngram.vocabulary, "</s>", "<unk>"]
        assert "never" in following
        histories = [
            (),
            ("<s>",),
            ("<s>", "a"),
            ("a", "b"),
            ("never",),
            ("<unk>", "b"),
            ("b", "a", "b"),
            ("d", "d", "d"),
        ]
        histories += [words for table in ngram.probabilities for words in table if words[-1] != "</s>"]
        for history in histories:
            assert sum(10 ** ngram.log10(word, history) for word in following) == pytest.approx(1, abs=1e-9), history


def test_witten_bell_by_hand():
    ngram = estimate([["a", "a"], ["b"]], 2)
    # counts: a 2, b 1, </s> 2; T = 3; four outcomes with <unk>
    unigram_a = (2 + 3 / 4) / (5 + 3)
    assert 10 ** ngram.log10("a") == pytest.approx(unigram_a)
    assert 10 ** ngram.log10("<unk>") == pytest.approx(3 / 4 / 8)
    # after a: a 1, </s> 1; T = 2
    assert 10 ** ngram.log10("a", ["a"]) == pytest.approx((1 + 2 * unigram_a) / 4)
    assert 10 ** ngram.log10("b", ["a"]) == pytest.approx(2 / 4 * (1 + 3 / 4) / 8)
    assert 10 ** ngram.log10("other", ["a"]) == pytest.approx(2 / 4 * 3 / 4 / 8)


def test_kneser_ney_by_hand():
    ngram = estimate([["a", "a", "a"], ["b"]], 2, smoothing="kneser-ney")
    # bigrams: <s>a 1, aa 2, a</s> 1, <s>b 1, b</s> 1: n1 = 4, n2 = 1, D = 4/6
    # words before a: <s>, a; b: <s>; </s>: a, b. n1 = 1, n2 = 2: D = 1/5; C = 5, T = 3; four outcomes with <unk>
    unigram_a = (2 - 1 / 5) / 5 + (1 / 5 * 3 / 5) / 4
    assert 10 ** ngram.log10("a") == pytest.approx(unigram_a)
    assert 10 ** ngram.log10("a", ["a"]) == pytest.approx((2 - 2 / 3) / 3 + (2 / 3 * 2 / 3) * unigram_a)


def test_a_seen_sentence_is_likelier_and_perplexity_is_per_event():
    ngram = estimate(SENTENCES, 3)
    assert ngram.score(["a", "b", "a"]) > ngram.score(["b", "a", "a"])
    expected = 10 ** (-(ngram.score(["a"]) + ngram.score(["c", "a"])) / 5)
    assert ngram.perplexity([["a"], ["c", "a"]]) == pytest.approx(expected)
    assert math.isnan(ngram.perplexity([]))


def test_sentences_too_short_for_the_order():
    assert estimate([["a"], ["b"]], 5).order == 3
    assert estimate([[]], 3).order == 2


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_kenlm_gives_the_same_scores(tmp_path, smoothing):
    kenlm = pytest.importorskip("flashlight.lib.text.decoder.kenlm", reason="needs KenLM: pip install flashlight-text")
    from flashlight.lib.text.dictionary import Dictionary

    for order in (1, 2, 3, 5):
        ngram = estimate(random_sentences(seed=order), order, smoothing=smoothing)
        ngram.save(tmp_path / "lm.arpa")
        words = [*ngram.vocabulary, "other"]
        dictionary = Dictionary()
        for index, word in enumerate(words):
            dictionary.add_entry(word, index)
        lm = kenlm.KenLM(str(tmp_path / "lm.arpa"), dictionary)
        for sentence in itertools.chain([(), (6,)], itertools.product(range(7), repeat=3), [(0, 1, 2, 3, 4, 5, 0, 1)]):
            state, total = lm.start(False), 0.0
            for index in sentence:
                state, score = lm.score(state, index)
                total += score
            total += lm.finish(state)[1]
            assert total == pytest.approx(ngram.score([words[index] for index in sentence]), abs=2e-5)


def test_the_file_is_arpa(tmp_path):
    ngram = estimate(SENTENCES, 3)
    ngram.save(tmp_path / "lm.arpa")
    found = check_ngram_file(tmp_path / "lm.arpa")
    assert (found.order, found.words) == (3, ("a", "b", "c", "d"))
    lines = (tmp_path / "lm.arpa").read_text().splitlines()
    assert lines[:2] == ["\\data\\", "ngram 1=7"] and lines[-1] == "\\end\\"


@pytest.mark.parametrize("word", ["<s>", "</s>", "<unk>", "two words", "", "nul\0"])
def test_words_that_no_ngram_can_have(word):
    with pytest.raises(ValueError, match="found the word"):
        estimate([["a"], [word]])


def test_bad_arguments():
    with pytest.raises(ValueError, match="order is 6"):
        estimate(SENTENCES, 6)
    with pytest.raises(ValueError, match="smoothing is 'katz'"):
        estimate(SENTENCES, 3, smoothing="katz")
    with pytest.raises(ValueError, match="found no sentence"):
        estimate([])


def test_text_files(tmp_path):
    path = tmp_path / "text"
    path.write_text("a b\n\n  b\tc \n", encoding="utf-8")
    assert read_sentences(path) == [("a", "b"), ("b", "c")]
    path.write_text("a b\nb <s> c\n")
    with pytest.raises(ValueError, match="text:2: found the word <s>"):
        read_sentences(path)
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="found no words"):
        read_sentences(path)
    path.write_bytes(b"a\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_sentences(path)
    with pytest.raises(FileNotFoundError, match="no such text"):
        read_sentences(tmp_path / "none")
    with pytest.raises(ValueError, match="found a folder"):
        read_sentences(tmp_path)


def test_the_verb(tmp_path, capsys):
    (tmp_path / "train").write_text("\n".join(CORPUS))
    (tmp_path / "more").write_text("e e\n")
    (tmp_path / "words").write_text("f g\n")
    (tmp_path / "test").write_text("a b z\n")
    texts, out = [str(tmp_path / "train"), str(tmp_path / "more")], str(tmp_path / "lm.arpa")
    options = ["--order", "2", "--words", str(tmp_path / "words"), "--test", str(tmp_path / "test")]
    assert main(["lm", *texts, out, *options]) == 0
    assert check_ngram_file(out).words == tuple("abcdefg")
    printed = capsys.readouterr().out
    assert "order 2, witten-bell: 10 1-grams" in printed and "1 of its 3 words unknown" in printed
    assert main(["lm", str(tmp_path / "none"), out]) == 2
    assert "no such text" in capsys.readouterr().err
