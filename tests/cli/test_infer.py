"""`w2v2-light infer`: fairseq's own infer.py, run in this process, on a tiny model."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import editdistance
import pytest
import soundfile

from fairseq_w2v2_light.cli.infer import add_operating_point, infer
from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.data.ngram import estimate, read_sentences

FIXTURES = Path(__file__).resolve().parents[1] / "tasks" / "conftest.py"


def load_fixtures():
    spec = importlib.util.spec_from_file_location("tiny_ctc_fixtures", FIXTURES)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_ctc(tmp_path_factory):
    return load_fixtures().make_tiny_ctc(tmp_path_factory.getbasetemp() / "tiny_ctc")


@pytest.fixture(scope="session")
def stochastic_ctc(tmp_path_factory):
    return load_fixtures().make_stochastic_ctc(tmp_path_factory.getbasetemp() / "stochastic_ctc")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test stands in an empty folder, which infer must not litter."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def arguments(model, data=None, checkpoint=None):
    data, checkpoint = data or model.data, checkpoint or model.checkpoint
    return [f"task.data={data}", f"common_eval.path={checkpoint}", "dataset.num_workers=0"]


def failure(capsys, argv):
    """The message of a command that must fail with exit code 2 and without a traceback."""
    assert main(["infer", *argv]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return captured.err


@pytest.mark.parametrize("count", [1, 7, 9])
def test_every_set_size_gives_as_many_hypotheses_as_references(tiny_ctc, tmp_path, elsewhere, count):
    (result,) = infer(arguments(tiny_ctc, tiny_ctc.copy_split(tmp_path / "data", count)))
    assert result["sentences"] == count
    assert result["words"] == 2 * count
    assert list(elsewhere.iterdir()) == []


def test_the_wer_is_that_of_the_files_it_writes(tiny_ctc, elsewhere):
    (result,) = infer([*arguments(tiny_ctc), "common_eval.results_path=decoded"])
    folder = elsewhere / "decoded" / "test"
    assert result["results_path"] == str(folder)

    def sentences(name):
        return [line.rsplit(" (", 1)[0].split() for line in (folder / name).read_text().splitlines()]

    pairs = list(zip(sentences("ref.word"), sentences("hypo.word")))
    errors, words = sum(editdistance.eval(*pair) for pair in pairs), sum(len(reference) for reference, _ in pairs)
    assert len(pairs) == 9
    assert (result["errors"], result["words"]) == (errors, words)
    assert (folder / "wer").read_text().startswith(f"WER: {result['wer']}")


def test_relative_paths_are_taken_from_where_the_user_stands(tiny_ctc, monkeypatch):
    monkeypatch.chdir(tiny_ctc.data.parent)
    (result,) = infer(["task.data=data", "common_eval.path=run/checkpoint_last.pt", "dataset.gen_subset=valid"])
    assert (result["split"], result["sentences"]) == ("valid", 3)


def test_task_audio_ctc_can_be_chosen(tiny_ctc):
    (result,) = infer(["task=audio_ctc", *arguments(tiny_ctc)])
    assert result["sentences"] == 9


def test_several_operating_points_in_one_run_and_sentencepieces(stochastic_ctc, elsewhere, capsys):
    argv = ["-m", "decoding.operating_point=s1q1k1,s2q1k2", "decoding.results_path=out", *arguments(stochastic_ctc)]
    assert main(["infer", *argv]) == 0
    folders = [elsewhere / "out" / "test" / name for name in ("0", "1")]
    hypotheses = [(folder / "hypo.units").read_text() for folder in folders]
    assert hypotheses[0] != hypotheses[1]
    transcripts = (stochastic_ctc.data / "test.wrd").read_text().splitlines()
    references = (folders[0] / "ref.word").read_text().splitlines()
    assert sorted(line.rsplit(" (", 1)[0] for line in references) == sorted(transcripts)
    printed = capsys.readouterr().out
    for point, folder in zip(("s1q1k1", "s2q1k2"), folders):
        wer = float((folder / "wer").read_text().split()[1])
        assert f"test, {point}: WER {wer:.2f} %" in printed


def test_an_operating_point_in_a_yaml(stochastic_ctc, tmp_path):
    data, checkpoint = stochastic_ctc.data, stochastic_ctc.checkpoint
    (tmp_path / "mine.yaml").write_text(
        f"""
