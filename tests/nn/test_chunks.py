"""Chunk masks: worked examples, who hears whom, padding, gradients."""

import random

import numpy as np
import pytest
import torch

from fairseq_w2v2_light.nn import FrameMask, OperatingPoint
from fairseq_w2v2_light.nn.chunks import ChunkLayout, ChunkMask

TOLERANCE = 1e-5
CHUNKS = dict(extractor_norm="layer", squeeze_factors=(1, 2), query_pools=(1, 2), kv_pools=(1, 2))
CHUNKS.update(chunk_frames=(0, 4, 8), left_context_frames=8, lookahead_frames=4)
POINTS = ("s1q1k1c4", "s1q2k1c8", "s1q1k2c4", "s2q1k1c4", "s2q2k2c8", "s2q1-2-1k2-2-1c4", "s2q2k1")


def heard(layout, query_pool=1, kv_pool=1):
    return ["".join("x" if hears else "." for hears in row) for row in layout.hears(query_pool, kv_pool).tolist()]


# ---- the layout


def test_the_places_of_the_worked_example():
    layout = ChunkLayout(5, 2, left=2, ahead=1)
    assert layout.frame.tolist() == [0, 1, 2, 3, 4, 5, 2, 4, 6]
    assert layout.chunk.tolist() == [0, 0, 1, 1, 2, 2, 0, 1, 2]


def test_who_hears_whom_in_the_worked_example():
    """Rows are queries, columns keys: 5 frames, a place that fills the last chunk up, the copies of 2, 4 and none."""
    assert heard(ChunkLayout(5, 2, left=2, ahead=1)) == [
        "xx....x..",
        "xx....x..",
        "xxxx...x.",
        "xxxx...x.",
        "..xxxx..x",
        "..xxxx..x",
        "xx....x..",
        "xxxx...x.",
        "..xxxx..x",
    ]


def test_without_look_ahead_there_are_no_copies():
    layout = ChunkLayout(5, 2, left=1, ahead=0)
    assert layout.frame.tolist() == [0, 1, 2, 3, 4]
    assert heard(layout) == ["xx...", "xx...", ".xxx.", ".xxx.", "...xx"]
    assert heard(ChunkLayout(5, 2, left=0, ahead=0)) == ["xx...", "xx...", "..xx.", "..xx.", "....x"]


def test_windows_of_a_pooled_mask_stay_in_their_chunk():
    layout = ChunkLayout(6, 4, left=2, ahead=2)
    assert layout.frame.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 8, 9]
    assert heard(layout, 2, 2) == ["xx..x.", "xx..x.", ".xxx.x", ".xxx.x", "xx..x.", ".xxx.x"]
    assert heard(layout, 4, 2)[:2] == ["xx..x.", ".xxx.x"]


def test_a_chunk_as_long_as_the_utterance_hears_everything():
    for size in (5, 9):
        assert heard(ChunkLayout(5, size, left=0, ahead=0)) == ["xxxxx"] * 5


