"""Operating points: text form, the sets a model is trained for, draws."""

import random

import pytest
import torch

from fairseq_w2v2_light.nn import OperatingPoint, OperatingPointSpace

SPACE = OperatingPointSpace((1, 2, 3), (1, 2), (1, 2, 3), depth=6)


@pytest.mark.parametrize(
    "text, squeeze, query, key_value",
    (
        ("s1q1k1", 1, (1,), (1,)),
        ("s2q1k2", 2, (1,), (2,)),
        ("s12q10k11", 12, (10,), (11,)),
        ("s1q1-1-2-2k1", 1, (1, 1, 2, 2), (1,)),
        ("s3q1x2-2x2k1-2-3-4", 3, (1, 1, 2, 2), (1, 2, 3, 4)),
        (" s2q1k1\n", 2, (1,), (1,)),
    ),
)
def test_parse(text, squeeze, query, key_value):
    point = OperatingPoint.parse(text)
    assert (point.squeeze, point.query, point.key_value) == (squeeze, query, key_value)


def test_text_form_round_trip():
    generator = random.Random(0)
    for _ in range(300):
        factors = [tuple(generator.randint(1, 3) for _ in range(generator.choice((1, 4, 12)))) for _ in range(2)]
        point = OperatingPoint(generator.randint(1, 12), *factors)
        assert OperatingPoint.parse(str(point)) == point
        assert " " not in str(point) and "," not in str(point)


def test_equal_factors_in_all_layers_are_one_factor():
    assert OperatingPoint(2, (1, 1, 1), (2, 2, 2)) == OperatingPoint.parse("s2q1k2")
    assert hash(OperatingPoint(1, (1, 1), (1,))) == hash(OperatingPoint())


@pytest.mark.parametrize(
    "text",
    ("", "s2", "s2q1", "s0q1k1", "s1q0k1", "s1q1k0", "s2q1k", "S2Q1K1", "s2q1k2 x", "s2q1,2k1", "s-1q1k1", "s2 q1 k1")
    + ("q1k1", "s2q1-k1", "s2q1x-2k1", "s2qx2k1", "s2q1x2x3k1", "s1.5q1k1", "s2q1k1q1", "None", "s1q1x0k1"),
)
def test_malformed_text_is_quoted_with_an_example(text):
    with pytest.raises(ValueError) as error:
        OperatingPoint.parse(text)
    assert "operating point" in str(error.value)
    assert "s2q1k2" in str(error.value)
    if text not in ("s0q1k1", "s1q0k1", "s1q1k0"):  # parsed, then refused: quoted in normal form
        assert f"'{text}'" in str(error.value)


@pytest.mark.parametrize("text", ("s1q1x999999999999k1", "s1q1k2x99999999999"))
def test_a_run_length_beyond_reason_is_refused(text):
    with pytest.raises(ValueError, match="operating point"):
        OperatingPoint.parse(text)


@pytest.mark.parametrize("text", ("s1q1k1", "s3q2k3", "s2q1x3-2x3k1", "s1q1k1-2-3-1-2-3"))
def test_trained_points_are_accepted(text):
    assert SPACE.check(OperatingPoint.parse(text)) == OperatingPoint.parse(text)


@pytest.mark.parametrize(
    "text, words",
    (
        ("s4q1k1", ("s4q1k1", "not trained with squeeze factor 4", "[1, 2, 3]")),
        ("s1q3k1", ("s1q3k1", "not trained with query pooling 3", "[1, 2]")),
        ("s1q1k4", ("s1q1k4", "not trained with key-value pooling 4", "[1, 2, 3]")),
        ("s1q1x5-3k1", ("not trained with query pooling 3",)),
        ("s1q1-2k1", ("s1q1-2k1", "2 query pooling factors for 6 layers")),
        ("s1q1k1x6-2", ("7 key-value pooling factors for 6 layers",)),
    ),
)
def test_untrained_points_are_refused(text, words):
    with pytest.raises(ValueError) as error:
        SPACE.check(OperatingPoint.parse(text))
    for word in words:
        assert word in str(error.value)


def test_layers_that_share_a_map_must_pool_alike():
    space = OperatingPointSpace((1,), (1, 2), (1, 2), depth=4, map_every=2)
    space.check(OperatingPoint.parse("s1q1-1-2-2k2-2-1-1"))
    with pytest.raises(ValueError, match=r"layer 1 reuses the attention map of layer 0 \(attention_map_every=2\)"):
        space.check(OperatingPoint.parse("s1q1-2-2-2k1"))


@pytest.mark.parametrize("index, key", ((0, "squeeze_factors"), (1, "query_pools"), (2, "kv_pools")))
@pytest.mark.parametrize("factors", ((), (0, 1), (-2,), (1, 1)))
def test_malformed_sets_name_the_key(index, key, factors):
    sets = [(1,), (1,), (1,)]
    sets[index] = factors
    with pytest.raises(ValueError, match=key) as error:
        OperatingPointSpace(*sets)
    assert str(list(factors)) in str(error.value)


def test_points_are_all_combinations():
    points = [str(point) for point in OperatingPointSpace((2, 1), (1, 2), (1,)).points()]
    assert points == ["s1q1k1", "s1q2k1", "s2q1k1", "s2q2k1"]


def test_default_is_the_least_reduction():
    assert str(OperatingPointSpace((4, 2), (2,), (3, 1)).default) == "s2q2k1"


def test_draws_are_a_function_of_seed_and_update():
    draws = [SPACE.draw(5, update) for update in range(50)]
    random.seed(1)
    torch.manual_seed(1)
    assert [SPACE.draw(5, update) for update in range(50)] == draws
    assert [SPACE.draw(6, update) for update in range(50)] != draws


def test_draws_leave_global_generators_alone():
    states = random.getstate(), torch.get_rng_state()
    SPACE.draw(1, 2)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_draws_do_not_change_between_versions():
    """A resumed run must draw what it would have drawn on another Python."""
    space = OperatingPointSpace((1, 2, 3, 4), (1, 2), (1, 2))
    assert [str(space.draw(1, update)) for update in range(5)] == [
        "s2q2k1",
        "s3q1k2",
        "s2q1k2",
        "s2q2k2",
        "s3q2k1",
    ]


def test_draws_are_uniform_and_independent():
    updates = 6000
    counts = {}
    for update in range(updates):
        point = SPACE.draw(1, update)
        counts[point] = counts.get(point, 0) + 1
    assert set(counts) == set(SPACE.points())
    expected = updates / 18
    assert all(0.7 * expected < count < 1.3 * expected for count in counts.values())


def test_per_layer_draws_are_uniform_in_every_layer():
    space = OperatingPointSpace((1, 2), (1, 2), (1, 3), depth=5, per_layer=True)
    draws = [space.draw(1, update) for update in range(800)]
    assert len({draw.query for draw in draws}) == 2**5
    for depth in range(5):
        assert 320 < sum(draw.query_pool(depth) == 2 for draw in draws) < 480
        assert 320 < sum(draw.kv_pool(depth) == 3 for draw in draws) < 480
    for draw in draws:
        space.check(draw)


def test_per_layer_draws_are_equal_in_layers_that_share_a_map():
    space = OperatingPointSpace((1,), (1, 2), (1, 2), depth=5, per_layer=True, map_every=2)
    for update in range(60):
        draw = space.draw(1, update)
        space.check(draw)
        assert draw.query_pool(0) == draw.query_pool(1) and draw.kv_pool(2) == draw.kv_pool(3)


def test_one_point_is_not_stochastic():
    assert not OperatingPointSpace((2,), (1,), (3,)).is_stochastic
    assert SPACE.is_stochastic
