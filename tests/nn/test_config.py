"""The network's configuration: frontend shapes as text, and values that cannot be."""

import pytest

from fairseq_w2v2_light.nn import OperatingPoint, encoder_config, frame_lengths, parse_conv_layers, receptive_field
from fairseq_w2v2_light.nn.config import EncoderConfig
from fairseq_w2v2_light.nn.operating_point import OperatingPointSpace

STOCK = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"


def build(**changes):
    keys = dict(
        conv_feature_layers="[(8, 10, 5), (8, 3, 2)]",
        extractor_norm="group",
        encoder_layers=4,
        dim=16,
        ffn_dim=16,
        heads=2,
        conv_pos=4,
        conv_pos_groups=2,
    )
    return encoder_config(**{**keys, **changes})


@pytest.mark.parametrize(
    "text",
    (STOCK, "[(64, 10, 5), [64, 3, 2]]", "2 * [(8, 3, 2)]", " [(8, 3, 2)]\n", "[(8,3,2)] * (1 + 2)", "[(4*2, 3, 2)]"),
)
def test_conv_layers_equal_python(text):
    assert parse_conv_layers(text) == tuple(tuple(layer) for layer in eval(text.strip()))


def test_stock_frontend():
    layers = parse_conv_layers(STOCK)
    assert receptive_field(layers) == (400, 320)
    assert [frame_lengths(samples, layers) for samples in (400, 719, 720, 16000, 160000)] == [1, 1, 2, 49, 499]
    assert receptive_field(build(conv_feature_layers=STOCK).conv_layers)[1] == 320


@pytest.mark.parametrize(
    "text",
    (
        "",
        "[]",
        "512",
        "(512, 10, 5)",
        "[512, 10, 5]",
        "[(512, 10)]",
        "[(512, 10, 5, 1)]",
        "[(512, 10, 0)]",
        "[(512, -10, 5)]",
        "[(512, 10, 5.0)]",
        "[('512', 10, 5)]",
        "[(512, 10, 5)",
        "[(512, 10, 5)] * 0",
        "[(512, 10, 5)] - 1",
        "[(512, 10, 5)] * [2]",
        "[(512, 10, 5)] + 3",
        "[layer for layer in [(512, 10, 5)]]",
        "layers",
        "[(True, 1, 1)]",
        "[(8, 3, 2)]\0",
        "[(8, 3, 2)]; 1",
        "None",
    ),
)
def test_malformed_conv_layers_are_quoted(text):
    with pytest.raises(ValueError) as error:
        parse_conv_layers(text)
    assert "conv_feature_layers" in str(error.value)
    assert text in str(error.value)


