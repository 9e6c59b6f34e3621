"""Operating points: text form, the sets a model is trained for, draws."""

import dataclasses
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


# ---- chunks

STREAMING = OperatingPointSpace((1, 2, 3), (1, 2), (1, 2, 3), depth=6, chunk=(0, 12, 24))


@pytest.mark.parametrize(
    "text, chunk", (("s1q1k1c24", 24), ("s2q1-1-2-2k1c6", 6), ("s1q1x6-2x6k2c480", 480), ("s1q1k1", 0))
)
def test_parse_a_chunk(text, chunk):
    assert OperatingPoint.parse(text).chunk == chunk
    assert str(OperatingPoint.parse(text)).endswith(f"c{chunk}") == bool(chunk)


def test_text_form_with_a_chunk_round_trips():
    generator = random.Random(1)
    for _ in range(200):
        factors = [tuple(generator.randint(1, 3) for _ in range(generator.choice((1, 4)))) for _ in range(2)]
        point = OperatingPoint(generator.randint(1, 4), *factors, chunk=generator.choice((0, 1, 12, 960)))
        assert OperatingPoint.parse(str(point)) == point


def test_chunk_0_needs_no_text():
    assert OperatingPoint.parse("s1q1k1c0") == OperatingPoint() and str(OperatingPoint(chunk=0)) == "s1q1k1"


@pytest.mark.parametrize(
    "text", ("s1q1k1c", "s1q1k1c-4", "c24", "s1q1c24k1", "s1q1k1c24c12", "s1q1k1c2.5", "s1q1k1c12-24")
)
def test_a_malformed_chunk_is_quoted_with_an_example(text):
    with pytest.raises(ValueError, match="operating point .*streaming: s1q1k1c24") as error:
        OperatingPoint.parse(text)
    assert f"'{text}'" in str(error.value)


def test_a_chunk_below_0_is_refused():
    with pytest.raises(ValueError, match="operating point .*: chunk -1 is below 0"):
        OperatingPoint(chunk=-1)


@pytest.mark.parametrize("chunk", ((), (-4,), (24, 24)))
def test_malformed_chunks_name_the_key(chunk):
    with pytest.raises(ValueError, match=r"expected distinct numbers of frames like \[24\]") as error:
        OperatingPointSpace(chunk=chunk)
    assert f"chunk_frames: found {list(chunk)}" in str(error.value)


@pytest.mark.parametrize("chunk, default", (((24,), 24), ((12, 48, 24), 48), ((24, 0), 0), ((0,), 0)))
def test_the_default_chunk_is_the_whole_utterance_or_the_largest(chunk, default):
    space = OperatingPointSpace((2, 1), chunk=chunk)
    assert space.default == OperatingPoint(1, chunk=default)
    assert space.is_stochastic and OperatingPointSpace(chunk=chunk).is_stochastic == (len(chunk) > 1)


def test_checking_fills_the_chunk_in():
    space = OperatingPointSpace((1, 2), chunk=(12, 24))
    assert str(space.check(OperatingPoint(2))) == "s2q1k1c24"
    assert str(space.check(OperatingPoint(1, chunk=12))) == "s1q1k1c12"
    assert str(STREAMING.check(OperatingPoint(2))) == "s2q1k1"
    assert str(OperatingPointSpace((1, 2)).check(OperatingPoint(2))) == "s2q1k1"


@pytest.mark.parametrize("trained", ((12, 24), (0,)))
def test_an_untrained_chunk_is_refused(trained):
    with pytest.raises(ValueError) as error:
        OperatingPointSpace(chunk=trained).check(OperatingPoint(chunk=36))
    for word in ("'s1q1k1c36'", "not trained with chunk 36", str(list(trained)), "fine-tune"):
        assert word in str(error.value)


def test_points_list_the_whole_utterance_first_then_larger_chunks():
    points = [str(point) for point in OperatingPointSpace((2, 1), chunk=(12, 0, 24)).points()]
    assert points == ["s1q1k1", "s1q1k1c24", "s1q1k1c12", "s2q1k1", "s2q1k1c24", "s2q1k1c12"]


def test_drawn_chunks_are_uniform_and_leave_the_other_factors_as_they_were():
    updates = 5400
    counts = {}
    for update in range(updates):
        point = STREAMING.draw(1, update)
        counts[point] = counts.get(point, 0) + 1
        assert dataclasses.replace(point, chunk=0) == SPACE.draw(1, update)
        assert STREAMING.draw(1, update) == point
    assert set(counts) == set(STREAMING.points())
    assert all(0.6 * updates / 54 < count < 1.4 * updates / 54 for count in counts.values())
    assert {STREAMING.draw(2, update) for update in range(400)} == set(STREAMING.points())


def test_draws_without_chunks_are_those_of_before_there_were_any():
    """Literal values of the version that had no chunks: its runs resume."""
    space = OperatingPointSpace((1, 2, 3), (1, 2), (1, 2, 3), depth=6)
    texts = "s3q1k3 s2q1k1 s3q1k3 s1q2k1 s2q1k1 s2q2k3 s1q1k1 s2q1k1"
    assert " ".join(str(space.draw(7, update)) for update in range(8)) == texts
    space = OperatingPointSpace((1, 2), (1, 2), (1, 2), depth=4, per_layer=True, map_every=2)
    texts = "s1q2x2-1x2k1 s1q2x2-1x2k1x2-2x2 s2q2k1x2-2x2 s2q1x2-2x2k1x2-2x2 s2q1k1x2-2x2"
    assert " ".join(str(space.draw(3, update)) for update in range(5)) == texts
    space = OperatingPointSpace((1, 2, 3), (1, 2), (1, 2, 3), depth=6, chunk=(0, 12, 24))
    texts = "s3q1k3c24 s2q1k1c12 s3q1k3c24 s1q2k1 s2q1k1c24 s2q2k3c12 s1q1k1c12 s2q1k1c24"
    assert " ".join(str(space.draw(7, update)) for update in range(8)) == texts
