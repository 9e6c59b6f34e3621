"""The operating point for a budget: what is measured, kept and chosen, and on what grounds."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from fairseq_w2v2_light.nn.config import EncoderConfig
from fairseq_w2v2_light.nn.operating_point import OperatingPoint, OperatingPointSpace
from fairseq_w2v2_light.runtime import operating
from fairseq_w2v2_light.runtime.ctc import CtcModel
from fairseq_w2v2_light.runtime.folder import read_config, read_folder, write_folder
from fairseq_w2v2_light.runtime.operating import (
    Speed,
    Workload,
    cache_file,
    choose,
    fingerprint,
    kept_or_measured,
    measure,
    parse_budget,
    rank,
    read_cache,
    record,
    recorded,
    trained_points,
    write_cache,
)

SPACE = OperatingPointSpace((1, 2), (1, 2), (1,), 2)
CONFIG = EncoderConfig(
    conv_layers=((16, 10, 5), (16, 3, 2), (16, 2, 2)),
    extractor_norm="layer",
    dim=16,
    ffn_dim=32,
    heads=2,
    norm_first=True,
    conv_pos=4,
    conv_pos_groups=2,
    layer_map=(0, 1),
    operating_points=SPACE,
    unsqueeze_factor=2,
)
STREAMING = dataclasses.replace(
    CONFIG, operating_points=dataclasses.replace(SPACE, chunk=(4, 8)), left_context=8, lookahead=4
)
SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "|", "A"]
S1, S1Q2, S2, S2Q2 = POINTS = [OperatingPoint.parse(text) for text in ("s1q1k1", "s1q2k1", "s2q1k1", "s2q2k1")]
KEY = {"cpu": "a", "model": "b"}


def names(points):
    return [str(point) for point in points]


def wers(**rates):
    """`about` of a model folder that records them."""
    return {"operating_points": [{"point": point, "wer": rate, "references": "test"} for point, rate in rates.items()]}


def speeds(*factors):
    return {point: Speed(0.8 * factor, factor) for point, factor in zip(POINTS, factors)}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "w2v2-light" / "operating-points"


@pytest.fixture
def folder(tmp_path):
    write_folder(CtcModel(CONFIG, SYMBOLS).eval(), tmp_path / "model", {"note": "mine"})
    return tmp_path / "model"


@pytest.mark.parametrize("text, budget", [("rtf=0.05", 0.05), ("rtf=2", 2), (" rtf = 1e-3", 1e-3)])
def test_budgets(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "0.05", "rtf", "rtf=", "rtf=0", "rtf=-1", "rtf=nan", "rtf=inf", "latency=2s"])
def test_bad_budgets_are_quoted(text):
    with pytest.raises(ValueError, match=f"--budget {text}: expected rtf=FACTOR"):
        parse_budget(text)


def test_points_with_the_same_pooling_everywhere_are_candidates():
    assert names(trained_points(CONFIG, S1)) == names(POINTS)


def test_a_model_that_was_fine_tuned_at_one_point_has_that_one():
    assert names(trained_points(CONFIG, S2)) == ["s2q1k1"]


def test_a_plain_model_has_one_point():
    plain = dataclasses.replace(CONFIG, operating_points=OperatingPointSpace(depth=2))
    assert names(trained_points(plain, S1)) == ["s1q1k1"]
    assert rank(plain, [S1], 6).why == "the only one"


def test_a_streaming_model_runs_files_with_its_largest_chunk():
    own = STREAMING.operating_points.default
    assert names(trained_points(STREAMING, own)) == ["s1q1k1c8", "s1q2k1c8", "s2q1k1c8", "s2q2k1c8"]


def test_points_per_layer_are_candidates_where_an_error_rate_is_recorded():
    per_layer = dataclasses.replace(CONFIG, operating_points=dataclasses.replace(SPACE, per_layer=True))
    about = wers(s1q1k1=5, **{"s1q1-2k1": 6})
    points = trained_points(per_layer, S1, about)
    assert names(points) == [*names(POINTS), "s1q1-2k1"]
    assert names(rank(per_layer, points, 6, about).points) == ["s1q1k1", "s1q1-2k1", "s1q2k1", "s2q1k1", "s2q2k1"]


@pytest.mark.parametrize(
    "entries",
    [None, {}, "text", [3], [{"point": "s1q1k1"}], [{"wer": 5}], [{"point": "s9q1k1", "wer": 5}]]
    + [[{"point": "s1q1k1", "wer": wer}] for wer in (None, "5", True, -1, float("nan"))],
)
def test_what_is_no_record_is_left_out(entries):
    assert recorded({"operating_points": entries}, CONFIG) == recorded(None, CONFIG) == {}


def test_recorded_error_rates_order_the_points():
    ranking = rank(CONFIG, POINTS, 6, wers(s1q1k1=5.2, s1q2k1=5.1, s2q1k1=7, s2q2k1=5.2))
    assert (ranking.by, ranking.why) == ("WER", "by WER on test")
    # equally accurate: the one that computes less
    assert names(ranking.points) == ["s1q2k1", "s2q2k1", "s1q1k1", "s2q1k1"]


def test_otherwise_macs_do():
    ranking = rank(CONFIG, POINTS, 6)
    assert (ranking.by, ranking.why) == ("MACs", "by MACs, as no WERs are recorded")
    assert names(ranking.points) == names(POINTS)
    ranking = rank(CONFIG, POINTS, 6, wers(s1q1k1=9, s2q2k1=1))
    assert names(ranking.points) == names(POINTS) and "WERs are recorded of 2 of 4 points" in ranking.why
    for key in ("references", "decoder"):
        about = wers(s1q1k1=9, s1q2k1=8, s2q1k1=7, s2q2k1=1)
        about["operating_points"][0][key] = "other"
        why = rank(CONFIG, POINTS, 6, about).why
        assert why == "by MACs, as the recorded WERs are of different references or decoders"


def test_of_chunks_the_larger_one_is_more_accurate():
    points = [OperatingPoint.parse(text) for text in ("s1q1k1c4", "s1q1k1c8", "s2q1k1c8")]
    assert names(rank(STREAMING, points, 6).points) == ["s1q1k1c8", "s1q1k1c4", "s2q1k1c8"]


class Machine:
    """A clock that runs as points are run. seconds: what each run of a point takes of ten seconds, one after the other;
    a shorter one takes its share of the last one, and `start`."""

    def __init__(self, seconds, start=0.0):
        self.now, self.runs, self.last, self.start = 100.0, [], 0.0, start
        self._seconds = {point: iter(values) for point, values in seconds.items()}

    def clock(self):
        return self.now

    def run(self, point, samples):
        self.runs.append((point, samples))
        if len(samples) == 80000:
            self.last = next(self._seconds[point])
        self.now += self.last if len(samples) == 80000 else self.last * len(samples) / 80000 + self.start


def test_points_are_measured_in_turns_after_a_run_that_does_not_count():
    rounds = operating.MOST_ROUNDS
    noisy = [50] + [1.0] * (rounds - 2) + [3.0, 9.0]
    machine = Machine({S1: noisy, S2: [50] + [0.5] * rounds})
    found = measure(machine.run, [S1, S2], 8000, machine.clock)
    assert [point for point, _ in machine.runs] == [S1, S2] + [S1, S1, S2, S2] * rounds
    lengths = [len(samples) / 8000 for _, samples in machine.runs[2:]]
    assert lengths[::2] == [10] * (2 * rounds) and lengths[1:8:2] == [1, 1, 1.5, 1.5]
    assert all(samples.dtype == "float32" for _, samples in machine.runs)
    assert found[S2].slow == pytest.approx(0.05) and found[S1].median == pytest.approx(0.1)
    assert found[S1].slow == pytest.approx(0.1)  # two of twenty were slower
    assert found[S1].start == pytest.approx(0, abs=1e-9)


def test_what_a_call_takes_besides_its_audio_is_measured():
    machine = Machine({S1: [2.0] * 99}, start=0.03)
    speed = measure(machine.run, [S1], 8000, machine.clock)[S1]
    assert (speed.slow, speed.start) == (pytest.approx(0.2), pytest.approx(0.03))


def test_slow_models_are_measured_a_few_times():
    machine, notes = Machine({S1: [30.0] * 99}), []
    measure(machine.run, [S1], 8000, machine.clock, notes.append)
    assert len(machine.runs) == 2 * operating.FEWEST_ROUNDS + 1
    assert notes == ["this takes about 150 s"]


SPEED = Speed(0.04, 0.05, 0.2)


def test_a_call_costs_as_much_for_little_audio():
    assert Workload((10.0,)).factor(SPEED) == pytest.approx(0.05 + 0.2 / 10)
    assert Workload((1.0,)).factor(SPEED) == pytest.approx(0.05 + 0.2)
    assert Workload().factor(SPEED) == Workload(()).factor(SPEED) == 0.05


def test_recordings_are_reckoned_in_the_batches_that_they_are_heard_in():
    assert Workload((2.0,) * 20).factor(SPEED) == pytest.approx(0.05 + 2 * 0.2 / 40)
    # padded to the next half second, and to the longest of the batch
    assert Workload((1.2,)).factor(SPEED) == pytest.approx((0.2 + 0.05 * 1.5) / 1.2)
    assert Workload((8.0, 2.0)).factor(SPEED) == pytest.approx((0.2 + 0.05 * 16) / 10)


def test_long_recordings_are_heard_in_windows():
    assert Workload((50.0,)).factor(SPEED) == pytest.approx((3 * 0.2 + 0.05 * 50) / 50)
    assert Workload((50.0,), longest=40.0).factor(SPEED) == pytest.approx((2 * 0.2 + 0.05 * 50) / 50)
    assert 0.05 < Workload((1e15, 2.0)).factor(SPEED) < 0.07  # a header that promises years


def test_attention_grows_with_the_length():
    assert Workload((20.0,)).factor(SPEED, lambda seconds: seconds**2) == pytest.approx(0.1 + 0.2 / 20)
    # but a short utterance is as dear as its share of a longer one
    assert Workload((2.0,)).factor(SPEED, lambda seconds: seconds**2) == pytest.approx(0.05 + 0.2 / 2)


def test_of_many_recordings_some_are_looked_at():
    asked = []
    workload = Workload.of(range(5000), lambda index: asked.append(index) or 3.0, 30.0)
    assert workload.lengths == (3.0,) * 500 and asked[:3] == [0, 10, 20] and workload.longest == 30
    assert str(workload) == "for recordings of 3.0 s on average" and str(Workload()) == "for utterances of 10 s"
    assert Workload.of([], len) == Workload() and Workload.of(["a"], len).lengths == (1,)
    # one of unknown length, as on standard input
    assert str(Workload((0.0,))) == "for a recording of 10.0 s" and Workload((0.0,)).factor(SPEED) > 0.05


def test_the_point_is_chosen_for_the_recordings():
    ranking = rank(CONFIG, POINTS, 6)
    measured = {point: Speed(speed.median, speed.slow, 0.05) for point, speed in speeds(0.09, 0.05, 0.04, 0.02).items()}
    assert choose(ranking, measured, 0.07).point == S1Q2
    assert choose(ranking, measured, 0.07, workload=Workload((2.0,) * 10)).point == S1Q2
    choice = choose(ranking, measured, 0.07, workload=Workload((2.0,)))
    assert choice.point == S2 and "keep rtf=0.07: rtf 0.065 for a recording of 2.0 s here" in choice.line()
    with pytest.raises(ValueError, match="of 0.045 for a recording of 2.0 s; give --budget rtf=0.045 or more"):
        choose(ranking, measured, 0.03, workload=Workload((2.0,)))
    dear = choose(ranking, measured, 0.07, "", Workload((20.0,)), lambda point, seconds: seconds**2)
    assert dear.point == S2Q2


def test_the_most_accurate_point_that_keeps_the_budget_is_chosen():
    ranking = rank(CONFIG, POINTS, 6, wers(s1q1k1=5.1, s1q2k1=5.3, s2q1k1=5.2, s2q2k1=9))
    choice = choose(ranking, speeds(0.09, 0.05, 0.05, 0.02), 0.05)
    assert choice.point == S2
    assert choice.line() == (
        "operating point s2q1k1: the most accurate (by WER on test) of the 3 of 4 points that keep rtf=0.05: rtf 0.05 "
        "for utterances of 10 s here, measured now"
    )
    assert [line.split() for line in choice.table()] == [
        ["point", "rtf", "of", "10", "s", "median", "fits", "WER", "%"],
        ["s1q1k1", "0.09", "0.09", "0.072", "no", "5.10"],
        ["s2q1k1", "0.05", "0.05", "0.04", "yes", "5.20", "<"],
        ["s1q2k1", "0.05", "0.05", "0.04", "yes", "5.30"],
        ["s2q2k1", "0.02", "0.02", "0.016", "yes", "9.00"],
    ]


def test_a_choice_of_one_says_so():
    choice = choose(rank(CONFIG, [S2], 6), {S2: Speed(0.01, 0.02)}, 0.05, "measured on 2026-01-01")
    assert choice.line().startswith(
        "operating point s2q1k1: the only one of the model; it keeps rtf=0.05: rtf 0.02 for utterances"
    )
    assert "GMACs" in choice.table()[0]


def test_a_budget_that_no_point_keeps_names_the_fastest():
    with pytest.raises(
        ValueError, match="the fastest, s2q2k1, has .* factor of 0.0321 for utterances of 10 s; give --budget rtf=0.033"
    ):
        choose(rank(CONFIG, POINTS, 6), speeds(0.2, 0.15, 0.04, 0.0321), 0.01)


def test_a_measurement_is_kept(cache):
    def fails(point, samples):
        raise AssertionError("measured again")

    notes, runs = [], []
    first, when = kept_or_measured(lambda *run: runs.append(run), POINTS, KEY, 100, note=notes.append)
    assert when == "measured now" and runs and len(list(cache.iterdir())) == 1
    assert notes == [f"measuring 4 operating points on this machine, once (kept in {cache_file(KEY)})"]
    second, when = kept_or_measured(fails, POINTS, KEY, 100, note=notes.append)
    assert second == first and when.startswith("measured on 20") and len(notes) == 1
    assert kept_or_measured(lambda *run: None, POINTS, KEY, 100, again=True)[1] == "measured now"
    for key in ({**KEY, "cpu": "c"}, {**KEY, "model": "c"}):
        assert kept_or_measured(lambda *run: None, POINTS, key, 100)[1] == "measured now"
    assert read_cache(cache_file(KEY), KEY, [S1])[0] == {S1: read_cache(cache_file(KEY), KEY, POINTS)[0][S1]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: "",
        lambda values: "{",
        lambda values: "[" * 100000,
        lambda values: "null",
        lambda values: json.dumps([values]),
        lambda values: json.dumps({**values, "version": 0}),
        lambda values: json.dumps({**values, "key": {**KEY, "cpu": "other"}}),
        lambda values: json.dumps({**values, "date": "yesterday"}),
        lambda values: json.dumps({**values, "points": {}}),
        lambda values: json.dumps({**values, "points": dict.fromkeys(names(POINTS), 0.1)}),
    ]
    + [
        lambda values, kept=kept: json.dumps(
            {**values, "points": dict.fromkeys(names(POINTS), dict(zip(("median", "slow", "start"), kept)))}
        )
        for kept in ((0, 0, 0), (2, 1, 0), (1, "nan", 0), (1, 2), (1, 2, -1), (1, 2, "inf"))
    ],
)
def test_what_is_damaged_or_stale_is_measured_again(cache, damage):
    file = cache_file(KEY)
    write_cache(file, KEY, speeds(4, 3, 2, 1))
    assert read_cache(file, KEY, POINTS)[0] == speeds(4, 3, 2, 1)
    file.write_text(damage(json.loads(file.read_text())))
    assert read_cache(file, KEY, POINTS) is None
    assert kept_or_measured(lambda *run: None, POINTS, KEY, 100)[1] == "measured now"
    assert read_cache(file, KEY, POINTS) is not None


def test_a_point_that_was_not_measured_is(cache):
    write_cache(cache_file(KEY), KEY, {S1: Speed(1, 2)})
    assert read_cache(cache_file(KEY), KEY, POINTS) is None


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    notes = []
    assert kept_or_measured(lambda *run: None, [S1], KEY, 100, note=notes.append)[1] == "measured now"
    assert "the measurement could not be kept" in notes[-1]


def test_the_cache_is_where_xdg_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the rules say to ignore
    assert operating.cache_folder() == Path("/home/someone/.cache/w2v2-light/operating-points")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert operating.cache_folder() is None
    assert kept_or_measured(lambda *run: None, [S1], KEY, 100)[1] == "measured now"


def test_the_fingerprint_is_that_of_weights_and_network(folder, tmp_path):
    before = fingerprint(folder)
    record(folder, [{"point": "s1q1k1", "wer": 5.0}])
    assert fingerprint(folder) == before
    model = read_folder(folder)
    with torch.no_grad():
        model.head.bias[0] += 1
    write_folder(model, folder, {})
    assert fingerprint(folder) != before
    (tmp_path / "a.pt").write_bytes(b"weights")
    (tmp_path / "b.pt").write_bytes(b"weights2")
    assert fingerprint(tmp_path / "a.pt") != fingerprint(tmp_path / "b.pt")


def test_the_machine_is_described():
    described = operating.machine(3, "2.1")
    assert described["threads"] == "3" and described["torch"] == "2.1" and described["cpu"]
    assert int(described["cores"]) >= 1


def test_error_rates_are_recorded_in_a_model_folder(folder):
    record(folder, [{"point": "s1q1k1", "wer": 5.0, "references": "a"}, {"point": "s2q1k1", "wer": 6.0}])
    record(folder, [{"point": "s1q1k1", "wer": 4.0}])
    about = read_config(folder)["about"]
    assert about["note"] == "mine"
    assert about["operating_points"] == [
        {"point": "s1q1k1", "wer": 4.0, "references": "a"},
        {"point": "s2q1k1", "wer": 6.0},
    ]
    assert {str(point): entry["wer"] for point, entry in recorded(about, CONFIG).items()} == {"s1q1k1": 4, "s2q1k1": 6}
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors", "tokens.txt"]
    assert read_folder(folder).config == CONFIG
    with pytest.raises(ValueError, match="not a model folder"):
        record(folder / "absent", [])


def test_macs_of_an_export_stay_beside_the_error_rate(folder):
    config = json.loads((folder / "config.json").read_text())
    config["about"]["operating_points"] = [{"point": "s1q1k1", "macs": 7}, "odd"]
    (folder / "config.json").write_text(json.dumps(config))
    record(folder, [{"point": "s1q1k1", "wer": 4.0}])
    assert read_config(folder)["about"]["operating_points"] == [{"point": "s1q1k1", "macs": 7, "wer": 4.0}]
