"""The benchmarks, scaled down until they are quick: they must not rot."""

import os
import subprocess
import sys
from pathlib import Path

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
