"""`w2v2-light tune-lm`: a development set recognised once, decoded with many weights."""

import json
import sys

import numpy as np
import pytest
import soundfile
import torch
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from tiny_checkpoints import LAYOUTS, SHAPE, container, ctc_model, letters, perturb, save_checkpoint, save_ctc

from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.data.ngram import estimate
from fairseq_w2v2_light.runtime.lm import LanguageModelDecoder, Weights
from fairseq_w2v2_light.runtime.recognizer import Recognizer
from fairseq_w2v2_light.runtime.scoring import score, totals

TEXTS = ["A B", "BCA A", "C"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model, three recordings of noise with texts, and n-grams of words and of letters."""
    folder = tmp_path_factory.mktemp("tune")
    torch.manual_seed(0)
    config = Wav2Vec2Config(**{**SHAPE, **LAYOUTS["large"]})
    pretrained = Wav2Vec2Model(config)
    perturb(pretrained, torch.Generator().manual_seed(0))
    path = save_checkpoint(folder / "pretrained.pt", container(config, "wav2vec2"), pretrained.state_dict())
    model = ctc_model(path, "wav2vec_ctc")
    perturb(model.w2v_encoder.proj, torch.Generator().manual_seed(1))
    task = {"_name": "audio_finetuning", "data": str(folder), "labels": "ltr"}
    save_ctc(folder / "ctc.pt", model, task, letters())
    rng, lines = np.random.default_rng(0), [str(folder)]
    for number, samples in enumerate((1200, 2000, 700)):
        soundfile.write(folder / f"{number}.wav", rng.normal(0, 0.2, samples), 16000)
        lines.append(f"{number}.wav\t{samples}")
    (folder / "valid.tsv").write_text("\n".join(lines) + "\n")
    (folder / "valid.wrd").write_text("\n".join(TEXTS) + "\n")
    estimate([text.split() for text in TEXTS], 2).save(folder / "words.arpa")
    estimate([[*text.replace(" ", "|"), "|"] for text in TEXTS], 3).save(folder / "letters.arpa")
    return folder


def arguments(folder, *more, lm="words.arpa"):
    return ["tune-lm", str(folder), "--model", str(folder / "ctc.pt"), "--lm", str(folder / lm), *more]


def failure(capsys, argv):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return captured.err


def needs_flashlight():
    pytest.importorskip("flashlight.lib.text", reason="needs a decoder: pip install flashlight-text")


def test_every_trial_is_what_the_decoder_does(folder, capsys, tmp_path, monkeypatch):
    needs_flashlight()
    monkeypatch.chdir(tmp_path)
    argv = arguments(folder, "--lm-weight", "0,2", "--word-score=-1,3", "--json", "--out", str(tmp_path / "out.json"))
    assert main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert (printed["utterances"], printed["words"], len(printed["trials"])) == (3, 5, 4)
    assert printed["best"] == printed["trials"][0] and printed["best"]["wer"] == min(
        t["wer"] for t in printed["trials"]
    )
    recognizer = Recognizer.from_pretrained(folder / "ctc.pt")
    waves = [soundfile.read(folder / f"{number}.wav", dtype="float32")[0] for number in range(3)]
    log_probs = recognizer.log_probs(waves)
    decoder = LanguageModelDecoder(recognizer.labels, folder / "words.arpa")
    for trial in printed["trials"]:
        weights = Weights(*(trial[name] for name in ("lm_weight", "word_score", "sil_score")))
        found = [decoder.with_weights(weights).best(frames).text for frames in log_probs]
        counts = totals(score("", text, hypothesis) for text, hypothesis in zip(TEXTS, found)).words
        assert trial["wer"] == pytest.approx(counts.rate) and trial["insertions"] == counts.insertions


def test_the_table_names_the_best_weights(folder, capsys):
    needs_flashlight()
    assert main(arguments(folder, "--random", "20", "--limit", "2", "--beam", "5")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["lm", "weight"] and lines[1].split()[0] == "greedy"
    assert lines[-4] == "... and 5 worse ones (--json prints all)"
    assert lines[-3].endswith("valid: 2 utterances, 4 words")
    best = lines[2].split()[:3]
    assert lines[-2] == f"best: --lm-weight {best[0]} --word-score {best[1]} --sil-score {best[2]}"
    assert lines[-1].startswith(f"in infer: decoding.lmweight={best[0]} ")


def test_without_a_lexicon(folder, capsys):
    needs_flashlight()
    argv = arguments(folder, "--lexicon-free", "--lm-weight", "0.5,1", "--sil-score=0,1", "--json", lm="letters.arpa")
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["lexicon_free"] and len(result["trials"]) == 4
    assert {trial["word_score"] for trial in result["trials"]} == {0}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lm-weight", "1,x"], "--lm-weight: found '1,x', expected numbers"),
        (["--lm-weight", ""], "--lm-weight: found ''"),
        (["--word-score=nan"], "--word-score: found 'nan', expected finite numbers"),
        (["--random", "0"], "--random: found 0"),
        (["--limit", "-1"], "--limit: found -1"),
        (["--lexicon-free", "--lexicon", "x"], "--lexicon-free: decodes without a lexicon"),
        (["--lexicon-free", "--word-score=1"], "--word-score: decoding without a lexicon has none"),
        (["--split", "dev"], "dev.tsv"),
    ],
)
def test_bad_options(folder, capsys, options, message):
    assert message in failure(capsys, arguments(folder, *options))


def test_files_that_cannot_be_used(folder, capsys, tmp_path):
    needs_flashlight()
    assert "none.arpa: no such language model" in failure(capsys, arguments(folder, lm="none.arpa"))
    assert "none: no such lexicon" in failure(capsys, arguments(folder, "--lexicon", "none"))
    (tmp_path / "texts").write_text("A B\n")
    argv = arguments(folder)
    argv[1] = str(tmp_path / "texts")
    assert "lines of text name no audio" in failure(capsys, argv)
    for name in ("valid.tsv", "valid.wrd"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "valid.wrd").write_text("\n\n\n")
    argv[1] = str(tmp_path)
    assert "hold no words" in failure(capsys, argv)
    lines = (folder / "valid.tsv").read_text().splitlines()
    (tmp_path / "bad.wav").write_bytes(b"not audio")
    (tmp_path / "valid.tsv").write_text(
        "\n".join([lines[0], lines[1], f"{tmp_path / 'bad.wav'}\t900", lines[3]]) + "\n"
    )
    (tmp_path / "valid.wrd").write_text("\n".join(TEXTS) + "\n")
    message = failure(capsys, argv)
    assert "valid.tsv:3" in message and "not audio" in message


def test_flashlight_is_missing(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder.kenlm", None)
    assert "`pip install flashlight-text`" in failure(capsys, arguments(folder))