@pytest.mark.parametrize(
    "text",
    (
        "__import__('os').system('touch {file}')",
        "[(512, 10, 5)] * __import__('os').system('touch {file}')",
        "[(512, 10, (lambda: open('{file}', 'w'))())]",
        "[(512, 10, 5)] if open('{file}', 'w') else []",
    ),
)
def test_code_in_conv_layers_is_not_run(text, tmp_path):
    text = text.format(file=tmp_path / "run")
    with pytest.raises(ValueError) as error:
        parse_conv_layers(text)
    assert text in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    (
        "[(1, 1, 1)] * 100000000000",
        "[(1, 1, 1)] * 1000 * 1000",
        "[(1, 1, 1)] * (1000 * 1000 * 1000)",
        "1 + " * 5000 + "1",
        "[" * 5000 + "]" * 5000,
    ),
    ids=("repeat", "repeats", "product", "sum", "nesting"),
)
def test_conv_layers_of_absurd_size_are_refused(text):
    with pytest.raises(ValueError, match="conv_feature_layers"):
        parse_conv_layers(text)


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"squeeze_tail": "cut"}, "squeeze_tail: found 'cut', expected 'keep' or 'drop'"),
        ({"attention_map_every": 0}, "attention_map_every: found 0"),
        ({"squeeze_factors": (1, 3), "unsqueeze_factor": 2}, "squeeze_factors: found 3, .* up to 2"),
        ({"squeeze_factors": (0,)}, r"squeeze_factors: found \[0\]"),
        ({"query_pools": ()}, r"query_pools: found \[\]"),
        ({"kv_pools": (2, 2)}, r"kv_pools: found \[2, 2\]"),
        ({"unique_layers": 9}, "unique_layers: found 9"),
        ({"layerdrop": 5}, "encoder_layerdrop .layerdrop.: found 5, expected a probability from 0 to 1"),
        ({"dropout": -0.1}, "dropout: found -0.1"),
        ({"attention_dropout": 1.5}, "attention_dropout: found 1.5"),
        ({"lookahead_frames": -3}, "lookahead_frames: found -3, expected 0 or more frames"),
        ({"left_context_frames": -1}, "left_context_frames: found -1"),
        ({"layer_map": "0,1"}, "layer_map '0,1'"),
    ),
)
def test_values_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_unsqueeze_factor_is_the_largest_squeeze_factor():
    assert build(squeeze_factors=(1, 3, 2)).unsqueeze_factor == 3
    assert build(squeeze_factors=(1,)).unsqueeze_factor == 1
    assert build(squeeze_factors=(1,), unsqueeze_factor=4).unsqueeze_factor == 4


# ---- streaming


def build_streaming(**changes):
    return build(**{"extractor_norm": "layer", "chunk_frames": (24,), "left_context_frames": 48, **changes})


@pytest.mark.parametrize(
    "changes, words",
    (
        (
            {"extractor_norm": "group"},
            ("extractor_mode: found 'default'", "GroupNorm over the whole utterance", "chunk_frames=[24]")
            + ("cannot wait for its end", "use a model trained with extractor_mode=layer_norm"),
        ),
        ({"left_context_frames": -1}, ("left_context_frames: found -1, expected 0 or more frames",)),
        ({"lookahead_frames": -2}, ("lookahead_frames: found -2, expected 0 or more frames",)),
        ({"chunk_frames": (-24,)}, ("chunk_frames: found [-24], expected distinct numbers of frames like [24]",)),
        ({"chunk_frames": (24, 24)}, ("chunk_frames: found [24, 24]",)),
        (
            {"squeeze_factors": (1, 5), "left_context_frames": 50},
            ("chunk_frames: 24 frames are no multiple of 5", "squeeze factor 5 times 1 of query_pools", "choose 25"),
        ),
        (
            {"squeeze_factors": (2,), "query_pools": (1, 7), "left_context_frames": 56},
            ("chunk_frames: 24 frames are no multiple of 14, squeeze factor 2 times 7 of query_pools", "choose 28"),
        ),
        (
            {"squeeze_factors": (2,), "kv_pools": (1, 4), "left_context_frames": 50},
            ("left_context_frames: 50 frames are no multiple of 8, squeeze factor 2 times 4 of kv_pools", "choose 56"),
        ),
        (
            {"kv_pools": (3,), "lookahead_frames": 4},
            ("lookahead_frames: 4 frames are no multiple of 3, squeeze factor 1 times 3 of kv_pools", "choose 6"),
        ),
        ({"squeeze_factors": (2,), "chunk_frames": (0, 25)}, ("chunk_frames: 25 frames are no multiple of 2",)),
    ),
)
def test_streaming_configurations_that_cannot_be(changes, words):
    with pytest.raises(ValueError) as error:
        build_streaming(**changes)
    for word in words:
        assert word in str(error.value)


def test_offline_models_may_have_any_context_and_norm():
    config = build(extractor_norm="group", chunk_frames=(), left_context_frames=301, squeeze_factors=(1, 2))
    assert not config.streams and config.frontend_padding == 0
    assert not build(chunk_frames=(0,)).streams


