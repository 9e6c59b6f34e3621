"""`w2v2-light student`: the command line; what it makes is tested in tests/compress."""

import pytest
import torch
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from omegaconf import OmegaConf

from fairseq_w2v2_light.cli.main import main

SHAPE = dict(
    encoder_embed_dim=32,
    encoder_ffn_embed_dim=64,
    encoder_attention_heads=2,
    encoder_layers=4,
    final_dim=16,
    quantize_targets=True,
    latent_vars=8,
    conv_pos=8,
    conv_feature_layers="[(16, 10, 5)] + [(16, 4, 4)] * 3",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A stock pre-trained model of four layers."""
    path = tmp_path_factory.mktemp("teacher") / "wav2vec2.pt"
    values = OmegaConf.to_container(OmegaConf.structured(Wav2Vec2Config(**SHAPE)), enum_to_str=True)
    task = {"_name": "audio_pretraining", "data": "/nowhere", "normalize": False}
    cfg = {"model": {**values, "_name": "wav2vec2"}, "task": task, "common": {"seed": 1}}
    torch.save({"args": None, "cfg": cfg, "model": Wav2Vec2Model(Wav2Vec2Config(**SHAPE)).state_dict()}, str(path))
    return path


def test_options_and_overrides_in_the_order_of_the_usage(teacher, tmp_path, capsys):
    out = tmp_path / "student.pt"
    options = ["--layers", "every:2", "--ffn", "48", "--layers-n", "3", "--seed", "5"]
    assert main(["student", str(teacher), str(out), *options, "model.squeeze_factors=[1,2]"]) == 0
    printed = capsys.readouterr().out
    assert f"{teacher} -> {out} (w2v2_light)" in printed
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    assert rows["frontend"][1:] == ["6", "3,264", "0", "0"] and rows["unsqueeze"][3] == "2"
    assert "student layer 1 <- teacher depth 2, in part" in printed
    assert "student layer 2 <- initialised anew" in printed
    model = torch.load(str(out), map_location="cpu")["cfg"]["model"]
    assert (model["encoder_layers"], model["encoder_ffn_embed_dim"], model["squeeze_factors"]) == (3, 48, [1, 2])
    assert main(["cost", str(out)]) == 0


def test_a_narrow_student_needs_no_layers(teacher, tmp_path, capsys):
    out = tmp_path / "student.pt"
    arguments = ["--width", "16", "--heads", "4", "--layers-n", "2", "--unique-layers", "1"]
    assert main(["student", *arguments, str(teacher), str(out)]) == 0
    assert "student layer 0 (at depths 0, 1) <- initialised anew" in capsys.readouterr().out


@pytest.fixture(scope="module")
def loud_teacher(tmp_path_factory):
    """A stock pre-trained model of four layers with LayerNorms in the frontend, trained with normalised audio."""
    path = tmp_path_factory.mktemp("loud") / "wav2vec2.pt"
    config = Wav2Vec2Config(**SHAPE, extractor_mode="layer_norm", layer_norm_first=True)
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    task = {"_name": "audio_pretraining", "data": "/nowhere", "normalize": True}
    cfg = {"model": {**values, "_name": "wav2vec2"}, "task": task, "common": {"seed": 1}}
    torch.save({"args": None, "cfg": cfg, "model": Wav2Vec2Model(config).state_dict()}, str(path))
    return path


def test_a_streaming_student_of_a_teacher_that_normalises_audio(loud_teacher, tmp_path, capsys):
    out = tmp_path / "student.pt"
    arguments = ["student", str(loud_teacher), str(out), "--layers", "every:2", "model.chunk_frames=[24]"]
    assert main(arguments) == 2
    assert "like --input-level 0.05 for LibriSpeech" in capsys.readouterr().err
    assert main([*arguments, "--input-level", "0.05"]) == 0
    printed = capsys.readouterr().out
    assert "note: audio: the student hears it as it is" in printed
    assert "note: streaming: the positions' 8 taps became 5 causal ones" in printed
    # a frame of this frontend is 20 ms, too
    assert main(["cost", str(out), "--latency"]) == 0
    assert "w2v2_light at s1q1k1c24: algorithmic latency 480.0 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layers", "each:2"], "--layers 'each:2': expected every:N, first:N, last:N"),
        (["--layers", "3,4"], "--layers '3,4': depth 4 is beyond the teacher's 4 layers"),
        (["--layers", "0", "--heads", "3"], "--width 32 is not divisible by 3 attention heads"),
        (["--layers", "0", "model.dropout=0", "model.dropout=1"], "model.dropout is given twice"),
        (["--layers", "0", "dropout=0"], "override 'dropout=0': expected model.KEY=VALUE"),
        (["--layers", "0", "model.dropuot=0"], "'model.dropuot': the model has no such key"),
        ([], "a student needs --layers"),
        (["--layers", "0", "--input-level", "0.05"], "the teacher was trained with task.normalize=false"),
        (["--layers", "0", "model.chunk_frames=[24]"], "extractor_mode: found 'default', a GroupNorm"),
    ],
)
def test_bad_input_gets_a_message(teacher, tmp_path, capsys, arguments, message):
    assert main(["student", str(teacher), str(tmp_path / "student.pt"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("w2v2-light student: error: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_the_teacher_is_not_overwritten(teacher, capsys):
    before = teacher.read_bytes()
    assert main(["student", str(teacher), str(teacher), "--layers", "0"]) == 2
    assert "the student would overwrite its teacher" in capsys.readouterr().err
    assert teacher.read_bytes() == before


def test_a_missing_teacher_is_named(tmp_path, capsys):
    assert main(["student", str(tmp_path / "none.pt"), str(tmp_path / "student.pt"), "--layers", "0"]) == 2
    assert f"{tmp_path / 'none.pt'}: no such checkpoint file" in capsys.readouterr().err
