"""Tiny teachers of every kind, as checkpoint files."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from tiny_checkpoints import SHAPE, container, ctc_model, letters, perturb, save_checkpoint, save_ctc

from fairseq_w2v2_light.compress.prune import prune_checkpoint
from fairseq_w2v2_light.models import W2V2LightConfig, W2V2LightModel
from fairseq_w2v2_light.nn.config import PRUNE_UNITS

SIX_LAYERS = dict(SHAPE, encoder_layers=6)


def pretrained(path, stock=False, seed=0, **changes):
    """A pre-training checkpoint with random weights (norms and biases too)."""
    torch.manual_seed(seed)
    config, model_class = (Wav2Vec2Config, Wav2Vec2Model) if stock else (W2V2LightConfig, W2V2LightModel)
    cfg = config(**{**SIX_LAYERS, **changes})
    model = model_class(cfg)
    perturb(model)
    return save_checkpoint(path, container(cfg, "wav2vec2" if stock else "w2v2_light"), model.state_dict())


def fine_tuned(path, start, name="light_ctc", has_dictionary=True):
    """A CTC checkpoint made from the pre-training checkpoint `start`."""
    torch.manual_seed(1)
    model = ctc_model(start, name)
    task = {"_name": "audio_finetuning", "labels": "ltr"}
    return save_ctc(path, model, task, letters() if has_dictionary else None)


def pruned(path, **changes):
    """A CTC checkpoint that pruning left with unequal layers."""
    gated = f"{path}.gated"
    pretrained(gated, prune_units=list(PRUNE_UNITS), feature_grad_mult=1.0, **changes)
    torch.manual_seed(1)
    model = ctc_model(gated, feature_grad_mult=1.0)
    with torch.no_grad():
        for parameter in model.w2v_encoder.w2v_model.gates.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 3)
    save_ctc(gated, model, {"_name": "audio_finetuning", "labels": "ltr"}, letters())
    prune_checkpoint(gated, path)
    return str(path)


@pytest.fixture(scope="session")
def make():
    """The helpers of this file."""
    return SimpleNamespace(
        shape=SIX_LAYERS,
        letters=letters,
        save=save_checkpoint,
        pretrained=pretrained,
        fine_tuned=fine_tuned,
        pruned=pruned,
        ctc_model=ctc_model,
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
