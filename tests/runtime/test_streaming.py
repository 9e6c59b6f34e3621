"""StreamingRecognizer: any division of the audio, many streams, saved states; the logits are fairseq's own."""

import io
import random

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from tiny_checkpoints import (
    LAYOUTS,
    SHAPE,
    container,
    ctc_model,
    letters,
    perturb,
    save_checkpoint,
    save_ctc,
)

from fairseq_w2v2_light.models import W2V2LightConfig, W2V2LightModel
from fairseq_w2v2_light.runtime.decode import greedy, prefix_beam_search
from fairseq_w2v2_light.runtime.endpoint import Endpointing
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.runtime.streaming import Final, StreamingRecognizer, StreamingState

HOP = 20
CHUNK = 8 * HOP
STREAMING = dict(chunk_frames=[8], left_context_frames=16, lookahead_frames=0)
MODELS = {
    "plain": STREAMING,
    "look-ahead": dict(STREAMING, lookahead_frames=4, layout="base"),
    "squeezed": dict(
        STREAMING, lookahead_frames=8, squeeze_factors=[1, 2], kv_pools=[1, 2], unique_layers=1, attention_map_every=2
    ),
}
POINTS = {"plain": "", "look-ahead": "s1q1k1c8", "squeezed": "s2q1k2"}


def streaming_checkpoint(folder, layout="large", ctc_keys=None, task=None, seed=0, **encoder):
    """Writes a tiny streaming CTC checkpoint that spells letters rather often; returns its path."""
    keys = {**SHAPE, **LAYOUTS[layout], "extractor_mode": "layer_norm", **encoder}
    config = W2V2LightConfig(**keys)
    torch.manual_seed(seed)
    model = W2V2LightModel(config)
    perturb(model, torch.Generator().manual_seed(seed))
    path = save_checkpoint(folder / "pretrained.pt", container(config, "w2v2_light"), model.state_dict())
    model = ctc_model(path, **(ctc_keys or {}))
    with torch.no_grad():
        model.w2v_encoder.proj.weight.normal_(std=2.0, generator=torch.Generator().manual_seed(seed))
        model.w2v_encoder.proj.bias[1:4] = -30  # <pad>, </s>, <unk>
    letters().save(str(folder / "dict.ltr.txt"))
    task = {"_name": "audio_finetuning", "data": str(folder), "labels": "ltr", **(task or {})}
    return save_ctc(folder / "ctc.pt", model, task, letters())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: streaming_checkpoint(tmp_path_factory.mktemp("model"), **keys) for name, keys in MODELS.items()}


@pytest.fixture(scope="module", params=MODELS)
def kind(request):
    return request.param


def recognizer(checkpoints, kind="plain", **options):
    return StreamingRecognizer.from_checkpoint(checkpoints[kind], operating_point=POINTS[kind], **options)


