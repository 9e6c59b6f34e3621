"""`w2v2-light tradeoff` on tiny checkpoints: its table and files against `evaluate`, `cost` and model folders."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from pruned_model import pruned
from safetensors.torch import load_file
from tiny_checkpoints import STOCHASTIC, STREAMING, finetuned, letters
from without_fairseq import WITHOUT_FAIRSEQ

from fairseq_w2v2_light.cli import main as cli
from fairseq_w2v2_light.cli.tradeoff import candidates, short_names
from fairseq_w2v2_light.export.folder import export_folder
from fairseq_w2v2_light.runtime.folder import write_folder
from fairseq_w2v2_light.study.cost import cost, load_subject

ROOT = Path(cli.__file__).parents[2]
POINTS = ["s1q1k1", "s1q1k2", "s1q2k1", "s1q2k2", "s2q1k1", "s2q1k2", "s2q2k1", "s2q2k2"]
QUICK = ["--seconds", "0.2", "--pieces", "1", "--repeats", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tradeoff")
    chance = np.random.default_rng(0)
    lines = ["."]
    for index, samples in enumerate((3000, 1500, 2400)):
        soundfile.write(folder / f"u{index}.wav", chance.normal(0, 0.1, samples).astype(np.float32), 16000)
        lines.append(f"u{index}.wav\t{samples}")
    for split, words in (("test", "AB A\nB\nA BA AB\n"), ("silent", "\n\n\n")):
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        (folder / f"{split}.wrd").write_text(words)
    for name in ("light", "other"):
        (folder / name).mkdir()
    finetuned(folder / "light", **STOCHASTIC)
    labels = letters("XYABZW|")
    finetuned(folder / "other", dictionary=labels, ctc_keys={"dictionary": labels}, layout="large")
    (folder / "streaming").mkdir()
    finetuned(folder / "streaming", layout="large", **{**STREAMING, "chunk_frames": [4, 8]})
    export_folder(folder / "light/ctc.pt", folder / "exported")
    return folder


def run(capsys, *arguments):
    assert cli.main(["tradeoff", *map(str, arguments), *QUICK]) == 0
    return capsys.readouterr()


def rows(capsys, *arguments):
    return json.loads(run(capsys, *arguments, "--json").out)["rows"]


def test_rows_are_what_evaluate_and_cost_say(made, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib to draw the plot")
    light, other = made / "light/ctc.pt", made / "other/ctc.pt"
    found = json.loads(run(capsys, made, light, other, "--out", tmp_path / "out", "--json").out)
    assert (found["utterances"], found["words"], found["seconds"]) == (3, 6, 0.2)
    assert found["audio_seconds"] == pytest.approx(6900 / 16000, abs=1e-3)
    table = found["rows"]
    expected = [("light", point) for point in POINTS] + [("other", "s1q1k1")]
    assert [(row["model"], row["operating_point"]) for row in table] == expected
    for row, path in ((table[5], light), (table[8], other)):
        counted = cost(load_subject(str(path), []), 0.2, row["operating_point"])
        assert row["macs"] == counted["macs"]
        # the vector that stands for masked frames is for training
        assert row["parameters"] == counted["parameters"] - 32 and row["bytes"] == 4 * row["parameters"]
        options = ["--operating-point", row["operating_point"], "--json"]
        assert cli.main(["evaluate", str(made), "--model", str(path), *options]) == 0
        evaluated = json.loads(capsys.readouterr().out)
        assert (row["wer"], row["cer"]) == (evaluated["wer"], evaluated["cer"])
        for kind in ("substitutions", "deletions", "insertions"):
            assert row[kind] == evaluated["words"][kind]
    assert all(row["real_time_factor"] > 0 and row["words"] == 6 for row in table)
    assert table[0]["speed_up"] == 1
    assert table[3]["speed_up"] == pytest.approx(table[0]["real_time_factor"] / table[3]["real_time_factor"])
    with open(tmp_path / "out/tradeoff.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [list(line.values()) for line in lines] == [[str(value) for value in row.values()] for row in table]
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in ("tradeoff.html", "tradeoff.png"))


def test_table_is_printed_and_progress_told_on_standard_error(made, capsys):
    said = run(capsys, made, f"a|b={made / 'exported'}@s2q1k2", f"plain={made / 'other/ctc.pt'}")
    lines = said.out.splitlines()
    assert lines[0].startswith("| model | operating point | dtype | parameters | MiB | GMACs (0.2 s) |")
    assert [line.partition(" float32")[0] for line in lines[2:]] == ["| a\\|b | s2q1k2 |", "| plain | s1q1k1 |"]
    assert "[1/2] a|b at s2q1k2, float32: WER " in said.err and "timing: 2 turns of 1 x 0.2 s" in said.err


def test_a_folder_measures_as_its_checkpoint(made, capsys):
    one, other = rows(capsys, made, made / "light/ctc.pt", made / "exported", "--operating-points", "s2q1k2")
    assert (one["model"], other["model"]) == ("light/ctc.pt", "exported")
    same = ("wer", "cer", "macs", "parameters", "bytes", "operating_point", "dtype")
    assert {key: one[key] for key in same} == {key: other[key] for key in same}


def test_each_dtype_once_with_the_bytes_that_a_folder_stores(made, tmp_path, capsys):
    found = rows(capsys, made, made / "light/ctc.pt@own", "--dtype", "auto,float32,int8")
    assert [row["dtype"] for row in found] == ["float32", "int8"]
    assert cli.main(["quantize", str(made / "light/ctc.pt"), str(tmp_path / "int8")]) == 0
    for row, folder in zip(found, (made / "exported", tmp_path / "int8")):
        stored = load_file(str(folder / "model.safetensors"))
        assert row["bytes"] == sum(value.numel() * value.element_size() for value in stored.values())
    assert found[1]["parameters"] == found[0]["parameters"]
    capsys.readouterr()
    (quantized,) = rows(capsys, made, tmp_path / "int8", "--operating-points", "own")
    assert (quantized["model"], quantized["dtype"], quantized["bytes"]) == ("int8", "int8", found[1]["bytes"])


def test_models_have_points_of_their_own(made, capsys):
    models = [f"fast={made / 'light/ctc.pt'}@s2q2k2, s2q2k2,s1q1k2", f"{made / 'light/ctc.pt'}@own"]
    found = rows(capsys, made, *models, "--operating-points", "all")
    points = [(row["model"], row["operating_point"]) for row in found]
    assert points == [("fast", "s2q2k2"), ("fast", "s1q1k2"), ("ctc.pt", "s1q1k1")]


def test_a_streaming_model_at_each_chunk_and_one_fixed_to_a_point(made, tmp_path, capsys):
    finetuned(tmp_path, **STOCHASTIC, ctc_keys={"operating_point": "s2q1k2"})
    capsys.readouterr()
    found = rows(capsys, made, made / "streaming/ctc.pt", tmp_path / "ctc.pt")
    assert [row["operating_point"] for row in found] == ["s1q1k1c8", "s1q1k1c4", "s2q1k2"]


def test_normalisation_and_tables(made, tmp_path, capsys):
    table = tmp_path / "t.csv"
    lines = [f"{made / f'u{index}.wav'},{text}\n" for index, text in enumerate(("ab a!", "b", "a: ba ab"))]
    table.write_text("path,text\n" + "".join(lines))
    folder = made / "exported"
    rates = set()
    for options in ([], ["--lowercase"], ["--lowercase", "--remove-punctuation"]):
        assert cli.main(["evaluate", str(table), "--model", str(folder), "--json", *options]) == 0
        expected = json.loads(capsys.readouterr().out)
        (found,) = rows(capsys, table, f"{folder}@own", *options)
        assert (found["wer"], found["words"]) == (expected["wer"], expected["words"]["reference"])
        rates.add(found["wer"])
    assert len(rates) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{made}", "{light}", "--operating-points", "s3q1k1"], "{light}: operating point 's3q1k1': the model was not"),
        (["{made}", "{light}", "{other}@s2q1k1"], "{other}: operating point 's2q1k1': the model was not trained with"),
        (["{made}", "{light}@s1q1k1,s2qlk1"], "{light}@s1q1k1,s2qlk1: operating point 's2qlk1': expected sSqQkK"),
        (["{made}", "{light}", "--operating-points", "fast"], "operating point 'fast': expected sSqQkK"),
        (["{made}", "{light}", "--split", "dev"], "dev.tsv: no such split; {made} has: silent, test"),
        (["{made}", "{light}@own", "--split", "silent"], "silent.tsv:2: the references hold no words"),
        (["{made}", "{made}/none.pt"], "none.pt: "),
        (["{made}", "a={light}", "a={other}"], "2 models are called 'a'; give each a name of its own, NAME=PATH"),
        (["{made}", "{light}", "{light}"], "2 models are called 'ctc.pt'"),
        (["{made}", "{light}", "--dtype", "float16"], "--dtype: found 'float16', expected some of auto, float32"),
        (["{made}", "{light}", "--seconds", "nan"], "--seconds: found nan, expected a positive number"),
        (["{made}", "{light}", "--seconds", "0.001"], "audio of 16 samples is too short to count"),
        (["{made}", "{light}", "--repeats", "0"], "--repeats: found 0, expected 1 or more"),
        (["{made}", "{light}", "--out", "{made}/test.tsv"], "--out {made}/test.tsv: a file; expected a folder"),
        (["{made}/test.wrd", "{light}"], "test.wrd:1: lines of text name no audio"),
    ],
)
def test_bad_input_gets_a_message(made, capsys, arguments, message):
    names = {"made": made, "light": made / "light/ctc.pt", "other": made / "other/ctc.pt"}
    arguments = [argument.format(**names) for argument in arguments]
    quick = [] if {"--seconds", "--repeats"} & set(arguments) else QUICK
    assert cli.main(["tradeoff", *arguments, *quick]) == 2
    captured = capsys.readouterr()
    assert message.format(**names) in captured.err and captured.out == ""


def test_models_as_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b@own", "lr=0.1"):
        (tmp_path / name).mkdir()
    (tmp_path / "lr=0.1/x.pt").write_text("")
    texts = ["a=b@own", "lr=0.1/x.pt@s1q1k1", "n=lr=0.1/x.pt", "m=a=b@own", "k=what@x.pt@own,s1q1k1", "z@s1q1k1,s2q1k1"]
    found = [(one.name, one.path, one.points) for one in candidates(texts, "all")]
    assert found == [
        ("a=b@own", "a=b@own", "all"),
        ("lr=0.1/x.pt", "lr=0.1/x.pt", "s1q1k1"),
        ("n", "lr=0.1/x.pt", "all"),
        ("m", "a=b", "own"),
        ("k", "what@x.pt@own,s1q1k1", "all"),
        ("z", "z", "s1q1k1,s2q1k1"),
    ]


def test_a_model_that_is_wider_when_it_runs_is_counted_as_it_is_stored(made, tmp_path, capsys):
    write_folder(pruned(), tmp_path / "narrow")
    floats, integers = rows(capsys, made, tmp_path / "narrow", "--dtype", "float32,int8")
    counted = cost(load_subject(str(tmp_path / "narrow"), []), 0.2)
    for row in (floats, integers):
        assert (row["parameters"], row["macs"]) == (counted["parameters"], counted["macs"])
    assert floats["bytes"] == 4 * floats["parameters"] > integers["bytes"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/plain/last.pt"], ["last.pt"]),
        (["runs/plain/fine/last.pt", "runs/mac_40/fine/last.pt"], ["plain", "mac_40"]),
        (["runs/a/b/last.pt", "runs/a/last.pt"], ["b", "last.pt"]),
        (["runs/a", "runs/a/b"], ["a", "b"]),
        (["/x/model", "/y/model/"], ["x", "y"]),
        (["runs/a.pt", "runs/b.pt", "other/b.pt"], ["runs/a.pt", "runs/b.pt", "other/b.pt"]),
    ],
)
def test_default_names(paths, names):
    assert short_names(paths) == names


def test_it_works_where_fairseq_cannot_be_imported(made, tmp_path):
    arguments = [str(made), str(made / "exported@own"), "--out", str(tmp_path / "out"), *QUICK]
    command = [sys.executable, "-c", WITHOUT_FAIRSEQ, "tradeoff", *arguments]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/tradeoff.html").is_file() and "| exported | s1q1k1 | float32 |" in result.stdout
    assert torch.__version__ in (tmp_path / "out/tradeoff.html").read_text(encoding="utf-8")
