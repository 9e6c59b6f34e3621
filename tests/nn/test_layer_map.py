"""Layer maps."""

import random

import pytest

from fairseq_w2v2_light.nn import format_layer_map, parse_layer_map


@pytest.mark.parametrize(
    "text, depth, unique, expected",
    (
        ("", 4, 0, (0, 1, 2, 3)),
        ("", 4, 1, (0, 0, 0, 0)),
        ("", 4, 2, (0, 0, 1, 1)),
        ("groups", 5, 2, (0, 0, 0, 1, 1)),
        ("cycle", 5, 2, (0, 1, 0, 1, 0)),
        ("cycle", 3, 0, (0, 1, 2)),
        ("0,0,1,1", 4, 0, (0, 0, 1, 1)),
        ("0x3, 1, 0x2", 6, 2, (0, 0, 0, 1, 0, 0)),
        ("1,0", 2, 0, (1, 0)),
    ),
)
def test_parse(text, depth, unique, expected):
    assert parse_layer_map(text, depth, unique) == expected


@pytest.mark.parametrize("depth", (1, 5, 12, 24))
def test_groups_are_contiguous_and_nearly_equal(depth):
    for unique in range(1, depth + 1):
        layer_map = parse_layer_map("groups", depth, unique)
        sizes = [layer_map.count(layer) for layer in range(unique)]
        assert list(layer_map) == sorted(layer_map)
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_text_form_round_trip():
    generator = random.Random(0)
    for _ in range(100):
        used = [generator.randrange(4) for _ in range(generator.randint(1, 12))]
        rank = {layer: index for index, layer in enumerate(sorted(set(used)))}
        layer_map = tuple(rank[layer] for layer in used)
        assert parse_layer_map(format_layer_map(layer_map), len(layer_map)) == layer_map


@pytest.mark.parametrize(
    "text, words",
    (
        ("0,0,1", ("'0,0,1'", "3 entries for encoder_layers=4")),
        ("0,0,2,2", ("'0,0,2,2'", "[0, 2]", "without gaps")),
        ("1,1,2,2", ("[1, 2]", "from 0")),
        ("0,0,a,1", ("'a' is no layer number", "'0x6,1x6'")),
        ("0,0,,1", ("'' is no layer number",)),
        ("0,0,-1,1", ("'-1' is no layer number",)),
        ("0x,1x2", ("'0x' is no layer number",)),
        ("x2,0", ("'x2' is no layer number",)),
        ("0;0;1;1", ("'0;0;1;1' is no layer number",)),
        ("Groups", ("'Groups' is no layer number", "'groups'")),
        ("0\u00b2,0,0,0", ("layer_map",)),
        ("0x0,1x4", ("[1]",)),
    ),
)
def test_malformed_maps(text, words):
    with pytest.raises(ValueError) as error:
        parse_layer_map(text, 4)
    assert "layer_map" in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_run_length_beyond_reason_is_refused():
    with pytest.raises(ValueError, match="layer_map"):
        parse_layer_map("0x99999999999", 4)


def test_map_and_number_of_stored_layers_must_agree():
    with pytest.raises(ValueError, match="uses 2 stored layers, but unique_layers=3"):
        parse_layer_map("0,0,1,1", 4, 3)


@pytest.mark.parametrize("unique", (-1, 5))
def test_number_of_stored_layers(unique):
    with pytest.raises(ValueError, match=f"unique_layers: found {unique}, expected 0 .* to encoder_layers=4"):
        parse_layer_map("", 4, unique)


def test_depth():
    with pytest.raises(ValueError, match="encoder_layers: found 0"):
        parse_layer_map("", 0)