def speech(samples, seed=0):
    """Noise in bursts, between silences."""
    random_state = np.random.RandomState(seed)
    loud = np.repeat(random_state.rand(samples // 200 + 1) > 0.4, 200)[:samples]
    return (loud * random_state.randn(samples) * 0.5).astype(np.float32)


def transcribe(recognizer, wave, sizes):
    """Final, and the partials, of a stream that comes in blocks of `sizes`, over and over."""
    partials, start, index = [], 0, 0
    while start < len(wave):
        size = sizes[index % len(sizes)]
        partials.append(recognizer.accept(wave[start : start + size]))
        start, index = start + size, index + 1
    return recognizer.finish(), partials


def fairseq_log_probs(path, wave, point=""):
    """(time, label), from the model that fairseq makes of the checkpoint, over the whole utterance."""
    overrides = {"operating_point": point} if point else {}
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides=overrides)
    with torch.no_grad():
        output = model.eval()(source=torch.from_numpy(wave)[None], padding_mask=None)
        return model.get_normalized_probs(output, log_probs=True)[:, 0]


def streamed_log_probs(recognizer, wave):
    """(time, label), as the recogniser's decoder hears them, block by block."""
    heard = []
    own = recognizer._decode_one

    def decode(state, rows):
        heard.append(rows)
        return own(state, rows)

    recognizer._decode_one = decode
    final, _ = transcribe(recognizer, wave, (97,))
    recognizer._decode_one = own
    return torch.from_numpy(np.concatenate(heard)), final


SAMPLES = (CHUNK * 9, CHUNK * 7 + 33)


# ---- what is heard


@pytest.mark.parametrize("samples", (HOP, CHUNK - 1, CHUNK, *SAMPLES))
def test_the_log_probabilities_are_those_of_fairseqs_whole_pass(checkpoints, kind, samples):
    wave = speech(samples, seed=1) + np.float32(0.01)
    found, _ = streamed_log_probs(recognizer(checkpoints, kind), wave)
    expected = fairseq_log_probs(checkpoints[kind], wave, POINTS[kind])
    assert found.shape == expected.shape == (samples // HOP, 8)
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("samples", SAMPLES)
def test_the_text_is_that_of_greedy_decoding_of_the_whole(checkpoints, kind, samples):
    wave = speech(samples)
    streaming = recognizer(checkpoints, kind, endpointing=None)
    final, _ = transcribe(streaming, wave, (50,))
    (hypothesis,) = greedy(fairseq_log_probs(checkpoints[kind], wave, POINTS[kind])[None])
    assert final.text == " ".join(streaming.labels.text(hypothesis.tokens).split())
    assert len(final.text) > 10 and final.seconds == samples / 16000


def test_beam_search_is_that_of_the_whole(checkpoints, kind):
    wave = speech(CHUNK * 4)
    streaming = recognizer(checkpoints, kind, beam=4, endpointing=None)
    final, _ = transcribe(streaming, wave, (77,))
    log_probs = fairseq_log_probs(checkpoints[kind], wave, POINTS[kind])
    log_probs[:, list(streaming.labels.never)] = -torch.inf
    ((best, *_),) = prefix_beam_search(log_probs[None], beam=4, nbest=1)
    assert final.text == " ".join(streaming.labels.text(best.tokens).split())


@pytest.mark.parametrize("beam", (1, 3))
@pytest.mark.parametrize(
    "endpointing", (None, Endpointing(silence=0.01, before_speech=0.03, longest=0.05, pause=0.003))
)
def test_any_division_of_the_audio_gives_the_same(checkpoints, kind, beam, endpointing):
    streaming = recognizer(checkpoints, kind, beam=beam, endpointing=endpointing)
    wave = speech(SAMPLES[1], seed=2)
    expected, _ = transcribe(streaming, wave, (len(wave),))
    assert len(expected.text) > 5
    generator = random.Random(0)
    divisions = [
        (HOP,),
        (CHUNK - 1,),
        (CHUNK,),
        (CHUNK + 1,),
        (1, 0, 500),
        [generator.randint(0, 400) for _ in range(9)],
    ]
    for sizes in [(1,)] * (beam == 1) + divisions:
        found, _ = transcribe(streaming, wave, sizes)
        assert found == expected, sizes  # text, words with times, segments, seconds


def test_partials_grow_into_the_final(checkpoints, kind):
    streaming = recognizer(checkpoints, kind, endpointing=Endpointing(silence=0.01, before_speech=0.03))
    final, partials = transcribe(streaming, speech(SAMPLES[0], seed=2), (33,))
    closed = [segment for partial in partials for segment in partial.segments]
    assert list(final.segments[: len(closed)]) == closed
    assert sum(partial.chunks for partial in partials) == (SAMPLES[0] - streaming.stream.lookahead_samples) // CHUNK
    assert [partial.seconds for partial in partials][-1] == final.seconds
    for partial in partials:
        assert partial.text == " ".join(word.text for word in partial.words)
        assert all(0 <= word.start < word.end <= partial.seconds for word in partial.words)
    starts = [word.start for word in final.words]
    assert starts == sorted(starts) and final.text == " ".join(word.text for word in final.words)


# ---- streams as values


def together(streaming, waves, sizes_of):
    """Finals of several streams over one model, which hear blocks of their own sizes in the same calls."""
    states, starts = [streaming.start() for _ in waves], [0] * len(waves)
    chunks = 0
    while any(start < len(wave) for start, wave in zip(starts, waves)):
        blocks = []
        for row, wave in enumerate(waves):
            size = sizes_of(row)
            blocks.append(wave[starts[row] : starts[row] + size])
            starts[row] += size
        states, partials = streaming.accept_many(states, blocks)
        chunks += sum(partial.chunks for partial in partials)
    return [streaming.finish_state(state) for state in states], chunks


@pytest.mark.parametrize("in_step", (True, False))
def test_many_streams_are_each_one_alone(checkpoints, kind, in_step):
    streaming = recognizer(checkpoints, kind)
    waves = [speech(samples, seed) for seed, samples in enumerate((1900, 1203, 0, 1900, 700))]
    generator = random.Random(0)
    finals, chunks = together(streaming, waves, lambda row: CHUNK if in_step else generator.randint(0, 350))
    assert finals == [transcribe(streaming, wave, (100,))[0] for wave in waves]
    wait = streaming.stream.lookahead_samples
    assert chunks == sum(max(0, len(wave) - wait) // CHUNK for wave in waves)


def test_streams_in_step_run_as_one_batch(checkpoints):
    streaming = recognizer(checkpoints)
    batches = []
    own = streaming.stream.step
    streaming.stream.step = lambda samples, state: (batches.append(len(samples)), own(samples, state))[1]
    states = [streaming.start() for _ in range(3)]
    states, _ = streaming.accept_many(states, [speech(CHUNK * 2 + 5)] * 3)
    streaming.accept_many(states, [speech(CHUNK), speech(3), speech(CHUNK)])
    assert batches == [3, 3, 2]


def restored(state):
    file = io.BytesIO()
    torch.save(state.to_dict(), file)
    file.seek(0)
    return StreamingState.from_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("beam", (1, 3))
def test_a_saved_state_goes_on_as_if_nothing_had_happened(checkpoints, kind, beam):
    endpointing = Endpointing(silence=0.01, before_speech=0.03)
    streaming = recognizer(checkpoints, kind, beam=beam, endpointing=endpointing)
    wave = speech(SAMPLES[1], seed=2)
    expected, _ = transcribe(streaming, wave, (len(wave),))
    for start in range(0, len(wave), 111):
        state = restored(streaming.state)
        if start % 333 == 0:  # as another process, which loads the model anew
            streaming = recognizer(checkpoints, kind, beam=beam, endpointing=endpointing)
        streaming.state = state
        streaming.accept(wave[start : start + 111])
    assert streaming.finish() == expected


def test_a_state_is_kept_and_gone_on_with_twice(checkpoints, kind):
    streaming = recognizer(checkpoints, kind)
    start = speech(777)
    streaming.accept(start)
    kept = streaming.state
    finals = []
    for seed in (1, 2, 1):
        streaming.state = kept
        streaming.accept(speech(1000, seed))
        finals.append(streaming.finish())
        assert finals[-1] == transcribe(streaming, np.concatenate([start, speech(1000, seed)]), (160,))[0]
    assert finals[0] == finals[2] != finals[1]


def test_the_callers_buffer_may_be_used_again(checkpoints):
    streaming, wave = recognizer(checkpoints), speech(SAMPLES[0])
    expected, _ = transcribe(streaming, wave, (100,))
    buffer = np.zeros(100, dtype=np.float32)
    for start in range(0, len(wave), 100):
        block = wave[start : start + 100]
        buffer[: len(block)] = block
        streaming.accept(buffer[: len(block)])
        buffer[:] = np.nan
    assert streaming.finish() == expected


def test_finish_begins_another_stream(checkpoints, kind):
    streaming = recognizer(checkpoints, kind)
    first, second = speech(1500, seed=1), speech(900, seed=2)
    expected = [transcribe(recognizer(checkpoints, kind), wave, (99,))[0] for wave in (first, second)]
    assert [transcribe(streaming, wave, (99,))[0] for wave in (first, second)] == expected
    assert streaming.finish() == Final("", (), (), 0.0)
    assert streaming.state.accepted == 0


def tensor_sizes(value):
    """Sizes of everything that a saved state holds, texts and tokens aside."""
    if torch.is_tensor(value):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: tensor_sizes(inner) for key, inner in value.items() if key not in ("words", "tokens", "segments")}
    if isinstance(value, list):
        return [tensor_sizes(inner) for inner in value]
    return type(value)


def test_200_chunks_leave_a_state_of_the_same_size(checkpoints, kind):
    """Of silence, in which nothing is decoded; words that were heard are kept."""
    model = load_ctc(checkpoints[kind])
    model.head.weight.zero_()
    model.head.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0, 0, 0, 0]))
    streaming = StreamingRecognizer(model, POINTS[kind])
    streaming.accept(speech(CHUNK * 3 + 7))
    first = streaming.state.to_dict()
    for seed in range(50):
        streaming.accept(speech(CHUNK * 4, seed))
    last = streaming.state.to_dict()
    assert tensor_sizes(last) == tensor_sizes(first)
    assert last["words"] == last["tokens"] == last["segments"] == []
    sizes = []
    for saved in (first, last):
        file = io.BytesIO()
        torch.save(saved, file)
        sizes.append(len(file.getvalue()))
    assert abs(sizes[1] - sizes[0]) <= 256  # larger numbers


