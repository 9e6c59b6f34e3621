"""Gates in the network: open ones change nothing, closed ones are exact zeros; streams, shared layers, gradients."""

import numpy as np
import pytest
import torch

from fairseq_w2v2_light.nn import Backbone, OperatingPoint
from fairseq_w2v2_light.nn.gates import HardConcrete
from fairseq_w2v2_light.nn.gating import GateValues
from fairseq_w2v2_light.nn.streaming import Stream

# open gates multiply by 1; what is left is the order of sums in a matrix product
ROUNDING = 3e-6
UNITS = ("conv", "heads", "ffn", "hidden")
LAYOUTS = {
    "base": dict(extractor_norm="group", norm_first=False, conv_bias=False),
    "large": dict(extractor_norm="layer", norm_first=True, conv_bias=True),
}
STREAMING = dict(
    extractor_norm="layer",
    encoder_layers=4,
    squeeze_factors=(1, 2),
    query_pools=(1,),
    kv_pools=(1, 2),
    chunk_frames=(4,),
    left_context_frames=12,
    lookahead_frames=4,
)


def wave(*samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(len(samples), max(samples))
    for row, count in enumerate(samples):
        rows[row, :count] = torch.randn(count, generator=generator)
    return rows


def gated(tiny, units=UNITS, seed=0, decide=None, **keys):
    """A network with gates; decide="open", or "random" ones of which about half are closed."""
    backbone = tiny.backbone(seed, prune_units=units, **keys)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in backbone.gates.modules():
            if isinstance(module, HardConcrete):
                module.log_alpha.fill_(5.0)
                if decide == "random":
                    module.log_alpha.copy_(torch.randn(module.log_alpha.shape, generator=generator) * 3 - 1)
    return backbone


def without_gates(tiny, backbone, **keys):
    plain = tiny.backbone(99, **keys)
    state = {name: value for name, value in backbone.state_dict().items() if not name.startswith("gates.")}
    plain.load_state_dict(state, strict=True)
    return plain


def encode(backbone, audio, point="s1q1k1", lengths=None):
    with torch.no_grad():
        return backbone.encode(audio, lengths, OperatingPoint.parse(point))


# ---- open gates


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "keys",
    ({}, {"encoder_layers": 4, "unique_layers": 2}, {"attention_map_every": 2}, {"squeeze_tail": "drop"}),
    ids=("plain", "shared", "maps", "drop"),
)
def test_open_gates_change_nothing_at_any_point(tiny, layout, keys):
    keys = {**LAYOUTS[layout], **keys}
    backbone = gated(tiny, **keys)
    plain = without_gates(tiny, backbone, **keys)
    audio, lengths = wave(401, 300), torch.tensor([401, 300])
    for point in tiny.points:
        found, expected = encode(backbone, audio, point, lengths)[0], encode(plain, audio, point, lengths)[0]
        assert (found.x - expected.x).abs().max() <= ROUNDING, point
        for ours, theirs in zip(found.layers, expected.layers):
            assert (ours.x - theirs.x).abs().max() <= ROUNDING and (ours.ffn - theirs.ffn).abs().max() <= ROUNDING


