"""`w2v2-light evaluate`: texts and models against references; operating points for a budget."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from without_fairseq import WITHOUT_FAIRSEQ

from fairseq_w2v2_light.cli import evaluate, recognition_options
from fairseq_w2v2_light.cli import main as cli
from fairseq_w2v2_light.nn.config import EncoderConfig
from fairseq_w2v2_light.nn.operating_point import OperatingPoint, OperatingPointSpace
from fairseq_w2v2_light.runtime import operating
from fairseq_w2v2_light.runtime.ctc import CtcModel
from fairseq_w2v2_light.runtime.folder import read_config, write_folder
from fairseq_w2v2_light.runtime.operating import Speed
from fairseq_w2v2_light.runtime.scoring import Counts
from fairseq_w2v2_light.runtime.windows import Windowing

ROOT = Path(cli.__file__).parents[2]
SPACE = OperatingPointSpace((1, 2), (1,), (1, 2), 2)
CONFIG = EncoderConfig(
    conv_layers=((16, 10, 5), (16, 3, 2), (16, 2, 2), (16, 8, 8)),
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
WORDS = ["AB A", "B", "A BA AB", "AAB B"]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    model = CtcModel(CONFIG, ["<s>", "<pad>", "</s>", "<unk>", "|", "A", "B"])
    with torch.no_grad():
        model.head.weight.mul_(20)
        model.head.bias[1:4] = -100
    write_folder(model.eval(), folder / "model")
    chance = np.random.default_rng(0)
    lines = ["."]
    for index, samples in enumerate((9000, 4000, 12000, 7000)):
        soundfile.write(folder / f"u{index}.wav", chance.normal(0, 0.1, samples).astype(np.float32), 16000)
        lines.append(f"u{index}.wav\t{samples}")
    (folder / "test.tsv").write_text("\n".join(lines) + "\n")
    (folder / "test.wrd").write_text("\n".join(WORDS) + "\n")
    rows = [f"u{index}.wav,{text}" for index, text in enumerate(WORDS)]
    (folder / "table.csv").write_text("\n".join(["path,text", *rows]) + "\n")
    return folder


@pytest.fixture
def data(made_once):
    return made_once


@pytest.fixture
def model(made_once, tmp_path):
    """A model folder for the test to change."""
    target = tmp_path / "own"
    target.mkdir()
    for file in (made_once / "model").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(operating, "SECONDS", 1)
    monkeypatch.setattr(operating, "MOST_ROUNDS", operating.FEWEST_ROUNDS)


def call(*arguments):
    return cli.main(["evaluate", *map(str, arguments)])


def values(capsys, *arguments):
    assert call(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys, *arguments):
    """The message of a command that must fail with exit code 2 and without a traceback."""
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def lines(path, *texts):
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def test_texts_against_texts(tmp_path, capsys):
    references = lines(tmp_path / "r.txt", "THE CAT SAT", "ON MATS", "YES")
    hypotheses = lines(tmp_path / "h.txt", "THE BAT SAT", "ON THE MATS", "")
    assert call(references, "--hypotheses", hypotheses) == 0
    assert capsys.readouterr().out.splitlines() == [
        "     rate %  substitutions  deletions  insertions  errors  of",
        "WER   50.00              1          1           1       3   6",
        "CER   38.10              1          3           4       8  21",
        "3 utterances, 3 with errors",
    ]
    found = values(capsys, references, "--hypotheses", hypotheses)
    assert found["wer"] == 50 and found["utterances"] == found["utterances_with_errors"] == 3
    assert found["words"] == dict(hits=4, substitutions=1, deletions=1, insertions=1, errors=3, reference=6)
    assert "real_time_factor" not in found


def test_normalisation_is_asked_for(tmp_path, capsys):
    references = lines(tmp_path / "r.txt", "Yes,  it\u2019s half-past ONE, Rene\u0301!")
    hypotheses = lines(tmp_path / "h.txt", "yes it's half past one ren\u00e9")
    wers = {
        options: values(capsys, references, "--hypotheses", hypotheses, *options)["wer"]
        for options in [(), ("--lowercase",), ("--remove-punctuation",), ("--lowercase", "--remove-punctuation")]
    }
    assert list(wers.values()) == [120, 120, 50, 0]


@pytest.mark.parametrize("name", ["out.txt", "out.jsonl"])
def test_alignments_of_every_utterance(tmp_path, capsys, name):
    references = lines(tmp_path / "r.txt", "u-1 A B C", "u-2 ÄÖ")
    hypotheses = lines(tmp_path / "h.txt", "u-2 ÄÖ ß", "u-1 A X")
    assert call(references, "--hypotheses", hypotheses, "--per-utterance", tmp_path / name) == 0
    written = (tmp_path / name).read_text(encoding="utf-8")
    if name == "out.txt":
        assert written.split("\n") == [
            *("id: (u-1)", "Scores: (#C #S #D #I) 1 1 1 0", "REF:  A B C", "HYP:  A * X", "Eval:   D S", ""),
            *("id: (u-2)", "Scores: (#C #S #D #I) 1 0 0 1", "REF:  ÄÖ *", "HYP:  ÄÖ ß", "Eval:    I", "", ""),
        ]
        return
    first, second = map(json.loads, written.splitlines())
    assert (first["id"], first["reference"], first["hypothesis"]) == ("u-1", "A B C", "A X")
    assert first["alignment"] == [["hit", "A", "A"], ["deletion", "B", None], ["substitution", "C", "X"]]
    assert second["wer"] == 100 and second["characters"]["insertions"] == 2


@pytest.mark.parametrize(
    "references, hypotheses, message",
    [
        (["A", "B"], ["A"], "1 hypotheses for 2 references"),
        ([" ", ""], ["A", ""], "r.txt:1: the references hold no words; the word error rate is undefined"),
    ],
)
def test_texts_that_cannot_be_scored(tmp_path, capsys, references, hypotheses, message):
    arguments = [lines(tmp_path / "r.txt", *references), "--hypotheses", lines(tmp_path / "h.txt", *hypotheses)]
    assert message in failure(capsys, *arguments, "--per-utterance", tmp_path / "out.txt")
    assert not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "expected either --model, to transcribe the audio, or --hypotheses"),
        (["--model", "m", "--hypotheses", "h"], "expected either --model"),
        (["--hypotheses", "h", "--beam", "4"], "--beam: for --model only"),
        (["--hypotheses", "h", "--all-points"], "--all-points: for --model only"),
        (["--hypotheses", "h", "--device", "cpu"], "--device: for --model only"),
        (["--model", "m", "--all-points", "--per-utterance", "u"], "--per-utterance: of one operating point only"),
        (["--model", "m", "--all-points", "--operating-point", "s1q1k1"], "--all-points evaluates every"),
        (["--model", "m", "--write-to-folder"], "--write-to-folder: m is no model folder"),
        (["--model", "m", "--columns", "text"], "--columns text: expected NAME=COLUMN"),
        (["--model", "m", "--auto-operating-point"], "needs a budget to keep, such as --budget rtf=0.05"),
        (["--model", "m", "--budget", "rtf=1"], "--budget: only with --auto-operating-point"),
        (["--model", "m", "--measure-again"], "--measure-again: only with --auto-operating-point"),
        (["--model", "m", "--auto-operating-point", "--budget", "fast"], "--budget fast: expected rtf=FACTOR"),
        (
            ["--model", "m", "--auto-operating-point", "--budget", "rtf=1", "--operating-point", "s1q1k1"],
            "--operating-point s1q1k1: --auto-operating-point chooses one",
        ),
        (["--model", "m", "--beam", "0"], "--beam: found 0, expected 1 or more"),
        (["--model", "m", "--threads", "-1"], "--threads: found -1"),
        (["--model", "m", "--window", "nan"], "--window: found nan seconds"),
        (["--model", "m", "--lexicon", "l"], "--lexicon: only for decoding with --lm; add --lm FILE"),
        (["--model", "m", "--lm", "x", "--lm-weight", "nan"], "--lm-weight: found nan"),
        (["--model", "m"], "m: no such"),
        (["--model", "m", "--split", "dev"], "dev.tsv: no such split"),
    ],
)
def test_options_that_do_not_fit(data, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, data, *options)


def test_lines_of_text_have_no_audio(tmp_path, capsys):
    assert "lines of text name no audio for a model" in failure(capsys, lines(tmp_path / "r.txt", "A"), "--model", "m")


@pytest.mark.parametrize("references", ["", "test.tsv", "table.csv"])
def test_a_model_against_a_folder_a_manifest_or_a_table(data, model, capsys, tmp_path, references):
    found = values(capsys, data / references, "--model", model, "--per-utterance", tmp_path / "u.jsonl")
    assert found["utterances"] == 4 and found["words"]["reference"] == 8 and found["wer"] > 0
    assert found["audio_seconds"] == 2 and found["real_time_factor"] == found["compute_seconds"] / 2
    expected = dict(model=str(model), operating_point="s1q1k1", dtype="float32", decoder="greedy")
    assert {key: found[key] for key in expected} == expected
    rows = [json.loads(line) for line in (tmp_path / "u.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"u{index}.wav" for index in range(4)]
    hypotheses = lines(tmp_path / "h.txt", *(row["hypothesis"] for row in rows))
    again = values(capsys, data, "--hypotheses", hypotheses)
    assert (again["words"], again["characters"]) == (found["words"], found["characters"])


def test_the_report_says_how(data, model, capsys):
    assert call(data, "--model", model, "--operating-point", "s2q1k2", "--beam", "3", "--threads", "1") == 0
    captured = capsys.readouterr()
    last = captured.out.splitlines()[-1]
    assert last.startswith("4 utterances, ") and "2.0 s of audio in " in last
    assert last.endswith("(s2q1k2, float32, beam 3)") and captured.err == ""


def test_every_point_and_a_list_of_points(data, model, capsys):
    found = values(capsys, data, "--model", model, "--all-points")
    assert [result["operating_point"] for result in found] == ["s1q1k1", "s1q1k2", "s2q1k1", "s2q1k2"]
    one = values(capsys, data, "--model", model, "--operating-point", "s2q1k2")
    assert one["words"] == found[-1]["words"]
    assert call(data, "--model", model, "--operating-point", "s2q1k2, s1q1k1,s2q1k2") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["point", "s2q1k2", "s1q1k1", "4"]
    assert printed[1].split()[1] == f"{one['wer']:.2f}" and printed[-1].endswith("float32, greedy")
    assert "s4q1k1" in failure(capsys, data, "--model", model, "--operating-point", "s1q1k1,s4q1k1")


def test_error_rates_are_written_to_the_folder_and_choose_the_point(data, model, capsys, monkeypatch):
    found = values(capsys, data, "--model", model, "--all-points", "--write-to-folder", "--lowercase")
    entries = read_config(model)["about"]["operating_points"]
    assert [entry["point"] for entry in entries] == ["s1q1k1", "s1q1k2", "s2q1k1", "s2q1k2"]
    assert [entry["wer"] for entry in entries] == [pytest.approx(result["wer"], abs=1e-3) for result in found]
    assert {entry["references"] for entry in entries} == {f"{data.name}/test, lowercase"}
    assert (entries[0]["words"], entries[0]["dtype"], entries[0]["decoder"]) == (8, "float32", "greedy")
    monkeypatch.setattr(
        operating, "measure", lambda run, points, rate, note: {point: Speed(0.1, 0.2) for point in points}
    )
    best = min(found, key=lambda result: (result["wer"], result["operating_point"] < "s2"))
    assert call(data, "--model", model, "--auto-operating-point", "--budget", "rtf=99", "--json", "-v") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["wer"] == best["wer"]
    assert f"by WER on {data.name}/test, lowercase" in captured.err and "WER %" in captured.err


def test_an_operating_point_for_a_budget_is_measured_once(data, model, capsys):
    options = [data, "--model", model, "--auto-operating-point", "--budget", "rtf=1000"]
    assert call(*options, "-v") == 0
    captured = capsys.readouterr()
    assert "(s1q1k1, float32, greedy)" in captured.out
    told = captured.err.splitlines()
    assert told[0].startswith("measuring 4 operating points on this machine, once (kept in ")
    assert told[1].startswith(
        "operating point s1q1k1: the most accurate (by MACs, as no WERs are recorded) of the 4 of 4 points that keep "
        "rtf=1000: rtf "
    )
    assert told[2].split()[:3] == ["point", "rtf", "of"] and len(told) == 7
    assert call(*options) == 0
    assert capsys.readouterr().err.count("\n") == 1
    for changed in (["--beam", "2"], ["--measure-again"]):
        assert call(*options, *changed) == 0
        assert "measuring 4 operating points" in capsys.readouterr().err
    message = failure(capsys, *options[:-1], "rtf=1e-9")
    assert "no operating point is that fast here (measured on " in message and "--dtype bfloat16" in message


def test_a_run_beyond_its_budget_is_told(data, model, capsys, monkeypatch):
    monkeypatch.setattr(
        operating, "measure", lambda run, points, rate, note: {point: Speed(1e-9, 1e-9) for point in points}
    )
    assert call(data, "--model", model, "--auto-operating-point", "--budget", "rtf=1e-8") == 0
    assert "note: this run had a real-time factor of " in capsys.readouterr().err


class Recognizer:
    """Stands in for runtime.recognizer's. transcripts: (text, error) of each source."""

    def __init__(self, transcripts):
        self.transcripts, self.point, self.dtype = transcripts, OperatingPoint(), "float32"
        self.windowing = Windowing()

    def transcribe(self, sources):
        for text, error in self.transcripts:
            yield SimpleNamespace(text=text, error=error, seconds=1.0)