# ---- silence


def test_something_else_than_a_saved_state():
    with pytest.raises(ValueError, match="'network', 'decoder'.*not saved by StreamingState.to_dict"):
        StreamingState.from_dict({"samples": torch.zeros(0)})


@pytest.fixture
def quiet(checkpoints):
    """A model whose blank wins wherever it hears nothing, and letters where it does not."""
    endpointing = Endpointing(silence=0.02, before_speech=0.1)
    streaming = StreamingRecognizer(load_ctc(checkpoints["plain"]), endpointing=endpointing)
    with torch.no_grad():
        head, positions = streaming.model.head, streaming.model.backbone.encoder.pos_conv[0]
        # without positions every frame of silence is the same, from the first one on
        positions.weight_g.zero_()
        positions.bias.zero_()
        steady = streaming.stream.step(torch.zeros(1, CHUNK), streaming.start().network)[0][0, 0]
        direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
        # letters A and B win where the frame differs from silence, in one sense or the other
        head.weight.zero_()
        head.bias.fill_(-30)
        head.bias[0] = 0
        for label, sign in ((4, 1), (5, -1)):
            head.weight[label] = sign * direction
            head.bias[label] = -sign * direction @ steady - 1
    return streaming


def test_silence_ends_a_segment(quiet):
    bursts = [np.random.RandomState(seed).randn(CHUNK * 2).astype(np.float32) for seed in range(3)]
    silence = np.zeros(CHUNK * 6, dtype=np.float32)
    wave = np.concatenate([silence, bursts[0], silence, bursts[1], silence, bursts[2]])
    final, partials = transcribe(quiet, wave, (CHUNK,))
    assert len(final.segments) == 3 and all(segment.text for segment in final.segments)
    assert final.text == " ".join(segment.text for segment in final.segments)
    for index, segment in enumerate(final.segments):
        begins = (6 + 8 * index) * CHUNK / 16000
        # what a burst has left in the positions and the left context rings on for a while
        assert begins <= segment.start < segment.end <= begins + 8 * CHUNK / 16000
    closing = [index for index, partial in enumerate(partials) if partial.segments]
    assert len(closing) == 2 and all(not partials[index].text for index in closing)
    assert transcribe(quiet, wave, (len(wave),))[0] == transcribe(quiet, wave, (13,))[0] == final


