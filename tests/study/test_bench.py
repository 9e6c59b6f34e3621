"""What bench measures, with a clock that makes every call take one second."""

import itertools
import math
import sys

import pytest
import torch
from tiny_checkpoints import MODELS, STREAMING, finetuned

from fairseq_w2v2_light.nn.counts import count_macs
from fairseq_w2v2_light.runtime import prepare
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.study import bench
from fairseq_w2v2_light.study.bench import LOADED, OURS, Contender, Setting, compare, format_table, load_model
from fairseq_w2v2_light.study.resident import added_memory, in_own_process

TINY = "pretraining/light_stochastic_tiny"
SETTING = Setting(seconds=0.1, batch_size=3)


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """Small matrices, and torch's threads as they were."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(bench, "_EDGES", {"cpu": (16, 32)})
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A stochastic CTC model."""
    return finetuned(tmp_path_factory.mktemp("bench"), **MODELS["stochastic"])


def counting_clock():
    """A clock that is a second later whenever it is read."""
    return itertools.count().__next__


def test_every_column_follows_from_the_times(checkpoint):
    contenders = [
        Contender("fairseq", checkpoint, implementation="fairseq"),
        Contender("loaded", checkpoint, implementation=LOADED),
        Contender("ours", checkpoint),
        Contender("int8", checkpoint, dtype="int8"),
        Contender("s2q1k2", checkpoint, point="s2q1k2"),
    ]
    torch.set_num_threads(2)
    table = compare(contenders, SETTING, 3, counting_clock(), memory=False)
    assert torch.get_num_threads() == 2
    rows = {row.contender.name: row for row in table.rows}
    assert list(rows) == [contender.name for contender in contenders] and not table.left_out
    model = load_ctc(checkpoint)
    macs = 3 * sum(count_macs(model.config, 1600, model.point, len(model.symbols)).values())
    for row in rows.values():
        assert (row.median, row.least, row.p90, row.speed_up, row.peak_bytes) == (1, 1, 1, 1, None)
        assert row.real_time_factor == pytest.approx(1 / 0.3) and row.throughput == pytest.approx(0.3)
        assert row.gflops == 2 * row.macs / 1e9 and row.peak_fraction == pytest.approx(2 * row.macs / (2 * 32**3))
        assert row.mac_ratio == macs / row.macs
    assert rows["ours"].macs == macs > rows["s2q1k2"].macs
    assert rows["fairseq"].difference == rows["s2q1k2"].difference == 0
    assert max(rows[name].difference for name in ("loaded", "ours")) <= 1e-4 < rows["int8"].difference < 1
    assert table.peaks["float32"] == table.best_peaks["float32"] == 2 * 32**3
    lines = format_table(table).splitlines()
    assert lines[0].startswith("3 utterances of 0.1 s, 1 thread; matrix products: ")
    assert len({line.count("|") for line in lines[2:]}) == 1 and len(lines) == 4 + len(contenders)
    # no other row has the weights at this point
    assert lines[-1].startswith("| s2q1k2 |") and lines[-1].endswith("|  |")


def test_the_speed_of_a_product_is_a_median_as_the_rows_are(checkpoint, monkeypatch):
    """A product takes 2, 4 and 1 s, the model 0.5, 2 and 4; neither the first calls nor those after products count."""
    monkeypatch.setattr(bench, "_EDGES", {"cpu": (32,)})
    turns = [(1, 9, 1), (2, 9, 0.5), (4, 9, 2), (1, 9, 4)]
    times = itertools.accumulate(itertools.chain.from_iterable((0, took) for turn in turns for took in turn))
    table = compare([Contender("ours", checkpoint)], SETTING, 3, times.__next__, memory=False)
    (row,) = table.rows
    assert (row.median, row.least) == (2, 0.5)
    assert (table.peaks["float32"], table.best_peaks["float32"]) == (32**3, 2 * 32**3)
    assert row.peak_fraction == pytest.approx(row.macs / 32**3)
    assert row.best_fraction == pytest.approx(2 * row.macs / 32**3)
    assert "matrix products: 0 GFLOP/s in float32 (at best 0)" in format_table(table)


def test_a_model_is_prepared_once_for_all_its_points(checkpoint, monkeypatch):
    dtypes = []
    monkeypatch.setattr(
        bench, "prepare_", lambda model, dtype, *rest: dtypes.append(dtype) or prepare.prepare_(model, dtype, *rest)
    )
    points = [Contender(point, checkpoint, point=point) for point in ("s1q1k1", "s2q1k2")]
    compare([*points, Contender("int8", checkpoint, dtype="int8")], SETTING, 1, counting_clock(), memory=False)
    assert dtypes == ["float32", "int8"]