@pytest.fixture
def recognizer(monkeypatch):
    def install(*transcripts):
        monkeypatch.setattr(recognition_options, "recognizer", lambda args, **given: Recognizer(transcripts))

    return install


@pytest.mark.parametrize("count", [3, 5])
def test_hypotheses_that_are_lost_or_too_many_are_noticed(data, recognizer, capsys, count):
    recognizer(*[("A", None)] * count)
    assert f"{count} hypotheses for 4 references" in failure(capsys, data, "--model", "m")


def test_audio_that_breaks_off_is_named_and_nothing_is_scored(data, recognizer, capsys):
    recognizer(("AB A", None), ("B", "u1.wav: found a NaN"), ("", None), ("", "u3.wav: found a NaN"))
    message = failure(capsys, data, "--model", "m")
    assert message.count("found a NaN") == 3 and "2 of 4 utterances could not be transcribed" in message
    assert message.endswith(f"mend or remove these: {data / 'test.tsv'}:3: u1.wav: found a NaN\n")


def test_perfect_hypotheses(data, recognizer, capsys):
    recognizer(*((text, None) for text in WORDS))
    found = values(capsys, data, "--model", "m")
    assert (found["wer"], found["utterances_with_errors"], found["audio_seconds"]) == (0, 0, 4)


