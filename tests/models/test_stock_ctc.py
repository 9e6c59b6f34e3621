"""Stock `wav2vec_ctc` that starts from checkpoints which are CTC models already."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from fairseq import checkpoint_utils
from fairseq.models.wav2vec import wav2vec2_asr
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config
from omegaconf import OmegaConf
from tiny_checkpoints import ctc_model, save_ctc

from fairseq_w2v2_light.models import W2V2LightConfig, stock_ctc
from fairseq_w2v2_light.paths import user_dir

ENCODER = "w2v_encoder.w2v_model."


def build(tiny, name, path, text="ABC|", **keys):
    return ctc_model(path, name, tiny.letters(text), **keys)


def encoder_weights(state_dict):
    return {name[len(ENCODER) :]: value for name, value in state_dict.items() if name.startswith(ENCODER)}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(params=("light_ctc", "wav2vec_ctc", "wav2vec_ctc on stock"))
def fine_tuned(request, tiny, tmp_path):
    """A CTC checkpoint: our model, stock's over our encoder, stock's over its own."""
    keys = dict(tiny.config, **tiny.layouts["large"])
    if "stock" in request.param:
        cfg, pretrained = tiny.container(Wav2Vec2Config(**keys), "wav2vec2"), tiny.pair(layout="large")[1]
    else:
        sharing = {"unique_layers": 1, "squeeze_factors": [1, 2]}
        cfg = tiny.container(W2V2LightConfig(**keys, **sharing), "w2v2_light")
        pretrained = tiny.light(layout="large", **sharing)
    start = tiny.save(tmp_path / "pretrained.pt", cfg, pretrained.state_dict())
    model = build(tiny, request.param.split()[0], start)
    path = save_ctc(tmp_path / "ctc.pt", model, dictionary=tiny.letters())
    return SimpleNamespace(path=path, model=model)


def test_the_encoder_is_taken_and_the_head_is_new(tiny, fine_tuned):
    model = build(tiny, "wav2vec_ctc", fine_tuned.path, text="XYZ|Q")
    found, expected = model.state_dict(), fine_tuned.model.state_dict()
    assert equal(encoder_weights(found), encoder_weights(expected))
    assert found["w2v_encoder.proj.weight"].shape == (9, 32)
    assert type(model.w2v_encoder.w2v_model) is type(fine_tuned.model.w2v_encoder.w2v_model)


def test_fine_tuning_keys_reach_the_encoder(tiny, fine_tuned):
    model = build(tiny, "wav2vec_ctc", fine_tuned.path, mask_prob=0.33, dropout=0.07, feature_grad_mult=0.5)
    encoder = model.w2v_encoder.w2v_model
    assert (encoder.mask_prob, encoder.feature_grad_mult) == (0.33, 0.5)
    assert model.cfg.w2v_args.model.dropout == 0.07 and model.cfg.w2v_args.model._name != "light_ctc"


def test_a_checkpoint_made_from_it_is_built_from_its_cfg_alone(tiny, fine_tuned, tmp_path):
    model = build(tiny, "wav2vec_ctc", fine_tuned.path)
    values = OmegaConf.to_container(model.cfg, enum_to_str=True)
    cfg = {key: value for key, value in values.items() if not str(value).startswith("${")}
    path = tiny.save(tmp_path / "again.pt", cfg, model.state_dict(), dictionary=tiny.letters())
    os.remove(fine_tuned.path)
    again = build(tiny, "wav2vec_ctc", path)
    assert equal(encoder_weights(again.state_dict()), encoder_weights(model.state_dict()))


def test_an_encoder_described_by_a_namespace(tiny, tmp_path):
    """As checkpoints from before hydra do."""
    flat = Namespace(arch="wav2vec2", task="audio_pretraining", data="/nowhere", normalize=False, mask_prob=0.65)
    cfg = {"_name": "wav2vec_ctc", "w2v_args": flat}
    path = tiny.save(
        tmp_path / "old.pt", cfg, {f"{ENCODER}mask_emb": torch.ones(2), "w2v_encoder.proj.bias": torch.zeros(1)}
    )
    state = wav2vec2_asr.checkpoint_utils.load_checkpoint_to_cpu(path, {"mask_prob": 0.1})
    assert state["cfg"].model._name == "wav2vec2" and state["cfg"].model.mask_prob == 0.1
    assert list(state["model"]) == ["mask_emb"]


def test_other_checkpoints_are_read_as_ever(tiny, tmp_path):
    keys = dict(tiny.config)
    cfg = tiny.container(W2V2LightConfig(**keys), "w2v2_light")
    path = tiny.save(tmp_path / "light.pt", cfg, tiny.light().state_dict())
    found = wav2vec2_asr.checkpoint_utils.load_checkpoint_to_cpu(path, {"mask_prob": 0.2})
    expected = checkpoint_utils.load_checkpoint_to_cpu(path, {"mask_prob": 0.2})
    assert found.keys() == expected.keys() and found["cfg"] == expected["cfg"]


def test_the_stand_in_offers_the_whole_module_and_is_installed_once():
    stand_in = wav2vec2_asr.checkpoint_utils
    assert stand_in.prune_state_dict is checkpoint_utils.prune_state_dict
    stock_ctc.accept_ctc_checkpoints()
    assert wav2vec2_asr.checkpoint_utils is stand_in
    with pytest.raises(AttributeError, match="nonsense"):
        stand_in.nonsense  # noqa: B018


STOCK_YAML = """# @package _global_
common: {log_interval: 1}
task: {_name: audio_finetuning, data: "???", labels: ltr, normalize: false}
dataset:
  {num_workers: 0, max_tokens: 40000, required_batch_size_multiple: 1, disable_validation: true, valid_subset: train}
