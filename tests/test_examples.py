"""The examples, scaled down until they are quick: they must not rot."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_checkpoints import LAYOUTS, SHAPE, container, ctc_model, letters, save_checkpoint, save_ctc

from fairseq_w2v2_light.models import W2V2LightConfig, W2V2LightModel
from fairseq_w2v2_light.study.experiment import localised, train

ROOT = Path(__file__).resolve().parents[1]
STRIDE_320 = "[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2"
pytest.importorskip("espeakng_loader", reason="pip install espeakng-loader to run the demo's speech synthesis")
pytest.importorskip("matplotlib", reason="pip install matplotlib to draw the plot")


def test_demo_trains_decodes_and_compares(tmp_path):
    arguments = ["--utterances", "12", "4", "4", "--pretrain-updates", "2", "--finetune-updates", "2"]
    output = run_example("demo", "--out", str(tmp_path / "demo"), *arguments)
    with open(tmp_path / "demo/tradeoff.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["operating_point"] for row in rows] == ["s1q1k1", "s1q2k2", "s2q1k2", "s3q2k2"]
    macs = [int(row["macs"]) for row in rows]
    assert macs == sorted(macs, reverse=True) and len(set(macs)) == 4
    assert all(int(row["parameters"]) < 1_000_000 and float(row["real_time_factor"]) > 0 for row in rows)
    assert "shared, stochastic" in (tmp_path / "demo/tradeoff.html").read_text(encoding="utf-8")
    assert (tmp_path / "demo/tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert "| shared, stochastic | s2q1k2 |" in output


@pytest.fixture
def noise(tmp_path):
    """A manifest folder of six seconds of noise in each split, with letter labels."""
    data = tmp_path / "data"
    data.mkdir()
    wave = np.random.RandomState(0).randn(6, 16000) * 0.1
    for index in range(6):
        soundfile.write(str(data / f"{index}.wav"), wave[index], 16000)
    for split in ("train", "valid", "test"):
        (data / f"{split}.tsv").write_text(".\n" + "".join(f"{index}.wav\t16000\n" for index in range(6)))
        (data / f"{split}.ltr").write_text("A B | A |\n" * 6)
    (data / "dict.ltr.txt").write_text("| 2\nA 2\nB 1\n")
    return data


def test_an_output_folder_belongs_to_one_corpus(tmp_path, noise):
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(noise, other)
    assert [localised(noise, out) for _ in range(2)] == [out / "data"] * 2
    with pytest.raises(ValueError, match=f"{out}: what is there was trained on {noise}, not on {other}; give another"):
        localised(other, out)


def test_what_was_trained_with_other_settings_is_not_gone_on_with(tmp_path):
    (tmp_path / "command.txt").write_text("common.seed=1 optimization.max_update=2")
    (tmp_path / "checkpoint_last.pt").touch()
    with pytest.raises(
        ValueError, match=rf"{tmp_path}: what is there was trained with other settings \(.*common.seed=1"
    ):
        train("finetuning/tiny", tmp_path, tmp_path, ["common.seed=2"], 2, report=lambda line: None)


def test_a_corpus_without_a_split_is_refused_before_anything_is_trained(tmp_path, noise):
    (noise / "test.ltr").unlink()
    with pytest.raises(FileNotFoundError, match="test.ltr: no such file; expected a manifest folder with train, valid"):
        localised(noise, tmp_path / "out")


def test_distill_compares_its_ways(tmp_path, noise):
    """From a teacher that it trains first."""
    arguments = ["--updates", "2", "--teacher-updates", "2", "2", "--seeds", "1"]
    arguments += ["--ways", "from scratch (CTC)", "CTC + hidden MSE + LF-MMI"]
    output = run_example("distill", str(noise), "--out", str(tmp_path / "out"), *arguments)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results) == {"from scratch (CTC)", "CTC + hidden MSE + LF-MMI"}
    assert all(set(wers) == {"valid", "test"} for seeds in results.values() for wers in seeds.values())
    assert "| CTC + hidden MSE + LF-MMI |" in output


def test_streaming_compares_its_students(tmp_path, noise):
    out = tmp_path / "out"
    arguments = [str(noise), "--teacher", tiny_teacher(tmp_path, noise), "--out", str(out), "--updates", "2", "2"]
    output = run_example("streaming", *arguments, "--chunks", "8+4", "--ways", "distilled")
    results = json.loads((out / "results.json").read_text())
    latencies = {name: row["latency_ms"] for name, row in results.items()}
    assert latencies == {"offline student": None, "240 ms (8+4 frames), distilled": 240.0}
    assert all(row[split]["words"] == 12 for row in results.values() for split in ("valid", "test"))
    assert (out / "results.md").read_text().splitlines()[2].startswith("| offline student | whole utterance |")
    assert "9 to 23.4 % at 480 ms" in output


def test_pruning_compares_models(tmp_path, noise):
    out = tmp_path / "out"
    arguments = [str(noise), "--checkpoint", tiny_teacher(tmp_path, noise), "--out", str(out), "--updates", "2", "2"]
    output = run_example("pruning", *arguments, "--methods", "mac", "--percent", "20")
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["unpruned", "mac 20 %"]
    assert all(row[split]["words"] == 12 for row in results.values() for split in ("valid", "test"))
    assert (out / "mac_20/pruned.png").read_bytes().startswith(b"\x89PNG")
    assert "| mac 20 % |" in output


def test_compare_means_over_its_seeds(tmp_path, noise):
    """Every way once, one of them again with a second seed, and on a second corpus going on from the first one's."""
    out, few = tmp_path / "out", ["--scale", "0.0004", "--points", "s2q1k2"]
    run_example("compare", str(noise), "--out", str(out), *few, "--seeds", "1")
    rows = rows_of(out / "results.md")
    names = ["uncompressed", "shared, stochastic", "distilled", "distilled, streaming (480 ms)"]
    names += ["pruned by 40 % of the MACs", "shared, stochastic, distilled"]
    assert [row[:1] + row[2:3] for row in rows] == [[name, dtype] for name in names for dtype in ("float32", "int8")]
    assert all(float(row[5]) > 0 and float(row[6]) > 0 and not any(" to " in cell for cell in row) for row in rows)
    assert (out / "test/tradeoff.html").is_file()

    run_example("compare", str(noise), "--out", str(out), *few, "--seeds", "1", "2", "--ways", "combined")
    rows = rows_of(out / "results.md")
    assert [row[:3] for row in rows] == [[names[-1], "s2q1k2", dtype] for dtype in ("float32", "int8")]
    assert all(row[3] == "2" and all(" to " in cell for cell in row[8:]) for row in rows)

    settings = ["--set", "optimization.update_freq=[2]", "--others", f"again={out / CHECKPOINT}"]
    second, ways = tmp_path / "second", {"plain": "finetuned", "shared": "finetuned", "combined": "."}
    arguments = [str(noise), "--out", str(second), *few, "--seeds", "1", "--start", str(out), *settings]
    run_example("compare", *arguments, "--ways", "shared", "combined")
    assert [row[0] for row in rows_of(second / "results.md")[::2]] == ["again", "shared, stochastic", names[-1]]
    for way, step in ways.items():
        command = (second / way / "seed1" / step / "finished.txt").read_text()
        assert f"model.w2v_path={out / way}" in command and "update_freq=[2]" in command
    assert not (second / "plain/seed1/pretrained").exists()


