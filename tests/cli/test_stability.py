"""`w2v2-light stability`: models side by side in tables, JSON, CSV and a plot."""

import csv
import json
import sys

import numpy as np
import pytest
import soundfile
from tiny_checkpoints import SHARED, STOCHASTIC, finetuned, pretrained

from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.study.stability import READING


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two checkpoints, and a folder of audio with a manifest without labels."""
    folder = tmp_path_factory.mktemp("stability")
    pretrained(folder / "plain.pt", layout="large", **STOCHASTIC)
    (folder / "ctc").mkdir()
    finetuned(folder / "ctc", layout="large", **SHARED)
    (folder / "audio").mkdir()
    chance = np.random.default_rng(0)
    lines = ["audio"]
    for index, samples in enumerate((1600, 900, 2000, 1200)):
        soundfile.write(folder / "audio" / f"u{index}.wav", chance.normal(0, 0.1, samples).astype(np.float32), 16000)
        lines.append(f"u{index}.wav\t{samples}")
    (folder / "valid.tsv").write_text("\n".join(lines) + "\n")
    return folder


def rows(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_tables_files_and_names(made, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the plot: pip install matplotlib")
    models = [str(made / "plain.pt"), str(made / "ctc" / "ctc.pt")]
    options = ["--audio", str(made), "--split", "valid", "--names", "plain, shared", "--out", str(tmp_path / "out")]
    assert main(["stability", *models, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Stability of representations across depth, over 4 of 4 recordings of ")
    assert READING in printed
    table = rows(printed)
    assert table[2][:6] == ["plain", "3", "3", "3", "pre-LN", "s1q1k1"]
    assert table[3][:6] == ["shared", "3", "1", "2", "pre-LN", "s1q1k1"]
    assert table[4][:4] == ["depth", "plain: cosine", "plain: CKA", "plain: change"]
    assert [row[0] for row in table[6:]] == ["0", "1", "2"]
    assert (tmp_path / "out" / "stability.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "out" / "stability.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [(row["model"], row["unique_layers"], row["depth"]) for row in written] == [
        *(("plain", "3", str(depth)) for depth in range(3)),
        *(("shared", "1", str(depth)) for depth in range(3)),
    ]
    assert [row["stored"] for row in written] == ["0", "1", "2", "0", "0", "0"]
    assert f"{float(written[4]['cka']):.4f}" == table[7][5]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"stability.png", "stability.csv"}


def test_json_of_noise_and_of_a_recipe(made, capsys):
    recipe = ["pretraining/light_stochastic_tiny", "model.encoder_layers=2", "model.unique_layers=1"]
    assert main(["stability", *recipe, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["analysis"] == READING and result["audio"].startswith("white noise, for want of speech")
    (model,) = result["models"]
    assert model["name"] == " ".join(recipe) and model["trained"] is False
    assert model["seconds"] == 50 and model["unique_layers"] == 1 and len(model["layers"]) == 2
    assert len(model["matrix"]) == 3 and model["matrix"][1][2] == model["layers"][1]["cka"]


def test_audio_by_file_folder_manifest_and_some_of_it(made, capsys):
    def heard(*options):
        assert main(["stability", str(made / "plain.pt"), "--json", "--audio", *map(str, options)]) == 0
        result = json.loads(capsys.readouterr().out)
        return result["audio"].split(" recordings")[0], result["models"][0]

    whole = heard(made / "audio")
    assert whole[0] == "4 of 4" and whole[1]["seconds"] == 5700 / 16000
    assert heard(made / "valid.tsv") == whole
    assert heard(*(made / "audio" / f"u{index}.wav" for index in range(4))) == whole
    text, model = heard(made, "--split", "valid", "--utterances", "2", "--operating-point", "s2q2k1")
    assert text == "2 of 4" and model["seconds"] == 3600 / 16000 and model["operating_point"] == "s2q2k1"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.pt"], "none.pt: no such file or folder; recipes have names such as pretraining/sew_tiny"),
        (["/no/folder"], "/no/folder: no such file or folder; recipes have names such as"),
        (["PLAIN", "model.unique_layers=1"], "plain.pt': its weights fit the network that it has"),
        (["model.unique_layers=1", "PLAIN"], "'model.unique_layers=1': found an override before any model"),
        (["PLAIN", "--operating-point", "s9q1k1"], "not trained with squeeze factor 9"),
        (["PLAIN", "PLAIN", "--names", "a,"], "--names a,: found an empty name, expected one for each of 2 models"),
        (["PLAIN", "--names", "a,b"], "--names a,b: found 2 names, expected one for each of 1 models"),
        (["PLAIN", "--utterances", "0"], "--utterances: found 0, expected 1 or more"),
        (["PLAIN", "--audio", "MADE"], "test.tsv: no such split; "),
        (["PLAIN", "--audio", "MADE/nothing"], "nothing: no such file or folder"),
        (["PLAIN", "--audio", "MADE/ctc"], "found no audio file there"),
        (["PLAIN", "--audio", "PLAIN"], "plain.pt: not audio that libsndfile can read"),
    ],
)
def test_bad_input_gets_a_message(made, capsys, arguments, message):
    filled = [text.replace("PLAIN", str(made / "plain.pt")).replace("MADE", str(made)) for text in arguments]
    assert main(["stability", *filled]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_files_that_cannot_be_written(made, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert main(["stability", str(made / "plain.pt"), "--out", str(tmp_path / "file")]) == 2
    assert "file: a file; expected a folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["stability", str(made / "plain.pt"), "--out", str(tmp_path / "out")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err and not (tmp_path / "out").exists()
