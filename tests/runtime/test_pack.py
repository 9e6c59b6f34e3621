"""Packed weights: the same network, faster."""

import pytest
import torch
from torch import nn

from fairseq_w2v2_light.nn import Backbone, OperatingPoint, encoder_config
from fairseq_w2v2_light.nn.streaming import Stream
from fairseq_w2v2_light.runtime import pack


def network(**changes):
    torch.manual_seed(0)
    keys = dict(
        conv_feature_layers="[(16, 10, 5), (16, 3, 2), (16, 2, 2)]",
        extractor_norm="layer",
        conv_bias=True,
        encoder_layers=3,
        dim=32,
        ffn_dim=48,
        heads=4,
        conv_pos=9,
        conv_pos_groups=4,
        chunk_frames=(0, 12),
        left_context_frames=12,
    )
    return Backbone(encoder_config(**{**keys, **changes})).eval()


def can_pack():
    return pack.pack_(nn.Sequential(nn.Linear(8, 8)), 4)


needs_product = pytest.mark.skipif(not can_pack(), reason="this torch has no packed product")


@needs_product
@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"norm_first": True, "unique_layers": 1, "attention_map_every": 3},
        {"squeeze_factors": (1, 2), "query_pools": (2,), "kv_pools": (3,)},
        {"extractor_norm": "group", "chunk_frames": ()},
        {"conv_bias": False, "extractor_norm": "layer"},
    ),
)
def test_the_packed_network_computes_the_same(changes):
    model, packed = network(**changes), network(**changes)
    packed.load_state_dict(model.state_dict())
    assert pack.pack_(packed, 12)
    wave, lengths = torch.randn(2, 1300), torch.tensor([1300, 700])
    points = list(model.config.operating_points.points())
    with torch.no_grad():
        for point in points:
            expected, _ = model.encode(wave, lengths, point)
            found, _ = packed.encode(wave, lengths, point)
            torch.testing.assert_close(found.x[0], expected.x[0], atol=1e-5, rtol=1e-5)
            frames = model.config.frames(700)
            torch.testing.assert_close(found.x[1, :frames], expected.x[1, :frames], atol=1e-5, rtol=1e-5)


@needs_product
def test_a_packed_stream_gives_the_frames_of_the_whole_utterance():
    model, packed = network(), network()
    packed.load_state_dict(model.state_dict())
    pack.pack_(packed, 12)
    stream = Stream(packed, OperatingPoint(chunk=12))
    wave, state, outputs = torch.randn(1, 1000), stream.start(), []
    rest = wave
    while rest.size(1) >= stream.samples_needed(state):
        needed = stream.samples_needed(state)
        frames, state = stream.step(rest[:, :needed], state)
        outputs.append(frames)
        rest = rest[:, needed:]
    outputs.append(stream.finish(rest, state))
    with torch.no_grad():
        expected, _ = model.encode(wave, point=OperatingPoint(chunk=12))
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected.x, atol=1e-5, rtol=1e-5)


@needs_product
def test_every_linear_but_the_unsqueeze_layer_is_packed():
    model = network(squeeze_factors=(2,))
    pack.pack_(model, 12)
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert left == ["encoder.upsample.0"]


@pytest.mark.parametrize("change", (lambda model: model.double(), lambda model: model.bfloat16()))
def test_other_dtypes_stay_as_they_are(change):
    model = change(network())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not pack.pack_(model, 12)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_torch_without_the_product_changes_nothing(monkeypatch):
    monkeypatch.setattr(pack, "_can_pack", lambda: False)
    model = network()
    assert not pack.pack_(model, 12)
    assert isinstance(model.encoder.layers[0].fc1, nn.Linear)