hydra: {{run: {{dir: "{tmp_path}/run"}}}}
task: {{_name: audio_finetuning, data: "{data}"}}
common_eval: {{path: "{checkpoint}", post_process: sentencepiece, results_path: "{tmp_path}/run"}}
dataset: {{gen_subset: test, num_workers: 0}}
decoding: {{operating_point: s2q1k2}}
"""
    )
    (from_yaml,) = infer(["--config-dir", str(tmp_path), "--config-name", "mine"])
    (from_command,) = infer([*arguments(stochastic_ctc), "decoding.operating_point=s2q1k2"])
    assert from_yaml["operating_point"] == from_command["operating_point"] == "s2q1k2"
    assert (from_yaml["wer"], from_yaml["sentences"]) == (from_command["wer"], 9)


def test_the_shipped_config_decodes(tiny_ctc, elsewhere):
    from fairseq_w2v2_light.paths import config_dir

    argv = arguments(tiny_ctc)
    # Flags between overrides: hydra's own parser would refuse that.
    (result,) = infer([argv[0], "--config-dir", str(config_dir("infer")), "--config-name", "ctc", *argv[1:]])
    assert result["sentences"] == 9
    assert (elsewhere / "decoded" / "test" / "hypo.word").is_file()


def test_model_overrides_gain_the_operating_point():
    assert add_operating_point("{'dropout': 0.5}", "s2q1k2") == "{'dropout': 0.5, 'operating_point': 's2q1k2'}"
    assert add_operating_point("{}", "s1q2-2k1") == "{'operating_point': 's1q2k1'}"


@pytest.mark.parametrize(
    "overrides, point, message",
    [
        ("{}", "s2qk2", "operating point 's2qk2'"),
        ("{'operating_point': 's1q1k1'}", "s2q1k2", "give only one of them"),
        ("nonsense", "s2q1k2", "expected a dict"),
        ("[1]", "s2q1k2", "expected a dict"),
    ],
)
def test_bad_operating_points_and_overrides_are_named(overrides, point, message):
    with pytest.raises(ValueError, match=message):
        add_operating_point(overrides, point)


def test_a_missing_checkpoint(capsys, tiny_ctc, tmp_path):
    message = failure(capsys, arguments(tiny_ctc, checkpoint=tmp_path / "none.pt"))
    assert f"{tmp_path / 'none.pt'}: no such checkpoint file" in message


def test_a_file_that_is_no_checkpoint(capsys, tiny_ctc):
    path = tiny_ctc.data / "test.tsv"
    assert f"{path}: not a checkpoint file of torch" in failure(capsys, arguments(tiny_ctc, checkpoint=path))


def test_a_torch_file_that_is_no_fairseq_checkpoint(capsys, tiny_ctc, tmp_path):
    import torch

    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    message = failure(capsys, arguments(tiny_ctc, checkpoint=tmp_path / "other.pt"))
    assert "not a fairseq checkpoint; expected the keys 'model' and 'cfg', found ['weights']" in message


def test_a_pretrained_checkpoint(capsys, tiny_ctc):
    message = failure(capsys, arguments(tiny_ctc, checkpoint=tiny_ctc.pretrained))
    assert "a pre-trained wav2vec2 model has no symbols to decode; fine-tune it" in message


def test_an_operating_point_for_a_stock_model(capsys, tiny_ctc):
    message = failure(capsys, [*arguments(tiny_ctc), "decoding.operating_point=s2q1k2"])
    assert "this wav2vec_ctc checkpoint has no operating points" in message


def test_an_operating_point_that_the_model_was_not_trained_with(capsys, stochastic_ctc):
    message = failure(capsys, [*arguments(stochastic_ctc), "decoding.operating_point=s4q1k1"])
    assert "not trained with squeeze factor 4" in message


def test_missing_task_data_and_path(capsys, tiny_ctc):
    assert "give task.data=FOLDER" in failure(capsys, ["common_eval.path=x.pt"])
    assert "give common_eval.path=CHECKPOINT" in failure(capsys, [f"task.data={tiny_ctc.data}"])


def test_an_unknown_split(capsys, tiny_ctc):
    message = failure(capsys, [*arguments(tiny_ctc), "dataset.gen_subset=dev"])
    assert "dev.tsv: no such split" in message and "test, train, valid" in message


def test_an_empty_split(capsys, tiny_ctc, tmp_path):
    data = tiny_ctc.copy_split(tmp_path / "data", 0)
    assert "split 'test' is empty" in failure(capsys, arguments(tiny_ctc, data))


def test_a_label_that_the_model_does_not_know(capsys, tiny_ctc, tmp_path):
    data = tiny_ctc.copy_split(tmp_path / "data", 2)
    labels = data / "test.ltr"
    labels.write_text(labels.read_text().replace("T", "\u00dc"))
    (data / "dict.ltr.txt").write_text((data / "dict.ltr.txt").read_text() + "\u00dc 1\n")
    message = failure(capsys, arguments(tiny_ctc, data))
    assert "symbol '\u00dc' is not among those that the checkpoint was trained with" in message


def test_an_audio_file_of_another_rate(capsys, tiny_ctc, tmp_path):
    data = tiny_ctc.copy_split(tmp_path / "data", 9)
    lines = (data / "test.tsv").read_text().splitlines()
    soundfile.write(tmp_path / "slow.wav", [0.0] * 4000, 8000)
    # The second of nine: validate_split looks only at the first, middle and last.
    lines[2] = f"{os.path.relpath(tmp_path / 'slow.wav', lines[0])}\t4000"
    (data / "test.tsv").write_text("\n".join(lines) + "\n")
    message = failure(capsys, arguments(tiny_ctc, data))
    assert "test.tsv:3: " in message and "8000 Hz" in message


def test_half_a_checkpoint(capsys, tiny_ctc, tmp_path):
    content = tiny_ctc.checkpoint.read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    message = failure(capsys, arguments(tiny_ctc, checkpoint=tmp_path / "half.pt"))
    assert f"{tmp_path / 'half.pt'}: the end of the checkpoint is missing" in message


def test_a_checkpoint_of_a_diverged_run(capsys, tiny_ctc, tmp_path):
    import torch

    from fairseq_w2v2_light.compat import read_checkpoint

    state = read_checkpoint(tiny_ctc.checkpoint)
    state["model"]["w2v_encoder.proj.weight"] = torch.full_like(state["model"]["w2v_encoder.proj.weight"], float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    message = failure(capsys, arguments(tiny_ctc, checkpoint=tmp_path / "nan.pt"))
    assert f"{tmp_path / 'nan.pt'}: parameter 'w2v_encoder.proj.weight' has NaN" in message
    assert "take an earlier checkpoint" in message


def test_bad_audio_met_while_decoding_leaves_former_results_as_they_were(capsys, tiny_ctc, tmp_path):
    data = tiny_ctc.copy_split(tmp_path / "data", 9)
    argv = [*arguments(tiny_ctc, data), f"decoding.results_path={tmp_path / 'out'}", "dataset.batch_size=1"]
    assert main(["infer", *argv]) == 0
    capsys.readouterr()
    results = sorted(path for path in (tmp_path / "out").iterdir() if path.suffix in (".word", ".units", ""))
    before = [path.read_bytes() for path in results if path.is_file()]
    lines = (data / "test.tsv").read_text().splitlines()
    soundfile.write(tmp_path / "nan.wav", [float("nan")] * 9000, 16000, subtype="FLOAT")
    # The last but one: the header of a float file does not tell, and others are decoded before.
    lines[8] = f"{os.path.relpath(tmp_path / 'nan.wav', lines[0])}\t9000"
    (data / "test.tsv").write_text("\n".join(lines) + "\n")
    for workers in (0, 1):
        message = failure(capsys, [*argv, f"dataset.num_workers={workers}"])
        assert f"error: {data / 'test.tsv'}:9: " in message and "nan.wav: NaN samples" in message
    assert {"hypo.word", "ref.word", "hypo.units", "ref.units", "wer"} <= {path.name for path in results}
    assert [path.read_bytes() for path in results if path.is_file()] == before
    assert not list((tmp_path / "out").glob(".*.word"))


def test_references_without_words(capsys, tiny_ctc, tmp_path):
    data = tiny_ctc.copy_split(tmp_path / "data", 2)
    (data / "test.ltr").write_text("|\n|\n")
    assert "split 'test': its references hold no words" in failure(capsys, arguments(tiny_ctc, data))


def test_a_minimum_length_that_leaves_nothing(capsys, tiny_ctc):
    message = failure(capsys, [*arguments(tiny_ctc), "+task.min_sample_size=99999"])
    assert "none of the 9 utterances has the 99999 samples of task.min_sample_size" in message


def test_a_quoted_path_of_odd_characters(tiny_ctc, tmp_path):
    data = tiny_ctc.copy_split(tmp_path / "sp ace,\u00fc=x [1]", 2)
    (result,) = infer([f"task.data='{data}'", *arguments(tiny_ctc)[1:]])
    assert result["sentences"] == 2


def test_a_path_that_needs_quotes(capfd, tiny_ctc):
    assert main(["infer", "task.data=/da,ta=x", f"common_eval.path={tiny_ctc.checkpoint}"]) == 2
    assert "task.data: a path with any of ,=()[]{}$ needs quotes: \"task.data='/da,ta=x'\"" in capfd.readouterr().err


def test_several_processes_are_refused(capsys, tiny_ctc):
    message = failure(capsys, [*arguments(tiny_ctc), "distributed_training.distributed_world_size=2"])
    assert "decodes in one process" in message


def test_a_language_model_without_flashlight(capsys, tiny_ctc, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder.kenlm", None)
    message = failure(capsys, [*arguments(tiny_ctc), "decoding.type=kenlm", "decoding.lmpath=lm.bin"])
    assert "decoding.type=kenlm" in message and "`pip install flashlight-text`" in message


def language_model(model, out, suffix="wrd", order=2):
    estimate(read_sentences(model.data / f"train.{suffix}"), order).save(out)
    return [*arguments(model), "decoding.type=kenlm", f"decoding.lmpath={out}", "decoding.beam=50"]


def decoded(folder, name):
    return [line.rsplit(" (", 1)[0] for line in (folder / name).read_text().splitlines()]


def test_a_language_model_over_words(tiny_ctc, tmp_path, elsewhere):
    pytest.importorskip("flashlight.lib.text", reason="needs a decoder: pip install flashlight-text")
    argv = language_model(tiny_ctc, tmp_path / "lm.arpa")
    (result,) = infer([*argv, "common_eval.results_path=out", "decoding.wordscore=20"])
    assert result["sentences"] == 9
    words = [line.split() for line in decoded(elsewhere / "out" / "test", "hypo.word")]
    known = {word for line in (tiny_ctc.data / "train.wrd").read_text().splitlines() for word in line.split()}
    assert any(words) and {word for line in words for word in line} <= known
    assert not list((elsewhere / "out" / "test").glob("lexicon*"))
    (tmp_path / "words").write_text("TEN\nSIX S I X\n")
    argv += [f"decoding.lexicon={tmp_path / 'words'}", "decoding.wordscore=20", "decoding.results_path=few"]
    infer(argv)
    few = {word for line in decoded(elsewhere / "few", "hypo.word") for word in line.split()}
    assert few and few <= {"TEN", "SIX"}


def test_a_language_model_over_labels_without_a_lexicon(tiny_ctc, tmp_path, elsewhere):
    pytest.importorskip("flashlight.lib.text", reason="needs a decoder: pip install flashlight-text")
    argv = language_model(tiny_ctc, tmp_path / "lm.arpa", "ltr", 3)
    (result,) = infer([*argv, "decoding.unitlm=true", "decoding.results_path=out", "decoding.lmweight=0.1"])
    assert result["sentences"] == 9
    units, words = (decoded(elsewhere / "out", name) for name in ("hypo.units", "hypo.word"))
    assert any(words)
    assert words == [" ".join(line.replace(" ", "").replace("|", " ").split()) for line in units]


def test_a_language_model_over_sentencepieces(stochastic_ctc, tmp_path, elsewhere):
    pytest.importorskip("flashlight.lib.text", reason="needs a decoder: pip install flashlight-text")
    argv = language_model(stochastic_ctc, tmp_path / "lm.arpa")
    (result,) = infer([*argv, "decoding.wordscore=20", "decoding.results_path=out"])
    assert result["sentences"] == 9
    known = {word for line in (stochastic_ctc.data / "train.wrd").read_text().splitlines() for word in line.split()}
    words = {word for line in decoded(elsewhere / "out", "hypo.word") for word in line.split()}
    assert words and words <= known


def test_language_models_that_cannot_be_used(capsys, tiny_ctc, tmp_path):
    pytest.importorskip("flashlight.lib.text", reason="needs a decoder: pip install flashlight-text")
    argv = language_model(tiny_ctc, tmp_path / "lm.arpa")
    assert "decoding.lmpath=FILE" in failure(capsys, [*arguments(tiny_ctc), "decoding.type=kenlm"])
    assert "the n-gram has none of the checkpoint's labels" in failure(capsys, [*argv, "decoding.unitlm=true"])
    (tmp_path / "words").write_text("TEN\nTIN T \u00dc N |\n", encoding="utf-8")
    message = failure(capsys, [*argv, f"decoding.lexicon={tmp_path / 'words'}"])
    assert f"{tmp_path / 'words'}:2: word 'TIN' is spelled with '\u00dc'" in message
    text = (tmp_path / "lm.arpa").read_text()
    (tmp_path / "lm.arpa").write_text(text[: len(text) // 2])
    assert f"{tmp_path / 'lm.arpa'}:" in failure(capsys, argv)
    assert "no such language model" in failure(capsys, [*arguments(tiny_ctc), *argv[-3:-2], "decoding.lmpath=none"])


def test_a_second_copy_of_the_plugin(capsys, tiny_ctc, tmp_path):
    copy = tmp_path / "fairseq_w2v2_light"
    copy.mkdir()
    message = failure(capsys, [*arguments(tiny_ctc), f"common.user_dir={copy}"])
    assert f"common.user_dir={copy}: " in message and "not globally unique" in message


def test_a_key_that_infer_does_not_have(capsys, tiny_ctc):
    assert "beem" in failure(capsys, [*arguments(tiny_ctc), "decoding.beem=3"])


def test_dropped_utterances_are_noticed(capsys, tiny_ctc, monkeypatch):
    from fairseq.tasks.audio_finetuning import AudioFinetuningTask

    stock = AudioFinetuningTask.get_batch_iterator

    def drops_the_last(self, dataset, **kwargs):
        iterator = stock(self, dataset, **{**kwargs, "max_sentences": 2})
        batches = list(iterator.frozen_batches)[:-1]
        iterator._frozen_batches, iterator.batch_sampler = tuple(batches), batches
        return iterator

    monkeypatch.setattr(AudioFinetuningTask, "get_batch_iterator", drops_the_last)
    message = failure(capsys, arguments(tiny_ctc))
    assert "8 hypotheses for 9 references" in message


def test_help_and_no_arguments(capsys):
    assert main(["infer", "--help"]) == 0
    assert "decoding.operating_point" in capsys.readouterr().out
    assert main(["infer"]) == 2
    assert "task.data=FOLDER" in capsys.readouterr().err


def test_the_program_in_a_process_of_its_own(tiny_ctc):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-m", "fairseq_w2v2_light.cli", "infer", *arguments(tiny_ctc)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "Word error rate:" in result.stdout + result.stderr
    assert "9 utterances" in result.stdout.splitlines()[-1]
