"""The benchmarks, scaled down until they are quick: they must not rot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_streaming_prints_its_table():
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "benchmarks/streaming.py"), "--smoke", "--threads", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")][1:]
    measured = {row[0][2:]: row[1] for row in rows}
    assert 0 < float(measured["real-time factor, one stream"])
    assert float(measured["4 streams as a batch, of one stream"].split()[0]) > 0
    assert any(name.startswith("0.4 minutes") and "words in" in name for name in measured)


def test_huggingface_prints_its_table():
    pytest.importorskip("transformers", reason="Hugging Face's classes: pip install transformers")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "benchmarks/huggingface.py"), "sew", "--smoke"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    row = result.stdout.splitlines()[-1].split(" | ")
    assert row[0] == "| sew (SEWForCTC)"
    assert all(float(cell) <= 1e-4 for cell in (row[2], row[3], row[5])) and float(row[4]) > 1e-3
