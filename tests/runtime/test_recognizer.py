"""Recordings to transcripts: batches, long recordings, sources that fail, and a process without fairseq."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from tiny_checkpoints import LAYOUTS, SHAPE, container, ctc_model, letters, perturb, save_checkpoint, save_ctc
from torch import nn

import fairseq_w2v2_light
from fairseq_w2v2_light.models import W2V2LightConfig, W2V2LightModel
from fairseq_w2v2_light.nn.config import EncoderConfig
from fairseq_w2v2_light.nn.operating_point import OperatingPoint
from fairseq_w2v2_light.runtime.beam import Token
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.runtime.recognizer import AudioStream, BeamDecoder, Recognizer
from fairseq_w2v2_light.runtime.windows import Windowing

ROOT = Path(fairseq_w2v2_light.__file__).parents[1]
RATE = 1000
HOP = 20
SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "|", "A", "B", "C", "D"]
LEVEL = 0.08
HISS = 0.001


class Hearing(nn.Module):
    """Stands in for a CtcModel: how loud a frame is says its label, but for the first and last frames it hears nothing.

    heard: (rows, longest row in samples) of each call.
    """

    blank, sample_rate, hop, symbols, deaf = 0, RATE, HOP, SYMBOLS, 5

    def __init__(self):
        super().__init__()
        self.config = EncoderConfig(conv_layers=((1, HOP, HOP),))
        self.backbone = SimpleNamespace(layer_norm=SimpleNamespace(weight=torch.zeros(1)))
        self.point = OperatingPoint()
        self.heard = []

    def forward(self, wave, lengths=None, point=None):
        self.heard.append(tuple(wave.shape))
        # the quieter half: a label's frames may begin in the middle of one
        levels = wave.abs().unfold(1, HOP, HOP).unflatten(-1, (2, HOP // 2)).mean(-1).amin(-1)
        frames = torch.full((len(wave),), levels.size(1)) if lengths is None else lengths // HOP
        label = (levels / LEVEL).round().long().clamp(0, len(SYMBOLS) - 1)
        for row, count in enumerate(frames.tolist()):
            label[row, : self.deaf] = label[row, max(0, count - self.deaf) :] = self.blank
        return nn.functional.one_hot(label, len(SYMBOLS)).float() * 8, None if lengths is None else frames


def speech(text, pause=0.3):
    """Samples that Hearing hears as `text`, with `pause` seconds of hiss at both ends (more than it is deaf for)."""
    frames = []
    for label in text.replace(" ", "|") + "|":
        frames += [LEVEL * SYMBOLS.index(label)] * 2 + [HISS]
    edge = [HISS] * round(pause * RATE / HOP)
    levels = np.repeat(np.float32(edge + frames + edge), HOP)
    return levels * np.where(np.arange(len(levels)) % 2, 1, -1).astype(np.float32)


def sentence(words, seed):
    generator = np.random.RandomState(seed)
    return " ".join("".join(generator.choice(list("ABCD"), generator.randint(1, 5))) for _ in range(words))


SHORT = Windowing(longest=6.0, overlap=1.5)


@pytest.fixture
def recognizer():
    return Recognizer(Hearing(), windowing=SHORT)


def texts(recognizer, *sources, **options):
    return [transcript.text for transcript in recognizer.transcribe(sources, **options)]


def test_a_recording_gives_text_and_words_with_their_times(recognizer):
    samples = np.concatenate([speech("AB C"), speech("DA")])
    (transcript,) = recognizer.transcribe([(samples, RATE)])
    assert transcript.text == "AB C DA" and transcript.error is None and transcript.source == ""
    assert transcript.seconds == pytest.approx(len(samples) / RATE)
    # A B | C | of 3 frames each, between pauses of 0.3 s
    expected = [("AB", 0.3, 0.4), ("C", 0.48, 0.52), ("DA", 1.2, 1.3)]
    for word, (text, start, end) in zip(transcript.words, expected):
        assert word.text == text
        assert word.start == pytest.approx(start, abs=0.06) and word.end == pytest.approx(end, abs=0.06)
        assert 0.99 < word.confidence <= 1


@pytest.mark.parametrize("pause", [0.1, 0.16, 0.6])
def test_a_long_recording_gives_the_text_of_its_pieces(recognizer, pause):
    pieces = [sentence(12, seed) for seed in range(12)]
    alone = texts(recognizer, *((speech(piece), RATE) for piece in pieces))
    assert alone == pieces
    (transcript,) = recognizer.transcribe([(np.concatenate([speech(piece, pause) for piece in pieces]), RATE)])
    assert transcript.text == " ".join(pieces)
    starts = [word.start for word in transcript.words]
    assert starts == sorted(starts) and all(word.start < word.end for word in transcript.words)
    assert all(one.end <= two.start for one, two in zip(transcript.words, transcript.words[1:]))


def test_a_recording_without_any_pause_loses_and_doubles_nothing(recognizer, monkeypatch):
    monkeypatch.setattr("fairseq_w2v2_light.runtime.recognizer._DECODE_SECONDS", 10.0)
    text = sentence(200, 0)
    samples = speech(text)
    decoded = []
    greedy = recognizer.decoder.decode
    recognizer.decoder = SimpleNamespace(decode=lambda frames: decoded.append(len(frames)) or greedy(frames))
    assert texts(recognizer, (samples, RATE)) == [text]
    assert len(decoded) > 2 and max(decoded) < 20 * RATE / HOP and sum(decoded) == len(samples) // HOP


def test_times_stay_right_after_many_windows(recognizer):
    text = sentence(150, 3)
    (transcript,) = recognizer.transcribe([(speech(text), RATE)])
    letters_before = 0
    for word in transcript.words:
        assert word.start == pytest.approx(0.3 + letters_before * 3 * HOP / RATE, abs=0.06)
        letters_before += len(word.text) + 1


def test_batches_are_sorted_by_length_and_change_nothing(recognizer):
    pieces = [sentence(words, words) for words in (9, 1, 5, 1, 12, 2, 7)]
    sources = [(speech(piece), RATE) for piece in pieces]
    assert texts(recognizer, *sources, batch_seconds=0.01) == pieces
    assert all(rows == 1 for rows, _ in recognizer.model.heard)
    recognizer.model.heard.clear()
    assert texts(recognizer, *sources, batch_seconds=4.0) == pieces
    lengths = [length for _, length in recognizer.model.heard]
    assert lengths == sorted(lengths, reverse=True) and max(rows for rows, _ in recognizer.model.heard) > 1
    assert all(rows == 1 or rows * length <= 4 * RATE for rows, length in recognizer.model.heard)


def test_transcripts_come_in_order_and_as_soon_as_they_are_done(recognizer):
    asked = []

    def sources():
        for seed in range(200):
            asked.append(seed)
            yield speech(sentence(4, seed)), RATE

    transcripts = recognizer.transcribe(sources(), batch_seconds=2.0)
    assert next(transcripts).text == sentence(4, 0) and len(asked) < 30
    assert [transcript.text for transcript in transcripts] == [sentence(4, seed) for seed in range(1, 200)]


def test_progress_is_told(recognizer):
    seconds = []
    samples = [speech("A"), speech("B" * 9)]
    texts(recognizer, *((wave, RATE) for wave in samples), batch_seconds=0.5, on_progress=seconds.append)
    assert len(seconds) == 2 and seconds[-1] == pytest.approx(sum(map(len, samples)) / RATE)


def test_one_bad_source_stops_none_of_the_others(recognizer, tmp_path):
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "nan.wav", np.float32([0.1, np.nan]), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "good.wav", speech("CAB"), RATE)
    sources = [tmp_path / name for name in ("missing.wav", "good.wav", "text.wav", "nan.wav", ".")]
    sources += [(np.float32([[0.1] * 99]), RATE), 7, str(tmp_path / "good.wav")]
    transcripts = list(recognizer.transcribe(sources))
    expected = ["no such", None, "libsndfile", "NaN", "folder", "expected (n,) or (n, channels)", "type int", None]
    for transcript, source, message in zip(transcripts, sources, expected):
        if message is None:
            assert transcript.text == "CAB" and transcript.error is None
        else:
            assert message in transcript.error and transcript.text == ""
        assert transcript.source == (str(source) if isinstance(source, (str, Path)) else "")
    assert len(transcripts) == len(expected)


def test_what_was_read_before_the_error_is_kept(recognizer, tmp_path):
    samples = np.concatenate([speech("ABC"), speech("D" * 200), np.float32([np.inf])])
    soundfile.write(tmp_path / "broken.wav", samples, RATE, subtype="FLOAT")
    (transcript,) = recognizer.transcribe([tmp_path / "broken.wav"])
    assert "infinite" in transcript.error and transcript.text.startswith("ABC D")


@pytest.mark.parametrize("pause", [0.1, 0.6])
@pytest.mark.parametrize("pieces", [1, 3, 9])
def test_no_word_before_the_error_is_lost(recognizer, tmp_path, pause, pieces):
    text = [sentence(9, seed) for seed in range(pieces)]
    samples = np.concatenate([speech(piece, pause) for piece in text])
    broken = np.concatenate([samples, np.float32([np.nan]), speech("DAD")])
    soundfile.write(tmp_path / "broken.wav", broken, RATE, subtype="FLOAT")
    (transcript,) = recognizer.transcribe([tmp_path / "broken.wav"])
    assert "found a NaN" in transcript.error and transcript.text == " ".join(text)
    assert transcript.seconds == len(samples) / RATE


def test_a_decoder_that_fails_fails_one_recording(recognizer):
    greedy = recognizer.decoder.decode

    def decode(log_probs):
        if len(log_probs) > 50:
            raise ValueError("too many frames")
        return greedy(log_probs)

    recognizer.decoder = SimpleNamespace(decode=decode)
    long, short = recognizer.transcribe([(speech("A" * 40), RATE), (speech("A"), RATE)])
    assert (long.error, long.text) == ("too many frames", "") and short.text == "A"


@pytest.mark.parametrize("samples", [0, 1, HOP - 1, HOP, 3 * HOP])
def test_hardly_any_audio_is_no_text(recognizer, samples):
    (transcript,) = recognizer.transcribe([(np.full(samples, 0.01, np.float32), RATE)])
    assert (transcript.text, transcript.words, transcript.error) == ("", (), None)
    assert transcript.seconds == samples / RATE


def test_audio_of_any_kind(recognizer, tmp_path):
    samples = speech("CAB AD")
    integers = (samples * 32767).astype(np.int16)
    sources = [(integers, RATE), (np.stack([samples] * 2, axis=1), RATE), (torch.from_numpy(samples), RATE)]
    for name, subtype in (("ä ö.flac", "PCM_24"), ("b.wav", "PCM_U8"), ("c.aiff", "PCM_16"), ("d.w64", "DOUBLE")):
        soundfile.write(str(tmp_path / name), np.stack([samples, samples], axis=1), RATE, subtype=subtype)
        sources.append(tmp_path / name)
    sources += [AudioStream(io.BytesIO(integers.tobytes()))]
    sources += [AudioStream(io.BytesIO((tmp_path / name).read_bytes())) for name in ("ä ö.flac", "b.wav", "c.aiff")]
    assert texts(recognizer, *sources) == ["CAB AD"] * len(sources)


@pytest.mark.parametrize("rate", [8000, 44000])
def test_audio_of_another_rate_is_resampled(recognizer, tmp_path, rate):
    pytest.importorskip("soxr", reason="resampling: pip install soxr")
    samples = np.abs(speech("BAD CAB"))
    time = np.arange(len(samples) * rate // RATE) / rate
    # a tone that the lower rate has room for, whose mean magnitude is the level
    tone = np.sin(2 * np.pi * 200 * time) * math.pi / 2
    soundfile.write(tmp_path / "a.wav", np.repeat(samples, rate // RATE) * tone, rate, subtype="FLOAT")
    (transcript,) = recognizer.transcribe([tmp_path / "a.wav"])
    assert transcript.error is None and transcript.seconds == pytest.approx(len(samples) / RATE, abs=0.01)
    assert len(transcript.words) == 2 and transcript.words[1].end < transcript.seconds


def test_a_header_that_promises_hours_gives_what_there_is(recognizer, tmp_path):
    soundfile.write(tmp_path / "a.wav", speech("DAB"), RATE, subtype="PCM_16")
    data = bytearray((tmp_path / "a.wav").read_bytes())
    position = data.index(b"data") + 4
    data[position : position + 4] = (0x7FFFFFF0).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    assert texts(recognizer, tmp_path / "a.wav") == ["DAB"]
    assert texts(recognizer, AudioStream(io.BytesIO(bytes(data)))) == ["DAB"]


@pytest.mark.parametrize("rate", [1, 2**31 - 1])
def test_an_absurd_sample_rate_is_an_error(recognizer, tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", speech("DAB"), RATE, subtype="PCM_16")
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    (transcript,) = recognizer.transcribe([tmp_path / "a.wav"])
    assert f"sample rate of {rate} Hz" in transcript.error


def test_a_beam_decoder_and_one_of_the_callers(recognizer):
    source = (speech("AB CAD"), RATE)
    recognizer.decoder = BeamDecoder(recognizer.labels, 4)
    assert texts(recognizer, source) == ["AB CAD"]
    recognizer.decoder = SimpleNamespace(decode=lambda log_probs: (Token(5, 3, 4), Token(6, 4, 4)))
    (transcript,) = recognizer.transcribe([source])
    assert transcript.text == "AB" and 0 < transcript.words[0].confidence < 0.1


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_batch_seconds_are_checked(recognizer, seconds):
    with pytest.raises(ValueError, match="batch_seconds"):
        next(recognizer.transcribe([], batch_seconds=seconds))


@pytest.mark.parametrize("source", ["a.wav", b"a.wav", Path("a.wav"), AudioStream(io.BytesIO())])
def test_one_source_in_no_list_is_an_error(recognizer, source):
    with pytest.raises(ValueError, match=r"sources is (.*); expected a list of sources, \[\1\] for one"):
        next(recognizer.transcribe(source))


# --- a network


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny stochastic checkpoint whose head says all kinds of labels."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    points = dict(squeeze_factors=[1, 2], query_pools=[1, 2], kv_pools=[1, 2])
    config = W2V2LightConfig(**{**SHAPE, **LAYOUTS["base"], **points})
    encoder = W2V2LightModel(config)
    perturb(encoder, torch.Generator().manual_seed(0))
    pretrained = save_checkpoint(folder / "pretrained.pt", container(config, "w2v2_light"), encoder.state_dict())
    model = ctc_model(pretrained)
    with torch.no_grad():
        model.w2v_encoder.proj.weight.mul_(20)
        perturb(model.w2v_encoder.proj, torch.Generator().manual_seed(1))
    return save_ctc(folder / "ctc.pt", model, {"normalize": True}, letters())


def noise(samples, seed=0):
    return np.random.RandomState(seed).standard_normal(samples).astype(np.float32)


@pytest.mark.parametrize("point", ["", "s2q1k2"])
def test_log_probs_are_the_models_own_in_any_batch(checkpoint, point):
    recognizer = Recognizer.from_pretrained(checkpoint, point)
    waves = [noise(count, count) for count in (900, 29, 5000, 0, 432, 30, 4990)]
    found = recognizer.log_probs(waves)
    model = load_ctc(checkpoint)
    for wave, log_probs in zip(waves, found):
        assert log_probs.dtype == np.float32
        if len(wave) < 30:
            assert log_probs.shape == (0, 8)
            continue
        with torch.no_grad():
            logits, _ = model(torch.from_numpy(wave)[None], point=recognizer.point)
        np.testing.assert_allclose(log_probs, logits[0].log_softmax(-1).numpy(), atol=1e-4, rtol=1e-5)


def test_the_point_is_checked_with_the_files_name(checkpoint):
    assert str(Recognizer.from_pretrained(checkpoint, "s2q2k1").point) == "s2q2k1"
    with pytest.raises(ValueError, match=r"ctc\.pt: .*s4"):
        Recognizer.from_pretrained(checkpoint, "s4q1k1")
    with pytest.raises(ValueError, match="threads"):
        Recognizer.from_pretrained(checkpoint, threads=0)


WITHOUT_FAIRSEQ = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fairseq", "hydra", "omegaconf"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
from fairseq_w2v2_light.cli.main import main
code = main(["transcribe", *sys.argv[1:]])
assert not {"fairseq", "hydra", "omegaconf"} & set(sys.modules)
sys.exit(code)
"""


def test_it_works_without_fairseq(checkpoint, tmp_path):
    recognizer = Recognizer.from_pretrained(checkpoint)
    for seed in range(2):
        soundfile.write(tmp_path / f"{seed}.wav", noise(4000, seed) * 0.1, 16000)
    expected = [transcript.text for transcript in recognizer.transcribe(sorted(tmp_path.glob("*.wav")))]
    assert all(expected)
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_FAIRSEQ, str(tmp_path), "--model", checkpoint, "--format", "json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == expected


def test_a_gpu_without_memory_for_a_batch_is_told(recognizer, monkeypatch):
    def forward(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(recognizer.model, "forward", forward)
    with pytest.raises(ValueError, match=r"too little memory for 2 x 1\.0 s of audio at once; lower --batch-seconds"):
        recognizer.log_probs([np.zeros(recognizer.sample_rate, dtype=np.float32)] * 2)