@pytest.mark.parametrize("content, message", [(None, "no such audio file"), (b"text", "not audio that libsndfile")])
def test_audio_is_opened_before_the_model_runs(data, tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "x.wav").write_bytes(content)
    table = lines(tmp_path / "t.csv", "path,text", f"{data / 'u0.wav'},A", "x.wav,B")
    printed = failure(capsys, table, "--model", "no model either")
    assert f"{table}:3: {tmp_path / 'x.wav'}: {message}" in printed


def test_counts_of_nothing_have_no_rate():
    assert evaluate._percent(Counts()) == "-"


def test_it_works_where_fairseq_cannot_be_imported(data, model):
    options = ["--auto-operating-point", "--budget", "rtf=1000", "--json"]
    command = [sys.executable, "-c", WITHOUT_FAIRSEQ, "evaluate", str(data), "--model", str(model), *options]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["utterances"] == 4


def load_fixtures():
    path = Path(__file__).resolve().parents[1] / "tasks" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_ctc_fixtures", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_error_rate_is_that_of_infer(tmp_path, tmp_path_factory, capsys, monkeypatch):
    from fairseq_w2v2_light.cli.infer import infer

    tiny_ctc = load_fixtures().make_tiny_ctc(tmp_path_factory.getbasetemp() / "tiny_ctc")
    monkeypatch.chdir(tmp_path)
    (expected,) = infer(
        [f"task.data={tiny_ctc.data}", f"common_eval.path={tiny_ctc.checkpoint}", "dataset.num_workers=0"]
        + ["common_eval.results_path=decoded"]
    )
    capsys.readouterr()
    folder = Path(expected["results_path"])
    for references in (folder / "ref.word", tiny_ctc.data):  # in an order of its own, and ours
        found = values(capsys, references, "--hypotheses", folder / "hypo.word")
        counts = found["words"]
        assert (counts["errors"], counts["reference"]) == (expected["errors"], expected["words"])
        assert found["wer"] == pytest.approx(expected["wer"]) and found["utterances"] == expected["sentences"]