def test_a_streaming_model_streams():
    for chunks in ((24,), (12, 24), (0, 24)):
        assert build_streaming(chunk_frames=chunks).streams
    build_streaming(squeeze_factors=(1, 2, 3), query_pools=(1, 2), kv_pools=(1, 4), lookahead_frames=24)


def test_frames_of_a_streaming_model_are_whole_hops():
    """A frame ends with the last sample of its hop: n samples make n // 320 frames."""
    config = build_streaming(conv_feature_layers=STOCK)
    assert config.frontend_padding == 80
    for samples in (320, 639, 640, 7679, 7680, 7681, 16000):
        assert config.frames(samples) == samples // 320
    assert build(conv_feature_layers=STOCK).frames(16000) == 49


def test_a_frontend_whose_window_is_its_hop_is_not_padded():
    assert build_streaming(conv_feature_layers="[(8, 5, 5), (8, 2, 2)]").frontend_padding == 0


def test_a_frontend_that_leaves_samples_out_cannot_stream():
    with pytest.raises(ValueError, match="conv_feature_layers: a frame hears 9 samples and the next one starts 10"):
        build_streaming(conv_feature_layers="[(8, 4, 5), (8, 2, 2)]")
    build(conv_feature_layers="[(8, 4, 5), (8, 2, 2)]")


# ---- widths that pruning leaves


@pytest.mark.parametrize(
    "changes, words",
    (
        ({"layer_heads": (1, 2)}, ("layer_heads: found 2 numbers, expected one for each of 4 stored layers",)),
        ({"layer_heads": (1,) * 4, "unique_layers": 2}, ("layer_heads: found 4 numbers", "2 stored layers")),
        ({"layer_ffn": (16,) * 5}, ("layer_ffn: found 5 numbers, expected one for each of 4 stored layers",)),
        ({"conv_norm_dims": (8,)}, ("conv_norm_dims: found 1 numbers, expected one for each of 2 frontend layers",)),
        ({"layer_heads": (1, -2, 0, 1)}, ("layer_heads: found [1, -2, 0, 1], expected numbers of 0 or more",)),
        ({"layer_ffn": (1, 2, 3, -4)}, ("layer_ffn: found [1, 2, 3, -4]",)),
        ({"conv_norm_dims": (8, -8)}, ("conv_norm_dims: found [8, -8]",)),
        ({"conv_norm_dims": (8, 7)}, ("conv_norm_dims: found 7 for frontend layer 1, which has 8 channels",)),
        ({"norm_dim": 15}, ("norm_dim: found 15, expected encoder_embed_dim=16 or more",)),
        ({"norm_dim": -1}, ("norm_dim: found -1",)),
        ({"head_dim": -8}, ("head_dim: found -8",)),
        ({"heads": 3}, ("encoder_attention_heads: 3 heads do not divide encoder_embed_dim 16", "set head_dim")),
        ({"heads": 0}, ("encoder_attention_heads: found 0, expected 1 or more",)),
        ({"heads": -2, "head_dim": 8}, ("encoder_attention_heads: found -2",)),
        ({"conv_pos_groups": 0}, ("conv_pos_groups: found 0, expected 1 or more",)),
        ({"conv_pos_groups": 3}, ("conv_pos_groups: 3 groups do not divide 16 channels",)),
        ({"conv_pos_group_dims": (16,)}, ("conv_pos_group_dims: found [16], expected 2 numbers (conv_pos_groups)",)),
        ({"conv_pos_group_dims": (9, 8)}, ("conv_pos_group_dims: found [9, 8]", "sum is encoder_embed_dim=16")),
        ({"conv_pos_group_dims": (16, 0)}, ("conv_pos_group_dims: found [16, 0]", "1 or more")),
        ({"conv_pos_group_dims": (17, -1)}, ("conv_pos_group_dims: found [17, -1]",)),
        ({"prune_units": ("conv", "head")}, ("prune_units: found ['conv', 'head']", "conv, heads, ffn, hidden")),
        ({"prune_units": ("conv", "conv")}, ("prune_units: found ['conv', 'conv']", "each once")),
        (
            {"layer_heads": (2, 1, 1, 1), "attention_map_every": 2},
            ("layer_heads: stored layers [0, 1] share attention maps (attention_map_every=2)", "[2, 1] heads"),
        ),
        (
            {"layer_heads": (1, 1, 0), "layer_map": "0,1,1,2", "attention_map_every": 2},
            ("layer_heads: stored layers [0, 1, 2] share", "[1, 1, 0] heads"),
        ),
    ),
)
def test_widths_that_cannot_be(changes, words):
    with pytest.raises(ValueError) as error:
        build(**changes)
    for word in words:
        assert word in str(error.value)