@pytest.mark.parametrize("layout", LAYOUTS)
def test_open_gates_leave_the_gradients_as_they_were(tiny, layout):
    keys = {**LAYOUTS[layout], "encoder_layers": 2}
    backbone = gated(tiny, **keys)
    plain = without_gates(tiny, backbone, **keys)
    for network in (backbone, plain):
        output, _ = network.encode(wave(401, 300), torch.tensor([401, 300]), OperatingPoint.parse("s2q2k3"))
        (output.x * torch.linspace(-1, 1, 16)).square().sum().backward()
    ours = dict(backbone.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_without_prune_units_there_is_nothing_of_gates(tiny):
    backbone = tiny.backbone()
    assert backbone.gates is None and not [name for name in backbone.state_dict() if "gate" in name]
    names = set(backbone.state_dict())
    both = set(gated(tiny).state_dict())
    assert names < both and all(name.startswith("gates.") for name in both - names)


# ---- closed gates


def zero_channels(gate):
    return gate.decided() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("point", ("s1q1k1", "s3q2k2"))
def test_closed_channels_are_exactly_zero_everywhere(tiny, layout, point):
    backbone = gated(tiny, decide="random", **LAYOUTS[layout])
    heard = []
    for block in backbone.feature_extractor.conv_layers:
        block.register_forward_hook(lambda module, inputs, output: heard.append(output))
    backbone.layer_norm.register_forward_hook(lambda module, inputs, output: heard.append(output.transpose(1, 2)))
    output, _ = encode(backbone, wave(401, 300), point, torch.tensor([401, 300]))
    gates = list(backbone.gates.conv.values())
    for x, gate in zip(heard, [*gates, gates[-1]]):
        closed = zero_channels(gate)
        assert 0 < closed.sum() < len(closed)
        assert x[:, closed].abs().max() == 0 and x[:, ~closed].abs().amax((0, 2)).min() > 0
    closed = zero_channels(backbone.gates.hidden)
    assert 0 < closed.sum() < len(closed)
    for x in (output.x, *(part for layer in output.layers for part in (layer.x, layer.ffn))):
        assert x[..., closed].abs().max() == 0
    assert output.x[..., ~closed].abs().amax((0, 1)).min() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unit", ("heads", "ffn"))
def test_a_block_without_an_open_gate_adds_nothing(tiny, layout, unit):
    """Not its bias either: what is left is the network without the block."""
    keys = {**LAYOUTS[layout], "encoder_layers": 2}
    backbone = gated(tiny, (unit,), **keys)
    with torch.no_grad():
        getattr(backbone.gates, unit)["1"].log_alpha.fill_(-9.0)
    left = {"heads": dict(layer_heads=(2, 0)), "ffn": dict(layer_ffn=(24, 0))}[unit]
    plain = tiny.backbone(99, **keys, **left)
    state = backbone.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()}, strict=True)
    for point in ("s1q1k1", "s2q2k3"):
        found, expected = encode(backbone, wave(401), point)[0].x, encode(plain, wave(401), point)[0].x
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_padded_batch_equals_its_utterances(tiny, layout):
    backbone = gated(tiny, decide="random", **LAYOUTS[layout])
    samples = (401, 30, 49, 260)
    for point in tiny.points[::3]:
        batch, mask = encode(backbone, wave(*samples), point, torch.tensor(samples))
        for row, count in enumerate(samples):
            alone, _ = encode(backbone, wave(*samples)[row : row + 1, :count], point)
            length = alone.x.size(1)
            assert mask.valid[row].sum() == length
            assert (batch.x[row, :length] - alone.x[0]).abs().max() <= 1e-5


# ---- streaming


def streamed(stream, audio):
    state, outputs = stream.start(), []
    while len(audio) >= stream.samples_needed(state):
        needed = stream.samples_needed(state)
        frames, state = stream.step(audio[None, :needed], state)
        outputs.append(frames[0])
        audio = audio[needed:]
    return torch.cat([*outputs, stream.finish(audio[None], state)[0]])


@pytest.mark.parametrize("point", ("s1q1k1c4", "s2q1k2c4"))
@pytest.mark.parametrize(
    "keys",
    (
        {"norm_first": False},
        {"norm_first": True, "conv_bias": True},
        {"unique_layers": 2, "attention_map_every": 2},
        {"attention_map_every": 2, "squeeze_tail": "drop"},
    ),
    ids=("post", "pre", "shared", "maps"),
)
def test_a_stream_computes_the_chunk_masked_pass(tiny, keys, point):
    backbone = gated(tiny, decide="random", **{**STREAMING, **keys})
    stream = Stream(backbone, OperatingPoint.parse(point))
    for samples in (19, 20, 163, 20 * 21 + 7):
        audio = wave(samples)[0]
        found = streamed(stream, audio)
        expected = encode(backbone, audio[None], point)[0].x[0] if samples >= 20 else torch.zeros(0, 16)
        assert found.shape == expected.shape
        assert not len(found) or (found - expected).abs().max() <= 1e-5


