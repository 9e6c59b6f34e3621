"""Streaming steps, the chunk-masked pass, and a definition of both in plain loops: the same frames."""

import io
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fairseq_w2v2_light.nn import OperatingPoint, receptive_field
from fairseq_w2v2_light.nn.streaming import Stream, StreamState

TOLERANCE = 1e-5
HOP = 20
STREAMING = dict(
    extractor_norm="layer", squeeze_factors=(1, 2), query_pools=(1,), kv_pools=(1, 2), attention_map_every=2
)
STREAMING.update(encoder_layers=4, chunk_frames=(4,), left_context_frames=12, lookahead_frames=4)


def random_case(tiny, seed):
    """A random streaming network and one of its operating points."""
    generator = random.Random(seed)
    pick = generator.choice
    squeeze, query, key_value = (pick([(1,), (2,), (1, 2), third]) for third in ((3, 1), (1, 2), (1, 3)))
    every, depth = pick([1, 1, 2]), generator.randint(2, 4)
    unit = max(squeeze) * (2 if 2 in squeeze + query + key_value else 1) * (3 if 3 in key_value else 1)
    chunks = generator.sample([unit, 2 * unit, 3 * unit], 2)
    keys = dict(
        extractor_norm="layer",
        encoder_layers=depth,
        norm_first=pick([False, True]),
        unique_layers=pick([0, 1, 2]),
        attention_map_every=every,
        squeeze_factors=squeeze,
        query_pools=query,
        kv_pools=key_value,
        squeeze_tail=pick(["keep", "drop"]),
        unsqueeze_residual=pick([True, False]),
        unsqueeze_factor=pick([max(squeeze), 4]),
        chunk_frames=tuple(chunks),
        left_context_frames=unit * pick([0, 1, 2, 5]),
        lookahead_frames=unit * pick([0, 0, 1, 2, 4]),
        conv_pos=pick([1, 4, 7, 12]),
        heads=pick([1, 2, 4]),
    )

    def pools(factors):
        if pick([True, False]):
            return (pick(factors),)
        drawn = [pick(factors) for _ in range(depth)]
        return tuple(drawn[layer - layer % every] for layer in range(depth))

    point = OperatingPoint(pick(squeeze), pools(query), pools(key_value), pick(chunks))
    backbone = tiny.backbone(seed, **keys)
    samples = [0, HOP - 1, HOP, HOP * point.chunk - 1, HOP * point.chunk, HOP * (2 * point.chunk + 1) + 3]
    samples.append(generator.randint(HOP, HOP * 5 * point.chunk))
    samples.append(HOP * 4 * point.chunk)
    return SimpleNamespace(backbone=backbone, point=point, samples=samples, generator=generator)


def noise(samples, seed=0):
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def whole(backbone, wave, point):
    """(time, channel), the chunk-masked pass over (samples,)."""
    if len(wave) < HOP:
        return torch.zeros(0, backbone.config.dim)
    with torch.no_grad():
        return backbone.encode(wave.unsqueeze(0), None, point)[0].x[0]


def streamed(stream, wave):
    """(time, channel), the same chunk by chunk."""
    state, outputs = stream.start(), []
    while len(wave) >= stream.samples_needed(state):
        needed = stream.samples_needed(state)
        frames, state = stream.step(wave[None, :needed], state)
        assert frames.shape == (1, stream.point.chunk, stream.config.dim)
        outputs.append(frames[0])
        wave = wave[needed:]
    return torch.cat([*outputs, stream.finish(wave[None], state)[0]])


def assert_close(found, expected, note=None):
    assert found.shape == expected.shape, note
    assert not len(expected) or (found - expected).abs().max() <= TOLERANCE, note


# ---- the definition


def windows(rows, factor):
    return [torch.stack(rows[start : start + factor]).mean(0) for start in range(0, len(rows), factor)]


