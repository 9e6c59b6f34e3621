"""`w2v2-light denominator`: from a manifest folder to a graph."""

import pytest

from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.criterions.denominator import DenominatorGraph


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dict.ltr.txt").write_text("| 3\nA 2\nB 1\n")
    (folder / "train.ltr").write_text("A B |\n\nA | A |\n")
    (folder / "valid.ltr").write_text("B |\n")
    return folder


def test_a_graph_beside_the_labels(data, capsys):
    assert main(["denominator", str(data)]) == 0
    graph = DenominatorGraph.load(data / "denominator.ltr.2.npz")
    assert graph.symbols == ["<s>", "<pad>", "</s>", "<unk>", "|", "A", "B"]
    assert graph.labels == [4, 5, 6] and graph.order == 2
    printed = capsys.readouterr().out
    assert "denominator.ltr.2.npz" in printed
    assert "order 2, 3 labels" in printed and "3 transcripts" in printed and "7 labels" in printed
    perplexity = float(printed.split("perplexity on them: ")[1].split()[0])
    assert 1 < perplexity < 4


def test_order_split_and_destination(data, tmp_path):
    out = tmp_path / "other" / "graph.npz"
    assert main(["denominator", str(data), str(out), "--order", "3", "--split", "valid"]) == 0
    graph = DenominatorGraph.load(out)
    assert graph.order == 3
    assert graph.log_start.argmax() == 2  # the only transcript begins with B


def test_a_symbol_that_the_dictionary_lacks(data, capsys):
    (data / "train.ltr").write_text("A B |\nA C |\n")
    assert main(["denominator", str(data)]) == 2
    error = capsys.readouterr().err
    assert "train.ltr:2: symbol 'C' is not in" in error and "dict.ltr.txt" in error
    assert not list(data.glob("*.npz"))


def test_fairseqs_own_symbols_are_no_labels(data, capsys):
    (data / "train.ltr").write_text("A <unk> |\n")
    assert main(["denominator", str(data)]) == 2
    assert "train.ltr:1: symbol '<unk>'" in capsys.readouterr().err


def test_transcripts_without_any_label(data, capsys):
    (data / "train.ltr").write_text("\n\n")
    assert main(["denominator", str(data)]) == 2
    assert "train.ltr: found no label in 2 lines" in capsys.readouterr().err


@pytest.mark.parametrize("name", ("dict.ltr.txt", "train.ltr"))
def test_a_missing_file(name, data, capsys):
    (data / name).unlink()
    assert main(["denominator", str(data)]) == 2
    assert f"{name}: no such file" in capsys.readouterr().err


def test_other_labels(data):
    (data / "dict.spm.txt").write_text("▁x 1\n", encoding="utf-8")
    (data / "train.spm").write_text("▁x ▁x\n", encoding="utf-8")
    assert main(["denominator", str(data), "--labels", "spm"]) == 0
    assert DenominatorGraph.load(data / "denominator.spm.2.npz").symbols[4:] == ["▁x"]
