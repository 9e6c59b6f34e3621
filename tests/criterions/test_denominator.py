"""The denominator graph: its probabilities, its file, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from fairseq_w2v2_light.criterions import denominator
from fairseq_w2v2_light.criterions.denominator import DenominatorGraph, estimate, perplexity

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
SYMBOLS = SPECIALS + ["a", "b"]
A, B = 4, 5


def close(values, expected):
    assert values.exp().flatten().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.fixture
def random_text():
    generator = np.random.default_rng(0)
    return [generator.integers(4, 9, size=length).tolist() for length in (0, 1, 2, 3, 5, 8, 13)]


FIVE = SPECIALS + list("abcde")


# Witten-Bell


def test_witten_bell_bigrams_by_hand():
    """Transcripts `a b` and `a`: p(a), p(b), p(</s>) = 3/8, 2/8, 3/8."""
    graph = estimate([[A, B], [A]], SYMBOLS)
    assert (graph.order, graph.labels, graph.blank) == (2, [A, B], 0)
    close(graph.log_start, [19 / 24, 1 / 12])
    close(graph.log_empty, [1 / 8])
    close(graph.log_transitions, [3 / 16, 3 / 8, 3 / 16, 1 / 8])
    close(graph.log_final, [7 / 16, 11 / 16])


def test_witten_bell_trigrams_by_hand():
    graph = estimate([[A, B], [A]], SYMBOLS, order=3)
    assert graph.order == 3
    close(graph.log_start, [19 / 24, 1 / 12])
    close(graph.log_transitions[0, 0], [2 * 3 / 16 / 4, (1 + 2 * 3 / 8) / 4])  # after <s> a
    close(graph.log_final[0, 0], [(1 + 2 * 7 / 16) / 4])
    close(graph.log_final[1, 1], [(1 + 11 / 16) / 2])  # after a b


def test_a_history_that_was_never_seen_has_the_shorter_ones_probabilities():
    text = [[A, B], [A]]
    bigram, trigram = estimate(text, SYMBOLS), estimate(text, SYMBOLS, order=3)
    assert torch.equal(trigram.log_transitions[2, 0], bigram.log_transitions[0, 0])  # after b a
    assert trigram.log_final[2, 0] == bigram.log_final[0, 0]


@pytest.mark.parametrize("order", (2, 3))
def test_the_probabilities_of_every_history_sum_to_one(order, random_text):
    graph = estimate(random_text, FIVE, order=order)
    start = graph.log_start.exp().sum() + graph.log_empty.exp()
    others = graph.log_transitions.exp().sum(-1) + graph.log_final.exp()
    assert start.item() == pytest.approx(1, abs=1e-12)
    assert (others - 1).abs().max() < 1e-12
    assert graph.log_transitions.shape == ((1 if order == 2 else 6), 5, 5)


def test_counting_in_parts_changes_nothing(random_text, monkeypatch):
    whole = estimate(random_text, FIVE, order=3)
    monkeypatch.setattr(denominator, "_COUNT_AT_ONCE", 4)
    assert estimate(iter(random_text), FIVE, order=3).fingerprint == whole.fingerprint


def test_empty_transcripts_count():
    often, never = estimate([[]] * 9 + [[A]], SYMBOLS), estimate([[A]] * 10, SYMBOLS)
    assert often.log_empty.exp() > 0.8 > 0.1 > never.log_empty.exp()


def test_labels_may_be_chosen():
    graph = estimate([[A, A]], SYMBOLS, labels=[A])
    assert graph.labels == [A] and graph.log_transitions.shape == (1, 1, 1)


def test_no_corpus_is_so_large_that_an_arc_falls_below_the_limit(monkeypatch):
    counts = np.full((3, 3, 3), 1.0)
    counts[1, 1] = counts[0, 1] = counts[2, 1] = (1e18, 0, 0)
    monkeypatch.setattr(denominator, "_count", lambda *arguments: counts)
    graph = estimate([[A]], SYMBOLS, order=3)
    assert graph.log_transitions.min() == denominator.MIN_LOG_PROBABILITY
    total = graph.log_transitions.exp().sum(-1) + graph.log_final.exp()
    assert (total - 1).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], SYMBOLS), "found no transcript"),
        (([[A], [A, 3]], SYMBOLS), "transcript 2: '<unk>' is no label"),
        (([[A, 6]], SYMBOLS), "transcript 1: holds an index outside of the dictionary of 6 symbols"),
        (([[A]], SPECIALS), "found no label"),
        (([[A]], SYMBOLS, [0, A]), "index 0 is both the blank and a label"),
        (([[A]], SYMBOLS, [A, 9]), "label 9 is not in the dictionary of 6 symbols"),
        (([[A]], SYMBOLS, [A, A]), "listed twice"),
        (([[A]], SYMBOLS, None, 4), "found order 4, expected 2 or 3"),
    ],
)
def test_what_cannot_be_estimated(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate(*arguments)


def test_order_3_is_for_small_label_sets():
    symbols = SPECIALS + [str(number) for number in range(257)]
    with pytest.raises(ValueError, match="found 257 labels, expected at most 256; choose order 2"):
        estimate([[4]], symbols, order=3)
    assert estimate([[4]], symbols, order=2).order == 2


# scores


@pytest.mark.parametrize("order", (2, 3))
def test_the_score_of_a_transcript_is_the_sum_of_its_arcs(order, random_text):
    graph = estimate(random_text, FIVE, order=order)
    arcs, final = graph.log_transitions, graph.log_final
    # a c c b: labels 0 2 2 1; in order 3 the history before is <s> (0), then a (1), then c (3)
    before = [0, 1, 3, 3] if order == 3 else [0, 0, 0, 0]
    expected = graph.log_start[0] + arcs[before[0], 0, 2] + arcs[before[1], 2, 2] + arcs[before[2], 2, 1]
    expected = expected + final[before[3], 1]
    padded = torch.tensor([[4, 6, 6, 5, 1, 1], [4, 1, 1, 1, 1, 1], [1] * 6])
    found = graph.score(graph.positions(padded), torch.tensor([4, 1, 0]))
    expected = torch.stack([expected, graph.log_start[0] + final[0, 0], graph.log_empty])
    assert (found - expected).abs().max() < 1e-12


def test_perplexity_is_per_label_and_end(random_text):
    graph = estimate([[A, B], [A]], SYMBOLS)
    log_probability = math.log(19 / 24 * 3 / 8 * 11 / 16) + math.log(19 / 24 * 7 / 16)
    assert perplexity(graph, [[A, B], [A]]) == pytest.approx(math.exp(-log_probability / 5))


def test_positions_of_symbols_that_are_no_labels():
    graph = estimate([[A]], SYMBOLS)
    assert graph.positions(torch.tensor([0, 1, 2, 3, A, B, 6, -1])).tolist() == [-1, -1, -1, -1, 1, 2, -1, -1]


def test_tensors_are_made_once_for_each_kind():
    graph = estimate([[A]], SYMBOLS)
    assert graph.tensors("cpu", torch.float32) is graph.tensors(torch.device("cpu"), torch.float32)
    assert graph.tensors("cpu", torch.float64).arcs.dtype == torch.float64


# what a graph must be


def parts(order=2, size=2):
    histories = 1 if order == 2 else size + 1
    return dict(
        symbols=SYMBOLS,
        labels=[A, B],
        log_start=torch.full((size,), -1.0),
        log_transitions=torch.full((histories, size, size), -1.0),
        log_final=torch.full((histories, size), -1.0),
        log_empty=-1.0,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(log_start=torch.tensor([-1.0, -math.inf])), "log_start holds log-probabilities from -inf to -1"),
        (dict(log_start=torch.tensor([-1.0, math.nan])), "log_start holds"),
        (dict(log_final=torch.full((1, 2), -36.0)), "log_final .* -36 .* expected all between -35 and 0; smooth"),
        (dict(log_empty=0.5), "log_empty .* 0.5"),
        (dict(log_start=torch.zeros(3)), r"log_start has shape \(3,\), expected \(2,\) for 2 labels"),
        (dict(log_transitions=torch.zeros(2, 2)), r"log_transitions has shape \(2, 2\), expected \(1, 2, 2\)"),
        (dict(log_final=torch.zeros(3, 2)), r"log_final has shape \(3, 2\), expected \(1, 2\)"),
        (dict(blank=6), "blank 6 is not in the dictionary of 6 symbols"),
    ],
)
def test_a_graph_that_the_recursion_could_not_trust_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DenominatorGraph(**{**parts(), **change})


# the file


@pytest.mark.parametrize("order", (2, 3))
def test_save_and_load(order, random_text, tmp_path):
    graph = estimate(random_text, FIVE, order=order)
    graph.save(tmp_path / "graph.npz")
    loaded = DenominatorGraph.load(tmp_path / "graph.npz")
    assert loaded.fingerprint == graph.fingerprint
    assert (loaded.symbols, loaded.labels, loaded.blank, loaded.order) == (FIVE, graph.labels, 0, order)
    for name in ("log_start", "log_transitions", "log_final", "log_empty"):
        assert torch.equal(getattr(loaded, name), getattr(graph, name))
    assert [path.name for path in tmp_path.iterdir()] == ["graph.npz"]


def test_symbols_of_any_script_survive(tmp_path):
    symbols = SPECIALS + ["é", "▁the", "字", "'"]
    estimate([[4, 5, 6, 7]], symbols).save(tmp_path / "graph")
    assert DenominatorGraph.load(tmp_path / "graph").symbols == symbols


def test_a_different_graph_has_a_different_fingerprint():
    graph = estimate([[A]], SYMBOLS)
    assert estimate([[A]], SYMBOLS).fingerprint == graph.fingerprint
    assert estimate([[B]], SYMBOLS).fingerprint != graph.fingerprint
    assert estimate([[A]], SPECIALS + ["a", "c"]).fingerprint != graph.fingerprint


def saved(path, **changes):
    estimate([[A, B]], SYMBOLS).save(path)
    with np.load(path) as archive:
        content = {name: archive[name] for name in archive.files}
    content = {**content, **changes}
    np.savez(path, **{name: value for name, value in content.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(version=np.array(99)), "graph.npz: denominator graph of version 99, expected 1; build it again with"),
        (dict(version=None), "graph.npz: denominator graph of version none, expected 1"),
        (dict(kind=np.array("other")), "graph.npz: not a denominator graph; build it again"),
        (dict(log_start=np.log([0.3, 0.3])), "graph.npz: damaged denominator graph .its fingerprint does not match"),
        (dict(symbols=np.array(SPECIALS + ["b", "a"])), "its fingerprint does not match"),
        (dict(log_final=np.zeros((7, 7))), "graph.npz: damaged denominator graph .*log_final has shape"),
    ],
)
def test_a_file_that_was_changed(changes, message, tmp_path):
    saved(tmp_path / "graph.npz", **changes)
    with pytest.raises(ValueError, match=message):
        DenominatorGraph.load(tmp_path / "graph.npz")


@pytest.mark.parametrize("content", (b"", b"text\n", b"PK\x03\x04 cut off", b"\x93NUMPY"))
def test_a_file_that_is_no_graph(content, tmp_path):
    (tmp_path / "graph.npz").write_bytes(content)
    with pytest.raises(ValueError, match="graph.npz: (not a|damaged) denominator graph.*build it again with"):
        DenominatorGraph.load(tmp_path / "graph.npz")


def test_a_file_that_was_cut_short(tmp_path):
    path = tmp_path / "graph.npz"
    estimate([[A, B]], SYMBOLS).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="damaged denominator graph"):
        DenominatorGraph.load(path)


def test_other_arrays_are_no_graph(tmp_path):
    np.savez(tmp_path / "graph.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match="not a denominator graph"):
        DenominatorGraph.load(tmp_path / "graph.npz")


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such denominator graph; make it with `w2v2-light denominator"):
        DenominatorGraph.load(tmp_path / "none.npz")


# its dictionary


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        (SPECIALS + ["a", "c"], "at index 5 the dictionary has 'c', the graph has 'b'"),
        (SPECIALS + ["b", "a"], "at index 4 the dictionary has 'b', the graph has 'a'"),
        (SPECIALS + ["a"], r"at index 5 the dictionary has no symbol, the graph has 'b' \(5 and 6 symbols\)"),
        (SYMBOLS + ["c"], "at index 6 the dictionary has 'c', the graph has no symbol"),
    ],
)
def test_another_dictionary_is_refused(symbols, message):
    with pytest.raises(ValueError, match=f"graph of model.pt: .*{message}.*again with `w2v2-light denominator"):
        estimate([[A]], SYMBOLS).check_dictionary(symbols, "graph of model.pt")


def test_its_own_dictionary_is_fine():
    estimate([[A]], SYMBOLS).check_dictionary(tuple(SYMBOLS), "here")


def test_a_graph_that_evaluation_saw_first_can_train():
    graph = estimate([[A, B]], SYMBOLS)
    with torch.inference_mode():
        graph.tensors("cpu", torch.float32)
    logits = torch.randn(1, 4, len(SYMBOLS), requires_grad=True)
    logits.index_select(2, graph.tensors("cpu", torch.float32).columns).sum().backward()
    assert logits.grad is not None
