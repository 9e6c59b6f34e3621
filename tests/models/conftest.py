"""Tiny random models, ours and fairseq's, with shared weights; and checkpoint files as fairseq's trainer writes."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from tiny_checkpoints import LAYOUTS, SHAPE, container, letters, random_audio, save_checkpoint
from tiny_checkpoints import perturb as perturb_weights

from fairseq_w2v2_light.models import StochasticSEWConfig, StochasticSEWModel, W2V2LightConfig, W2V2LightModel

TINY = dict(SHAPE, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, encoder_layerdrop=0.0)


def build_light(seed=0, layout="base", perturb=True, **changes):
    torch.manual_seed(seed)
    model = W2V2LightModel(W2V2LightConfig(**{**TINY, **LAYOUTS[layout], **changes}))
    if perturb:
        perturb_weights(model, torch.Generator().manual_seed(seed))
    return model.eval()


def build_sew(seed=0, **changes):
    torch.manual_seed(seed)
    keys = {key: value for key, value in TINY.items() if key != "conv_pos"}
    model = StochasticSEWModel(StochasticSEWConfig(**{**keys, "conv_pos": 7, "projection_hidden_dim": 24, **changes}))
    return model.eval()


def build_pair(seed=0, layout="base", **changes):
    """(ours, fairseq's) with the same random weights, in eval mode."""
    torch.manual_seed(seed)
    stock = Wav2Vec2Model(Wav2Vec2Config(**{**TINY, **LAYOUTS[layout], **changes}))
    perturb_weights(stock, torch.Generator().manual_seed(seed))
    light = W2V2LightModel(W2V2LightConfig(**{**TINY, **LAYOUTS[layout], **changes}))
    light.load_state_dict(stock.state_dict(), strict=True)
    return light.eval(), stock.eval()


def random_mask(batch, time, masked=7, seed=0):
    """A mask (batch, time) with `masked` frames in every row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch, time, dtype=torch.bool)
    for row in range(batch):
        mask[row, torch.randperm(time, generator=generator)[:masked]] = True
    return mask


@pytest.fixture(scope="session")
def tiny():
    """The helpers of this file, by name."""
    return SimpleNamespace(
        config=TINY,
        layouts=LAYOUTS,
        light=build_light,
        sew=build_sew,
        pair=build_pair,
        audio=random_audio,
        mask=random_mask,
        container=container,
        save=save_checkpoint,
        letters=letters,
    )


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
