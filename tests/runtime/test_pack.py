"""Packed weights: the same network, faster."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq_w2v2_light.nn import Backbone, OperatingPoint, encoder_config
from fairseq_w2v2_light.nn.attention import MultiheadAttention
from fairseq_w2v2_light.nn.frontend import frame_lengths, receptive_field
from fairseq_w2v2_light.nn.positions import ConvPositions
from fairseq_w2v2_light.nn.streaming import Stream
from fairseq_w2v2_light.runtime import mkl, pack, packed_frontend, products
from fairseq_w2v2_light.runtime.ctc import CtcModel


def configured(**changes):
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
    return encoder_config(**{**keys, **changes})


def perturbed(model):
    """In evaluation, with norms and biases of random values, which their initial ones and zeros would hide."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval().requires_grad_(False)


def network(**changes):
    torch.manual_seed(0)
    return perturbed(Backbone(configured(**changes)))


def transcriber(**changes):
    torch.manual_seed(0)
    return perturbed(CtcModel(configured(**changes), ["<s>", *"ABC|"]))


def both(make, rows=12, **changes):
    """The same random network twice, the second one packed."""
    model, packed = make(**changes), make(**changes)
    assert pack.pack_(packed, rows)
    return model, packed


def can_pack():
    return pack.pack_(nn.Sequential(nn.Linear(8, 8)), 4)


needs_product = pytest.mark.skipif(not can_pack(), reason="this torch has no packed product")


@pytest.fixture(params=("Intel's", "others", "others, windows copied"))
def cpu(request, monkeypatch):
    monkeypatch.setattr(packed_frontend, "multiplies_by_mkl", lambda: request.param == "Intel's")
    if request.param.endswith("copied"):
        monkeypatch.setattr(packed_frontend, "_SAME_PLACES", 1)


# the layers of the frontend are laid out in one of three ways
on_every_cpu = pytest.mark.usefixtures("cpu")


# what pruning leaves of 32 hidden channels, 4 heads of 8 and FFNs of 48: one place of the positions is empty
PRUNED = dict(
    norm_first=True,
    conv_feature_layers="[(13, 10, 5), (11, 3, 2), (31, 2, 2)]",
    conv_norm_dims=(16, 16, 32),
    dim=31,
    head_dim=8,
    norm_dim=32,
    conv_pos_group_dims=(8, 8, 7, 8),
    layer_heads=(1, 0, 3),
    layer_ffn=(45, 0, 7),
    chunk_frames=(),
)
CASES = {
    "post-LN": {},
    "pre-LN": {"norm_first": True},
    "shared layer and map": {"norm_first": True, "unique_layers": 1, "attention_map_every": 3},
    "shared post-LN": {"unique_layers": 1},
    "squeezed and pooled": {"squeeze_factors": (1, 2, 3), "query_pools": (2,), "kv_pools": (3,), "chunk_frames": ()},
    "SEW's": {
        "squeeze_factors": (2,),
        "squeeze_tail": "drop",
        "unsqueeze_residual": False,
        "chunk_frames": (),
        "extractor_norm": "group",
        "conv_feature_layers": "[(8, 10, 5), (16, 3, 2), (16, 1, 1), (32, 2, 2), (32, 1, 1)]",
    },
    "GroupNorm": {"extractor_norm": "group", "chunk_frames": (), "conv_bias": False},
    "GroupNorm, biases": {"extractor_norm": "group", "chunk_frames": ()},
    "LayerNorm without biases": {"conv_bias": False},
    "tanh GELU": {"activation": "gelu_fast"},
    "ReLU": {"activation": "relu"},
    "kernel below its stride": {"conv_feature_layers": "[(16, 4, 5), (16, 5, 2), (16, 3, 1), (16, 1, 2)]"},
    "projection": {"conv_feature_layers": "[(16, 10, 5), (24, 3, 2), (20, 2, 2)]"},
    "pruned": PRUNED,
    "pruned, post-LN": {**PRUNED, "norm_first": False},
    "pruned, projected": {**PRUNED, "project_features": True, "conv_norm_dims": ()},
    "pruned, projected to as many": {
        **PRUNED,
        "conv_feature_layers": "[(13, 10, 5), (32, 3, 2)]",
        "conv_norm_dims": (),
    },
    "pruned, squeezed": {**PRUNED, "squeeze_factors": (1, 2, 3), "unsqueeze_residual": True},
    "pruned to half": {
        **PRUNED,
        "dim": 15,
        "conv_feature_layers": "[(13, 10, 5), (11, 3, 2), (15, 2, 2)]",
        "conv_pos_group_dims": (4, 4, 3, 4),
    },
    "pruned stream": {**PRUNED, "chunk_frames": (12,)},
    "pruned, group norm": {**PRUNED, "extractor_norm": "group", "conv_norm_dims": (), "project_features": True},
}