def test_silence_only_has_no_segments(quiet):
    final, partials = transcribe(quiet, np.zeros(CHUNK * 30, dtype=np.float32), (100,))
    assert (final.text, final.words, final.segments) == ("", (), ())
    assert final.seconds == CHUNK * 30 / 16000
    assert not any(partial.segments or partial.text for partial in partials)


# ---- input


def test_short_streams(checkpoints, kind):
    streaming = recognizer(checkpoints, kind)
    for samples in (0, 1, HOP - 1):
        final, partials = transcribe(streaming, speech(samples), (7,))
        assert final == Final("", (), (), samples / 16000)
        assert all(partial.chunks == 0 for partial in partials)
    assert streaming.accept([]).seconds == 0.0
    for samples in (HOP, CHUNK, CHUNK + 1):
        wave = speech(samples, seed=3) + np.float32(0.1)
        log_probs, _ = streamed_log_probs(streaming, wave)
        assert len(log_probs) == samples // HOP


def test_samples_of_every_kind_are_the_same(checkpoints):
    streaming = recognizer(checkpoints)
    integers = (speech(SAMPLES[0]) * 8000).astype(np.int16)
    floats = integers.astype(np.float32) / 32768
    expected, _ = transcribe(streaming, floats, (200,))
    for wave in (integers, floats.astype(np.float64), torch.from_numpy(floats), torch.from_numpy(integers)):
        assert transcribe(streaming, wave, (200,))[0] == expected
    assert transcribe(streaming, floats.tolist(), (200,))[0] == expected
    rounded = torch.from_numpy(floats).bfloat16()
    assert transcribe(streaming, rounded, (200,))[0] == transcribe(streaming, rounded.float(), (200,))[0]


