"""The network's configuration: frontend shapes as text, and values that cannot be."""

import pytest

from fairseq_w2v2_light.nn import encoder_config, frame_lengths, parse_conv_layers, receptive_field

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