def reference(backbone, wave, point):
    """The frames of (samples,), chunk by chunk and query by query: who hears whom, in plain loops, without a mask."""
    config, encoder = backbone.config, backbone.encoder
    field, hop = receptive_field(config.conv_layers)
    padded = torch.cat([torch.zeros(field - hop), wave])
    frames = []
    for time in range(len(wave) // hop):
        heard, _ = backbone.feature_extractor.convolve(padded[None, time * hop : time * hop + field])
        frames.append(backbone.project(backbone.layer_norm(heard))[0, 0])

    squeezed = []
    for start in range(0, len(frames), point.squeeze):
        window = frames[start : start + point.squeeze]
        if config.squeeze_tail == "drop" and len(window) < point.squeeze and squeezed:
            break
        squeezed.append(torch.stack(window).mean(0) + position(encoder.pos_conv[0], frames, start))
    if not config.norm_first:
        squeezed = [encoder.layer_norm(frame) for frame in squeezed]

    size, left, ahead = (frames // point.squeeze for frames in (point.chunk, config.left_context, config.lookahead))
    # every layer's input, as the chunk that a frame belongs to has it
    remembered = [[] for _ in range(config.depth)]
    outputs = []
    for start in range(0, len(squeezed), size):
        own = len(squeezed[start : start + size])
        rows = squeezed[start : start + size + ahead]
        maps = None
        for depth, stored in enumerate(config.layer_map):
            layer = encoder.layers[stored]
            past = remembered[depth][max(0, start - left) : start]
            remembered[depth] += rows[:own]
            if depth % config.attention_map_every == 0:
                maps = None
            rows, maps = run_layer(layer, rows, past, point.query_pool(depth), point.kv_pool(depth), maps)
        outputs += rows[:own]
    if config.norm_first:
        outputs = [encoder.layer_norm(frame) for frame in outputs]
    if point.squeeze > 1:
        outputs = [frame for squeezed in outputs for frame in unsqueezed(encoder.upsample, squeezed, point.squeeze)]
        outputs = outputs[: len(frames)] + [torch.zeros(config.dim)] * (len(frames) - len(outputs))
    return torch.stack(outputs)


def position(conv, frames, time):
    norm = conv.weight_v.square().sum((0, 1)).sqrt()
    width = conv.weight_v.size(1)
    y = conv.bias.clone()
    for tap in range(conv.kernel):
        heard = time - (conv.kernel - 1) + tap
        if heard < 0:
            continue
        for group in range(conv.groups):
            rows = slice(group * len(y) // conv.groups, (group + 1) * len(y) // conv.groups)
            weight = conv.weight_v[rows, :, tap] * conv.weight_g[0, 0, tap] / norm[tap]
            y[rows] += weight @ frames[heard][group * width : (group + 1) * width]
    return F.gelu(y)


def run_layer(layer, rows, past, query_pool, kv_pool, maps):
    """One layer for the frames of a chunk: a list of vectors in, one out; and the weights of its attention."""
    attention = layer.self_attn
    hidden, before = rows, past
    if layer.norm_first:
        hidden, before = ([layer.self_attn_layer_norm(row) for row in some] for some in (rows, past))
    heard = windows(before, kv_pool) + windows(hidden, kv_pool)
    queries = windows(hidden, query_pool)
    values = torch.stack([attention.v_proj(row) for row in heard])
    if maps is None:
        keys = torch.stack([attention.k_proj(row) for row in heard])
        maps = []
        for row in queries:
            query = attention.q_proj(row)
            weights = []
            for head in range(attention.heads):
                part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
                weights.append((keys[:, part] @ query[part] / attention.head_dim**0.5).softmax(0))
            maps.append(weights)
    mixed = []
    for weights in maps:
        parts = values.unflatten(1, (attention.heads, attention.head_dim)).unbind(1)
        mixed.append(attention.out_proj(torch.cat([weight @ part for weight, part in zip(weights, parts)])))
    results = []
    for index, row in enumerate(rows):
        row = row + mixed[index // query_pool]
        if not layer.norm_first:
            row = layer.self_attn_layer_norm(row)
        inner = layer.final_layer_norm(row) if layer.norm_first else row
        row = row + layer.fc2(layer.activation(layer.fc1(inner)))
        results.append(row if layer.norm_first else layer.final_layer_norm(row))
    return results, maps


def unsqueezed(upsample, frame, factor):
    blocks = upsample[0].weight.chunk(upsample.factor), upsample[0].bias.chunk(upsample.factor)
    for sub_frame in range(factor):
        block = int((sub_frame + 0.5) / factor * upsample.factor)
        y = F.gelu(blocks[0][block] @ frame + blocks[1][block])
        yield y + frame if upsample.residual else y


@pytest.mark.parametrize("seed", range(16))
def test_the_masked_pass_and_the_steps_are_what_the_definition_says(tiny, seed):
    case = random_case(tiny, seed)
    for samples in case.samples[3:7]:
        wave = noise(samples, seed)
        with torch.no_grad():
            expected = reference(case.backbone, wave, case.point)
        assert_close(whole(case.backbone, wave, case.point), expected, (case.point, samples))
        assert_close(streamed(Stream(case.backbone, case.point), wave), expected, (case.point, samples))


def test_the_definition_is_sensitive(tiny):
    """Look-ahead, left context and chunk all matter to it; else the test above would say little."""
    base = dict(extractor_norm="layer", squeeze_factors=(1,), kv_pools=(1,), query_pools=(1,), chunk_frames=(4,))
    wave, point = noise(400), OperatingPoint(chunk=4)
    keys = [dict(left_context_frames=left, lookahead_frames=ahead) for left, ahead in ((4, 0), (8, 0), (4, 2), (4, 4))]
    with torch.no_grad():
        outputs = [reference(tiny.backbone(**base, **changes), wave, point) for changes in keys]
    for index, first in enumerate(outputs):
        assert all((first - second).abs().max() > 0.01 for second in outputs[:index])


# ---- steps


@pytest.mark.parametrize("seed", range(100, 130))
def test_steps_are_the_masked_pass(tiny, seed):
    case = random_case(tiny, seed)
    stream = Stream(case.backbone, case.point)
    for samples in case.samples:
        wave = noise(samples, seed)
        assert_close(streamed(stream, wave), whole(case.backbone, wave, case.point), (case.point, samples))


def test_a_frontend_without_overlap(tiny):
    """Its state remembers no samples."""
    keys = {**STREAMING, "conv_feature_layers": "[(8, 5, 5), (8, 2, 2), (8, 2, 2)]", "conv_pos": 1}
    stream, wave = Stream(tiny.backbone(**keys), OperatingPoint(1, chunk=4)), noise(HOP * 21 + 7)
    assert stream.start().samples.shape == (1, 0) and stream.start().frames.shape == (1, 0, 16)
    assert_close(streamed(stream, wave), whole(stream.backbone, wave, stream.point))


def saved_and_restored(state):
    file = io.BytesIO()
    torch.save(state.to_dict(), file)
    file.seek(0)
    return StreamState.from_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("seed", range(200, 216))
def test_batches_of_streams_that_began_at_different_times(tiny, seed):
    """Any of the streams that need equally many samples step as one batch, in any order; some are saved on the way."""
    case = random_case(tiny, seed)
    stream, generator = Stream(case.backbone, case.point), case.generator
    chunk_samples = HOP * case.point.chunk
    waves = [noise(chunk_samples * generator.randint(0, 7) + generator.randint(0, 99), row) for row in range(5)]
    states, outputs, rest = [stream.start() for _ in waves], [[] for _ in waves], list(waves)
    while True:
        ready = [row for row in range(5) if len(rest[row]) >= stream.samples_needed(states[row])]
        if not ready:
            break
        needed = stream.samples_needed(states[generator.choice(ready)])
        ready = [row for row in ready if stream.samples_needed(states[row]) == needed]
        rows = generator.sample(ready, generator.randint(1, len(ready)))
        batch = StreamState.stack([states[row] for row in rows])
        frames, batch = stream.step(torch.stack([rest[row][:needed] for row in rows]), batch)
        for index, (row, state) in enumerate(zip(rows, batch.split())):
            states[row] = saved_and_restored(state) if generator.random() < 0.3 else state
            outputs[row].append(frames[index])
            rest[row] = rest[row][needed:]
    for row, wave in enumerate(waves):
        found = torch.cat([*outputs[row], stream.finish(rest[row][None], states[row])[0]])
        assert_close(found, whole(case.backbone, wave, case.point), case.point)


@pytest.mark.parametrize("seed", range(300, 306))
def test_a_batch_from_the_start(tiny, seed):
    case = random_case(tiny, seed)
    stream = Stream(case.backbone, case.point)
    waves = torch.stack([noise(HOP * case.point.chunk * 6, row) for row in range(3)])
    state, outputs, heard = stream.start(3), [], 0
    while heard + stream.samples_needed(state) <= waves.size(1):
        needed = stream.samples_needed(state)
        frames, state = stream.step(waves[:, heard : heard + needed], state)
        outputs.append(frames)
        heard += needed
    found = torch.cat(outputs, dim=1)
    for row in range(3):
        assert_close(found[row], whole(case.backbone, waves[row], case.point)[: found.size(1)])


# ---- the state as a value


@pytest.fixture
def stream(tiny):
    return Stream(tiny.backbone(**STREAMING), OperatingPoint.parse("s2q1k2c4"))


def test_a_state_of_another_operating_point_is_refused(tiny, stream):
    other = Stream(stream.backbone, OperatingPoint.parse("s1q1k1c4"))
    with pytest.raises(ValueError, match="another operating point than 's2q1k2c4'"):
        stream.finish(torch.zeros(1, 0), other.start())


def after(stream, state, chunks, seed):
    """(frames, state) after that many more chunks of noise."""
    frames = []
    for index in range(chunks):
        wave = torch.stack([noise(stream.samples_needed(state), seed + index) for _ in state.heard])
        y, state = stream.step(wave, state)
        frames.append(y)
    return torch.cat(frames, dim=1), state


def same(first, second):
    """Whether two saved states are equal."""
    if torch.is_tensor(first):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(same(*pair) for pair in zip(first, second))
    return first == second


@pytest.mark.parametrize("streams", (1, 3))
def test_a_state_never_changes(stream, streams):
    _, state = after(stream, stream.start(streams), 3, seed=0)
    before = state.to_dict()
    first, one = after(stream, state, 3, seed=10)
    then = one.to_dict()
    after(stream, state, 2, seed=20)
    for row in state.split():
        stream.finish(noise(33)[None], row)
        after(stream, row, 2, seed=30)
    assert same(state.to_dict(), before)
    again, two = after(stream, state, 3, seed=10)
    assert torch.equal(first, again) and same(then, two.to_dict()) and same(then, one.to_dict())


def test_steps_in_and_outside_of_inference_mode(stream):
    expected = after(stream, stream.start(), 6, seed=0)[0]
    for inside in (0, 1):
        state, frames = stream.start(), []
        for index in range(6):
            with torch.inference_mode(index % 2 == inside):
                y, state = after(stream, state, 1, seed=index)
                frames.append(y.clone())
        torch.testing.assert_close(torch.cat(frames, dim=1), expected)


def test_threads_that_go_on_from_the_same_state(stream):
    _, state = after(stream, stream.start(), 3, seed=0)
    expected = [after(stream, state, 4, seed)[0] for seed in range(6)]
    with ThreadPoolExecutor(6) as threads:
        for _ in range(5):
            found = threads.map(lambda seed: after(stream, state, 4, seed)[0], range(6))
            assert all(torch.equal(*pair) for pair in zip(found, expected))


@pytest.mark.parametrize("seed", range(4))
def test_any_state_ever_made_can_be_gone_on_with(stream, seed):
    """Alone, or stacked with others of any age, split or not: states may share storage, but nobody can tell."""
    generator = random.Random(seed)
    made = [(stream.start(), (), None)]  # state, the seeds of the noise that it heard, its copy

    def expected(history):
        state = stream.start()
        for noise_seed in history:
            frames, state = after(stream, state, 1, noise_seed)
        return frames, state.to_dict()

    for step in range(40):
        first = len(generator.choice(made)[1]) > 0
        pool = [entry for entry in made if (len(entry[1]) > 0) == first]
        chosen = [generator.choice(pool) for _ in range(generator.choice((1, 1, 2, 3)))]
        if generator.random() < 0.3:  # go on with the rows of one batch
            batches = [entry[0].origin and entry[0].origin[0] for entry in pool]
            chosen = [entry for entry, owner in zip(pool, batches) if owner is batches[-1] is not None] or chosen
        batch = StreamState.stack([entry[0] for entry in chosen])
        wave = noise(stream.samples_needed(batch), step)[None].expand(len(chosen), -1)
        frames, batch = stream.step(wave, batch)
        for row, (state, entry) in enumerate(zip(batch.split(), chosen)):
            history = (*entry[1], step)
            assert_close(frames[row : row + 1], expected(history)[0])
            made.append((state, history, state.to_dict()))
    for state, history, copy in made[1:]:
        assert same(state.to_dict(), copy)
        for found, correct in zip(copy["values"], expected(history)[1]["values"]):
            assert_close(found, correct)


def test_what_was_saved_is_not_the_state_itself(stream):
    _, state = after(stream, stream.start(), 2, seed=0)
    saved = state.to_dict()
    for value in (saved["samples"], saved["frames"], *saved["values"]):
        value.fill_(9)
    assert not same(saved, state.to_dict())
    expected, _ = after(stream, after(stream, stream.start(), 2, seed=0)[1], 1, seed=5)
    assert torch.equal(after(stream, state, 1, seed=5)[0], expected)


def test_streams_part_and_meet_again(stream):
    _, batch = after(stream, stream.start(3), 2, seed=0)
    rows = batch.split()
    assert StreamState.stack(rows) is batch
    turned = StreamState.stack([rows[2], rows[0]])
    assert turned.heard == (batch.heard[2], batch.heard[0])
    assert torch.equal(turned.frames, batch.frames[[2, 0]])
    for layer, part in zip(batch.memory, turned.memory):
        assert (layer.key is None) == (part.key is None)
        assert torch.equal(part.value, layer.value[[2, 0]])
    assert same(StreamState.stack([*rows[:2], saved_and_restored(rows[2])]).to_dict(), batch.to_dict())
    assert len(StreamState.stack(rows[:2]).heard) == 2


def sizes(saved):
    """Shapes of all tensors of a saved state."""
    tensors = [saved["samples"], saved["ahead"], saved["frames"], *saved["keys"], *saved["values"]]
    return [None if tensor is None else tuple(tensor.shape) for tensor in tensors]


def saved_bytes(state):
    file = io.BytesIO()
    torch.save(state.to_dict(), file)
    return len(file.getvalue())


def test_200_chunks_leave_a_state_of_the_same_size(stream):
    _, state = after(stream, stream.start(), 1, seed=0)
    first, bytes_of_first = sizes(state.to_dict()), saved_bytes(state)
    _, state = after(stream, state, 200, seed=1)
    assert sizes(state.to_dict()) == first
    assert abs(saved_bytes(state) - bytes_of_first) <= 128  # `heard` is a larger number
    # nothing but the newest past is kept alive by a view either, with room to append a few chunks
    for layer, (frames, dim) in zip(state.memory, [(3, 8)] * 4):
        assert layer.value.shape[2:] == (frames, dim)
        assert layer.value.untyped_storage().nbytes() <= 4 * 2 * dim * 4 * (frames + 2 * 2)


def test_the_keys_of_layers_that_reuse_a_map_are_not_kept(stream):
    _, state = after(stream, stream.start(), 2, seed=0)
    assert [layer.key is None for layer in state.memory] == [False, True, False, True]


# ---- latency and errors


def test_a_sample_is_heard_at_the_stated_latency_and_no_later(tiny):
    backbone = tiny.backbone(**STREAMING)
    for point in ("s1q1k1c4", "s2q1k2c4"):
        point = OperatingPoint.parse(point)
        stream = Stream(backbone, point)
        wave = noise(HOP * 21)[None].requires_grad_()
        frames = backbone.encode(wave, None, point)[0].x[0]
        for time in (0, 3, 4, 11, 12):
            (gradient,) = torch.autograd.grad(frames[time].square().sum(), wave, retain_graph=True)
            heard = gradient[0].nonzero().flatten().max().item()
            assert heard == (time // 4 + 1) * stream.chunk_samples + stream.lookahead_samples - 1


def test_other_numbers_of_samples_are_refused(stream):
    state = stream.start()
    assert (stream.samples_needed(state), stream.chunk_samples, stream.lookahead_samples) == (160, 80, 80)
    with pytest.raises(ValueError, match="a step takes 160 samples, found 80"):
        stream.step(torch.zeros(1, 80), state)
    _, state = stream.step(torch.zeros(1, 160), state)
    with pytest.raises(ValueError, match="a step takes 80 samples, found 160"):
        stream.step(torch.zeros(1, 160), state)


def test_an_offline_model_cannot_be_streamed(tiny):
    with pytest.raises(ValueError, match=r"'s1q1k1' hears the whole utterance.*train the model with chunk_frames"):
        Stream(tiny.backbone())


def test_a_point_without_a_chunk_cannot_be_streamed(tiny):
    backbone = tiny.backbone(**{**STREAMING, "chunk_frames": (0, 4, 8)})
    with pytest.raises(ValueError, match=r"'s1q1k1' hears the whole utterance.*choose a chunk, like s1q1k1c8"):
        Stream(backbone)
    assert Stream(backbone, OperatingPoint(chunk=8)).point.chunk == 8


def test_an_untrained_chunk_is_refused(tiny):
    with pytest.raises(ValueError, match=r"'s1q1k1c8': the model was not trained with chunk 8; .* \[4\]"):
        Stream(tiny.backbone(**STREAMING), OperatingPoint(chunk=8))


def test_the_default_is_the_largest_chunk(tiny):
    assert Stream(tiny.backbone(**{**STREAMING, "chunk_frames": (4, 12, 8)})).point.chunk == 12