@pytest.mark.parametrize(
    "samples, message",
    (
        (np.zeros((2, 10), dtype=np.float32), r"samples have shape \(2, 10\); expected \(n,\), one channel"),
        (np.float32(1), r"samples have shape \(\); expected \(n,\)"),
        (np.zeros(4, dtype=np.int32), "samples are int32; expected floats in .* or 16-bit integers"),
        ([1, 2, 3], "samples are int64; expected floats"),
        (np.zeros(3, dtype=complex), "samples are complex128"),
        (np.array([0, np.nan], dtype=np.float32), "found NaN, infinite or huge ones, expected floats in"),
        (np.array([0, np.inf]), "found NaN, infinite or huge ones"),
        (np.array([0, 1e300]), "found NaN, infinite or huge ones"),
        (np.array([0, 1e30]), "found NaN, infinite or huge ones"),
    ),
)
def test_bad_samples_are_refused_and_leave_the_stream_as_it_was(checkpoints, samples, message):
    streaming = recognizer(checkpoints)
    streaming.accept(speech(100))
    state = streaming.state
    with pytest.raises(ValueError, match=message):
        streaming.accept(samples)
    assert streaming.state is state


def test_a_finish_that_fails_begins_another_stream(checkpoints):
    streaming = recognizer(checkpoints)
    before = streaming.finish()
    streaming.accept(speech(1000))
    streaming.state.samples[:] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        streaming.finish()
    assert streaming.finish() == before


def test_as_many_blocks_as_streams(checkpoints):
    streaming = recognizer(checkpoints)
    with pytest.raises(ValueError, match="2 streams with 1 blocks of samples; expected one block each"):
        streaming.accept_many([streaming.start()] * 2, [speech(10)])
    assert streaming.accept_many([], []) == ([], [])


# ---- models


def test_what_it_says_of_itself(checkpoints):
    streaming = recognizer(checkpoints, "look-ahead")
    assert (streaming.sample_rate, streaming.chunk_samples) == (16000, CHUNK)
    assert streaming.latency_ms == 1000 * (CHUNK + 4 * HOP) / 16000
    assert streaming.seconds_per_frame == HOP / 16000


def test_an_operating_point_is_chosen(tmp_path):
    path = streaming_checkpoint(tmp_path, **dict(STREAMING, chunk_frames=[8, 4, 0]))
    for point, chunk in (("s1q1k1c8", 8), ("s1q1k1c4", 4)):
        assert StreamingRecognizer.from_checkpoint(path, point).chunk_samples == chunk * HOP
    with pytest.raises(ValueError, match=r"ctc.pt: operating point 's1q1k1' hears the whole utterance.*s1q1k1c8"):
        StreamingRecognizer.from_checkpoint(path)
    with pytest.raises(ValueError, match=r"ctc.pt: operating point 's1q1k1c5': .* not trained with chunk 5"):
        StreamingRecognizer.from_checkpoint(path, "s1q1k1c5")
    with pytest.raises(ValueError, match=r"ctc.pt: operating point 'c8': expected"):
        StreamingRecognizer.from_checkpoint(path, "c8")


def test_the_point_of_a_fine_tuned_model_is_its_own(tmp_path):
    keys = dict(STREAMING, chunk_frames=[8, 4], squeeze_factors=[1, 2])
    path = streaming_checkpoint(tmp_path, ctc_keys={"operating_point": "s2q1k1c4"}, **keys)
    assert str(StreamingRecognizer.from_checkpoint(path).stream.point) == "s2q1k1c4"


def test_an_offline_model_is_refused(tmp_path):
    path = streaming_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"ctc.pt: .*'s1q1k1' hears the whole utterance.*train the model with chunk"):
        StreamingRecognizer.from_checkpoint(path)


def test_a_model_of_normalised_audio_is_refused(tmp_path):
    path = streaming_checkpoint(tmp_path, task={"normalize": True}, **STREAMING)
    with pytest.raises(ValueError, match=r"ctc.pt: the model normalises .*task.normalize=false and chunk_frames"):
        StreamingRecognizer.from_checkpoint(path)


def test_a_beam_below_1_is_refused(checkpoints):
    with pytest.raises(ValueError, match=r"beam is 0; expected 1 \(greedy\) or more"):
        StreamingRecognizer(load_ctc(checkpoints["plain"]), beam=0)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        StreamingRecognizer.from_checkpoint(tmp_path / "absent.pt")


def test_a_model_in_training_mode_does_not_drop_anything(checkpoints):
    model = load_ctc(checkpoints["plain"]).train()
    wave = speech(SAMPLES[0])
    assert transcribe(StreamingRecognizer(model), wave, (100,)) == transcribe(recognizer(checkpoints), wave, (100,))
