"""What the tests' tiny models and checkpoint files have in common; on pytest's `pythonpath`."""

from types import SimpleNamespace

import torch
from fairseq import checkpoint_utils, models
from fairseq.data import Dictionary
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from omegaconf import OmegaConf

from fairseq_w2v2_light.models import StochasticSEWConfig, StochasticSEWModel, W2V2LightConfig, W2V2LightModel

# stride 20, receptive field 30 samples
CONV_LAYERS = "[(16, 10, 5), (16, 3, 2), (16, 2, 2)]"
SHAPE = dict(
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
)
LAYOUTS = {
    "base": dict(extractor_mode="default", layer_norm_first=False, conv_bias=False),
    "large": dict(extractor_mode="layer_norm", layer_norm_first=True, conv_bias=True),
}


def letters(text="ABC|"):
    """A dictionary of single letters (8 symbols with fairseq's own four)."""
    dictionary = Dictionary()
    for letter in text:
        dictionary.add_symbol(letter)
    return dictionary


def random_audio(*samples, seed=0, dtype=torch.float32):
    """Waveforms of these lengths as a padded batch, and its padding mask (None when all are equally long)."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.zeros(len(samples), max(samples), dtype=dtype)
    padding = torch.ones(source.shape, dtype=torch.bool)
    for row, count in enumerate(samples):
        source[row, :count] = torch.randn(count, generator=generator).to(dtype)
        padding[row, :count] = False
    return source, padding if padding.any() else None


def perturb(model, generator=None):
    """Gives norms and biases random values, which their initial ones and zeros would hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def container(config, name):
    """A dataclass configuration as a checkpoint holds it, references to other sections resolved."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    references = {"${common.seed}": 7, "${task.normalize}": False, "${task.data}": "", "${common.tpu}": False}
    values = {key: references.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
    return {**without_references(values), "_name": name}


def without_references(values):
    """Without the keys that refer to another section of a run."""
    return {key: value for key, value in values.items() if not str(value).startswith("${")}


def save_checkpoint(path, model_cfg, state_dict, task=None, dictionary=None):
    """Writes a checkpoint with the entries that fairseq's Trainer.state_dict has; returns its path as text.

    task: keys of the task that differ from the pre-training one's.
    """
    cfg = {
        "common": {"seed": 7, "tpu": False},
        "task": {
            "_name": "audio_pretraining",
            "data": "/nowhere",
            "normalize": False,
            "sample_rate": 16000,
            **(task or {}),
        },
        "criterion": {"_name": "light_contrastive" if dictionary is None else "ctc"},
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
                "lr_scheduler_state": {"best": 1.0},
                "num_updates": 3,
            }
        ],
        "task_state": {} if dictionary is None else {"target_dictionary": dictionary},
        "extra_state": {
            "metrics": {},
            "previous_training_time": 0.0,
            "train_iterator": {"epoch": 4, "iterations_in_epoch": 0},
            "val_loss": 1.0,
        },
        "last_optimizer_state": {"state": {}},
    }
    checkpoint_utils.torch_persistent_save(state, str(path))
    return str(path)


def ctc_model(path, name="light_ctc", dictionary=None, **keys):
    """A CTC model that starts from the checkpoint `path`, as fairseq's training builds it; keys: of its own."""
    cfg = {"_name": name, "w2v_path": str(path), "normalize": False, "data": "/nowhere", "ddp_backend": "legacy_ddp"}
    cfg.update({"apply_mask": False}, **({"operating_point_seed": 7} if name == "light_ctc" else {}), **keys)
    dictionary = letters() if dictionary is None else dictionary
    return models.build_model(OmegaConf.create(cfg), SimpleNamespace(target_dictionary=dictionary)).eval()


def save_ctc(path, model, task=None, dictionary=None):
    """Writes a CTC model's checkpoint; returns its path as text."""
    values = without_references(OmegaConf.to_container(model.cfg, enum_to_str=True))
    return save_checkpoint(path, values, model.state_dict(), task, dictionary)


STOCHASTIC = dict(squeeze_factors=[1, 2], query_pools=[1, 2], kv_pools=[1, 2])
SHARED = dict(unique_layers=1, attention_map_every=2)
STREAMING = dict(chunk_frames=[4], left_context_frames=8, lookahead_frames=2)
SEW = dict(STOCHASTIC, conv_pos=7, projection_hidden_dim=24)
PRETRAINED = {
    "wav2vec2": (Wav2Vec2Model, Wav2Vec2Config),
    "w2v2_light": (W2V2LightModel, W2V2LightConfig),
    "stochastic_sew": (StochasticSEWModel, StochasticSEWConfig),
}


def pretrained(path, name="w2v2_light", layout="base", **keys):
    """Writes a tiny pre-training checkpoint; returns its path."""
    model_class, config_class = PRETRAINED[name]
    config = config_class(**{**SHAPE, **LAYOUTS[layout], **keys})
    torch.manual_seed(0)
    model = model_class(config)
    perturb(model, torch.Generator().manual_seed(0))
    return save_checkpoint(path, container(config, name), model.state_dict())


def finetuned(folder, ctc="light_ctc", ctc_keys=None, task=None, dictionary=None, **encoder):
    """Writes a tiny CTC checkpoint that fairseq's own loader can load; returns its path."""
    model = ctc_model(pretrained(folder / "pretrained.pt", **encoder), ctc, **(ctc_keys or {}))
    perturb(model.w2v_encoder.proj, torch.Generator().manual_seed(1))
    letters().save(str(folder / "dict.ltr.txt"))
    task = {"_name": "audio_finetuning", "data": str(folder), "labels": "ltr", **(task or {})}
    return save_ctc(folder / "ctc.pt", model, task, dictionary or letters())


# CTC checkpoints of every kind, as arguments of `finetuned`
MODELS = {
    "base": dict(layout="base"),
    "large": dict(layout="large"),
    "stock CTC model": dict(layout="large", ctc="wav2vec_ctc"),
    "shared layers": dict(layout="large", **SHARED),
    "stochastic": dict(layout="base", **STOCHASTIC),
    "at one point": dict(layout="large", **STOCHASTIC, **SHARED, ctc_keys={"operating_point": "s2q1k2"}),
    "at a point of its own": dict(layout="base", **STOCHASTIC, operating_point="s2q2k1"),
    "stochastic SEW": dict(name="stochastic_sew", **SEW, ctc_keys={"operating_point": "s2q1k2"}),
    "streaming": dict(layout="large", **STREAMING),
    "streaming since fine-tuning": dict(layout="large", ctc_keys={**STREAMING, "chunk_frames": [4, 8]}),
}