def test_widths_of_stored_layers():
    config = build(layer_heads=(1, 0, 2, 5), head_dim=4, layer_ffn=(0, 3, 16, 99))
    assert [config.heads_of(stored) for stored in range(4)] == [1, 0, 2, 5] and config.head_size == 4
    assert [config.ffn_of(stored) for stored in range(4)] == [0, 3, 16, 99]
    plain = build()
    assert [plain.heads_of(3), plain.ffn_of(3), plain.head_size] == [2, 16, 8]


def test_layers_that_share_maps_may_lose_their_heads_together():
    config = build(layer_heads=(0, 0, 2, 2), attention_map_every=2)
    assert config.map_groups == {0: {0, 1}, 2: {2, 3}}


def test_pruned_widths_need_no_divisors():
    config = build(dim=13, head_dim=8, heads=2, norm_dim=16, conv_pos_group_dims=(6, 7), conv_norm_dims=(8, 12))
    assert config.head_size == 8


@pytest.mark.parametrize(
    "keys, projects", (({}, True), ({"dim": 8}, False), ({"dim": 8, "project_features": True}, True))
)
def test_whether_features_are_projected(keys, projects):
    assert build(**keys).projects == projects


def test_a_model_section_with_pruned_widths():
    from fairseq_w2v2_light.nn.config import encoder_config_from

    stock = dict(
        conv_feature_layers="[(8, 10, 5), (8, 3, 2)]",
        extractor_mode="layer_norm",
        conv_bias=False,
        encoder_embed_dim=13,
        encoder_ffn_embed_dim=16,
        encoder_attention_heads=2,
        layer_norm_first=True,
        activation_fn="gelu",
        conv_pos=4,
        conv_pos_groups=2,
        encoder_layers=2,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
    )
    pruned = dict(layer_heads=[1, 0], layer_ffn=[0, 3], head_dim=8, norm_dim=16, conv_norm_dims=[9, 8])
    pruned.update(conv_pos_group_dims=[6, 7], project_features=True, prune_units=["heads"])
    config = encoder_config_from({**stock, **pruned})
    for key, value in pruned.items():
        assert getattr(config, key) == (tuple(value) if isinstance(value, list) else value), key
    hash(config)
    plain = encoder_config_from({**stock, "encoder_embed_dim": 16})
    assert (plain.layer_heads, plain.head_dim, plain.norm_dim, plain.prune_units) == ((), 0, 0, ())


def test_operating_points_count_the_layers_of_their_network():
    """Whatever space a caller made: one of 12 layers, by default."""
    config = EncoderConfig(
        conv_layers=((8, 10, 5),),
        dim=16,
        layer_map=(0, 1),
        heads=2,
        conv_pos_groups=2,
        attention_map_every=2,
        operating_points=OperatingPointSpace(query=(1, 2), per_layer=True),
    )
    points = config.operating_points
    assert (points.depth, points.map_every, points.query) == (2, 2, (1, 2))
    assert {len(points.draw(0, update).query) for update in range(20)} == {1}
    with pytest.raises(ValueError, match="12"):
        points.check(OperatingPoint(query=(1,) * 11 + (2,)))