@needs_product
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_positions_of_few_frames_use_the_order_of_many(stride, causal):
    """oneDNN takes a hundred times as long with a weight ordered for another number of frames than it likes."""
    positions = ConvPositions(8, 6, 2, causal=causal)
    packed = pack.PackedPositions(positions)
    with torch.no_grad():
        for frames in (1, 4, 50, 7):
            x = torch.randn(2, frames, 8)
            torch.testing.assert_close(packed(x, stride), positions(x, stride), atol=1e-6, rtol=1e-5)
    assert len(packed.conv._packed) == 1


@needs_product
@on_every_cpu
@pytest.mark.parametrize("name", CASES)
def test_the_packed_network_computes_the_same(name):
    model, packed = both(transcriber, **CASES[name])
    wave, lengths = torch.randn(2, 1300), torch.tensor([1300, 700])
    wave[1, 700:] = 0
    config = model.backbone.config
    with torch.no_grad():
        for point in config.operating_points.points():
            expected, counts = model(wave, lengths, point)
            found, found_counts = packed(wave, lengths, point)
            assert found.shape == expected.shape and torch.equal(found_counts, counts)
            for row, count in enumerate(counts.tolist()):
                torch.testing.assert_close(found[row, :count], expected[row, :count], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(packed(wave, None, point)[0], model(wave, None, point)[0], atol=1e-5, rtol=1e-5)


@needs_product
@on_every_cpu
@pytest.mark.parametrize("norm", ("layer", "group"))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("copied", (True, False))
@pytest.mark.parametrize("frames", (1, 2, 31, 127, 128, 129, 300))
def test_every_length_gives_the_same_frames(norm, bias, copied, frames, monkeypatch):
    """One frame, whole pieces of the frontend, and one more or less than those; with windows of the wave or without."""
    monkeypatch.setattr(packed_frontend, "PIECE_FRAMES", (32, 128))
    monkeypatch.setattr(packed_frontend, "_COPY_LEAST", 1 if copied else 99)
    model, packed = both(network, extractor_norm=norm, conv_bias=bias, chunk_frames=())
    shortest = 30 + (frames - 1) * 20
    for samples in (shortest, shortest + 19):
        assert frame_lengths(samples, model.config.conv_layers) == frames
        wave = torch.randn(1, samples)
        expected, found = (one.encode(wave)[0].x for one in (model, packed))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_product
@on_every_cpu
@pytest.mark.parametrize("copied", (True, False))
def test_loud_quiet_and_silent_audio_are_normalised_alike(copied, monkeypatch):
    monkeypatch.setattr(packed_frontend, "_COPY_LEAST", 1 if copied else 99)
    model, packed = both(network, extractor_norm="group", chunk_frames=())
    wave = torch.randn(3, 1000) * torch.tensor([[100.0], [1e-4], [0.0]]) + torch.tensor([[50.0], [0.0], [0.0]])
    expected, found = (one.encode(wave)[0].x for one in (model, packed))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@needs_product
@on_every_cpu
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("copied", (True, False))
def test_what_all_channels_have_in_common_is_no_matter_to_a_layer_norm(bias, copied, monkeypatch):
    """Weights, biases and audio with large means: what a LayerNorm takes off is not in the packed weights."""
    monkeypatch.setattr(packed_frontend, "_COPY_LEAST", 1 if copied else 99)
    model, packed = (network(conv_bias=bias, chunk_frames=()) for _ in range(2))
    for one in (model, packed):
        for block in one.feature_extractor.conv_layers:
            block[0].weight.add_(3.0)
            if bias:
                block[0].bias.sub_(7.0)
    assert pack.pack_(packed, 12)
    for layer in packed.feature_extractor.conv_layers:
        assert isinstance(layer.norm, packed_frontend.CentredNorm)
        weight = layer.weight if hasattr(layer, "weight") else layer.as_linear().weight.t()
        assert float(weight.mean(-1).abs().max()) < 1e-6
    scale, shift = torch.tensor([[10.0], [1e-3], [1.0], [0.0]]), torch.tensor([[5.0], [0.0], [-2.0], [0.0]])
    wave = torch.randn(4, 900) * scale + shift
    exact = model.double().encode(wave.double())[0].x
    torch.testing.assert_close(packed.encode(wave)[0].x.double(), exact, atol=2e-4, rtol=2e-4)


def require_same_frames(model, packed):
    """Of short and long audio, inside and outside of inference mode."""
    for samples in (30, 900, 9000):
        wave = torch.randn(2, samples)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = packed.encode(wave)[0].x
            torch.testing.assert_close(found, model.encode(wave)[0].x, atol=2e-5, rtol=2e-5)


@needs_product
@pytest.mark.parametrize("changes", ({"extractor_norm": "group"}, {"norm_first": True}, {"unique_layers": 1}))
def test_networks_whose_linears_are_all_mkls(changes, monkeypatch):
    """As in large networks on Intel's CPUs."""
    monkeypatch.setattr(mkl, "multiplies_by_mkl", lambda: True)
    monkeypatch.setattr(products, "_MKL_LEAST", 1)
    monkeypatch.setattr(products, "_MKL_LEAST_GELU", 1)
    if not mkl.mkl_serves(32, 48):
        pytest.skip("a torch without MKL")
    model, packed = both(network, **{"chunk_frames": (), **changes})
    linears = [module for module in packed.modules() if isinstance(module, products.PackedLinear)]
    assert len(linears) > 3 and all(linear.mkl is not None for linear in linears)
    require_same_frames(model, packed)


@needs_product
@pytest.mark.parametrize("plain", (False, True))
@pytest.mark.parametrize("changes", ({"extractor_norm": "group"}, {"norm_first": True}, {"unique_layers": 1}))
def test_networks_whose_linears_are_onednns_or_torchs_own(plain, changes, monkeypatch):
    """As small networks on CPUs that are not Intel's, and on those that are."""
    monkeypatch.setattr(products, "multiplies_by_mkl", lambda: plain)
    monkeypatch.setattr(mkl, "multiplies_by_mkl", lambda: False)
    model, packed = both(network, **{"chunk_frames": (), **changes})
    linears = [module for module in packed.modules() if isinstance(module, products.PackedLinear)]
    assert any(linear.plain is not None for linear in linears) == plain
    require_same_frames(model, packed)


@needs_product
@pytest.mark.parametrize("rows, by_onednn", [(1, False), (32, False), (33, True), (300, True)])
def test_few_rows_are_torchs_own_product_with_a_gelu_too(rows, by_onednn, monkeypatch):
    """On Intel's CPUs: oneDNN, whose product has the GELU in it, takes long to start."""
    monkeypatch.setattr(products, "multiplies_by_mkl", lambda: True)
    calls, multiply = [], products._multiply
    monkeypatch.setattr(products, "_multiply", lambda *inputs: calls.append(1) or multiply(*inputs))
    linear, x = nn.Linear(48, 80), torch.randn(1, rows, 48)
    found = products.PackedLinear(linear.weight, linear.bias, 100, gelu=True)(x)
    torch.testing.assert_close(found, F.gelu(linear(x)).detach(), atol=1e-6, rtol=1e-6)
    assert bool(calls) == by_onednn


@pytest.mark.parametrize("shape", [(1, 1), (3, 1, 7), (16, 1024), (2, 16, 512), (16, 1025)])
def test_the_gelu_of_few_values_and_of_many_is_the_exact_one(shape):
    x = 3 * torch.randn(shape)
    expected = F.gelu(x.double()).float()
    assert products.gelu_(x) is x
    torch.testing.assert_close(x, expected, atol=2e-6, rtol=2e-6)


@needs_product
def test_wide_frontends_are_run_in_shorter_pieces(monkeypatch):
    """4 frames of the first layer to one of the last, 16 channels: 320 values are five frames."""
    monkeypatch.setattr(packed_frontend, "PIECE_VALUES", 320)
    monkeypatch.setattr(packed_frontend, "PIECE_FRAMES", (2, 128))
    model, packed = both(network, chunk_frames=())
    lengths, first = [], packed.feature_extractor.conv_layers[0]
    convolve = first.convolve
    first.convolve = lambda x, *others: (
        lengths.append(frame_lengths(len(x), model.config.conv_layers)) or convolve(x, *others)
    )
    wave = torch.randn(1, 30 + 11 * 20)
    torch.testing.assert_close(packed.encode(wave)[0].x, model.encode(wave)[0].x, atol=1e-5, rtol=1e-5)
    assert lengths == [5, 5, 2]


@needs_product
@pytest.mark.parametrize("norm", ("layer", "group"))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("after", ("(32, 2, 2)", "(32, 3, 1)", "(32, 3, 2)"))
def test_layers_of_three_taps_in_pairs_of_frames(norm, bias, after, monkeypatch):
    """As those of 512 channels: even and odd numbers of frames, a single one, several pieces and utterances."""
    monkeypatch.setattr(packed_frontend, "multiplies_by_mkl", lambda: True)
    monkeypatch.setattr(packed_frontend, "_PAIRS_LEAST", 16)
    monkeypatch.setattr(packed_frontend, "PIECE_FRAMES", (7, 7))
    layers = f"[(16, 10, 5), (24, 3, 2), (16, 3, 2), (8, 3, 2), (16, 1, 1), (16, 3, 2), {after}]"
    model, packed = both(network, conv_feature_layers=layers, extractor_norm=norm, conv_bias=bias, chunk_frames=())
    convolved = list(packed.feature_extractor.conv_layers)
    paired = [layer for layer in convolved if layer._shared is not None]
    assert [convolved.index(layer) for layer in paired] == [1, 2, 5] + [6] * (after == "(32, 3, 2)")
    made = set()
    for layer in paired:
        layer.register_forward_hook(lambda _, inputs, y: made.add(len(y)))
    field, hop = receptive_field(model.config.conv_layers)
    for samples in (*range(field, field + 9 * hop, hop), field + 30 * hop):
        wave = torch.randn(2, samples)
        heard = wave.clone()
        expected, found = (one.encode(wave)[0].x for one in (model, packed))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(wave, heard)
    assert after != "(32, 2, 2)" or {2, 4, 14} <= made
    assert after != "(32, 3, 2)" or {1, 2, 3, 7} <= made


@needs_product
@on_every_cpu
def test_memory_that_calls_share_mixes_nothing_up():
    """Calls in and outside of inference mode, of any length, and several at the same time."""
    model, packed = both(network, extractor_norm="group", chunk_frames=())
    waves = [torch.randn(1, samples) for samples in (4000, 700, 30, 9000)]
    with torch.no_grad():
        expected = [model.encode(wave)[0].x for wave in waves]
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            found = [packed.encode(wave)[0].x for wave in waves]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def call(index):
        with torch.inference_mode():
            return packed.encode(waves[index % 4])[0].x

    with ThreadPoolExecutor(4) as threads:
        for index, found in enumerate(threads.map(call, range(40))):
            torch.testing.assert_close(found, expected[index % 4], atol=1e-5, rtol=1e-5)


@needs_product
@on_every_cpu
def test_audio_that_is_a_view_is_read_as_it_stands():
    model, packed = both(network)
    wave = torch.randn(1300, 2).t()
    torch.testing.assert_close(packed.encode(wave)[0].x, model.encode(wave)[0].x, atol=1e-5, rtol=1e-5)


@needs_product
@on_every_cpu
def test_lengths_in_any_order_are_computed_alike():
    """oneDNN orders weights for one length; later ones must not depend on the first."""
    model, packed = both(network, squeeze_factors=(1, 2), chunk_frames=())
    for samples in (4000, 50, 1300, 30, 4000):
        wave = torch.randn(1, samples)
        for point in model.config.operating_points.points():
            found, expected = (one.encode(wave, point=point)[0].x for one in (packed, model))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_product
@on_every_cpu
def test_padding_may_hold_anything_finite():
    model, packed = both(network, extractor_norm="group", chunk_frames=())
    wave, lengths = torch.randn(2, 1300), torch.tensor([1300, 700])
    wave[1, 700:] = 1e6
    alone = model.encode(wave[1:, :700])[0].x
    found = packed.encode(wave, lengths)[0].x[1:, : alone.size(1)]
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@needs_product
@on_every_cpu
def test_a_second_packing_changes_nothing():
    model, packed = both(network, squeeze_factors=(1, 2), chunk_frames=())
    modules = list(packed.modules())
    assert pack.pack_(packed, 12) and list(packed.modules()) == modules
    wave = torch.randn(1, 1300)
    torch.testing.assert_close(packed.encode(wave)[0].x, model.encode(wave)[0].x, atol=1e-5, rtol=1e-5)


@needs_product
def test_a_packed_network_stays_in_evaluation():
    """Without the dropout of training, which new modules begin with."""
    model, packed = both(transcriber, dropout=0.5, attention_dropout=0.5, chunk_frames=())
    assert not any(module.training for module in packed.modules())
    wave = torch.randn(1, 1300)
    torch.testing.assert_close(packed(wave)[0], model(wave)[0], atol=1e-5, rtol=1e-5)


@needs_product
@on_every_cpu
def test_a_packed_stream_gives_the_frames_of_the_whole_utterance():
    model, packed = both(network)
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
@pytest.mark.parametrize("dim", (32, 1024))
@pytest.mark.parametrize(
    "pools, every, fused",
    [((1,), 1, (32, 1024)), ((2,), 1, (32, 1024)), ((1, 2), 1, (32,)), ((1,), 2, ())],
)
def test_queries_keys_and_values_are_one_product_where_they_are_of_the_same_frames(dim, pools, every, fused):
    """With 1,024 channels rows of the result would be 12 KiB long, and get a gap; the weights are not packed twice."""
    changes = dict(query_pools=pools, kv_pools=pools, attention_map_every=every, dim=dim, encoder_layers=2)
    model, packed = both(network, **changes)
    for layer in packed.encoder.layers:
        assert isinstance(layer.self_attn, pack.PackedAttention) == (dim in fused)
        apart = [hasattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
        assert dim not in fused or sum(apart) == 3 * (len(pools) > 1)
    wave = torch.randn(2, 1300)
    for point in model.config.operating_points.points():
        for lengths in (None, torch.tensor([1300, 700])):
            found, expected = (one.encode(wave, lengths, point)[0].x for one in (packed, model))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@needs_product
@pytest.mark.parametrize("apart", (False, True))
def test_the_one_product_answers_other_questions_too(apart):
    """Other frames, or a map that is there already: attention, as nothing here asks for it."""
    attention = perturbed(MultiheadAttention(32, 4, head_dim=6))
    packed = pack.PackedAttention(attention, 12, apart)
    query, key_value, attention_map = torch.randn(2, 5, 32), torch.randn(2, 9, 32), torch.rand(2, 4, 5, 9)
    for arguments in ((query, query), (query, key_value), (query, key_value, None, attention_map)):
        found, expected = packed(*arguments), attention(*arguments)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed.attention_map(query, key_value), attention.attention_map(query, key_value))


@needs_product
def test_every_product_is_packed():
    _, packed = both(network, squeeze_factors=(2,))
    left = [name for name, module in packed.named_modules() if isinstance(module, (nn.Linear, nn.Conv1d))]
    assert left == []


@pytest.mark.parametrize("change", (lambda model: model.double(), lambda model: model.bfloat16()))
def test_other_dtypes_stay_as_they_are(change):
    model = change(network())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not pack.pack_(model, 12)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_torch_without_the_product_changes_nothing(monkeypatch):
    monkeypatch.setattr(pack, "can_multiply", lambda: False)
    model = network()
    assert not pack.pack_(model, 12)
    assert isinstance(model.encoder.layers[0].fc1, nn.Linear)


@on_every_cpu
def test_a_torch_without_the_convolution_packs_the_rest(monkeypatch):
    monkeypatch.setattr(pack, "can_convolve", lambda: False)
    model, packed = both(network)
    assert isinstance(packed.encoder.pos_conv, ConvPositions)
    assert not any(isinstance(module, products.PackedConv1d) for module in packed.modules())
    wave = torch.randn(1, 1300)
    torch.testing.assert_close(packed.encode(wave)[0].x, model.encode(wave)[0].x, atol=1e-5, rtol=1e-5)


def test_gates_are_left_alone():
    model = network(prune_units=("conv", "heads", "ffn", "hidden"), chunk_frames=())
    assert not pack.pack_(model, 12)
    assert isinstance(model.encoder.layers[0].fc1, nn.Linear)
