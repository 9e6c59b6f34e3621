"""Tiny checkpoint files of teachers and students, as fairseq's trainer writes them."""

from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils, models
from fairseq.data import Dictionary
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from omegaconf import OmegaConf

from fairseq_w2v2_light.models import StochasticSEWConfig, StochasticSEWModel, W2V2LightConfig, W2V2LightModel

# stride 20, receptive field 30 samples
CONV_LAYERS = "[(16, 10, 5), (16, 3, 2), (16, 2, 2)]"
TINY = dict(
    conv_feature_layers=CONV_LAYERS,
    encoder_layers=4,
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
ENCODERS = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
    "w2v2_light": (W2V2LightConfig, W2V2LightModel),
    "stochastic_sew": (StochasticSEWConfig, StochasticSEWModel),
}


def letters(text="ABC|"):
    """A dictionary of single letters (8 symbols with fairseq's own four)."""
    dictionary = Dictionary()
    for letter in text:
        dictionary.add_symbol(letter)
    return dictionary


def audio(*samples, seed=0):
    """Waveforms of these lengths as a padded batch, and its padding mask (None when all are equally long)."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.zeros(len(samples), max(samples))
    padding = torch.ones(source.shape, dtype=torch.bool)
    for row, count in enumerate(samples):
        source[row, :count] = torch.randn(count, generator=generator)
        padding[row, :count] = False
    return source, padding if padding.any() else None


def _container(config, name):
    """A dataclass configuration as a checkpoint holds it, references to other sections resolved."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    references = {"${common.seed}": 7, "${task.normalize}": False, "${task.data}": "", "${common.tpu}": False}
    values = {key: references.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
    return {**{key: value for key, value in values.items() if not str(value).startswith("${")}, "_name": name}


def _save(path, model_cfg, state_dict, task, dictionary=None):
    cfg = {
        "common": {"seed": 7, "tpu": False},
        "task": {"_name": "audio_pretraining", "data": "/nowhere", "normalize": False, "sample_rate": 16000, **task},
        "criterion": {"_name": "ctc" if dictionary else "wav2vec"},
        "lr_scheduler": {"_name": "fixed"},
        "model": model_cfg,
    }
    state = {
        "args": None,
        "cfg": cfg,
        "model": state_dict,
        "criterion": None,
        "optimizer_history": [{"criterion_name": "", "lr_scheduler_state": {"best": None}, "num_updates": 3}],
        "task_state": {} if dictionary is None else {"target_dictionary": dictionary},
        "extra_state": {"metrics": {}, "previous_training_time": 0.0},
    }
    checkpoint_utils.torch_persistent_save(state, str(path))


def pretrained(path, name="wav2vec2", layout="large", seed=0, task=None, edit=None, **keys):
    """Writes a pre-training checkpoint of wav2vec2, w2v2_light or stochastic_sew with random weights.

    keys: of the model. task: of the task (normalize, sample_rate). edit(state_dict): changes the weights. Returns
    path (text) and model (in eval mode).
    """
    torch.manual_seed(seed)
    config_class, model_class = ENCODERS[name]
    config = config_class(**{**TINY, **LAYOUTS[layout], **keys})
    model = model_class(config).eval()
    with torch.no_grad():  # norms and biases too: their initial ones and zeros hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    if edit is not None:
        edit(model.state_dict())
    _save(path, _container(config, name), model.state_dict(), task or {})
    return SimpleNamespace(path=str(path), model=model)


def fine_tuned(path, name="light_ctc", encoder="w2v2_light", dictionary=None, task=None, edit=None, **keys):
    """Writes a CTC checkpoint, name wav2vec_ctc or light_ctc, over an encoder that `pretrained` makes; as it."""
    start = pretrained(f"{path}.encoder", encoder, task=task, **keys)
    dictionary = letters() if dictionary is None else dictionary
    normalize = bool((task or {}).get("normalize", False))
    cfg = {"_name": name, "w2v_path": start.path, "normalize": normalize, "data": "/nowhere", "apply_mask": False}
    cfg.update({"ddp_backend": "legacy_ddp"}, **({"operating_point_seed": 7} if name == "light_ctc" else {}))
    torch.manual_seed(1)
    model = models.build_model(OmegaConf.create(cfg), SimpleNamespace(target_dictionary=dictionary)).eval()
    with torch.no_grad():
        model.w2v_encoder.proj.weight.normal_()
    if edit is not None:
        edit(model.state_dict())
    values = OmegaConf.to_container(model.cfg, enum_to_str=True)
    values = {key: value for key, value in values.items() if not str(value).startswith("${")}
    _save(path, values, model.state_dict(), {"_name": "audio_finetuning", **(task or {})}, dictionary)
    return SimpleNamespace(path=str(path), model=model, encoder=model.w2v_encoder.w2v_model)


@pytest.fixture(scope="session")
def checkpoints():
    """Writers of tiny checkpoints (hop 20 samples, 4 layers of 32 channels, 8 symbols), and what goes with them.

    stock(path, **keys), stock_ctc(path, ...), light(path, ...), light_ctc(path, ...); audio(*samples), letters(text).
    """

    def stock_ctc(path, **keys):
        return fine_tuned(path, "wav2vec_ctc", "wav2vec2", **keys)

    def light(path, **keys):
        return pretrained(path, "w2v2_light", **keys)

    return SimpleNamespace(
        stock=pretrained, stock_ctc=stock_ctc, light=light, light_ctc=fine_tuned, audio=audio, letters=letters
    )