def test_a_stream_of_a_model_in_training_mode_draws_nothing(tiny):
    backbone = gated(tiny, decide="random", **STREAMING)
    audio, point = wave(20 * 16)[0], OperatingPoint.parse("s1q1k1c4")
    expected = streamed(Stream(backbone, point), audio)
    assert torch.equal(streamed(Stream(backbone.train(), point), audio), expected)


@pytest.mark.parametrize("norm_first", (False, True))
def test_pruned_shapes_stream(tiny, norm_first):
    backbone = tiny.backbone(**{**STREAMING, **PRUNED, "norm_first": norm_first, "layer_heads": (1, 0, 3, 2)})
    for point in ("s1q1k1c4", "s2q1k2c4"):
        audio = wave(20 * 21 + 7)[0]
        found = streamed(Stream(backbone, OperatingPoint.parse(point)), audio)
        assert (found - encode(backbone, audio[None], point)[0].x[0]).abs().max() <= 1e-5


# ---- shared layers and maps


def test_a_shared_layer_has_the_same_gates_wherever_it_runs(tiny):
    keys = dict(encoder_layers=4, norm_first=True)
    shared = gated(tiny, decide="random", unique_layers=2, **keys)
    layer_map = shared.config.layer_map
    repeated = tiny.backbone(**keys)
    state = {
        name: value for name, value in shared.state_dict().items() if not name.startswith(("encoder.layers.", "gates."))
    }
    for depth, stored in enumerate(layer_map):
        weights = shared.encoder.layers[stored].state_dict()
        state.update({f"encoder.layers.{depth}.{name}": value for name, value in weights.items()})
    repeated.load_state_dict(state, strict=True)
    values = shared.gates.decided()
    values = values._replace(
        heads=[values.heads[stored] for stored in layer_map], ffn=[values.ffn[stored] for stored in layer_map]
    )
    with torch.no_grad():
        features, _ = repeated.features(wave(401), None, values)
        features = repeated.project(repeated.normalise(features, values))
        for point in ("s1q1k1", "s2q2k3"):
            expected = repeated.encoder(features, None, OperatingPoint.parse(point), gates=values).x
            torch.testing.assert_close(encode(shared, wave(401), point)[0].x, expected, atol=1e-6, rtol=1e-6)


def test_a_reused_map_uses_the_gates_of_its_maker(tiny):
    """Heads of layers that share a map close together: the map of a closed head is of no use to either."""
    backbone = gated(tiny, ("heads",), encoder_layers=4, attention_map_every=2)
    audio = wave(401)
    with torch.no_grad():
        backbone.gates.heads["0"].log_alpha[1] = -9.0
        for layer in (0, 1):
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(backbone.encoder.layers[layer].self_attn, name).weight[8:].normal_()
        first = encode(backbone, audio)[0].x
        for layer in (0, 1):
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(backbone.encoder.layers[layer].self_attn, name).weight[8:].normal_()
    torch.testing.assert_close(encode(backbone, audio)[0].x, first)


# ---- one draw a call