def test_others_that_cannot_run_are_left_out_with_a_reason(tmp_path):
    path = finetuned(tmp_path, layout="large", **STREAMING)
    other = Contender("stock fairseq", path, implementation="fairseq")
    table = compare([other, Contender("ours", path)], SETTING, 1, counting_clock(), memory=False)
    assert [row.contender.name for row in table.rows] == ["ours"] and table.rows[0].mac_ratio == 1
    assert "without stock fairseq: stock fairseq cannot express this model: it is a streaming" in format_table(table)
    with pytest.raises(ValueError, match="nothing to run: stock fairseq cannot express"):
        compare([other], SETTING, 1, counting_clock(), memory=False)


def test_models_that_stay_in_the_dtype_that_they_were_given(checkpoint):
    half = [Contender("fp32", checkpoint, (), LOADED), Contender("bf16", checkpoint, (), LOADED, "bfloat16")]
    table = compare(half, SETTING, 1, counting_clock(), memory=False)
    assert sorted(table.peaks) == ["bfloat16", "float32"]
    assert 1e-4 < table.rows[1].difference < 0.2
    with pytest.raises(ValueError, match="int8: only our prepared models run in it"):
        bench.build(Contender("int8", checkpoint, (), LOADED, "int8"), SETTING)


def no_compiler(wave):
    raise RuntimeError("no C++ compiler\nset CXX")


def test_a_compiled_model_is_torch_compiles(checkpoint, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    rows = [Contender("ours", checkpoint), Contender("compiled", checkpoint, compiled=True)]
    table = compare(rows, SETTING, 1, counting_clock(), memory=False)
    assert len(compiled) == 1 and table.rows[1].difference == 0
    monkeypatch.setattr(torch, "compile", lambda module: no_compiler)
    table = compare(rows, SETTING, 1, counting_clock(), memory=False)
    assert table.left_out == {"compiled": "torch.compile fails here: no C++ compiler"} and len(table.rows) == 1


def test_a_recipe_has_the_same_random_weights_in_every_call():
    first, second = (load_model(TINY, ["model.operating_point=s2q1k1"]) for _ in range(2))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert str(first.point) == "s2q1k1" and len(first.symbols) == 32 and not first.training


def test_only_recipes_have_overrides(checkpoint):
    with pytest.raises(ValueError, match="overrides are for recipes; leave out model.unique_layers=2"):
        load_model(checkpoint, ["model.unique_layers=2"])
    assert load_model(checkpoint).symbols == load_ctc(checkpoint).symbols


@pytest.mark.parametrize(
    "setting, repeats, message",
    [
        (Setting(0.1, threads=0), 1, "threads: found 0, expected 1 or more"),
        (Setting(0.0), 1, "seconds: found 0, expected a positive number"),
        (Setting(math.nan), 1, "seconds: found nan, expected a positive number"),
        (Setting(0.1, batch_size=0), 1, "batch size: found 0, expected a positive number"),
        (SETTING, 0, "repeats: found 0, expected a positive number"),
        (Setting(0.001), 1, "too short"),
    ],
)
def test_settings_that_are_none(checkpoint, setting, repeats, message):
    with pytest.raises(ValueError, match=message):
        compare([Contender("ours", checkpoint)], setting, repeats)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none(checkpoint):
    with pytest.raises(ValueError, match="device cuda: torch .* finds no GPU here; choose --device cpu"):
        compare([Contender("ours", checkpoint)], Setting(0.1, device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(checkpoint, monkeypatch):
    monkeypatch.setattr(bench, "_EDGES", {"cuda": (256,)})
    rows = [Contender(dtype, checkpoint, (), OURS, dtype) for dtype in ("float32", "bfloat16")]
    table = compare(rows, Setting(0.1, device="cuda"), 2)
    assert all(row.peak_bytes > 0 and math.isfinite(row.difference) for row in table.rows)
    with pytest.raises(ValueError, match="int8 was asked for, which runs on CPUs"):
        compare([Contender("int8", checkpoint, dtype="int8")], Setting(0.1, device="cuda"))


def test_bfloat16_is_refused_where_the_cpu_has_none(checkpoint, monkeypatch):
    monkeypatch.setattr(prepare, "multiplies_bfloat16", lambda: False)
    with pytest.raises(ValueError, match="this CPU has no instructions for it"):
        compare([Contender("ours", checkpoint, dtype="bfloat16")], SETTING)


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory a call took")


@LINUX
def test_added_memory_is_what_the_work_allocates():
    added = added_memory(lambda: torch.ones(2**23))
    # Linux counts pages in batches
    assert 0.9 * 2**25 < added < 1.2 * 2**25
    assert added_memory(lambda: None) < 2**23


@LINUX
def test_the_peak_of_a_call_is_measured_in_a_process_of_its_own(checkpoint):
    peak = bench.peak_memory(Contender("ours", checkpoint, implementation=LOADED), Setting(30.0, batch_size=2))
    # the first convolution alone makes 16 channels of a fifth of the samples
    assert peak > 4 * 16 * 2 * 30 * 16000 / 5


def test_what_fails_in_a_process_of_its_own_fails_here():
    with pytest.raises(ValueError, match="invalid literal"):
        in_own_process(int, "x")
    with pytest.raises(ChildProcessError, match="was killed"):
        in_own_process(eval, "__import__('os')._exit(9)")
