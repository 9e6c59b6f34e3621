"""The shapes of BASE and LARGE: parameter counts of fairseq, its state dict, its features."""

import pytest
import torch
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model

from fairseq_w2v2_light.models import W2V2LightConfig, W2V2LightModel

BASE = dict(quantize_targets=True, final_dim=256, encoder_layerdrop=0.0)
LARGE = dict(
    quantize_targets=True,
    final_dim=768,
    encoder_layers=24,
    encoder_embed_dim=1024,
    encoder_ffn_embed_dim=4096,
    encoder_attention_heads=16,
    encoder_layerdrop=0.0,
)
LARGE_LV60K = {**LARGE, "extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}


@pytest.fixture(autouse=True)
def _no_random_initialisation(monkeypatch):
    """Initial values are overwritten; drawing hundreds of millions of them takes most of the time."""
    for name in ("normal_", "kaiming_normal_", "uniform_", "xavier_uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)


def fill(model):
    """Small pseudo-random values, cheaply: tiles of one random vector."""
    noise = torch.randn(100_003, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.no_grad():
        for parameter in model.parameters():
            count = parameter.numel()
            parameter.view(-1).copy_(noise.repeat(-(-count // len(noise)))[:count])
            if parameter.dim() == 1 or parameter.shape[:2] == (1, 1):
                parameter.add_(0.5)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("shape, parameters", ((BASE, 95_044_608), (LARGE_LV60K, 317_390_592)), ids=("base", "large"))
def test_real_shapes_equal_stock(shape, parameters):
    stock = Wav2Vec2Model(Wav2Vec2Config(**shape)).eval()
    fill(stock)
    with torch.device("meta"):
        light = W2V2LightModel(W2V2LightConfig(**shape)).eval()
    assert count(light) == count(stock) == parameters
    # assigned, not copied: both models use the same memory
    torch.nn.Module.load_state_dict(light, stock.state_dict(), strict=True, assign=True)

    source = torch.randn(1, 16000, generator=torch.Generator().manual_seed(1)) * 0.1
    with torch.no_grad():
        ours = light.extract_features(source)["x"]
        theirs = stock.extract_features(source, None)["x"]
    assert ours.shape == (1, 49, shape.get("encoder_embed_dim", 768))
    assert (ours - theirs).abs().max() <= 1e-5


def test_one_stored_layer_leaves_nine_percent_of_large():
    with torch.device("meta"):
        light = W2V2LightModel(W2V2LightConfig(**LARGE, unique_layers=1))
    full = 317_380_000
    assert count(light) == pytest.approx(27_670_000, rel=0.005)
    assert 1 - count(light) / full == pytest.approx(0.9128, abs=0.0005)
