"""Hard concrete gates: their distribution against theory, half precision, gradients, and what evaluation decides."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from fairseq_w2v2_light.nn.gates import Gates, HardConcrete, decide
from fairseq_w2v2_light.nn.gating import gated, gated_linear

SAMPLES = 1_000_000
LOG_ALPHAS = (-6.0, -3.0, -1.6, 0.0, 0.7, 2.4, 3.0, 6.0)
BETA, LOW, HIGH = 2 / 3, -0.1, 1.1


def gate(*log_alphas, **options):
    module = HardConcrete(len(log_alphas), **options)
    with torch.no_grad():
        module.log_alpha.copy_(torch.tensor(log_alphas))
    return module


def draws(log_alpha, seed=0):
    """(SAMPLES,) of one log alpha."""
    torch.manual_seed(seed)
    module = HardConcrete(SAMPLES)
    with torch.no_grad():
        module.log_alpha.fill_(log_alpha)
        return module.draw()


def above(t, log_alpha):
    """P(z > t) for 0 <= t < 1 in float64: of s = (high - low) sigmoid((logit(u) + log alpha) / beta) + low."""
    v = (np.asarray(t, dtype=np.float64) - LOW) / (HIGH - LOW)
    return 1 / (1 + np.exp(BETA * np.log(v / (1 - v)) - log_alpha))


# ---- the distribution


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_a_million_samples_have_the_mean_and_probabilities_of_theory(log_alpha):
    z = draws(log_alpha).double()
    assert 0 <= z.min() and z.max() <= 1
    module = gate(log_alpha)
    for found, expected in (
        ((z != 0).double(), module.probability().item()),
        ((z == 1).double(), float(above(1.0, log_alpha))),
        (z, module.mean().item()),
    ):
        assert abs(found.mean() - expected) <= 4 * max(found.std().item(), 1e-3) / math.sqrt(SAMPLES), log_alpha


@pytest.mark.parametrize("log_alpha", (-3.0, 0.0, 2.4))
def test_between_0_and_1_samples_have_the_density_of_theory(log_alpha):
    edges = np.linspace(0, 1, 21)
    counts, _ = np.histogram(draws(log_alpha).double().numpy(), edges)
    tails = above(edges, log_alpha)
    expected = SAMPLES * (tails[:-1] - tails[1:])
    # the first and the last bin also hold the zeros and the ones
    assert np.all(np.abs(counts - expected)[1:-1] <= 4.5 * np.sqrt(expected)[1:-1])


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_probability_is_the_tail_at_zero(log_alpha):
    assert gate(log_alpha).probability().item() == pytest.approx(float(above(0.0, log_alpha)), abs=1e-6)


@pytest.mark.parametrize("log_alpha", (-12.0, *LOG_ALPHAS, 12.0))
def test_the_mean_equals_a_fine_integral(log_alpha):
    middles = (np.arange(1_000_000) + 0.5) / 1_000_000
    assert gate(log_alpha).mean().item() == pytest.approx(above(middles, log_alpha).mean(), abs=1e-5, rel=1e-4)


def test_the_gate_starts_with_the_probability_that_was_asked_for():
    for probability in (0.01, 0.5, 0.9, 0.99):
        found = HardConcrete(3, open_probability=probability).probability()
        torch.testing.assert_close(found, torch.full((3,), probability))


def test_other_constants():
    torch.manual_seed(0)
    module = HardConcrete(200_000, open_probability=0.4, beta=0.5, low=-0.3, high=1.2)
    z = module.draw()
    assert (z != 0).float().mean().item() == pytest.approx(0.4, abs=0.006)
    assert z.mean().item() == pytest.approx(module.mean()[0].item(), abs=0.006)


@pytest.mark.parametrize(
    "options, words",
    (
        ({"open_probability": 1.0}, ("open_probability: found 1.0", "less than 1")),
        ({"open_probability": 0.0}, ("open_probability: found 0.0",)),
        ({"size": 0}, ("size 0", "size >= 1")),
        ({"beta": 0.0}, ("beta 0.0",)),
        ({"low": 0.0}, ("low 0.0", "low < 0")),
        ({"high": 1.0}, ("high 1.0", "high > 1")),
    ),
)
def test_constants_that_cannot_be(options, words):
    with pytest.raises(ValueError) as error:
        HardConcrete(**{"size": 2, **options})
    for word in words:
        assert word in str(error.value)


# ---- one draw


def test_extreme_uniforms_are_finite_and_the_ends():
    z = gate(0.0, 0.0).draw(torch.tensor([0.0, 1.0]))
    assert z.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_extreme_uniforms_in_half_precision(dtype):
    """Where 1 - 1e-6 is 1."""
    module = gate(0.0, 0.0)
    z = module.draw(torch.tensor([0.0, 1.0], dtype=dtype))
    z.sum().backward()
    assert z.dtype == torch.float32 and z.tolist() == [0.0, 1.0]
    assert module.log_alpha.grad.isfinite().all()


def test_gradients_reach_log_alpha_only_between_0_and_1():
    module = gate(0.0, 0.0, 0.0)
    z = module.draw(torch.tensor([1e-3, 0.5, 1 - 1e-3]))
    assert z[0] == 0 and 0 < z[1] < 1 and z[2] == 1
    z.sum().backward()
    gradient = module.log_alpha.grad
    assert gradient[0] == 0 and gradient[2] == 0
    # d/da of (high - low) sigmoid(a / beta) at a = 0
    assert gradient[1].item() == pytest.approx((HIGH - LOW) / 4 / BETA, rel=1e-5)


def test_probability_and_mean_have_gradients_everywhere():
    for value in ("probability", "mean"):
        module = gate(-5.0, 0.0, 5.0)
        getattr(module, value)().sum().backward()
        assert (module.log_alpha.grad > 0).all()


def test_training_draws_anew_from_torchs_seed():
    module = HardConcrete(1000, open_probability=0.5).train()
    torch.manual_seed(1)
    first, second = module(), module()
    torch.manual_seed(1)
    assert torch.equal(module(), first) and not torch.equal(first, second)


def test_evaluation_draws_nothing():
    module = HardConcrete(1000, open_probability=0.5).eval()
    state = torch.get_rng_state()
    assert torch.equal(module(), module()) and torch.equal(module(), module.decided())
    assert torch.equal(torch.get_rng_state(), state)


# ---- half precision


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("how", ("module", "autocast"))
def test_half_precision_gives_no_inf_or_nan_in_a_million_samples(dtype, how):
    torch.manual_seed(0)
    module = HardConcrete(SAMPLES, open_probability=0.5)
    module = module.to(dtype) if how == "module" else module
    # torch 2.1 has bfloat16 only on a CPU
    enabled = how == "autocast" and (dtype == torch.bfloat16 or torch.__version__ >= "2.3")
    with torch.autocast("cpu", dtype=torch.bfloat16 if not enabled else dtype, enabled=enabled):
        z, probability = module.draw(), module.probability()
        z.sum().backward()
    for values in (z, probability, module.log_alpha.grad):
        assert values.dtype == torch.float32 and values.isfinite().all()
    assert (z != 0).float().mean().item() == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_what_evaluation_decides_is_no_matter_of_precision(dtype):
    log_alphas = torch.linspace(-4, 4, 50).tolist()
    expected = gate(*log_alphas).decided()
    assert torch.equal(gate(*log_alphas).to(dtype).decided(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(*log_alphas).decided(), expected)


def precise(module):
    """The number that fp16 and bf16 would round, unchanged."""
    return module.log_alpha.dtype == torch.float32 and torch.equal(module.log_alpha, torch.tensor([1.2345678, -0.1]))


@pytest.mark.parametrize(
    "convert",
    (
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.double(),
        lambda module: module.to(torch.float16),
        lambda module: module.to("cpu", torch.bfloat16),
        lambda module: module._apply(lambda tensor: tensor.half()),
        lambda module: copy.deepcopy(module.half()),
        lambda module: copy.deepcopy(module).half().half().float(),
        lambda module: nn.Sequential(nn.Linear(2, 2), module).half()[1],
    ),
)
def test_log_alpha_stays_in_fp32(convert):
    assert precise(convert(gate(1.2345678, -0.1)))


def test_the_parameter_stays_the_same_one_when_the_module_is_converted():
    """An optimizer may hold it already."""
    module = gate(0.5)
    before = module.log_alpha
    assert module.half().log_alpha is before and module.log_alpha.requires_grad


def test_gradients_stay_in_fp32_when_the_module_is_converted():
    module = gate(1.2345678, -0.1)
    (module.log_alpha * 1.2345678).sum().backward()
    module.half()
    assert module.log_alpha.grad.dtype == torch.float32
    assert torch.equal(module.log_alpha.grad, torch.full((2,), 1.2345678))


@pytest.mark.parametrize("assign", (False, True))
def test_a_state_dict_in_half_precision_loads_as_fp32(assign):
    module = gate(0.0, 0.0)
    module.load_state_dict({"log_alpha": torch.tensor([1.5, -0.5]).half()}, assign=assign)
    assert module.log_alpha.dtype == torch.float32 and module.log_alpha.tolist() == [1.5, -0.5]
    assert isinstance(module.log_alpha, nn.Parameter)


def test_a_network_in_half_precision_saves_its_gates_in_fp32(tiny):
    backbone = tiny.backbone(prune_units=("conv", "heads", "ffn", "hidden")).half()
    state = backbone.state_dict()
    assert {value.dtype for name, value in state.items() if name.startswith("gates.")} == {torch.float32}
    assert {value.dtype for name, value in state.items() if not name.startswith("gates.")} == {torch.float16}


# ---- evaluation


@pytest.mark.parametrize("size", sorted({1, 2, 3, 12, 50, 64, 99, 100, 101, 512, 768, 1000, 2048, 3072, 4095, 4096}))
def test_untouched_gates_are_exactly_1(size):
    assert torch.equal(HardConcrete(size).decided(), torch.ones(size))


def test_untouched_gates_are_exactly_1_beside_others():
    """Rounding the expected number must not close one of them."""
    for closed in range(0, 301, 20):
        module = HardConcrete(300)
        with torch.no_grad():
            module.log_alpha[:closed] = -8.0
        assert module.decided().tolist() == [0.0] * closed + [1.0] * (300 - closed)


@pytest.mark.parametrize("seed", range(8))
def test_as_many_are_open_as_expected_the_most_likely_ones(seed):
    torch.manual_seed(seed)
    log_alpha = torch.randn(random.Random(seed).randint(1, 400)) * 2 - 1
    module = gate(*log_alpha.tolist())
    decided, probability = module.decided(), module.probability()
    sure = probability > 0.989
    assert int((decided > 0).sum()) == round((sure.sum() + probability[~sure].sum()).item())
    if 0 < (decided > 0).sum() < len(decided):
        assert log_alpha[decided > 0].min() >= log_alpha[decided == 0].max()


def test_layers_are_decided_together():
    """Rounding once keeps what is expected of all, where each for itself would lose half a gate a layer."""
    torch.manual_seed(0)
    layers = [gate(*(torch.randn(5) * 2 - 2).tolist()) for _ in range(30)]
    expected = sum(layer.probability().sum().item() for layer in layers)
    decided = decide(layers)
    assert [len(part) for part in decided] == [5] * 30
    assert abs(sum(int((part > 0).sum()) for part in decided) - expected) <= 0.5 + 30 * 5 * 0.011
    opened = torch.cat(decided) > 0
    probability = torch.cat([layer.probability() for layer in layers])
    assert probability[opened].min() >= probability[~opened].max()


def test_an_open_gate_has_the_usual_estimate_and_at_least_its_mean():
    module = gate(*torch.linspace(-1.5, 3.5, 200).tolist())
    decided = module.decided()
    opened = decided > 0
    usual = (1.2 * torch.sigmoid(module.log_alpha) - 0.1).clamp(0, 1)
    torch.testing.assert_close(decided[opened], torch.maximum(usual, module.mean())[opened])
    assert (decided[opened] >= module.mean()[opened]).all() and decided.max() == 1


def test_all_may_be_closed():
    module = gate(*[-5.0] * 7)
    assert torch.equal(module.decided(), torch.zeros(7))


def test_equal_gates_that_are_half_closed_keep_half():
    decided = HardConcrete(64, open_probability=0.25).decided()
    module = gate(*[HardConcrete(1, open_probability=0.25).log_alpha.item()] * 64)
    assert int((module.decided() > 0).sum()) == 16
    # there, the start is no sign of "not touched": everything is as likely as it was
    assert int((decided > 0).sum()) == 64


# ---- the gates of a network


def test_every_unit_has_its_gates(tiny):
    config = tiny.config(prune_units=("conv", "heads", "ffn", "hidden"))
    gates = Gates(config).eval()
    values = gates()
    assert [len(value) for value in values.conv] == [8, 8, 8]
    assert [len(value) for value in values.heads] == [2, 2, 2]
    assert [len(value) for value in values.ffn] == [24, 24, 24]
    assert len(values.hidden) == 16
    assert sorted(gates.state_dict()) == sorted(
        [f"{unit}.{index}.log_alpha" for unit in ("conv", "heads", "ffn") for index in range(3)] + ["hidden.log_alpha"]
    )


@pytest.mark.parametrize("unit", ("conv", "heads", "ffn", "hidden"))
def test_only_the_units_asked_for(tiny, unit):
    gates = Gates(tiny.config(prune_units=(unit,)))
    assert {name.split(".")[0] for name in gates.state_dict()} == {unit}
    for values in (gates(), gates.decided(), gates.probabilities()):
        assert [name for name, value in values._asdict().items() if value is not None] == [unit]


def test_layers_that_have_none_left_have_no_gates(tiny):
    config = tiny.config(prune_units=("heads", "ffn"), layer_heads=(1, 0, 2), head_dim=8, layer_ffn=(0, 5, 24))
    values = Gates(config)()
    assert [value if value is None else len(value) for value in values.heads] == [1, None, 2]
    assert [value if value is None else len(value) for value in values.ffn] == [None, 5, 24]


def test_gates_belong_to_stored_layers(tiny):
    gates = Gates(tiny.config(encoder_layers=6, unique_layers=2, prune_units=("heads", "ffn")))
    assert sorted(gates.state_dict()) == [
        f"{unit}.{stored}.log_alpha" for unit in ("ffn", "heads") for stored in (0, 1)
    ]


def test_layers_that_use_each_others_maps_have_one_set_of_head_gates(tiny):
    config = tiny.config(encoder_layers=6, attention_map_every=2, prune_units=("heads", "ffn"))
    gates = Gates(config).train()
    assert [name for name in gates.state_dict() if name.startswith("heads")] == [
        f"heads.{n}.log_alpha" for n in (0, 2, 4)
    ]
    values = gates()
    for first in (0, 2, 4):
        assert values.heads[first] is values.heads[first + 1]
    assert len(values.ffn) == 6


@pytest.mark.parametrize(
    "keys, groups",
    (
        ({}, {0: {0}, 1: {1}, 2: {2}, 3: {3}}),
        ({"attention_map_every": 3}, {0: {0, 1, 2}, 3: {3}}),
        ({"attention_map_every": 4}, {0: {0, 1, 2, 3}}),
        ({"attention_map_every": 2, "layer_map": "0,1,2,1"}, {0: {0, 1, 2}}),
        ({"attention_map_every": 2, "layer_map": "0,0,1,1"}, {0: {0}, 1: {1}}),
        ({"attention_map_every": 2, "unique_layers": 1}, {0: {0}}),
    ),
)
def test_map_groups(tiny, keys, groups):
    assert tiny.config(encoder_layers=4, **keys).map_groups == groups


def test_expected_counts_have_gradients(tiny):
    gates = Gates(tiny.config(prune_units=("conv", "heads", "ffn", "hidden")))
    values = gates.probabilities()
    total = sum(value.sum() for unit in values[:3] for value in unit) + values.hidden.sum()
    assert total.item() == pytest.approx(0.99 * (24 + 6 + 72 + 16), rel=1e-5)
    total.backward()
    assert all((parameter.grad > 0).all() for parameter in gates.parameters())


# ---- what gates do to weights


def test_a_gate_multiplies_in_the_dtype_of_its_input():
    x = torch.ones(2, 3, dtype=torch.float16)
    assert gated(x, None) is x
    y = gated(x, torch.tensor([0.0, 0.5, 1.0]))
    assert y.dtype == torch.float16 and y.tolist() == [[0.0, 0.5, 1.0]] * 2


@pytest.mark.parametrize("dim", (0, 1, 2, -1, -2, -3))
def test_a_gate_along_any_dimension(dim):
    x = torch.randn(2, 3, 4)
    gate = torch.rand(x.size(dim))
    assert torch.equal(gated(x, gate, dim), (x.movedim(dim, -1) * gate).movedim(-1, dim))


def test_a_gated_linear_is_the_linear_between_gated_activations():
    torch.manual_seed(0)
    linear, x = nn.Linear(5, 3), torch.randn(2, 7, 5)
    rows, columns = torch.tensor([0.0, 1.0, 0.3]), torch.tensor([1.0, 0.0, 0.5, 0.2, 1.0])
    assert torch.equal(gated_linear(linear, x), linear(x))
    torch.testing.assert_close(gated_linear(linear, x, rows, columns), linear(x * columns) * rows)
    torch.testing.assert_close(gated_linear(linear, x, None, columns), linear(x * columns))
    torch.testing.assert_close(gated_linear(linear, x, rows), linear(x) * rows)


def test_a_gated_linear_without_an_open_column_adds_no_bias():
    linear = nn.Linear(5, 3)
    assert gated_linear(linear, torch.randn(2, 5), None, torch.zeros(5)).abs().sum() == 0
    assert gated_linear(linear, torch.zeros(2, 5), None, torch.eye(5)[0]).tolist() == [linear.bias.tolist()] * 2
