"""Counts from shapes: against networks that exist, expected ones, and their gradients."""

import pytest
import torch

from fairseq_w2v2_light.nn import Backbone, OperatingPoint
from fairseq_w2v2_light.nn.counts import Widths, count_macs, count_parameters, expected_widths, widths_of
from fairseq_w2v2_light.nn.gates import Gates, GateValues

UNITS = ("conv", "heads", "ffn", "hidden")
# two layers serve three depths
SHARED = {"layer_map": "0,1,1"}
LAYOUTS = [
    {},
    {"norm_first": True, "extractor_norm": "layer", "conv_bias": True},
    SHARED,
    {**SHARED, "attention_map_every": 2},
]
# what stays of tiny.config: frontend channels, hidden channels of each group of positions, heads and FFN of each layer
KEPT = dict(
    conv_feature_layers="[(5, 10, 5), (1, 3, 2), (6, 2, 2)]",
    dim=10,
    conv_pos_group_dims=(5, 5),
    head_dim=8,
    norm_dim=16,
)


def stored_layers(changes):
    return 2 if "layer_map" in changes else 3


def pruned(tiny, changes):
    """A network with less of everything, and layer 1 without FFN."""
    heads, ffn = (1, 1, 1), (11, 0, 24)
    layers = stored_layers(changes)
    return tiny.config(**KEPT, project_features=True, layer_heads=heads[:layers], layer_ffn=ffn[:layers], **changes)


def surely(size, kept):
    """P(z != 0) of `size` gates of which the first `kept` are open."""
    return (torch.arange(size) < kept).float()


def kept_probabilities(config, widths):
    return GateValues(
        [surely(layer[0], kept) for layer, kept in zip(config.conv_layers, widths.conv)],
        [surely(config.heads, kept) for kept in widths.heads],
        [surely(config.ffn_dim, kept) for kept in widths.ffn],
        surely(config.dim, widths.dim),
    )


def gated(tiny, **changes):
    config = tiny.config(prune_units=UNITS, **changes)
    return config, Gates(config)


@pytest.mark.parametrize("changes", LAYOUTS)
def test_parameters_are_those_of_the_network(tiny, changes):
    for config in (tiny.config(**changes), pruned(tiny, changes)):
        stored = sum(parameter.numel() for parameter in Backbone(config).parameters())
        # and the mask vector, which is the pre-training model's
        assert sum(count_parameters(config).values()) == stored + config.dim


def test_counts_of_numbers_are_numbers(tiny):
    for config in (tiny.config(), pruned(tiny, {})):
        for counts in (count_parameters(config, 20), count_macs(config, 4000, vocabulary=20)):
            assert all(isinstance(count, int) for count in counts.values())


def test_widths_default_to_the_networks_own(tiny):
    config = pruned(tiny, {})
    assert widths_of(config) == Widths([5, 1, 6], [1, 1, 1], [11, 0, 24], 10)
    assert count_parameters(config, 20, widths_of(config)) == count_parameters(config, 20)
    assert count_macs(config, 4000, widths=widths_of(config)) == count_macs(config, 4000)


def test_vocabulary_counts_a_ctc_projection(tiny):
    config = tiny.config()
    assert count_parameters(config, 20)["heads"] == 17 * 20
    assert count_macs(config, 4000, vocabulary=20)["head"] == config.frames(4000) * 16 * 20


def test_without_gates_the_expected_widths_are_the_networks_own(tiny):
    config = tiny.config()
    assert expected_widths(config, GateValues()) == widths_of(config)
    some = expected_widths(config, GateValues(heads=[torch.full((2,), 0.25), None, torch.ones(2)]))
    assert [float(heads) for heads in some.heads] == [0.5, 2.0, 2.0]
    assert some._replace(heads=[2, 2, 2]) == widths_of(config)


def test_expected_widths_are_sums_of_probabilities(tiny):
    config, gates = gated(tiny)
    widths = expected_widths(config, gates.probabilities())
    for found, own in zip((*widths[:3], [widths.dim]), (*widths_of(config)[:3], [config.dim])):
        assert [float(torch.as_tensor(width).detach()) for width in found] == pytest.approx(
            [0.99 * width for width in own]
        )


