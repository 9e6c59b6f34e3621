"""Options of model, operating point and decoder, as transcribe and evaluate share them."""

import argparse
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from fairseq_w2v2_light.cli import main as cli
from fairseq_w2v2_light.cli import recognition_options
from fairseq_w2v2_light.nn.config import EncoderConfig
from fairseq_w2v2_light.nn.operating_point import OperatingPointSpace
from fairseq_w2v2_light.runtime import operating, recognizer
from fairseq_w2v2_light.runtime.ctc import CtcModel
from fairseq_w2v2_light.runtime.folder import write_folder
from fairseq_w2v2_light.runtime.operating import Speed, record

CONFIG = EncoderConfig(
    conv_layers=((16, 10, 5), (16, 3, 2), (16, 16, 16)),
    extractor_norm="layer",
    dim=16,
    ffn_dim=32,
    heads=2,
    norm_first=True,
    conv_pos=4,
    conv_pos_groups=2,
    layer_map=(0, 1),
    operating_points=OperatingPointSpace((1, 2), (1, 2), (1,), 2, per_layer=True),
    unsqueeze_factor=2,
)


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_folder(CtcModel(CONFIG, ["<s>", "<pad>", "</s>", "<unk>", "|", "A"]).eval(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def speeds(monkeypatch):
    """Has every point measured at the factor that the test says; gives the points that were measured."""
    measured = []

    def install(**factors):
        def measure(run, points, sample_rate, note):
            measured.extend(map(str, points))
            return {point: Speed(factors[str(point)] / 2, factors[str(point)]) for point in points}

        monkeypatch.setattr(operating, "measure", measure)
        return measured

    return install


def options(*arguments, several=False):
    parser = argparse.ArgumentParser()
    recognition_options.add_arguments(parser, several_points=several)
    args = parser.parse_args(list(map(str, arguments)))
    recognition_options.check(args)
    return args


def test_the_model_is_asked_for():
    with pytest.raises(SystemExit):
        options()


def test_the_chosen_point_is_that_of_the_recogniser(model, speeds):
    measured = speeds(s1q1k1=0.4, s1q2k1=0.3, s2q1k1=0.2, s2q2k1=0.1)
    notes = []
    args = options("--model", model, "--auto-operating-point", "--budget", "rtf=0.25")
    made = recognition_options.recognizer(args, notes.append)
    assert str(made.point) == "s2q1k1" and measured == ["s1q1k1", "s1q2k1", "s2q1k1", "s2q2k1"]
    assert notes[-1].startswith("operating point s2q1k1: the most accurate (by MACs, as no WERs are recorded)")
    assert recognition_options.points(args, made) == [made.point]


@pytest.mark.parametrize("seconds, point", [([4.0] * 5, "s1q2k1"), ([1.0], "s2q2k1"), ([None], "s1q2k1")])
def test_the_point_is_chosen_for_the_recordings(model, monkeypatch, tmp_path, seconds, point):
    import soundfile

    for length in filter(None, seconds):
        soundfile.write(tmp_path / f"{length}.wav", [0.0] * round(16000 * length), 16000)
    # the kept measurement of an earlier process
    kept = {"s1q1k1": 0.4, "s1q2k1": 0.2, "s2q1k1": 0.18, "s2q2k1": 0.1}
    monkeypatch.setattr(
        operating,
        "kept_or_measured",
        lambda run, points, *rest: (
            {point: Speed(kept[str(point)], kept[str(point)], 0.1) for point in points},
            "then",
        ),
    )
    heard = []
    transcribe = recognizer.Recognizer.transcribe
    monkeypatch.setattr(
        recognizer.Recognizer,
        "transcribe",
        lambda self, sources: heard.append((str(self.point), len(sources[0][0]))) or transcribe(self, sources),
    )
    recordings = [None if length is None else tmp_path / f"{length}.wav" for length in seconds]
    args = options("--model", model, "--auto-operating-point", "--budget", "rtf=0.25")
    made = recognition_options.recognizer(args, lambda line: None, recordings)
    # and what a first call takes is not left to the recordings
    assert str(made.point) == point and heard == [(point, 160000)]


@pytest.mark.parametrize("compute, told", [(2.7, 0), (2.8, 1)])
def test_a_run_above_the_budget_is_told(model, compute, told):
    notes = []
    args = options("--model", model, "--auto-operating-point", "--budget", "rtf=0.25")
    recognition_options.compare_with_budget(args, compute, 10.0, notes.append)
    assert len(notes) == told and all("factor of 0.28, above --budget rtf=0.25" in line for line in notes)
    recognition_options.compare_with_budget(options("--model", model), compute, 10.0, notes.append)
    assert len(notes) == told


def test_a_recorded_point_per_layer_is_a_candidate(model, speeds):
    about = dict(s1q1k1=5, s1q2k1=6, s2q1k1=8, s2q2k1=9)
    record(model, [{"point": point, "wer": wer} for point, wer in {**about, "s1q1-2k1": 5.5}.items()])
    speeds(**{"s1q1-2k1": 0.24}, s1q1k1=0.4, s1q2k1=0.3, s2q1k1=0.2, s2q2k1=0.1)
    args = options("--model", model, "--auto-operating-point", "--budget", "rtf=0.25", "-v")
    notes = []
    assert str(recognition_options.recognizer(args, notes.append).point) == "s1q1-2k1"
    assert len(notes) == 8 and notes[4].endswith("5.50   <")


def test_a_budget_that_is_not_kept_leaves_the_recogniser_alone(model, speeds):
    speeds(s1q1k1=0.4, s1q2k1=0.3, s2q1k1=0.2, s2q2k1=0.1)
    with pytest.raises(
        ValueError,
        match="the fastest, s2q2k1, has a real-time factor of 0.1 for utterances of 10 s; give --budget rtf=0.1",
    ):
        recognition_options.recognizer(options("--model", model, "--auto-operating-point", "--budget", "rtf=0.05"))


def test_several_points(model):
    args = options("--model", model, "--operating-point", "s2q1k1,s1q1-2k1", several=True)
    made = recognition_options.recognizer(args)
    assert str(made.point) == "s2q1k1"
    assert list(map(str, recognition_options.points(args, made))) == ["s2q1k1", "s1q1-2k1"]
    every = recognition_options.points(options("--model", model), made, all_points=True)
    assert list(map(str, every)) == ["s1q1k1", "s1q2k1", "s2q1k1", "s2q2k1"]


def test_what_is_measured_is_the_whole_way_to_text(model, monkeypatch):
    seen = []

    def kept_or_measured(run, points, key, sample_rate, again, note):
        run(points[-1], [0.0] * 4000)
        seen.append(key)
        return {point: Speed(0.1, 0.1) for point in points}, "measured now"

    class Decoder:
        def decode(self, log_probs):
            seen.append(log_probs.shape)
            return ()

    monkeypatch.setattr(operating, "kept_or_measured", kept_or_measured)
    monkeypatch.setattr(recognizer, "BeamDecoder", lambda labels, beam: Decoder())
    args = options("--model", model, "--beam", "4", "--auto-operating-point", "--budget", "rtf=1", "--threads", "1")
    assert str(recognition_options.recognizer(args, lambda line: None).point) == "s1q1k1"
    shape, key = seen
    assert shape[1] == 6
    assert (key["decoder"], key["dtype"], key["threads"], len(key["model"])) == ("beam 4", "float32", "1", 64)


def test_the_language_model_gets_what_was_given(monkeypatch):
    module = types.ModuleType("fairseq_w2v2_light.runtime.lm")
    module.LanguageModelDecoder = lambda *args, **settings: (args, settings)
    monkeypatch.setitem(sys.modules, "fairseq_w2v2_light.runtime.lm", module)
    args = options("--model", "m", "--lm", "a/b.arpa")
    assert recognition_options._decoder(args, "labels") == (("labels", "a/b.arpa", None), {})
    assert recognition_options.decoder_name(args) == "lm b.arpa"
    given = [
        "--lexicon",
        "x/l.txt",
        "--lm-weight",
        "1.5",
        "--word-score",
        "-1",
        "--beam",
        "9",
        "--beam-threshold",
        "20",
    ]
    args = options("--model", "m", "--lm", "b.arpa", *given)
    settings = dict(lm_weight=1.5, word_score=-1.0, beam=9, beam_threshold=20.0)
    assert recognition_options._decoder(args, "labels") == (("labels", "b.arpa", "x/l.txt"), settings)
    assert recognition_options.decoder_name(args) == (
        "lm b.arpa, beam 9, lexicon l.txt, lm weight 1.5, word score -1.0, beam threshold 20.0"
    )
    assert recognition_options.decoder_name(options("--model", "m", "--lm", "b", "--lexicon-free")) == (
        "lm b, lexicon-free"
    )


@pytest.mark.parametrize("beam, name", [([], "greedy"), (["--beam", "1"], "greedy"), (["--beam", "8"], "beam 8")])
def test_decoders_without_a_language_model(model, beam, name):
    args = options("--model", model, *beam)
    made = recognition_options.recognizer(args)
    assert recognition_options.decoder_name(args) == name
    assert type(made.decoder).__name__ == ("BeamDecoder" if name != "greedy" else "GreedyDecoder")
    described = recognition_options.describe(args, made)
    assert described == {"model": str(model), "operating_point": "s1q1k1", "dtype": "float32", "decoder": name}


def test_notes_need_standard_error(monkeypatch, capsys):
    recognition_options.note("line")
    assert capsys.readouterr().err == "line\n"
    monkeypatch.setattr(sys, "stderr", None)
    recognition_options.note("line")
    assert capsys.readouterr().out == ""


def test_transcribe_chooses_a_point_too(model, speeds, tmp_path, capsys):
    import numpy as np
    import soundfile

    speeds(s1q1k1=0.4, s1q2k1=0.3, s2q1k1=0.2, s2q2k1=0.1)
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    command = ["transcribe", str(tmp_path / "a.wav"), "--model", str(model)]
    assert cli.main([*command, "--auto-operating-point", "--budget", "rtf=0.25"]) == 0
    error = capsys.readouterr().err
    assert "operating point s2q1k1: the most accurate" in error and "(float32, s2q1k1" in error
    assert cli.main([*command, "--auto-operating-point"]) == 2
    assert "needs a budget to keep" in capsys.readouterr().err


def test_a_point_that_cannot_be_run_is_named(model, monkeypatch):
    failing = SimpleNamespace(error="broken")
    monkeypatch.setattr(recognizer.Recognizer, "transcribe", lambda self, sources: [failing])
    args = options("--model", model, "--auto-operating-point", "--budget", "rtf=1")
    with pytest.raises(ValueError, match="cannot be measured at s1q1k1: broken"):
        recognition_options.recognizer(args, lambda line: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(model, tmp_path, capsys):
    assert cli.main(["transcribe", str(tmp_path / "a.wav"), "--model", str(model), "--device", "cuda"]) == 2
    assert "finds no GPU here; choose --device cpu" in capsys.readouterr().err


def test_a_device_is_one_that_is_known(model):
    with pytest.raises(ValueError, match="device: found 'tpu', expected one of cpu, cuda"):
        recognizer.Recognizer.from_pretrained(model, device="tpu")
