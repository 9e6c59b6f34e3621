"""The examples, scaled down until they are quick: they must not rot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("espeakng_loader", reason="pip install espeakng-loader to run the demo's speech synthesis")
pytest.importorskip("matplotlib", reason="pip install matplotlib to draw the plot")


def test_demo_trains_decodes_and_compares(tmp_path):
    command = [sys.executable, str(ROOT / "examples/demo/run.py"), "--out", str(tmp_path / "demo")]
    command += ["--utterances", "12", "4", "4", "--pretrain-updates", "2", "--finetune-updates", "2"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]

    rows = json.loads((tmp_path / "demo/tradeoff.json").read_text())
    assert [row["operating_point"] for row in rows] == ["s1q1k1", "s1q2k2", "s2q1k2", "s3q2k2"]
    macs = [row["macs"] for row in rows]
    assert macs == sorted(macs, reverse=True) and len(set(macs)) == 4
    assert all(row["parameters"] < 1_000_000 and row["real_time_factor"] > 0 for row in rows)
    assert (tmp_path / "demo/tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert "| shared, stochastic | s2q1k2 |" in result.stdout


def test_distill_compares_its_ways(tmp_path):
    """On noise, from a teacher that it trains first."""
    data = tmp_path / "data"
    data.mkdir()
    wave = np.random.RandomState(0).randn(6, 16000) * 0.1
    for index in range(6):
        soundfile.write(str(data / f"{index}.wav"), wave[index], 16000)
    for split in ("train", "valid", "test"):
        (data / f"{split}.tsv").write_text(".\n" + "".join(f"{index}.wav\t16000\n" for index in range(6)))
        (data / f"{split}.ltr").write_text("A B | A |\n" * 6)
    (data / "dict.ltr.txt").write_text("| 2\nA 2\nB 1\n")
    command = [sys.executable, str(ROOT / "examples/distill/run.py"), str(data), "--out", str(tmp_path / "out")]
    command += ["--updates", "2", "--teacher-updates", "2", "2", "--seeds", "1"]
    command += ["--ways", "from scratch (CTC)", "CTC + hidden MSE + LF-MMI"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results) == {"from scratch (CTC)", "CTC + hidden MSE + LF-MMI"}
    assert all(set(wers) == {"valid", "test"} for seeds in results.values() for wers in seeds.values())
    assert "| CTC + hidden MSE + LF-MMI |" in result.stdout
