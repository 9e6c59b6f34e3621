"""Sparsity of gates, the augmented Lagrangian, and that it brings a network to its target."""

import dataclasses

import pytest
import torch

from fairseq_w2v2_light.criterions.sparsity import (
    METHODS,
    MULTIPLIERS_GROUP,
    Multipliers,
    check_method,
    kept_bars,
    opened,
    ramped,
    sparsities,
)
from fairseq_w2v2_light.nn.config import EncoderConfig
from fairseq_w2v2_light.nn.counts import count_macs, count_parameters
from fairseq_w2v2_light.nn.gates import Gates, GateValues, HardConcrete
from fairseq_w2v2_light.nn.operating_point import OperatingPoint, OperatingPointSpace

ALL = ("conv", "heads", "ffn", "hidden")
TRANSFORMER = ("heads", "ffn", "hidden")


def network(units=ALL, **changes):
    config = EncoderConfig(
        conv_layers=((128, 10, 5), (128, 8, 8), (128, 8, 8)),
        extractor_norm="layer",
        dim=256,
        ffn_dim=512,
        heads=64,
        conv_pos=8,
        conv_pos_groups=16,
        layer_map=(0, 1),
        prune_units=units,
    )
    return dataclasses.replace(config, **changes)


def hard_concretes(gates):
    return [module for module in gates.modules() if isinstance(module, HardConcrete)]