def trained(backbone, seed=0, audio=None, point="s1q1k1"):
    """The output of one call in training mode."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    return backbone.train().encode(wave(401) if audio is None else audio, None, OperatingPoint.parse(point))[0].x


def test_training_draws_from_torchs_seed_anew_in_every_call(tiny):
    backbone = gated(tiny, decide="random").train()
    first, other, again = trained(backbone, 1), trained(backbone, 2), trained(backbone, 1)
    assert torch.equal(first, again) and not torch.allclose(first, other)
    torch.manual_seed(1)
    np.random.seed(1)
    second = [backbone.encode(wave(401))[0].x for _ in range(2)]
    assert not torch.allclose(*second)


def test_evaluation_is_deterministic(tiny):
    backbone = gated(tiny, decide="random")
    assert torch.equal(encode(backbone, wave(401))[0].x, encode(backbone, wave(401))[0].x)


def test_without_gradients_training_uses_the_gates_of_evaluation(tiny):
    """Frozen updates prune nothing."""
    backbone = gated(tiny, decide="random")
    expected = encode(backbone, wave(401))[0].x
    torch.testing.assert_close(encode(backbone.train(), wave(401))[0].x, expected)


def test_one_draw_serves_the_whole_call(tiny):
    backbone = gated(tiny, decide="random", norm_first=True, encoder_layers=4, unique_layers=2).train()
    torch.manual_seed(3)
    values = backbone.gate_values()
    torch.manual_seed(3)
    output, _ = backbone.encode(wave(401))
    closed = values.hidden == 0
    assert 0 < closed.sum() < 16
    for x in (output.x, *(layer.x for layer in output.layers)):
        assert x[..., closed].abs().max() == 0
    assert (output.x[..., ~closed].abs().amax((0, 1)) > 0).all()


@pytest.mark.parametrize("keys", ({}, {"unique_layers": 1}, {"attention_map_every": 2}))
def test_recomputed_activations_see_the_same_draw(tiny, keys):
    gradients = []
    for recompute in (False, True):
        backbone = gated(tiny, decide="random", checkpoint_activations=recompute, dropout=0.1, **keys)
        trained(backbone, 1, point="s2q2k3").square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in backbone.named_parameters()})
    for name, plain in gradients[0].items():
        if plain is None:
            assert gradients[1][name] is None
        else:
            torch.testing.assert_close(gradients[1][name], plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("point", ("s1q1k1", "s2q2k3"))
def test_every_gate_of_what_ran_gets_a_gradient(tiny, layout, point):
    """In draws between 0 and 1, which all have in the end."""
    backbone = gated(tiny, **LAYOUTS[layout])
    with torch.no_grad():
        for parameter in backbone.gates.parameters():
            parameter.zero_()
    for seed in range(16):
        trained(backbone, seed, point=point).square().sum().backward()
    for name, parameter in backbone.gates.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).all(), name


@pytest.mark.parametrize("norm_first", (False, True))
def test_gradients_of_gates_are_those_of_finite_differences(tiny, norm_first):
    """Those of the Transformer; the frontend's norms compute in fp32, too coarse for it."""
    encoder = gated(tiny, encoder_layers=2, norm_first=norm_first).double().encoder
    torch.manual_seed(0)
    widths = [(2, 2), (24, 24)]
    heads, ffn = ([torch.rand(width, dtype=torch.float64).requires_grad_() for width in unit] for unit in widths)
    values = GateValues(None, heads, ffn, torch.rand(16, dtype=torch.float64).requires_grad_())
    x, upstream = torch.randn(1, 9, 16, dtype=torch.float64), torch.randn(1, 9, 16, dtype=torch.float64)

    def run():
        return (encoder(x, None, OperatingPoint.parse("s2q2k3"), gates=values).x * upstream).sum()

    run().backward()
    for gate in (*heads, *ffn, values.hidden):
        for index in (0, len(gate) - 1):
            with torch.no_grad():
                gate[index] += 1e-6
                more = run()
                gate[index] -= 2e-6
                less = run()
                gate[index] += 1e-6
            assert gate.grad[index].item() == pytest.approx(((more - less) / 2e-6).item(), rel=1e-5, abs=1e-6)


# ---- what pruning leaves