@pytest.mark.parametrize("changes", LAYOUTS)
@pytest.mark.parametrize("point", ["s1q1k1", "s1q2k3", "s3q1k2"])
def test_gates_that_are_surely_open_count_as_none(tiny, changes, point):
    config = tiny.config(**changes)
    widths = expected_widths(config, kept_probabilities(config, widths_of(config)))
    point = OperatingPoint.parse(point)
    for expected, exact in (
        (count_macs(config, 4000, point, 20, widths), count_macs(config, 4000, point, 20)),
        (count_parameters(config, 20, widths), count_parameters(config, 20)),
    ):
        assert {part: float(count) for part, count in expected.items()} == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("changes", LAYOUTS)
@pytest.mark.parametrize("point", ["s1q1k1", "s1q2k3", "s3q1k2"])
def test_gates_that_are_surely_closed_count_as_pruned(tiny, changes, point):
    config = tiny.config(project_features=True, **changes)
    smaller = pruned(tiny, changes)
    widths = expected_widths(config, kept_probabilities(config, widths_of(smaller)))
    point = OperatingPoint.parse(point)
    for expected, exact in (
        (count_macs(config, 4000, point, 20, widths), count_macs(smaller, 4000, point, 20)),
        (count_parameters(config, 20, widths), count_parameters(smaller, 20)),
    ):
        assert {part: float(count) for part, count in expected.items()} == pytest.approx(exact, rel=1e-6)


def test_gates_closed_by_training_leave_nothing(tiny):
    config, gates = gated(tiny, norm_first=True)
    for gate in gates.parameters():
        torch.nn.init.constant_(gate, -200.0)
    widths = expected_widths(config, gates.probabilities())
    assert sum(count_macs(config, 4000, widths=widths).values()) == 0
    assert sum(count_parameters(config, widths=widths).values()) == config.conv_pos


@pytest.mark.parametrize("changes", LAYOUTS)
@pytest.mark.parametrize("count", [count_parameters, lambda *args, **kwargs: count_macs(args[0], 4000, **kwargs)])
def test_every_gate_has_a_gradient_that_makes_it_close(tiny, changes, count):
    config, gates = gated(tiny, **changes)
    sum(count(config, widths=expected_widths(config, gates.probabilities())).values()).backward()
    for name, parameter in gates.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad > 0).all(), name


def test_the_gradient_of_a_head_gate_is_its_macs_times_that_of_its_probability(tiny):
    """Eq. (10) for one head: 4 T d d_head + 2 T^2 d_head."""
    config = tiny.config(prune_units=("heads",))
    gates = Gates(config)
    count_macs(config, 4000, widths=expected_widths(config, gates.probabilities()))["attention"].backward()
    frames, probability = config.frames(4000), 0.99
    macs = 4 * frames * 16 * 8 + 2 * frames**2 * 8
    expected = macs * probability * (1 - probability)
    for gate in gates.heads.values():
        assert gate.log_alpha.grad.tolist() == pytest.approx([expected] * 2, rel=1e-4)


def test_padding_of_unequal_groups_keeps_its_share(tiny):
    config = tiny.config(dim=10, head_dim=8, conv_pos_group_dims=(7, 3))
    assert count_parameters(config)["positions"] == 14 * 7 * 6 + 6 + 14
    half = widths_of(config)._replace(dim=torch.tensor(5.0))
    assert float(count_parameters(config, widths=half)["positions"]) == pytest.approx(7 * 3.5 * 6 + 6 + 7)


def test_a_layer_that_reuses_maps_costs_half_the_products_and_projections(tiny):
    each, second = tiny.config(), tiny.config(attention_map_every=2)
    every = count_macs(each, 4000)["attention"]
    assert count_macs(second, 4000)["attention"] * 6 == every * 5


def test_audio_shorter_than_a_frame_is_refused(tiny):
    with pytest.raises(ValueError, match="audio of 5 samples is too short to count: one frame needs"):
        count_macs(tiny.config(), 5)