def control(method, target, steps=300, lr=0.1):
    """Trains gates on a toy loss, a price for what each removes, with the optimizers of the recipes."""
    torch.manual_seed(0)
    config = network(TRANSFORMER if method == "transformer" else ALL)
    gates, multipliers = Gates(config).train(), Multipliers(METHODS[method], stiffness=500.0)
    prices = [torch.rand_like(gate.log_alpha) / gate.log_alpha.numel() / 10 for gate in hard_concretes(gates)]
    optimizer = torch.optim.Adam(gates.parameters(), lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    ascent = torch.optim.SGD(multipliers.parameters(), lr=2.0)
    for step in range(steps):
        optimizer.zero_grad()
        ascent.zero_grad()
        loss = sum((price * (1 - gate()).square()).sum() for price, gate in zip(prices, hard_concretes(gates)))
        found = sparsities(method, config, gates.probabilities(), vocabulary=30)
        wanted = {name: ramped(target, step, steps // 2) for name in METHODS[method]}
        (loss + multipliers.penalty(found, wanted)).backward()
        optimizer.step()
        ascent.step()
        schedule.step()
    with torch.no_grad():
        ends = (gates.probabilities(), opened(gates.decided()))
        return [sparsities(method, config, values, vocabulary=30) for values in ends]


@pytest.mark.parametrize("target", [percent / 100 for percent in range(10, 100, 10)])
@pytest.mark.parametrize("method", ["size", "sepsize", "mac"])
def test_the_controller_reaches_its_target(method, target):
    expected, reached = control(method, target)
    for name in METHODS[method]:
        assert abs(float(expected[name]) - target) < 0.01, name
        assert abs(float(reached[name]) - target) < 0.01, name


def test_the_controller_of_the_transformer_alone():
    expected, reached = control("transformer", 0.4)
    assert abs(float(expected["transformer"]) - 0.4) < 0.01 and abs(float(reached["transformer"]) - 0.4) < 0.01


def gap_gradients(sparsity, values):
    multipliers = Multipliers(["size"], 0.0)
    multipliers.values.data.copy_(torch.tensor([values]))
    s = torch.tensor(sparsity, requires_grad=True)
    penalty = multipliers.penalty({"size": s}, {"size": 0.5})
    penalty.backward()
    return penalty.item(), s.grad.item(), multipliers.values.grad[0].tolist()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_penalty_value_and_gradients(sparsity):
    """g = l1 (s - t) + l2 (s - t)^2: that of s descends, those of the multipliers are turned round."""
    gap = sparsity - 0.5
    value, of_s, of_multipliers = gap_gradients(sparsity, [2.0, 3.0])
    assert value == pytest.approx(2 * gap + 3 * gap**2, abs=1e-6)
    assert of_s == pytest.approx(2 + 6 * gap, abs=1e-6)
    assert of_multipliers == pytest.approx([-gap, -(gap**2)], abs=1e-6)


def test_a_descent_optimizer_ascends_on_the_multipliers():
    multipliers = Multipliers(["cnn", "transformer"], 10.0)
    assert multipliers.values.tolist() == [[0.0, 10.0], [0.0, 10.0]]
    optimizer = torch.optim.SGD(multipliers.parameters(), lr=1.0)
    found = {"cnn": torch.tensor(0.1), "transformer": torch.tensor(0.7)}
    multipliers.penalty(found, {"cnn": 0.5, "transformer": 0.5}).backward()
    optimizer.step()
    # too little was pruned: l1 pushes on; too much: back
    assert multipliers.values[0].tolist() == pytest.approx([-0.4, 10.16])
    assert multipliers.values[1].tolist() == pytest.approx([0.2, 10.04])


def test_two_constraints_add_up():
    multipliers = Multipliers(["cnn", "transformer"], 3.0)
    found = {"cnn": torch.tensor(0.2), "transformer": torch.tensor(0.4)}
    penalty = multipliers.penalty(found, {"cnn": 0.5, "transformer": 0.5})
    assert penalty.item() == pytest.approx(3 * 0.3**2 + 3 * 0.1**2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_multipliers_stay_in_single_precision(dtype):
    multipliers = Multipliers(["size"], 0.1).to(dtype)
    assert multipliers.values.dtype == torch.float32 and multipliers.values.tolist() == [[0.0, pytest.approx(0.1)]]
    assert multipliers.values.param_group == MULTIPLIERS_GROUP


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_changes_nothing(method, dtype):
    config = network(TRANSFORMER if method == "transformer" else ALL)
    gates = Gates(config)

    def compute():
        found = sparsities(method, config, gates.probabilities(), vocabulary=30)
        target = dict.fromkeys(found, 0.5)
        return found, Multipliers(METHODS[method]).to(dtype).penalty(found, target)

    expected, penalty = compute()
    gates.to(dtype)
    # torch 2.1 has no float16 autocast on a CPU
    with torch.autocast("cpu", torch.bfloat16):
        found, half_penalty = compute()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert half_penalty.dtype == torch.float32 and torch.equal(half_penalty, penalty)


def test_everything_is_finite_where_all_gates_are_closed():
    config = network()
    gates = Gates(config)
    for gate in hard_concretes(gates):
        torch.nn.init.constant_(gate.log_alpha, -200.0)
    for method in ("size", "sepsize", "mac"):
        found = sparsities(method, config, gates.probabilities(), vocabulary=30)
        penalty = Multipliers(METHODS[method]).penalty(found, dict.fromkeys(found, 0.4))
        gradients = torch.autograd.grad(penalty, list(gates.parameters()), allow_unused=True)
        assert penalty.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def values_of(config, fraction):
    """The first `fraction` of every unit's gates open."""

    def first(size):
        return (torch.arange(size) < size * fraction).float()

    layers = range(config.unique_layers)
    return GateValues(
        [first(channels) for channels, _, _ in config.conv_layers],
        [first(config.heads) for _ in layers],
        [first(config.ffn_dim) for _ in layers],
        first(config.dim),
    )


def test_fractions_are_those_of_a_model_of_that_size():
    config = network()
    half = dataclasses.replace(
        config,
        conv_layers=tuple((channels // 2, kernel, stride) for channels, kernel, stride in config.conv_layers),
        dim=128,
        ffn_dim=256,
        heads=32,
        head_dim=4,
    )
    # positions of half the channels, in as many groups
    pruned = values_of(config, 0.5)
    before, after = count_parameters(config, 30), count_parameters(half, 30)
    cnn = 1 - after["frontend"] / before["frontend"]
    layers = 1 - after["layers"] / before["layers"]
    size = 1 - sum(after.values()) / sum(before.values())
    macs = [sum(count_macs(each, 160_000, vocabulary=30).values()) for each in (config, half)]
    assert float(sparsities("sepsize", config, pruned, 30)["cnn"]) == pytest.approx(cnn, abs=1e-6)
    assert float(sparsities("sepsize", config, pruned, 30)["transformer"]) == pytest.approx(layers, abs=1e-6)
    assert float(sparsities("size", config, pruned, 30)["size"]) == pytest.approx(size, abs=1e-5)
    assert float(sparsities("mac", config, pruned, 30)["mac"]) == pytest.approx(1 - macs[1] / macs[0], abs=1e-6)


def test_open_gates_prune_nothing():
    config = network()
    pruned = [sparsities(method, config, values_of(config, 1.0), 30) for method in METHODS]
    assert all(float(value) == pytest.approx(0, abs=1e-6) for found in pruned for value in found.values())


def test_macs_are_counted_at_the_operating_point():
    space = OperatingPointSpace((1, 4), depth=2)
    config = network(("conv",), operating_points=space, unsqueeze_factor=4)
    gone = values_of(config, 0.5)._replace(heads=None, ffn=None, hidden=None)
    default = sparsities("mac", config, gone)["mac"]
    assert torch.equal(default, sparsities("mac", config, gone, point=OperatingPoint.parse("s1q1k1"))["mac"])
    # the frontend has a larger share where the Transformer does less
    assert sparsities("mac", config, gone, point=OperatingPoint.parse("s4q1k1"))["mac"] > default + 0.05


@pytest.mark.parametrize(
    "updates, ramp, expected",
    [(-5, 10, 0.0), (-1, 0, 0.0), (0, 10, 0.0), (5, 10, 0.2), (10, 10, 0.4), (99, 10, 0.4), (0, 0, 0.4)],
)
def test_the_target_ramps_up(updates, ramp, expected):
    assert ramped(0.4, updates, ramp) == pytest.approx(expected)


def test_bars_show_what_each_layer_keeps():
    gates = GateValues(
        [torch.ones(8), torch.tensor([1.0] * 4 + [0.0] * 4)],
        [torch.zeros(8), None],
        None,
        torch.tensor([0.3] * 96 + [0.0] * 4),
    )
    assert kept_bars(gates) == "conv █▅ heads ·· hidden 96 %"
    assert kept_bars(GateValues(ffn=[torch.tensor([1.0] + [0.0] * 99)])) == "ffn ▁"


@pytest.mark.parametrize(
    "method, units, targets, message",
    [
        (
            "speed",
            ALL,
            {"all": 0.4},
            r"criterion.method: found 'speed', expected one of size, sepsize, mac",
        ),
        ("size", (), {"size": 0.4}, r"model.prune_units: empty.*set model.prune_units=\[conv,heads,ffn,hidden\]"),
        ("transformer", ALL, {"transformer": 0.4}, r"prunes the Transformer only; set.*=\[heads,ffn,hidden\]"),
        ("transformer", (), {"transformer": 0.4}, r"model.prune_units: empty.*=\[heads,ffn,hidden\]"),
        ("mac", ALL, {"mac": 1.0}, r"criterion.target: found 1.0, expected the fraction to prune, from 0 to below 1"),
        ("mac", ALL, {"mac": -0.1}, r"criterion.target: found -0.1"),
        ("mac", ALL, {"mac": float("nan")}, r"criterion.target: found nan"),
        ("sepsize", ALL, {"cnn": 1.5, "transformer": 0.4}, r"criterion.cnn_target: found 1.5"),
        ("sepsize", TRANSFORMER, {"cnn": 0.2, "transformer": 0.4}, r"criterion.cnn_target: found 0.2.*at most 0.0%"),
        ("size", ("conv",), {"size": 0.9}, r"criterion.target: found 0.9, but gates on \['conv'\] can remove at most"),
    ],
)
def test_refuses_what_cannot_work(method, units, targets, message):
    with pytest.raises(ValueError, match=message):
        check_method(method, network(units), targets, 30)


@pytest.mark.parametrize("method", METHODS)
def test_accepts_what_can(method):
    units = TRANSFORMER if method == "transformer" else ALL
    check_method(method, network(units), dict.fromkeys(METHODS[method], 0.9), 30)
