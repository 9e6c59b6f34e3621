"""Tiny checkpoint files of teachers and students, as fairseq's trainer writes them."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from tiny_checkpoints import (
    LAYOUTS,
    SHAPE,
    container,
    ctc_model,
    letters,
    perturb,
    random_audio,
    save_checkpoint,
    save_ctc,
)

from fairseq_w2v2_light.models import StochasticSEWConfig, StochasticSEWModel, W2V2LightConfig, W2V2LightModel

ENCODERS = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
    "w2v2_light": (W2V2LightConfig, W2V2LightModel),
    "stochastic_sew": (StochasticSEWConfig, StochasticSEWModel),
}


def pretrained(path, name="wav2vec2", layout="large", seed=0, task=None, edit=None, **keys):
    """Writes a pre-training checkpoint of wav2vec2, w2v2_light or stochastic_sew with random weights.

    keys: of the model. task: of the task (normalize, sample_rate). edit(state_dict): changes the weights. Returns
    path (text) and model (in eval mode).
    """
    torch.manual_seed(seed)
    config_class, model_class = ENCODERS[name]
    config = config_class(**{**SHAPE, "encoder_layers": 4, **LAYOUTS[layout], **keys})
    model = model_class(config).eval()
    perturb(model)
    if edit is not None:
        edit(model.state_dict())
    save_checkpoint(path, container(config, name), model.state_dict(), task)
    return SimpleNamespace(path=str(path), model=model)


def fine_tuned(path, name="light_ctc", encoder="w2v2_light", dictionary=None, task=None, edit=None, **keys):
    """Writes a CTC checkpoint, name wav2vec_ctc or light_ctc, over an encoder that `pretrained` makes; as it."""
    start = pretrained(f"{path}.encoder", encoder, task=task, **keys)
    dictionary = letters() if dictionary is None else dictionary
    torch.manual_seed(1)
    normalize, feature_grad_mult = bool((task or {}).get("normalize", False)), keys.get("feature_grad_mult", 0.0)
    model = ctc_model(start.path, name, dictionary, normalize=normalize, feature_grad_mult=feature_grad_mult)
    with torch.no_grad():
        model.w2v_encoder.proj.weight.normal_()
    if edit is not None:
        edit(model.state_dict())
    save_ctc(path, model, {"_name": "audio_finetuning", **(task or {})}, dictionary)
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
        stock=pretrained, stock_ctc=stock_ctc, light=light, light_ctc=fine_tuned, audio=random_audio, letters=letters
    )
