"""The examples, scaled down until they are quick: they must not rot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
