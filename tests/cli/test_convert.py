"""`w2v2-light convert`: stock checkpoints become ours, with the same outputs."""

import pytest
import torch
from fairseq import checkpoint_utils, tasks
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from omegaconf import OmegaConf

from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.models import W2V2LightModel

SMALL = dict(
    encoder_embed_dim=32,
    encoder_ffn_embed_dim=64,
    encoder_attention_heads=2,
    encoder_layers=2,
    final_dim=16,
    quantize_targets=True,
    latent_vars=8,
    conv_feature_layers="[(16, 10, 5)] + [(16, 4, 4)] * 3",
)


def section(dataclass_instance, **values):
    return {**OmegaConf.to_container(OmegaConf.structured(dataclass_instance), enum_to_str=True), **values}


def write_checkpoint(path, model_cfg, state_dict):
    task = {"_name": "audio_pretraining", "data": "/nowhere", "normalize": False, "sample_rate": 16000}
    state = {
        "args": None,
        "cfg": {"model": model_cfg, "task": task, "criterion": {"_name": "wav2vec"}, "common": {"seed": 1}},
        "model": state_dict,
        "criterion": None,
        "optimizer_history": [{"num_updates": 3, "criterion_name": "Wav2vecCriterion", "best_loss": 1.0}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1}, "val_loss": 1.0},
    }
    torch.save(state, str(path))
    return path


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    torch.manual_seed(0)
    cfg = Wav2Vec2Config(**SMALL)
    model = Wav2Vec2Model(cfg).eval()
    path = tmp_path_factory.mktemp("stock") / "wav2vec2.pt"
    model_cfg = section(Wav2Vec2Config(), **SMALL, _name="wav2vec2")
    return model, write_checkpoint(path, model_cfg, model.state_dict())


def test_converted_model_has_the_same_outputs(stock, tmp_path, capsys):
    model, path = stock
    out = tmp_path / "light.pt"
    assert main(["convert", str(path), str(out)]) == 0
    assert "wav2vec2" in capsys.readouterr().out
    models, cfg, _ = checkpoint_utils.load_model_ensemble_and_task([str(out)])
    assert isinstance(models[0], W2V2LightModel) and cfg.model._name == "w2v2_light"
    wave = torch.randn(2, 8000)
    with torch.no_grad():
        expected = model.extract_features(wave, None)["x"]
        found = models[0].eval().extract_features(wave, None)["x"]
    assert (expected - found).abs().max() <= 1e-5


def test_a_converted_checkpoint_can_be_trained_with_sharing_overrides(stock, tmp_path):
    _, path = stock
    out = tmp_path / "light.pt"
    assert main(["convert", str(path), str(out)]) == 0
    state = torch.load(str(out), map_location="cpu")
    for key in ("unique_layers", "squeeze_factors", "operating_point", "attention_map_every"):
        assert key in state["cfg"]["model"]
    assert tasks.TASK_REGISTRY[state["cfg"]["task"]["_name"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"RIFF not a checkpoint", "not a checkpoint file of torch"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, capsys, content, message):
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    out = tmp_path / "out.pt"
    assert main(["convert", str(path), str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error
    assert not out.exists() and sorted(file.name for file in tmp_path.iterdir()) == ["broken.pt"]


def test_missing_file_is_named(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "none.pt"), str(tmp_path / "out.pt")]) == 2
    assert "none.pt" in capsys.readouterr().err


def test_other_models_are_refused(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "lm.pt", {"_name": "transformer_lm"}, {"weight": torch.zeros(1)})
    assert main(["convert", str(path), str(tmp_path / "out.pt")]) == 2
    assert "checkpoint of model 'transformer_lm'" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_listed(stock, tmp_path, capsys):
    model, _ = stock
    weights = dict(model.state_dict())
    weights["surplus"] = weights.pop("mask_emb")
    path = write_checkpoint(tmp_path / "odd.pt", section(Wav2Vec2Config(), **SMALL, _name="wav2vec2"), weights)
    assert main(["convert", str(path), str(tmp_path / "out.pt")]) == 2
    error = capsys.readouterr().err
    assert "missing ['mask_emb']" in error and "unexpected ['surplus']" in error
    assert not (tmp_path / "out.pt").exists()


def test_half_a_checkpoint_is_refused(stock, tmp_path, capsys):
    _, path = stock
    content = path.read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    for arguments in (
        ["convert", str(tmp_path / "half.pt"), str(tmp_path / "out.pt")],
        ["cost", str(tmp_path / "half.pt")],
    ):
        assert main(arguments) == 2
        assert f"{tmp_path / 'half.pt'}: the end of the checkpoint is missing" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


def test_weights_of_a_diverged_run_are_refused(stock, tmp_path, capsys):
    model, _ = stock
    weights = {**model.state_dict(), "mask_emb": torch.full((32,), float("inf"))}
    path = write_checkpoint(tmp_path / "inf.pt", section(Wav2Vec2Config(), **SMALL, _name="wav2vec2"), weights)
    assert main(["convert", str(path), str(tmp_path / "out.pt")]) == 2
    assert f"{path}: parameter 'mask_emb' has NaN or infinite values" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()
