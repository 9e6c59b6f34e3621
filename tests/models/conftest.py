"""Tiny random models, ours and fairseq's, with shared weights; and checkpoint files as fairseq's trainer writes."""

from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from omegaconf import OmegaConf

from fairseq_w2v2_light.models import StochasticSEWConfig, StochasticSEWModel, W2V2LightConfig, W2V2LightModel

# stride 20, receptive field 30 samples
CONV_LAYERS = "[(16, 10, 5), (16, 3, 2), (16, 2, 2)]"
TINY = dict(
    conv_feature_layers=CONV_LAYERS,
    encoder_layers=3,
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
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    encoder_layerdrop=0.0,
)
LAYOUTS = {
    "base": dict(extractor_mode="default", layer_norm_first=False, conv_bias=False),
    "large": dict(extractor_mode="layer_norm", layer_norm_first=True, conv_bias=True),
}


def _perturb(model, seed):
    """Gives norms and biases random values, which their initial ones and zeros would hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def build_light(seed=0, layout="base", perturb=True, **changes):
    torch.manual_seed(seed)
    model = W2V2LightModel(W2V2LightConfig(**{**TINY, **LAYOUTS[layout], **changes}))
    if perturb:
        _perturb(model, seed)
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
    _perturb(stock, seed)
    light = W2V2LightModel(W2V2LightConfig(**{**TINY, **LAYOUTS[layout], **changes}))
    light.load_state_dict(stock.state_dict(), strict=True)
    return light.eval(), stock.eval()


def random_audio(*samples, seed=0, dtype=torch.float32):
    """Waveforms of these lengths as a padded batch, and its padding mask (None when all are equally long)."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.zeros(len(samples), max(samples), dtype=dtype)
    padding = torch.ones(source.shape, dtype=torch.bool)
    for row, count in enumerate(samples):
        source[row, :count] = torch.randn(count, generator=generator).to(dtype)
        padding[row, :count] = False
    return source, padding if padding.any() else None


def random_mask(batch, time, masked=7, seed=0):
    """A mask (batch, time) with `masked` frames in every row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch, time, dtype=torch.bool)
    for row in range(batch):
        mask[row, torch.randperm(time, generator=generator)[:masked]] = True
    return mask


def container(config, name):
    """A dataclass configuration as a checkpoint holds it, references to other sections resolved."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    references = {"${common.seed}": 7, "${task.normalize}": False, "${task.data}": "", "${common.tpu}": False}
    values = {key: references.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
    unresolved = [key for key, value in values.items() if str(value).startswith("${")]
    return {**{key: value for key, value in values.items() if key not in unresolved}, "_name": name}


def save_checkpoint(path, model_cfg, state_dict, task=None, dictionary=None):
    """Writes a checkpoint with the entries that fairseq's Trainer.state_dict has; returns its path as text."""
    cfg = {
        "common": {"seed": 7, "tpu": False},
        "task": task or {"_name": "audio_pretraining", "data": "/nowhere", "normalize": False},
        "criterion": {"_name": "light_contrastive"},
        "lr_scheduler": {"_name": "fixed"},
        "model": model_cfg,
    }
    state = {
        "args": None,
        "cfg": cfg,
        "model": state_dict,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "LightContrastive",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": None},
                "num_updates": 3,
            }
        ],
        "task_state": {} if dictionary is None else {"target_dictionary": dictionary},
        "extra_state": {"metrics": {}, "previous_training_time": 0.0},
    }
    checkpoint_utils.torch_persistent_save(state, str(path))
    return str(path)


def letters(text="ABC|"):
    """A dictionary of single letters."""
    dictionary = Dictionary()
    for letter in text:
        dictionary.add_symbol(letter)
    return dictionary


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
