"""The encoder: padding, operating points, shared layers, shared maps, gradients."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fairseq_w2v2_light.nn import Encoder, FrameMask, OperatingPoint
from fairseq_w2v2_light.nn.pooling import mean_pool, repeat_frames

TOLERANCE = 1e-5


def encode(encoder, x, mask=None, point="s1q1k1", **options):
    with torch.no_grad():
        return encoder(x, mask, OperatingPoint.parse(point), **options)


def assert_rows_equal_alone(encoder, x, mask, lengths, point):
    batch = encode(encoder, x, mask, point).x
    assert batch.shape == x.shape
    for row, length in enumerate(lengths):
        alone = encode(encoder, x[row : row + 1, :length], None, point).x[0]
        assert alone.shape == (length, x.size(-1))
        assert (batch[row, :length] - alone).abs().max() <= TOLERANCE, (row, length)


@pytest.mark.parametrize("squeeze_tail", ("keep", "drop"))
@pytest.mark.parametrize("norm_first", (False, True))
def test_padded_batch_equals_its_utterances_at_every_point(tiny, norm_first, squeeze_tail):
    encoder = tiny.encoder(norm_first=norm_first, squeeze_tail=squeeze_tail)
    lengths = (17, 1, 2, 3, 4, 5, 16, 11)
    x, mask = tiny.frames(*lengths)
    for point in tiny.points:
        assert_rows_equal_alone(encoder, x, mask, lengths, point)


@pytest.mark.parametrize("seed", range(12))
def test_padded_batch_equals_its_utterances_at_random(tiny, seed):
    generator = random.Random(seed)
    every = generator.choice((1, 1, 2, 3))
    encoder = tiny.encoder(
        seed,
        norm_first=generator.random() < 0.5,
        squeeze_tail=generator.choice(("keep", "drop")),
        encoder_layers=4,
        unique_layers=generator.choice((0, 1, 2)),
        attention_map_every=every,
        conv_pos=generator.choice((3, 6, 9)),
        squeeze_factors=(1, 2, 3, 4, 5),
        pool_per_layer=True,
    )
    lengths = tuple(generator.randint(1, 24) for _ in range(6))
    x, mask = tiny.frames(*lengths, seed=seed)
    for update in range(4):
        point = str(encoder.config.operating_points.draw(seed, update))
        assert_rows_equal_alone(encoder, x, mask, lengths, point)


@pytest.mark.parametrize("squeeze_tail", ("keep", "drop"))
def test_one_frame_at_every_point(tiny, squeeze_tail):
    encoder = tiny.encoder(squeeze_tail=squeeze_tail)
    x, _ = tiny.frames(1, 1)
    for point in tiny.points:
        y = encode(encoder, x, None, point).x
        assert y.shape == x.shape and y.isfinite().all()


def test_a_kept_tail_is_not_zero_and_a_dropped_one_is(tiny):
    x, _ = tiny.frames(11)
    for tail, zero in (("keep", False), ("drop", True)):
        y = encode(tiny.encoder(squeeze_tail=tail), x, None, "s3q1k1").x
        assert (y[:, 9:].abs().sum() == 0) == zero
        assert y[:, :9].abs().min(dim=-1).values.sum() > 0


@pytest.mark.parametrize("point", ("s1q1k1", "s2q1k1", "s2q2k3"))
def test_changing_padding_changes_nothing(tiny, point):
    encoder = tiny.encoder()
    x, mask = tiny.frames(12, 7)
    other = x.clone()
    other[1, 7:] = 1e3
    torch.testing.assert_close(encode(encoder, other, mask, point).x[1, :7], encode(encoder, x, mask, point).x[1, :7])


def test_least_reduction_is_the_plain_encoder(tiny):
    stochastic = tiny.encoder()
    plain = tiny.encoder(squeeze_factors=(1,), query_pools=(1,), kv_pools=(1,))
    state = {name: value for name, value in stochastic.state_dict().items() if not name.startswith("upsample")}
    plain.load_state_dict(state, strict=True)
    x, mask = tiny.frames(9, 12)
    torch.testing.assert_close(encode(stochastic, x, mask).x, encode(plain, x, mask).x, atol=0, rtol=0)


def test_operating_points_differ(tiny):
    encoder = tiny.encoder()
    x, _ = tiny.frames(13)
    outputs = {point: encode(encoder, x, None, point).x for point in tiny.points}
    for first, second in itertools.combinations(tiny.points, 2):
        assert (outputs[first] - outputs[second]).abs().max() > 1e-3, (first, second)


def test_per_layer_pooling_is_what_the_layers_get(tiny):
    encoder = tiny.encoder()
    x, _ = tiny.frames(13)
    encoder_calls = []
    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda module, inputs: encoder_calls.append(inputs[2:4]))
    encode(encoder, x, None, "s1q1-2-1k3-1-2")
    assert encoder_calls == [(1, 3), (2, 1), (1, 2)]


@pytest.mark.parametrize("norm_first", (False, True))
@pytest.mark.parametrize(
    "keys",
    (
        {"unique_layers": 1},
        {"unique_layers": 2},
        {"unique_layers": 3, "layer_map": "cycle"},
        {"layer_map": "0,1,1,2,0"},
        {"layer_map": "0x2,1x3"},
    ),
    ids=lambda keys: "-".join(str(value) for value in keys.values()),
)
def test_shared_layers_equal_the_same_layers_repeated(tiny, norm_first, keys):
    shared = tiny.encoder(encoder_layers=5, norm_first=norm_first, **keys)
    layer_map = shared.config.layer_map
    plain = tiny.encoder(encoder_layers=5, norm_first=norm_first)
    state = {name: value for name, value in shared.state_dict().items() if not name.startswith("layers.")}
    for depth, stored in enumerate(layer_map):
        state.update({f"layers.{depth}.{name}": value for name, value in shared.layers[stored].state_dict().items()})
    plain.load_state_dict(state, strict=True)
    x, mask = tiny.frames(9, 12)
    for point in ("s1q1k1", "s2q2k3"):
        ours, repeated = encode(shared, x, mask, point), encode(plain, x, mask, point)
        torch.testing.assert_close(ours.x, repeated.x, atol=0, rtol=0)
        assert len(ours.layers) == len(repeated.layers) == 5
    stored = sum(parameter.numel() for parameter in shared.layers.parameters())
    repeated = sum(parameter.numel() for parameter in plain.layers.parameters())
    assert stored * 5 == repeated * len(set(layer_map))


def plain_layer(layer, x, valid, query_pool, kv_pool, attention_map):
    """One layer with the weights `attention_map`, computed when it is None: (output, map). Masks by hand."""
    mask = None if valid is None else FrameMask(valid)
    attention = layer.self_attn
    hidden = layer.self_attn_layer_norm(x) if layer.norm_first else x
    query, key_value = mean_pool(hidden, query_pool, mask), mean_pool(hidden, kv_pool, mask)

    def heads(y):
        return y.view(*y.shape[:2], attention.heads, -1).permute(0, 2, 1, 3)

    if attention_map is None:
        scores = heads(attention.q_proj(query)) @ heads(attention.k_proj(key_value)).transpose(2, 3)
        scores = scores / attention.head_dim**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.pooled(kv_pool).valid[:, None, None], float("-inf"))
        attention_map = scores.softmax(-1)
    mixed = (attention_map @ heads(attention.v_proj(key_value))).permute(0, 2, 1, 3).flatten(2)
    x = x + repeat_frames(attention.out_proj(mixed), query_pool, x.size(1))
    x = x if layer.norm_first else layer.self_attn_layer_norm(x)
    y = layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x) if layer.norm_first else x)))
    return (x + y if layer.norm_first else layer.final_layer_norm(x + y)), attention_map


@pytest.mark.parametrize("norm_first", (False, True))
@pytest.mark.parametrize("every", (2, 3, 5))
@pytest.mark.parametrize("point", ("s1q1k1", "s1q2k3", "s2q2k1"))
def test_reused_maps_equal_an_explicit_computation(tiny, norm_first, every, point):
    encoder = tiny.encoder(encoder_layers=5, norm_first=norm_first, attention_map_every=every, unique_layers=3)
    x, mask = tiny.frames(9, 12)
    point = OperatingPoint.parse(point)
    ours = encode(encoder, x, mask, str(point))

    valid = mask.pooled(point.squeeze).valid
    pooled = mean_pool(x * mask.valid[..., None], point.squeeze, mask)
    y = pooled + encoder.pos_conv(x * mask.valid[..., None], point.squeeze)[:, : pooled.size(1)]
    y = y if norm_first else encoder.layer_norm(y)
    attention_map = None
    with torch.no_grad():
        for depth, stored in enumerate(encoder.config.layer_map):
            attention_map = None if depth % every == 0 else attention_map
            y, attention_map = plain_layer(
                encoder.layers[stored], y, valid, point.query[0], point.key_value[0], attention_map
            )
            torch.testing.assert_close(ours.layers[depth].x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("every, calls", ((1, 5), (2, 3), (3, 2), (5, 1), (9, 1)))
def test_layers_that_reuse_a_map_skip_query_and_key_projections(tiny, every, calls):
    encoder = tiny.encoder(encoder_layers=5, attention_map_every=every, unique_layers=2)
    counts = {"q_proj": 0, "k_proj": 0, "v_proj": 0}
    for layer in encoder.layers:
        for name in counts:

            def hook(module, inputs, output, name=name):
                counts[name] += 1

            getattr(layer.self_attn, name).register_forward_hook(hook)
    encode(encoder, *tiny.frames(7, 9))
    assert counts == {"q_proj": calls, "k_proj": calls, "v_proj": 5}


@pytest.mark.parametrize("point", ("s1q1k1", "s2q2k1"))
def test_without_keeping_layers_the_frames_are_the_same(tiny, point):
    encoder = tiny.encoder(encoder_layers=3, attention_map_every=2)
    x, mask = tiny.frames(9, 12)
    with torch.no_grad():
        kept, freed = (encoder(x, mask, OperatingPoint.parse(point), keep_layers=keep) for keep in (True, False))
    assert len(kept.layers) == 3 and freed.layers == []
    assert freed.depths == kept.depths
    torch.testing.assert_close(freed.x, kept.x, atol=0, rtol=0)


def test_computing_every_map_equals_fused_attention(tiny):
    """attention_map_every=2 keeps maps, 1 does not; with a map for each layer of its own they must agree."""
    fused = tiny.encoder(encoder_layers=1)
    kept = tiny.encoder(encoder_layers=2, unique_layers=1, attention_map_every=2)
    kept.load_state_dict(fused.state_dict(), strict=True)
    x, mask = tiny.frames(7, 9)
    torch.testing.assert_close(
        encode(kept, x, mask, last_layer=0).x, encode(fused, x, mask, last_layer=0).x, atol=1e-6, rtol=1e-5
    )


def test_state_dict_stores_each_shared_tensor_once(tiny):
    encoder = tiny.encoder(encoder_layers=6, unique_layers=1)
    names = [name for name in encoder.state_dict() if name.startswith("layers.")]
    assert len(names) == 16 and all(name.startswith("layers.0.") for name in names)
    pointers = [value.data_ptr() for value in encoder.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("keys", ({}, {"unique_layers": 1}, {"attention_map_every": 2}, {"pool_per_layer": True}))
def test_recomputed_activations_have_equal_gradients(tiny, keys):
    gradients = []
    for recompute in (False, True):
        encoder = tiny.encoder(checkpoint_activations=recompute, dropout=0.1, attention_dropout=0.1, **keys).train()
        x, mask = tiny.frames(9, 12)
        x.requires_grad_()
        torch.manual_seed(1)
        encoder(x, mask, OperatingPoint.parse("s2q2k3")).x.square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in encoder.parameters())])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=1e-5)


def test_layerdrop_drops_whole_groups_that_share_a_map(tiny):
    encoder = tiny.encoder(encoder_layers=6, attention_map_every=2, layerdrop=0.5).train()
    x, mask = tiny.frames(9, 12)
    ran = []
    for index, layer in enumerate(encoder.layers):
        layer.register_forward_pre_hook(lambda module, inputs, index=index: ran.append(index))
    seen = set()
    for seed in range(30):
        ran.clear()
        np.random.seed(seed)
        encode(encoder, x, mask)
        assert all((2 * group in ran) == (2 * group + 1 in ran) for group in range(3))
        seen.add(tuple(ran))
    assert len(seen) >= 6


def test_nothing_is_dropped_in_inference(tiny):
    encoder = tiny.encoder(layerdrop=1.0, dropout=0.5, attention_dropout=0.5, activation_dropout=0.5)
    x, mask = tiny.frames(9, 12)
    first, second = encode(encoder, x, mask), encode(encoder, x, mask)
    assert len(first.layers) == 3
    assert torch.equal(first.x, second.x)


def test_all_layers_dropped_leaves_positions_and_norm(tiny):
    encoder = tiny.encoder(layerdrop=1.0).train()
    x, mask = tiny.frames(9, 12)
    output = encode(encoder, x, mask, "s2q1k1")
    assert output.layers == [] and output.x.shape == x.shape


@pytest.mark.parametrize("extractor_norm", ("group", "layer"))
@pytest.mark.parametrize("squeeze_tail", ("keep", "drop"))
def test_backbone_batch_equals_its_utterances(tiny, extractor_norm, squeeze_tail):
    backbone = tiny.backbone(extractor_norm=extractor_norm, squeeze_tail=squeeze_tail, norm_first=True)
    samples = (401, 30, 49, 50, 77, 399, 260)
    wave = torch.zeros(len(samples), max(samples))
    for row, count in enumerate(samples):
        wave[row, :count] = torch.randn(count)
    for point in tiny.points:
        point = OperatingPoint.parse(point)
        with torch.no_grad():
            batch, mask = backbone.encode(wave, torch.tensor(samples), point)
            for row, count in enumerate(samples):
                alone, _ = backbone.encode(wave[row : row + 1, :count], None, point)
                length = alone.x.size(1)
                assert mask.valid[row].sum() == length
                assert (batch.x[row, :length] - alone.x[0]).abs().max() <= TOLERANCE


def test_group_norm_frontend_ignores_what_lies_in_the_padding(tiny):
    backbone = tiny.backbone()
    wave, lengths = torch.randn(2, 400), torch.tensor([400, 211])
    loud = wave.clone()
    loud[1, 211:] = 100
    with torch.no_grad():
        quiet, mask = backbone.features(wave, lengths)
        noisy, _ = backbone.features(loud, lengths)
    torch.testing.assert_close(noisy[mask.valid], quiet[mask.valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("samples", (0, 1, 29))
def test_too_short_audio(tiny, samples):
    backbone = tiny.backbone()
    with pytest.raises(ValueError, match=f"audio of {samples} samples is too short: .* at least 30 samples"):
        backbone.encode(torch.zeros(1, samples))
    with pytest.raises(ValueError, match=f"audio of {samples} samples is too short"):
        backbone.encode(torch.zeros(2, 300), torch.tensor([300, samples]))


def test_an_untrained_point_is_refused(tiny):
    """The runtime calls this without a fairseq model that would check."""
    backbone = tiny.backbone(squeeze_factors=(1, 2))
    for text in ("s3q1k1", "s1q5k1", "s1q1-2k1"):
        with pytest.raises(ValueError, match="operating point"):
            backbone.encode(torch.randn(1, 400), None, OperatingPoint.parse(text))


def test_without_unsqueeze_weights_a_squeeze_factor_is_refused(tiny):
    backbone = tiny.backbone(squeeze_factors=(1,))
    with pytest.raises(ValueError, match="s2q1k1"):
        backbone.encode(torch.randn(1, 400), None, OperatingPoint(2))


@pytest.mark.parametrize(
    "keys, message",
    (
        ({"heads": 3}, "encoder_attention_heads: 3 heads do not divide encoder_embed_dim 16"),
        ({"conv_pos_groups": 3}, "conv_pos_groups: 3 groups do not divide 16 channels"),
        ({"activation": "gellu"}, "activation_fn: found 'gellu', expected one of gelu, "),
    ),
)
def test_shapes_that_cannot_be(tiny, keys, message):
    with pytest.raises(ValueError, match=message):
        Encoder(tiny.config(**keys))


def test_extractor_norm(tiny):
    with pytest.raises(ValueError, match="extractor norm: found 'batch', expected 'group' or 'layer'"):
        tiny.backbone(extractor_norm="batch")


def test_parts_for_the_runtime_can_be_pickled(tiny):
    """What a worker process or torch.save of a whole module needs."""
    import pickle

    for activation in ("gelu", "gelu_accurate", "relu_squared", "linear"):
        encoder = tiny.encoder(activation=activation)
        twin = pickle.loads(pickle.dumps(encoder))
        x, mask = tiny.frames(5, 7)
        torch.testing.assert_close(encode(twin, x, mask, "s2q2k2").x, encode(encoder, x, mask, "s2q2k2").x)