def test_compare_names_the_model_that_it_cannot_go_on_from(tmp_path, noise):
    command = ["compare", str(noise), "--out", str(tmp_path / "out"), "--start", str(tmp_path), "--ways", "shared"]
    with pytest.raises(AssertionError, match=r"--start: found no model in .*/shared/seed1; run this example on the"):
        run_example(*command)


CHECKPOINT = "plain/seed1/finetuned/checkpoint_last.pt"


def rows_of(table):
    """The cells of the rows of a Markdown table."""
    return [line[2:-2].split(" | ") for line in table.read_text().splitlines()[2:]]


def run_example(name, *arguments):
    """Runs examples/NAME/run.py; returns what it printed."""
    command = [sys.executable, str(ROOT / "examples" / name / "run.py"), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def tiny_teacher(folder, data):
    """A CTC checkpoint of random weights and four layers, for audio of zero mean and unit variance."""
    config = W2V2LightConfig(**{**SHAPE, **LAYOUTS["base"], "encoder_layers": 4, "conv_feature_layers": STRIDE_320})
    state = W2V2LightModel(config).state_dict()
    normalize = {"normalize": True}
    start = save_checkpoint(folder / "pretrained.pt", container(config, "w2v2_light"), state, normalize)
    labels = letters("|AB")
    task = {"_name": "audio_finetuning", "data": str(data), "labels": "ltr", **normalize}
    return save_ctc(folder / "teacher.pt", ctc_model(start, dictionary=labels, **normalize), task, labels)