@pytest.mark.parametrize("seed", range(12))
def test_hearing_is_what_the_definition_says(seed):
    generator = random.Random(seed)
    time, size = generator.randint(1, 20), generator.randint(1, 7)
    left, ahead = generator.randint(0, 9), generator.randint(0, 9)
    layout = ChunkLayout(time, size, left, ahead)
    places = list(zip(layout.frame.tolist(), layout.chunk.tolist()))
    originals = [(frame, frame // size) for frame in range(time)]
    copies = [
        (chunk, frame)
        for chunk in range(-(-time // size))
        for frame in range((chunk + 1) * size, (chunk + 1) * size + ahead)
    ]
    assert places[:time] == originals
    assert sorted((chunk, frame) for frame, chunk in places[layout.originals :]) == sorted(copies)
    hears = layout.hears()
    for query, (_, chunk) in enumerate(places):
        for key, (frame, owner) in enumerate(places):
            is_copy = key >= layout.originals
            own = owner == chunk
            past = not is_copy and chunk * size - left <= frame < chunk * size
            assert hears[query, key] == (own or past), (query, key)


def test_copies_are_added_and_taken_away():
    layout = ChunkLayout(5, 2, left=2, ahead=1)
    x = torch.arange(10.0).view(1, 5, 2)
    extended = layout.extend(x)
    assert extended.shape == (1, 9, 2)
    real = layout.frame < 5
    assert torch.equal(extended[:, real], x[:, layout.frame[real]])
    assert torch.equal(layout.restrict(extended), x)


# ---- the mask


def test_a_mask_without_padding():
    mask = ChunkMask(ChunkLayout(5, 2, left=2, ahead=0))
    assert mask.valid is None
    assert torch.equal(mask.attention()[0, 0], ChunkLayout(5, 2, left=2, ahead=0).hears())
    mask = ChunkMask(ChunkLayout(5, 2, left=2, ahead=1))
    assert mask.valid.tolist() == [[True, True, True, True, True, False, True, True, False]]
    assert not mask.attention()[0, 0, 4, 5]


def test_padding_is_heard_by_no_frame():
    frames = FrameMask.from_lengths(torch.tensor([5, 3]), 5)
    mask = ChunkMask(ChunkLayout(5, 2, left=2, ahead=1), frames)
    assert mask.valid.int().tolist() == [[1, 1, 1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 1, 0, 0]]
    attention = mask.attention()
    assert attention.shape == (2, 1, 9, 9)
    for row in range(2):
        for query in mask.valid[row].nonzero().flatten():
            assert not attention[row, 0, query][~mask.valid[row]].any()


@pytest.mark.parametrize("pools", ((1, 1), (2, 1), (1, 2), (2, 2), (4, 2)))
@pytest.mark.parametrize("ahead", (0, 4))
def test_every_query_hears_something(ahead, pools):
    frames = FrameMask.from_lengths(torch.tensor([11, 1, 4, 5, 8]), 11)
    attention = ChunkMask(ChunkLayout(11, 4, left=0, ahead=ahead), frames).attention(*pools)
    assert bool(attention.any(-1).all())


# ---- the encoder with it


def encode(encoder, x, mask=None, point="s1q1k1c4"):
    with torch.no_grad():
        return encoder(x, mask, encoder.config.operating_points.check(OperatingPoint.parse(point)))


@pytest.mark.parametrize("squeeze_tail", ("keep", "drop"))
@pytest.mark.parametrize("norm_first", (False, True))
def test_a_padded_batch_is_its_utterances_one_by_one(tiny, norm_first, squeeze_tail):
    encoder = tiny.encoder(norm_first=norm_first, squeeze_tail=squeeze_tail, **CHUNKS)
    lengths = (17, 1, 2, 3, 4, 5, 16, 11)
    x, mask = tiny.frames(*lengths)
    garbage = torch.where(mask.valid.unsqueeze(-1), x, x * 1e3 - 7)
    for point in POINTS:
        batch = encode(encoder, x, mask, point)
        assert torch.equal(encode(encoder, garbage, mask, point).x[mask.valid], batch.x[mask.valid])
        for row, length in enumerate(lengths):
            alone = encode(encoder, x[row : row + 1, :length], None, point)
            assert (batch.x[row, :length] - alone.x[0]).abs().max() <= TOLERANCE, (point, length)
            for batched, single in zip(batch.layers, alone.layers):
                squeezed = single.x.size(1)
                assert (batched.x[row, :squeezed] - single.x[0]).abs().max() <= TOLERANCE


def test_layer_results_are_at_the_squeezed_rate_without_copies(tiny):
    encoder = tiny.encoder(**CHUNKS)
    x, _ = tiny.frames(11)
    for point, time in (("s1q1k1c4", 11), ("s2q1k1c4", 6)):
        for layer in encode(encoder, x, None, point).layers:
            assert layer.x.shape == layer.ffn.shape == (1, time, 16)


def test_chunk_0_is_the_offline_model_with_causal_positions(tiny):
    streaming = tiny.backbone(**CHUNKS)
    offline = tiny.backbone(**{**CHUNKS, "chunk_frames": ()})
    offline.load_state_dict(streaming.state_dict(), strict=True)
    offline.feature_extractor.padding = streaming.feature_extractor.padding
    offline.encoder.pos_conv[0].causal = True
    wave, lengths = torch.randn(3, 500), torch.tensor([500, 333, 95])
    for point in ("s1q1k1", "s2q2k1"):
        found, mask = streaming.encode(wave, lengths, OperatingPoint.parse(point))
        expected, _ = offline.encode(wave, lengths, OperatingPoint.parse(point))
        assert torch.equal(found.x[mask.valid], expected.x[mask.valid])


@pytest.mark.parametrize("lookahead", (0, 4))
def test_a_chunk_as_long_as_the_utterance_is_the_whole_utterance(tiny, lookahead):
    encoder = tiny.encoder(**{**CHUNKS, "chunk_frames": (0, 24), "lookahead_frames": lookahead})
    x, mask = tiny.frames(24, 7)
    for point in ("s1q1k1", "s2q1k2"):
        whole, chunked = encode(encoder, x, mask, point).x, encode(encoder, x, mask, point + "c24").x
        assert (whole - chunked)[mask.valid].abs().max() <= TOLERANCE


def test_what_a_frame_hears_ends_with_its_chunk_and_look_ahead_whatever_the_depth(tiny):
    encoder = tiny.encoder(encoder_layers=6, **CHUNKS)
    x, _ = tiny.frames(20)
    for point, chunk in (("s1q1k1c4", 4), ("s2q2k2c8", 8)):
        inputs = x.clone().requires_grad_()
        outputs = encoder(inputs, None, OperatingPoint.parse(point)).x
        for frame in range(20):
            (gradient,) = torch.autograd.grad(outputs[0, frame].square().sum(), inputs, retain_graph=True)
            touched = gradient[0].abs().sum(-1).nonzero().flatten()
            assert touched.max() == min(19, (frame // chunk + 1) * chunk + 4 - 1), (point, frame)


# ---- training


def gradients(encoder, x, mask, point, seed=0):
    """Gradients of a loss over the valid frames, one per parameter, and that of the input."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    encoder.zero_grad()
    inputs = x.clone().requires_grad_()
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.valid
    encoder(inputs, mask, OperatingPoint.parse(point)).x[valid].square().sum().backward()
    return {name: parameter.grad for name, parameter in encoder.named_parameters()}, inputs.grad


@pytest.mark.parametrize("every", (1, 2))
@pytest.mark.parametrize("norm_first", (False, True))
def test_gradients_through_chunks_and_padding_are_finite(tiny, norm_first, every):
    encoder = tiny.encoder(norm_first=norm_first, attention_map_every=every, **CHUNKS).train()
    idle = {id(parameter) for parameter in encoder.idle_parameters()}
    lengths = (17, 1, 9, 4)
    x, mask = tiny.frames(*lengths)
    for point in ("s1q1k1c4", "s1q2k2c4", "s2q1k2c8", "s2q2k1c4"):
        found, of_input = gradients(encoder, x, mask, point)
        assert bool(torch.isfinite(of_input).all()) and not of_input[~mask.valid].any()
        for name, parameter in encoder.named_parameters():
            gradient = found[name]
            if id(parameter) not in idle:
                # a key's bias shifts all scores of a query alike: nothing to learn
                assert gradient is not None and (gradient.abs().sum() > 0 or "k_proj.bias" in name), (point, name)
            assert gradient is None or bool(torch.isfinite(gradient).all()), (point, name)


def test_rows_of_a_map_sum_to_one_and_are_zero_where_nothing_is_heard(tiny):
    encoder = tiny.encoder(attention_map_every=2, **CHUNKS)
    x, mask = tiny.frames(17, 1, 9)
    attention = encode(encoder, x, mask).layers[0].attention_map
    allowed = ChunkMask(ChunkLayout(17, 4, 8, 4), mask).attention()
    assert bool(torch.isfinite(attention).all())
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    assert not attention[~allowed.expand_as(attention)].any()


@pytest.mark.parametrize("point", ("s1q1k1c4", "s2q2k2c8"))
def test_training_with_dropout_and_layer_drop(tiny, point):
    encoder = tiny.encoder(
        encoder_layers=4, dropout=0.3, attention_dropout=0.3, activation_dropout=0.3, layerdrop=0.4, **CHUNKS
    ).train()
    x, mask = tiny.frames(17, 9)
    depths = set()
    for seed in range(6):
        found, of_input = gradients(encoder, x, mask, point, seed)
        assert bool(torch.isfinite(of_input).all()) and bool(of_input.any())
        with torch.no_grad():
            depths.add(tuple(encoder(x, mask, OperatingPoint.parse(point)).depths))
    assert len(depths) > 1


@pytest.mark.parametrize("every", (1, 2))
def test_checkpointed_activations_give_the_same_gradients(tiny, every):
    x, mask = tiny.frames(17, 9)
    results = []
    for checkpoint in (False, True):
        encoder = tiny.encoder(checkpoint_activations=checkpoint, attention_map_every=every, **CHUNKS).train()
        results.append(gradients(encoder, x, mask, "s2q2k1c4")[0])
    for name, expected in results[0].items():
        if expected is None:
            assert results[1][name] is None
        else:
            torch.testing.assert_close(results[1][name], expected)
