"""Error rates: counts, alignments and totals, against editdistance and enumeration."""

import functools
import random

import editdistance
import pytest

from fairseq_w2v2_light.runtime import scoring
from fairseq_w2v2_light.runtime.scoring import Counts, align, alignment_lines, count, fewest_errors, score, totals


@functools.lru_cache(maxsize=None)
def enumerated(reference, hypothesis):
    """(errors, hits) of every alignment's best: fewest errors, then most hits."""
    if not reference or not hypothesis:
        return len(reference) + len(hypothesis), 0
    errors, hits = enumerated(reference[:-1], hypothesis[:-1])
    same = reference[-1] == hypothesis[-1]
    ways = [(errors + (not same), hits + same)]
    for shorter in ((reference[:-1], hypothesis), (reference, hypothesis[:-1])):
        errors, hits = enumerated(*shorter)
        ways.append((errors + 1, hits))
    return min(ways, key=lambda way: (way[0], -way[1]))


def random_pairs(seed, pairs, longest, alphabet):
    chance = random.Random(seed)
    for _ in range(pairs):
        yield tuple([chance.choice(alphabet) for _ in range(chance.randrange(longest + 1))] for _ in range(2))


def counted(steps):
    kinds = [step.kind for step in steps]
    return Counts(*map(kinds.count, ("hit", "substitution", "deletion", "insertion")))


@pytest.mark.parametrize("table", [1 << 24, 4], ids=["at once", "divided"])
def test_counts_and_alignments_are_the_best_of_all(monkeypatch, table):
    monkeypatch.setattr(scoring, "_LARGEST_TABLE", table)
    for reference, hypothesis in random_pairs(0, 1000, 8, "abc"):
        counts = count(reference, hypothesis)
        assert (counts.errors, counts.hits) == enumerated(tuple(reference), tuple(hypothesis))
        assert counts.reference == len(reference)
        steps = align(reference, hypothesis)
        assert counted(steps) == counts
        assert [step.reference for step in steps if step.kind != "insertion"] == reference
        assert [step.hypothesis for step in steps if step.kind != "deletion"] == hypothesis
        assert all((step.kind == "hit") == (step.reference == step.hypothesis) for step in steps)


@pytest.mark.parametrize("longest, alphabet", [(40, "ab"), (150, "abcdefgh "), (90, ["ONE", "TWO", "\u00dc", "OH"])])
def test_errors_are_those_of_editdistance(longest, alphabet):
    for reference, hypothesis in random_pairs(1, 60, longest, alphabet):
        errors = editdistance.eval(reference, hypothesis)
        assert count(reference, hypothesis).errors == fewest_errors(reference, hypothesis) == errors


@pytest.mark.parametrize("errors", [0.02, 0.3])
def test_a_long_recording_is_counted_and_aligned(errors):
    chance = random.Random(2)
    words = [f"w{number}" for number in range(300)]
    reference = [chance.choice(words) for _ in range(3000)]
    hypothesis = []
    for word in reference:
        draw = chance.random()
        hypothesis += [] if draw < errors / 3 else [word, "and"] if draw < errors / 1.5 else [word]
        if errors / 1.5 < draw < errors:
            hypothesis[-1] = chance.choice(words)
    counts = count(reference, hypothesis)
    assert counts.errors == editdistance.eval(reference, hypothesis) > 0
    assert counts == counted(align(reference, hypothesis))


@pytest.mark.parametrize(
    "reference, hypothesis, counts",
    [
        ("", "", Counts()),
        ("", "a b", Counts(insertions=2)),
        ("a b", "", Counts(deletions=2)),
        ("a b c", "a b c", Counts(3)),
        ("a b c", "x y z", Counts(substitutions=3)),
        ("a b c d", "a c d d", Counts(3, deletions=1, insertions=1)),  # jiwer may say two substitutions
        ("a b", "b c", Counts(1, deletions=1, insertions=1)),
        ("a", "a a a a", Counts(1, insertions=3)),
    ],
)
def test_hits_are_preferred(reference, hypothesis, counts):
    assert count(reference.split(), hypothesis.split()) == counts


def test_rates_are_of_the_reference():
    assert Counts(3, 1, 0, 0).rate == 25 and Counts(1, 0, 0, 3).rate == 300 and Counts(5).rate == 0
    assert Counts(0, 0, 0, 2).rate is None
    assert Counts(1, 2, 3, 4) + Counts(5, 6, 7, 8) == Counts(6, 8, 10, 12)


def test_alignment_lines_are_those_of_sclite():
    lines = alignment_lines(align("THE CAT SAT ON MATS".split(), "THE BAT ON OH MATS".split()))
    assert lines == [
        "REF:  THE CAT SAT ON ** MATS",
        "HYP:  THE *** BAT ON OH MATS",
        "Eval:     D   S      I",
    ]
    assert alignment_lines([]) == ["REF:", "HYP:", "Eval:"]


def test_alignment_lines_of_wide_characters():
    wide = lambda text: 2 * len(text)  # noqa: E731
    assert alignment_lines(align(["日本", "語"], ["日", "語"]), wide) == [
        "REF:  日本 語",
        "HYP:  日   語",
        "Eval: S",
    ]


def test_a_score_collapses_white_space_only():
    scored = score("u1", " So\tit is\u00a0\u3000", "so  it\nis")
    assert (scored.name, scored.reference, scored.hypothesis) == ("u1", "So it is", "so it is")
    assert scored.words == Counts(2, substitutions=1)
    assert scored.characters == Counts(7, substitutions=1)  # the blanks count
    assert [step.kind for step in scored.alignment()] == ["substitution", "hit", "hit"]


def test_totals_weigh_utterances_by_length():
    result = totals([score("a", "one two three", "one two three"), score("b", "four", "for"), score("c", "", "oh")])
    assert (result.utterances, result.wrong) == (3, 2)
    assert result.words == Counts(3, substitutions=1, insertions=1) and result.words.rate == 50
    assert totals([]).words.rate is None
