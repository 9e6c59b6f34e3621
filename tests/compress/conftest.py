"""Tiny teachers of every kind, as checkpoint files."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from fairseq import models
from fairseq.data import Dictionary
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from omegaconf import OmegaConf

from fairseq_w2v2_light.models import W2V2LightConfig, W2V2LightModel

SHAPE = dict(
    conv_feature_layers="[(16, 10, 5), (16, 3, 2), (16, 2, 2)]",
    encoder_layers=6,
    encoder_embed_dim=32,
    encoder_ffn_embed_dim=48,
    encoder_attention_heads=4,
    conv_pos=8,
    conv_pos_groups=4,
    quantize_targets=True,
    final_dim=12,
    latent_vars=6,
    latent_groups=2,
    num_negatives=5,
    mask_length=3,
)
TASK = {"_name": "audio_pretraining", "data": "/nowhere", "normalize": False}


def letters(text="ABC|"):
    dictionary = Dictionary()
    for letter in text:
        dictionary.add_symbol(letter)
    return dictionary


def container(config, name):
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return {**{key: value for key, value in values.items() if not str(value).startswith("${")}, "_name": name}


def save(path, model_cfg, weights, task=TASK, dictionary=None):
    """Writes a checkpoint of a run that made three updates."""
    state = {
        "args": None,
        "cfg": {
            "common": {"seed": 7},
            "task": task,
            "criterion": {"_name": "wav2vec"},
            "lr_scheduler": {"_name": "fixed"},
            "model": model_cfg,
        },
        "model": weights,
        "criterion": None,
        "optimizer_history": [
            {"criterion_name": "C", "optimizer_name": "O", "lr_scheduler_state": {"best": 1.0}, "num_updates": 3}
        ],
        "task_state": {} if dictionary is None else {"target_dictionary": dictionary},
        "extra_state": {"train_iterator": {"epoch": 4, "iterations_in_epoch": 0}, "val_loss": 1.0},
        "last_optimizer_state": {"state": {}},
    }
    torch.save(state, str(path))
    return str(path)


def pretrained(path, stock=False, seed=0, **changes):
    """A pre-training checkpoint with random weights (norms and biases too)."""
    torch.manual_seed(seed)
    config, model_class = (Wav2Vec2Config, Wav2Vec2Model) if stock else (W2V2LightConfig, W2V2LightModel)
    cfg = config(**{**SHAPE, **changes})
    model = model_class(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return save(path, container(cfg, "wav2vec2" if stock else "w2v2_light"), model.state_dict())


def ctc_model(path, name="light_ctc", dictionary=None):
    """A CTC model that starts from the checkpoint `path`, as fairseq's training builds it."""
    cfg = {"_name": name, "w2v_path": str(path), "normalize": False, "data": "/nowhere", "ddp_backend": "legacy_ddp"}
    cfg = OmegaConf.create({**cfg, "apply_mask": False, **({"operating_point_seed": 7} if name == "light_ctc" else {})})
    return models.build_model(cfg, argparse.Namespace(target_dictionary=dictionary or letters())).eval()


def fine_tuned(path, start, name="light_ctc", has_dictionary=True):
    """A CTC checkpoint made from the pre-training checkpoint `start`."""
    torch.manual_seed(1)
    model = ctc_model(start, name)
    values = OmegaConf.to_container(model.cfg, enum_to_str=True)
    cfg = {key: value for key, value in values.items() if not str(value).startswith("${")}
    task = {"_name": "audio_finetuning", "data": "/nowhere", "labels": "ltr", "normalize": False}
    return save(path, cfg, model.state_dict(), task, letters() if has_dictionary else None)


@pytest.fixture(scope="session")
def make():
    """The helpers of this file."""
    return SimpleNamespace(
        shape=SHAPE, letters=letters, save=save, pretrained=pretrained, fine_tuned=fine_tuned, ctc_model=ctc_model
    )


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Paths of teachers: stock and ours, shared too, pre-trained and fine-tuned by either CTC model."""
    folder = tmp_path_factory.mktemp("teachers")
    paths = {
        "stock": pretrained(folder / "stock.pt", stock=True),
        "light": pretrained(folder / "light.pt"),
        "shared": pretrained(folder / "shared.pt", unique_layers=2, squeeze_factors=[1, 2]),
    }
    paths["light_ctc"] = fine_tuned(folder / "light_ctc.pt", paths["light"])
    paths["wav2vec_ctc"] = fine_tuned(folder / "wav2vec_ctc.pt", paths["stock"], "wav2vec_ctc")
    return paths


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
