"""Activation memory of dry runs against that of networks that really run, and against torch's profiler."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fairseq_w2v2_light.nn.backbone import Backbone
from fairseq_w2v2_light.nn.config import EncoderConfig
from fairseq_w2v2_light.nn.operating_point import OperatingPoint, OperatingPointSpace
from fairseq_w2v2_light.study.memory import LiveMemory, activation_memory, measure_activations

CONFIG = EncoderConfig(
    conv_layers=((16, 10, 5), (16, 3, 2), (16, 2, 2)),
    extractor_norm="layer",
    dim=32,
    ffn_dim=48,
    heads=4,
    norm_first=True,
    conv_pos=8,
    conv_pos_groups=4,
    layer_map=(0, 1, 0),
    operating_points=OperatingPointSpace((1, 2, 3), (1, 2), (1, 2), 3),
    unsqueeze_factor=3,
)
GROUP_NORM = replace(CONFIG, extractor_norm="group", norm_first=False)
SHARED_MAPS = replace(CONFIG, attention_map_every=2)
PRUNED = replace(
    CONFIG,
    layer_heads=(3, 0),
    layer_ffn=(7, 0),
    head_dim=8,
    norm_dim=40,
    conv_norm_dims=(18, 16, 16),
    conv_pos_group_dims=(9, 7, 8, 8),
)
STREAMING = replace(
    CONFIG,
    operating_points=OperatingPointSpace((1, 2), (1,), (1,), 3, chunk=(0, 4)),
    left_context=8,
    lookahead=2,
    conv_pos=5,
)
KB = 1 << 10


def measured(config, samples, point, vocabulary=9, normalizes=False):
    torch.manual_seed(0)
    head = nn.Linear(config.dim, vocabulary) if vocabulary else nn.Identity()
    return measure_activations(Backbone(config).eval(), head, samples, point, normalizes)


@pytest.mark.parametrize(
    "config, text",
    [
        (CONFIG, "s1q1k1"),
        (CONFIG, "s3q2k2"),
        (GROUP_NORM, "s2q1k2"),
        (SHARED_MAPS, "s1q1k1"),
        (PRUNED, "s1q1k1"),
        (STREAMING, "s1q1k1"),
        (STREAMING, "s1q1k1c4"),
        (STREAMING, "s2q1k1c4"),
    ],
)
def test_a_dry_run_counts_what_a_real_one_does(config, text):
    point = OperatingPoint.parse(text)
    found = activation_memory(config, 3000, point, vocabulary=9)
    assert found == measured(config, 3000, point)
    assert list(found) == ["frontend", "transformer"] and min(found.values()) > KB


def test_activations_are_those_of_the_profiler():
    """What torch's allocator gave and took, with the kernels' own buffers, which are not ours to count."""
    backbone, point = Backbone(CONFIG).eval(), OperatingPoint()
    ours = max(measure_activations(backbone, nn.Identity(), 60000, point).values())
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profiler:
        backbone.encode(torch.zeros(1, 60000), None, point)
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert ours <= peak * 1.01 and peak <= 1.3 * ours


def test_memory_grows_with_the_audio():
    short, long = (activation_memory(CONFIG, samples, OperatingPoint()) for samples in (20000, 40000))
    for part in short:
        assert long[part] == pytest.approx(2 * short[part], rel=0.02)


def test_the_transformer_takes_less_where_it_is_squeezed():
    points = [OperatingPoint.parse(text) for text in ("s1q1k1", "s2q1k1", "s3q1k1")]
    sizes = [activation_memory(CONFIG, 40000, point) for point in points]
    assert len({size["frontend"] for size in sizes}) == 1
    assert sizes[0]["transformer"] > 1.3 * sizes[1]["transformer"] > 1.3 * sizes[2]["transformer"]


def test_a_map_that_layers_share_is_memory_and_there_is_one_at_a_time():
    """Two maps, one after the other, and a last layer that keeps none."""
    samples, frames = 40000, CONFIG.frames(40000)
    deep = replace(CONFIG, layer_map=(0, 1, 0, 1, 0))
    plain, shared = (
        activation_memory(replace(deep, attention_map_every=every), samples, OperatingPoint()) for every in (1, 2)
    )
    one_map = 4 * CONFIG.heads * frames**2
    assert 0.9 * one_map <= shared["transformer"] - plain["transformer"] < 1.1 * one_map


def test_a_stream_takes_as_much_however_long_it_is():
    point = OperatingPoint.parse("s1q1k1c4")
    short, long = (activation_memory(STREAMING, samples, point) for samples in (8000, 10**9))
    assert short == long == measured(STREAMING, 30000, point, vocabulary=0)
    assert max(long.values()) < max(activation_memory(STREAMING, 30000, OperatingPoint()).values())


def test_gates_cost_nothing_and_normalising_a_copy():
    gated = replace(CONFIG, prune_units=("heads",))
    point = OperatingPoint()
    plain = activation_memory(CONFIG, 3000, point)
    assert activation_memory(gated, 3000, point) == plain
    copied = activation_memory(CONFIG, 3000, point, normalizes=True)
    assert 4 * 3000 <= copied["transformer"] - plain["transformer"] <= 4 * 3000 + KB


def test_random_numbers_go_on_as_before():
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    activation_memory(CONFIG, 3000, OperatingPoint())
    assert torch.equal(torch.randn(4), expected)


def test_audio_that_is_too_short():
    with pytest.raises(ValueError, match="too short"):
        activation_memory(CONFIG, 20, OperatingPoint())


def test_views_and_results_in_place_are_no_memory():
    weight = torch.ones(1000)
    memory = LiveMemory([weight])
    with memory:
        memory.begin("first")
        x = torch.zeros(1000)
        y = x.view(10, 100)[2:].transpose(0, 1)
        y.add_(1)
        weight.view(10, 100)
        assert (memory.live, memory.peak) == (4000, 4000)
        z = x + weight
        assert memory.live == 8000
        del x, z
        assert memory.live == 4000  # y sees it
        memory.begin("second")
        del y
        assert memory.live == 0
    assert memory.peaks == {"first": 8000, "second": 4000} and memory.peak == 8000