criterion: {_name: ctc, zero_infinity: true}
optimization: {max_update: 2, lr: [0.0], sentence_avg: true}
optimizer: {_name: adam}
lr_scheduler: {_name: fixed}
model: {_name: wav2vec_ctc, w2v_path: "???", feature_grad_mult: 1.0, mask_length: 3}
"""


def test_fairseq_hydra_train_fine_tunes_a_ctc_checkpoint(tiny, tmp_path):
    keys = dict(tiny.config, unique_layers=1, conv_feature_layers="[(16, 10, 5), (16, 8, 8), (16, 8, 8)]")
    cfg = tiny.container(W2V2LightConfig(**keys), "w2v2_light")
    start = tiny.save(tmp_path / "pretrained.pt", cfg, tiny.light(**keys).state_dict())
    model = build(tiny, "light_ctc", start)
    values = OmegaConf.to_container(model.cfg, enum_to_str=True)
    cfg = {key: value for key, value in values.items() if not str(value).startswith("${")}
    student = tiny.save(tmp_path / "student.pt", cfg, model.state_dict(), dictionary=tiny.letters())

    lines = [str(tmp_path)]
    for index in range(4):
        soundfile.write(str(tmp_path / f"{index}.wav"), np.random.RandomState(index).randn(9000) * 0.1, 16000)
        lines.append(f"{index}.wav\t9000")
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "train.ltr").write_text("A B |\n" * 4)
    (tmp_path / "dict.ltr.txt").write_text("A 1\nB 1\n| 1\n")
    (tmp_path / "stock.yaml").write_text(STOCK_YAML)
    command = [
        str(Path(sys.executable).with_name("fairseq-hydra-train")),
        f"common.user_dir={user_dir()}",
        f"task.data={tmp_path}",
        f"model.w2v_path={student}",
        f"checkpoint.save_dir={tmp_path}/save",
        f"hydra.run.dir={tmp_path}/hydra",
        "--config-dir",
        str(tmp_path),
        "--config-name",
        "stock",
    ]
    path = os.pathsep.join([str(user_dir().parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    state = torch.load(str(tmp_path / "save" / "checkpoint_last.pt"), map_location="cpu")
    assert state["cfg"]["model"]["_name"] == "wav2vec_ctc"
    assert state["cfg"]["model"]["w2v_args"]["model"]["_name"] == "w2v2_light"
    assert equal(encoder_weights(state["model"]), encoder_weights(model.state_dict())), "the learning rate is 0"
    assert state["model"]["w2v_encoder.proj.weight"].shape[0] == 4 + 3
