"""The benchmarks, scaled down until they are quick: they must not rot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def smoke(name):
    """The rows of the tables that a benchmark prints, without the bars at their ends: lists of cells."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--smoke", "--threads", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return [line[2:-2].split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]


def test_streaming_prints_its_table():
    measured = {row[0]: row[1] for row in smoke("streaming.py")[1:]}
    assert 0 < float(measured["real-time factor, one stream"])
    assert float(measured["4 streams as a batch, of one stream"].split()[0]) > 0
    assert any(name.startswith("0.4 minutes") and "words in" in name for name in measured)


def test_huggingface_prints_its_table():
    pytest.importorskip("transformers", reason="Hugging Face's classes: pip install transformers")
    rows = {row[0]: [float(cell) for cell in row[1:]] for row in smoke("huggingface.py")[1:]}
    assert sorted(rows) == ["base (Wav2Vec2ForCTC)", "large (Wav2Vec2ForCTC)", "sew (SEWForCTC)"]
    for alone, padded, by_batch, back in (row[1:5] for row in rows.values()):
        assert max(alone, padded, back) <= 1e-4 and by_batch >= 0


def test_inference_compares_the_same_network():
    rows = smoke("inference.py")
    assert [row[0] for row in rows if row[0] in ("stock fairseq", "ours", "ours, packed")] == [
        "stock fairseq",
        "ours",
        "ours, packed",
    ]
    columns = rows[0]
    numbers = [dict(zip(columns, row)) for row in rows if row != columns]
    assert all(float(row["ms, median"]) > 0 and float(row["GMACs"]) > 0 for row in numbers)
    differences = [float(row["difference"]) for row in numbers if row["difference"].strip()]
    assert len(differences) >= 6 and max(differences) < 1e-4
    by_name = {row["what"]: float(row["GMACs"]) for row in numbers}
    assert by_name["s3q2k2"] < by_name["s1q1k1"] and by_name["pruned"] < by_name["unpruned"]


def test_quantized_compares_bytes_and_time():
    columns, *rows = smoke("quantized.py")
    assert [row[0] for row in rows[:2]] == ["fairseq float32", "float32"] and "int8" in [row[0] for row in rows]
    for row in (dict(zip(columns, row)) for row in rows):
        assert float(row["weights"].split()[0]) > 0 and float(row["median"].split()[0]) > 0
        limit = 1e-4 if row["model"].endswith("float32") else 0.1
        assert float(row["error of the logits"]) < limit


def test_claims_compares_every_paper():
    rows = smoke("claims.py")
    timed = {row[0]: row for row in rows if len(row) == 9 and row[0] != "model"}
    assert len(timed) > 30 and all(float(row[7]) > 0 for row in timed.values())
    assert float(timed["pruned by 40 %"][5].split()[0]) > 1.6 > float(timed["pruned by 20 %"][5].split()[0]) > 1.2
    papers = {row[0] for row in rows if len(row) == 4}
    assert {"W2V2-Light", "Shrinking Bigfoot", "Stochastic wav2vec 2.0", "HJ-Pruning"} <= papers


def test_transcription_gives_the_text_of_the_pieces():
    measured = {row[0]: row[1] for row in smoke("transcription.py")[1:]}
    assert int(measured["words of the utterances"]) > 20
    assert measured["in the others"] == "0"
    assert int(measured["in utterances with zeros of their own"]) == int(measured["words that differ"].split()[0])
    # the references are what the utterances were recognised as
    assert measured["WER of the utterances, of the file"].startswith("0.00 %, ")
    assert any(name.startswith("starts of") for name in measured)


def test_lfmmi_compares_the_losses():
    rows = {row[0]: row[1:] for row in smoke("lfmmi.py")}
    losses = [f"{kind} order {order}" for order in (2, 3) for kind in ("training", "distillation")]
    assert list(rows) == ["loss", "ctc", *losses]
    assert all(float(rows[loss][2]) > 0 for loss in losses)


def test_budget_compares_what_it_took_with_the_budget():
    columns, row = smoke("budget.py")
    measured = dict(zip(columns, row))
    assert measured["point"].startswith("s") and float(measured["budget"]) > 0
    assert float(measured["expected"].split()[0]) <= 1
    assert all(float(measured[name].split()[0]) > 0 for name in ("recordings took", "point measured again"))


def test_training_compares_the_same_update_and_the_memory_of_shared_layers():
    rows = smoke("training.py")
    measured = {row[0]: row[1:] for row in rows}
    assert float(measured["ours"][-1]) < 1e-5 and float(measured["ours"][-2]) > 0
    assert all(float(cell) > 0 for cell in measured["stock fairseq"][:-1])
    unshared, shared = measured["unshared"], measured["shared, a map in every layer"]
    assert float(unshared[0].split()[0]) > 10 * float(shared[0].split()[0])
    assert 0 < float(shared[2]) < float(unshared[2]) and float(shared[1]) < 0.1 * float(unshared[1])


def test_distillation_epoch_compares_the_trainings():
    columns, plain, distilled = smoke("distillation_epoch.py")
    assert columns == ["training", "s an epoch, median", "of plain CTC"]
    assert plain[0] == "plain CTC (fairseq's criterion)" and distilled[0] == "CTC + KL"
    assert plain[2] == "1.00" and all(float(row[1]) > 0 for row in (plain, distilled))
