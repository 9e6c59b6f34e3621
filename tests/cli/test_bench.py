"""`w2v2-light bench`: the command line; what it measures is tested in tests/study."""

import json
import math

import pytest
import torch
from tiny_checkpoints import MODELS, finetuned, pretrained

from fairseq_w2v2_light.cli.bench import parse_models
from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.export.folder import export_folder
from fairseq_w2v2_light.study import bench
from fairseq_w2v2_light.study.training import peak_memory

TINY = "pretraining/light_stochastic_tiny"
QUICK = ["--smoke", "--no-memory", "--threads", "1", "--seconds", "0.1"]


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """Small matrices, and torch's threads as they were."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(bench, "_EDGES", {"cpu": (16,)})
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A stochastic CTC model."""
    return finetuned(tmp_path_factory.mktemp("bench"), **MODELS["stochastic"])


def numbers(value):
    """All numbers in JSON."""
    if isinstance(value, (dict, list)):
        return [number for item in (value.values() if isinstance(value, dict) else value) for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def test_json_has_every_setting_and_row(checkpoint, capsys):
    points = ["--operating-points", "s1q1k1", "s2q1k2"]
    arguments = [*points, "--dtypes", "float32", "int8", "--against", "fairseq", "--batch-sizes", "1", "2", "--json"]
    assert main(["bench", checkpoint, *QUICK, *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["repeats"] == 1 and result["machine"]["torch"] == torch.__version__
    assert [table["setting"]["batch_size"] for table in result["tables"]] == [1, 2]
    for table in result["tables"]:
        rows = {row["contender"]["name"]: row for row in table["rows"]}
        assert list(rows) == [
            "stock fairseq float32 s1q1k1",
            *("ours float32 s1q1k1", "ours int8 s1q1k1", "ours float32 s2q1k2", "ours int8 s2q1k2"),
        ]
        assert all(math.isfinite(number) for row in rows.values() for number in numbers(row))
        assert rows["ours float32 s1q1k1"]["difference"] <= 1e-4
        assert list(table["left_out"]) == ["stock fairseq float32 s2q1k2"]


def test_a_table_of_several_models_a_recipe_with_overrides_and_a_folder(checkpoint, tmp_path, capsys):
    export_folder(checkpoint, tmp_path / "folder")
    models = [str(tmp_path / "folder"), TINY, "model.encoder_layers=2"]
    assert main(["bench", *models, *QUICK]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith(f"torch {torch.__version__}; ") and "int8: " in header
    rows = [line[2:-2].split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == [
        f"{tmp_path / 'folder'} ours float32",
        f"{' '.join(models[1:])} ours float32",
    ]
    assert all(float(cell) > 0 for row in rows[1:] for cell in row[1:6])


def test_all_points_of_a_model(checkpoint, capsys):
    assert main(["bench", checkpoint, *QUICK, "--operating-points", "all"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ours")]
    assert len(rows) == 8 and rows[-1].startswith("| ours float32 s2q2k2 |")


def test_training_compares_updates(capsys):
    recipe = [TINY, "model.encoder_layers=1", "model.squeeze_factors=[1]", "model.query_pools=[1]"]
    arguments = ["--training", "--updates", "1", "--seconds", "0.5", "--threads", "1", "--no-memory"]
    assert main(["bench", *recipe, "model.kv_pools=[1]", *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (table,) = result["tables"]
    stock, ours = table["rows"]
    assert result["updates"] == 1 and (stock["name"], ours["name"]) == ("stock fairseq", "ours")
    assert stock["parameters"] == ours["parameters"] and ours["difference"] < 1e-5
    for row in (stock, ours):
        assert row["updates_per_second"] > 0 and row["peak_bytes"] is None


def test_the_memory_of_an_update_has_weights_gradients_and_adams_averages():
    weights, peak = peak_memory(TINY, ("model.encoder_layers=1",), 0.5, 1, 1)
    assert peak > 16 * weights


def test_training_of_a_shared_stochastic_model_has_no_common_loss(capsys):
    assert main(["bench", TINY, "model.encoder_layers=2", *QUICK, "--seconds", "0.5", "--training"]) == 0
    stock, ours = [line[2:-2].split(" | ") for line in capsys.readouterr().out.splitlines()[-2:]]
    assert float(stock[4]) > float(ours[4]) > 0 and float(ours[6]) > 0
    assert ours[5].strip() == ours[7].strip() == ""


def test_a_path_may_look_like_an_override(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.lr=0.1").mkdir()
    assert parse_models(["a", "model.lr=0.1", "model.x=1"]) == [("a", ()), ("model.lr=0.1", ("model.x=1",))]


def test_overrides_belong_to_the_recipe_before_them():
    words = ["a", "model.x=1", "model.y=2", "model.pt", "b", "model.x=3"]
    assert parse_models(words) == [("a", ("model.x=1", "model.y=2")), ("model.pt", ()), ("b", ("model.x=3",))]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere/nothing"], "recipe 'nowhere/nothing': no such file or name"),
        (["model.unique_layers=1"], "found an override before any model"),
        ([TINY, "model.nonsense=1"], "'model.nonsense': the model has no such key"),
        ([TINY, "--threads", "0"], "--threads: found 0, expected 1 or more"),
        ([TINY, "--batch-sizes", "2", "-1"], "--batch-sizes: found -1, expected 1 or more"),
        ([TINY, "--seconds", "inf"], "seconds: found inf, expected a positive number"),
        ([TINY, "--seconds", "-1"], "seconds: found -1, expected a positive number"),
        ([TINY, "--repeats", "0"], "repeats: found 0, expected a positive number"),
        ([TINY, "--operating-points", "s9q1k1"], "not trained with squeeze factor 9"),
        ([TINY, "--operating-points", "fast"], "operating point 'fast': expected sSqQkK"),
        ([TINY, "--updates", "2"], "--updates: found 2, but it counts updates of training; add --training"),
        ([TINY, "--training", "--dtypes", "int8", "--compile"], "in fp32; leave out --dtypes, --compile"),
        ([TINY, "--training", "--updates", "0"], "training: found 0 updates"),
        (["finetuning/tiny", "--training"], "expected pre-training, one of"),
        (
            [TINY, "--training", "--seconds", "0.01"],
            "shortest utterance has 0 frames, expected more than a mask",
        ),
        ([TINY, "--seconds", "1e300"], "seconds: found 1e+300, expected at most 86,400"),
        ([TINY, "unique_layers=2"], "neither a model nor an override of one; expected model.unique_layers=2"),
    ],
)
def test_bad_input_gets_a_message(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_updates_of_a_trained_model_are_refused(checkpoint, capsys):
    assert main(["bench", checkpoint, "--training"]) == 2
    assert "a trained model; updates are timed from random weights" in capsys.readouterr().err


def test_an_unknown_dtype_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["bench", TINY, "--dtypes", "float8"])
    assert "invalid choice: 'float8'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", ([], ["--training"]))
def test_cuda_is_refused_where_there_is_none(arguments, checkpoint, capsys):
    source = TINY if arguments else checkpoint
    assert main(["bench", source, *arguments, "--device", "cuda"]) == 2
    assert "finds no GPU here; choose --device cpu" in capsys.readouterr().err


def test_a_pretrained_checkpoint_has_no_head(tmp_path, capsys):
    assert main(["bench", pretrained(tmp_path / "pretrained.pt")]) == 2
    assert "a pre-training checkpoint ('w2v2_light'), which has no CTC head" in capsys.readouterr().err
