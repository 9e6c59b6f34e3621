"""`w2v2-light prune`: the command line; what it computes is tested in tests/compress."""

import sys

import pytest
import torch
from tiny_checkpoints import LAYOUTS, SHAPE, container, ctc_model, letters, perturb, save_checkpoint, save_ctc

from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.models import W2V2LightConfig, W2V2LightModel

UNITS = ["conv", "heads", "ffn", "hidden"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A pre-training checkpoint without gates."""
    torch.manual_seed(0)
    config = W2V2LightConfig(**{**SHAPE, **LAYOUTS["large"]})
    model = W2V2LightModel(config)
    perturb(model)
    path = tmp_path_factory.mktemp("plain") / "plain.pt"
    return save_checkpoint(path, container(config, "w2v2_light"), model.state_dict())


@pytest.fixture(scope="module")
def gated(plain, tmp_path_factory):
    """A CTC checkpoint that got gates in fine-tuning: closed are half the channels, and one layer's heads."""
    model = ctc_model(plain, prune_units=UNITS, feature_grad_mult=1.0)
    for name, gate in model.w2v_encoder.w2v_model.gates.named_parameters():
        gate.data[len(gate) // 2 :] = -20.0
        if name == "heads.1.log_alpha":
            gate.data.fill_(-20.0)
    path = tmp_path_factory.mktemp("gated") / "gated.pt"
    return save_ctc(path, model, {"_name": "audio_finetuning", "labels": "ltr"}, letters())


def total(path, capsys):
    """Parameters of a checkpoint, as `cost` prints them."""
    assert main(["cost", str(path)]) == 0
    return capsys.readouterr().out.split("\ntotal")[1].split()[0]


def test_a_summary(gated, tmp_path, capsys):
    out = tmp_path / "small.pt"
    assert main(["prune", gated, str(out)]) == 0
    first, kept, cost = capsys.readouterr().out.splitlines()
    assert first == f"{gated} -> {out} (light_ctc)" and list(tmp_path.iterdir()) == [out]
    assert kept == "kept 24 of 48 frontend channels, 4 of 12 heads, 72 of 144 FFN channels, 16 of 32 hidden channels"
    assert cost.startswith(f"parameters {total(gated, capsys)} -> {total(out, capsys)} (")
    assert "; MACs of 10 s at s1q1k1 " in cost


def test_a_report_beside_the_checkpoint(gated, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "small.pt"
    assert main(["prune", gated, str(out), "--report"]) == 0
    table, picture = out.with_suffix(".md"), out.with_suffix(".png")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"report: {table}, {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = table.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["0", "8 of 16", "50.0 %"] in rows
    assert ["1", "0 of 4", "0.0 %", "24 of 48", "50.0 %"] in rows
    assert ["hidden", "16 of 32", "50.0 %"] in rows
    assert text.split("\n\n", 3)[3].strip() in printed


def test_a_report_in_a_folder(gated, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["prune", gated, str(tmp_path / "small.pt"), "--report", str(tmp_path / "a" / "b")]) == 0
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"small.md", "small.png"}


def test_a_report_without_matplotlib(gated, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["prune", gated, str(tmp_path / "small.pt"), "--report"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["prune", gated, str(tmp_path / "small.pt")]) == 0


def refused(arguments, capsys):
    assert main(["prune", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("w2v2-light prune: error: ") and len(error.splitlines()) == 1
    return error


def test_a_checkpoint_without_gates(plain, tmp_path, capsys):
    error = refused([plain, str(tmp_path / "small.pt")], capsys)
    assert f"'{plain}': found no gates" in error and "criterion light_prune" in error


def test_a_missing_checkpoint(tmp_path, capsys):
    error = refused([str(tmp_path / "none.pt"), str(tmp_path / "small.pt")], capsys)
    assert f"{tmp_path / 'none.pt'}: no such checkpoint file" in error


def test_the_checkpoint_is_not_overwritten(gated, capsys):
    assert "would overwrite its source" in refused([gated, gated], capsys)


def test_reports_that_cannot_be(gated, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    error = refused([gated, str(tmp_path / "small.pt"), "--report", str(tmp_path / "file")], capsys)
    assert f"--report {tmp_path / 'file'}: a file; expected a folder" in error
    error = refused([gated, str(tmp_path / "small.md"), "--report"], capsys)
    assert "the report would overwrite the checkpoint" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_weights_that_are_not_finite(gated, tmp_path, capsys):
    state = torch.load(gated, map_location="cpu", weights_only=False)
    state["model"]["w2v_encoder.proj.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    error = refused([str(tmp_path / "nan.pt"), str(tmp_path / "small.pt")], capsys)
    assert "nan.pt: parameter 'w2v_encoder.proj.bias' has NaN" in error
