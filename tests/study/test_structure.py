"""What pruning left, as a table and a picture."""

import pytest
from omegaconf import OmegaConf

from fairseq_w2v2_light.models.recipe import read_recipe
from fairseq_w2v2_light.study.configured import ConfiguredSubject
from fairseq_w2v2_light.study.structure import compare, draw_structure, format_structure, format_summary


@pytest.fixture(scope="module")
def structure():
    """The base recipe with and without some of its frontend, heads and FFN; 24 stored layers, to draw many."""
    model = read_recipe("pretraining/w2v2_light_base", {"unique_layers": 24, "encoder_layers": 24}).model
    shapes = [(100, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
    kept = {
        "conv_feature_layers": str(shapes),
        "layer_heads": [0, 6] + [12] * 22,
        "layer_ffn": [3072] * 23 + [0],
    }
    subjects = (ConfiguredSubject("light_ctc", cfg, 32) for cfg in (model, OmegaConf.merge(model, kept)))
    return compare(*subjects)


def test_widths(structure):
    assert structure.widths["conv"] == [(100, 512)] + [(512, 512)] * 6
    assert structure.widths["heads"] == [(0, 12), (6, 12)] + [(12, 12)] * 22
    assert structure.widths["ffn"] == [(3072, 3072)] * 23 + [(0, 3072)]
    assert structure.widths["hidden"] == [(768, 768)]


def test_summary(structure):
    kept, cost = format_summary(structure).splitlines()
    assert kept == (
        "kept 3,172 of 3,584 frontend channels, 270 of 288 heads, 70,656 of 73,728 FFN channels, "
        "768 of 768 hidden channels"
    )
    before, after = structure.before, structure.after
    assert f"{before['parameters']:,} -> {after['parameters']:,}" in cost
    assert f"{before['macs'] / 1e9:.3f} G -> {after['macs'] / 1e9:.3f} G" in cost


def test_table(structure):
    lines = format_structure(structure).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert ["0", "100 of 512", "19.5 %"] in rows
    assert ["1", "6 of 12", "50.0 %", "3,072 of 3,072", "100.0 %"] in rows
    assert ["23", "12 of 12", "100.0 %", "0 of 3,072", "0.0 %"] in rows
    ffn = next(row for row in rows if row[0] == "of them FFN")
    assert ffn[1:4] == ["", "", ""] and ffn[-1] == "95.8 %"
    total = next(row for row in rows if row[0] == "total")
    assert total[1] == f"{structure.before['parameters']:,}" and total[2] == f"{structure.after['parameters']:,}"
    for name in ("parameters_by_part", "macs_by_part"):
        # no part is missing
        assert sum(structure.after[name].values()) == structure.after[name.split("_")[0]]


def test_picture(structure, tmp_path):
    pytest.importorskip("matplotlib")
    draw_structure(structure, tmp_path / "structure.png", "base")
    assert (tmp_path / "structure.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["structure.png"]
