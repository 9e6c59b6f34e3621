"""What `compat` mends, on whichever versions are installed."""

import logging
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from fairseq_w2v2_light import compat


@pytest.mark.skipif(not hasattr(torch.serialization, "add_safe_globals"), reason="torch 2.1 loads everything")
def test_checkpoint_types_load_and_nothing_else(tmp_path):
    from fairseq.data import Dictionary

    compat.allow_checkpoint_types()
    torch.save({"dictionary": Dictionary(), "args": Namespace(arch="wav2vec2")}, tmp_path / "good.pt")
    assert torch.load(tmp_path / "good.pt")["args"].arch == "wav2vec2"
    torch.save({"model": {}, "cfg": {"path": Path("x")}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="it holds a 'pathlib.*Path', which could run code"):
        compat.read_checkpoint(tmp_path / "other.pt")


def test_examples_are_importable_without_shadowing_logging():
    folder = compat.make_examples_importable()
    from examples.speech_recognition.new.decoders.viterbi_decoder import ViterbiDecoder

    assert ViterbiDecoder.__module__ == "examples.speech_recognition.new.decoders.viterbi_decoder"
    assert str(folder.parent) not in sys.path
    assert not Path(logging.__file__).is_relative_to(folder.parent)


def test_a_folder_named_examples_yields(monkeypatch, tmp_path):
    compat.make_examples_importable()
    (tmp_path / "examples").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "examples"]:
        monkeypatch.delitem(sys.modules, name)
    import examples

    assert str(tmp_path / "examples") in examples.__path__
    folder = compat.make_examples_importable()
    assert list(sys.modules["examples"].__path__) == [str(folder)]


def test_the_overrides_of_a_command_line_may_stand_among_its_flags():
    arguments = compat.hydra_arguments(["a=1", "--config-name", "x", "b=2", "-m"])
    assert arguments.overrides == ["a=1", "b=2"]
    assert (arguments.config_name, arguments.multirun) == ("x", True)


def test_a_checkpoint_from_before_hydra_is_read(tmp_path):
    compat.allow_checkpoint_types()
    args = Namespace(arch="wav2vec_ctc", task="audio_pretraining", labels="ltr")
    torch.save({"model": {}, "args": args}, tmp_path / "old.pt")
    state = compat.read_checkpoint(tmp_path / "old.pt")
    assert compat.checkpoint_section(state, "model")["_name"] == "wav2vec_ctc"
    assert compat.checkpoint_section(state, "task")["_name"] == "audio_pretraining"
    assert compat.checkpoint_section(state, "task")["labels"] == "ltr"


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 broken zip"])
def test_bytes_that_are_no_checkpoint(tmp_path, content):
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"bad\.pt: (the file is empty|not a checkpoint file of|the end .* is missing)"
    ):
        compat.read_checkpoint(path)


def test_models_are_known_by_name():
    assert compat.is_registered_model("wav2vec_ctc")
    assert not compat.is_registered_model("no_such_model")


def test_a_checkpoints_task_gains_the_keys_that_only_the_running_fairseq_has():
    from omegaconf import OmegaConf

    saved, current = OmegaConf.create({"labels": "ltr"}), OmegaConf.create({"labels": None, "new": 1, "data": "???"})
    OmegaConf.set_struct(saved, True)
    compat.complete_task_config(saved, current)
    assert saved == {"labels": "ltr", "new": 1}


def test_a_language_model_over_labels_scores_the_labels_of_the_dictionary(tmp_path):
    pytest.importorskip("flashlight.lib.text", reason="needs a decoder: pip install flashlight-text")
    from fairseq.data import Dictionary
    from omegaconf import OmegaConf

    from fairseq_w2v2_light.data.ngram import estimate

    dictionary = Dictionary()
    for symbol in "|ETAONIHSRDLU":
        dictionary.add_symbol(symbol)
    sentences = [["T", "H", "E", "|", "E", "N", "D", "|"], ["A", "|", "T", "O", "N", "|"]]
    ngram = estimate(sentences, 3, vocabulary=dictionary.symbols[4:])
    ngram.save(tmp_path / "lm.arpa")
    cfg = OmegaConf.create(
        dict(nbest=1, unitlm=True, lexicon=None, lmpath=str(tmp_path / "lm.arpa"), beam=50, beamthreshold=50.0)
    )
    cfg.update(dict(beamsizetoken=None, lmweight=1.0, silweight=0.0, wordscore=0.0))
    with compat.mended_kenlm_decoder():
        decoders = sys.modules["examples.speech_recognition.new.decoders.flashlight_decoder"]
        decoder = decoders.KenLMDecoder(cfg, dictionary)
        for symbol in dictionary.symbols[4:]:
            _, found = decoder.lm.score(decoder.lm.start(False), dictionary.index(symbol))
            assert found == pytest.approx(ngram.log10(symbol, ["<s>"]), abs=1e-5), symbol
        frames = torch.full((1, 7, len(dictionary)), -9.0)
        for frame, symbol in enumerate(("T", "T", "<s>", "H", "E", "E", "|")):
            frames[0, frame, dictionary.index(symbol)] = 0.0
        ((hypothesis,),) = decoder.decode(frames)
    assert "words" not in hypothesis
    assert dictionary.string(hypothesis["tokens"]) == "| T H E |"