PRUNED = dict(
    conv_feature_layers="[(5, 10, 5), (1, 3, 2), (7, 2, 2)]",
    encoder_layers=4,
    dim=13,
    heads=2,
    head_dim=8,
    ffn_dim=24,
    conv_pos_groups=3,
    conv_pos_group_dims=(2, 7, 4),
    norm_dim=16,
    conv_norm_dims=(8, 8, 8),
    layer_heads=(1, 0, 2, 0),
    layer_ffn=(0, 3, 24, 0),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "keys", ({}, {"conv_pos": 5}, {"project_features": True, "dim": 7, "conv_pos_group_dims": (1, 4, 2)})
)
def test_pruned_shapes_run_and_train(tiny, layout, keys):
    backbone = tiny.backbone(**{**PRUNED, **LAYOUTS[layout], **keys}).train()
    output = backbone.encode(wave(401, 300), torch.tensor([401, 300]), OperatingPoint.parse("s2q2k3"))[0]
    output.x.square().sum().backward()
    assert output.x.shape == (2, 19, backbone.config.dim) and len(output.layers) == 4
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []
    again = Backbone(backbone.config)
    again.load_state_dict(backbone.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(again.encode(wave(401))[0].x, backbone.encode(wave(401))[0].x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pruned_shapes_in_padded_batches(tiny, layout):
    backbone = tiny.backbone(**{**PRUNED, **LAYOUTS[layout]})
    samples = (401, 30, 49, 260)
    for point in tiny.points[::4]:
        batch, _ = encode(backbone, wave(*samples), point, torch.tensor(samples))
        for row, count in enumerate(samples):
            alone, _ = encode(backbone, wave(*samples)[row : row + 1, :count], point)
            assert (batch.x[row, : alone.x.size(1)] - alone.x[0]).abs().max() <= 1e-5


def test_a_layer_that_lost_everything_passes_its_input_on(tiny):
    backbone = tiny.backbone(**{**PRUNED, **LAYOUTS["large"]})
    output, _ = encode(backbone, wave(401))
    assert torch.equal(output.layers[3].x, output.layers[2].x)
    assert output.layers[3].ffn.abs().sum() == 0 and output.layers[3].ffn.shape == output.x.shape
    assert not [name for name in backbone.state_dict() if name.startswith("encoder.layers.3.")]


def test_channels_that_are_not_there_do_not_reach_the_positions(tiny):
    """Unequal groups are those of a wider convolution whose other channels are zero."""
    backbone = tiny.backbone(**PRUNED)
    conv = backbone.encoder.pos_conv[0]
    assert conv.weight_v.shape == (21, 7, 6) and conv.bias.shape == (21,)
    x = torch.randn(2, 13, 9)
    places = torch.tensor([0, 1, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17])
    wide = torch.zeros(2, 21, 9)
    wide[:, places] = x
    expected = torch.nn.functional.conv1d(wide, conv.weight(), conv.bias, padding=3, groups=3)[:, places, :9]
    torch.testing.assert_close(conv(x), expected)
    gate = torch.rand(13)
    torch.testing.assert_close(conv(x, gate=gate), expected * gate[:, None])


def test_pruned_shapes_on_the_meta_device_load_their_weights(tiny):
    """As the runtime builds a network: no tensor of its own may stay behind there."""
    backbone = tiny.backbone(**PRUNED)
    with torch.device("meta"):
        built = Backbone(backbone.config)
    built.load_state_dict(backbone.state_dict(), assign=True)
    torch.testing.assert_close(encode(built.eval(), wave(401))[0].x, encode(backbone, wave(401))[0].x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pruned_network_has_gates_on_what_is_left(tiny, layout):
    """Pruning can go on."""
    keys = {**PRUNED, **LAYOUTS[layout]}
    backbone = gated(tiny, **keys)
    plain = without_gates(tiny, backbone, **keys)
    for point in ("s1q1k1", "s2q2k3"):
        torch.testing.assert_close(
            encode(backbone, wave(401), point)[0].x, encode(plain, wave(401), point)[0].x, atol=1e-6, rtol=1e-6
        )
    half = gated(tiny, decide="random", **keys)
    assert encode(half, wave(401))[0].x.isfinite().all()
