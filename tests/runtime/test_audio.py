import io
import os
import sys
import threading
import warnings

import numpy as np
import pytest
import soundfile

from fairseq_w2v2_light.runtime.audio import (
    Pace,
    block_length,
    check_audio,
    pcm_blocks,
    resampled_blocks,
    stream_blocks,
    wav_blocks,
)

RATE = 16000


@pytest.fixture
def wave():
    return (np.random.RandomState(0).standard_normal(1000) * 3000).astype(np.int16)


def joined(blocks):
    return np.concatenate([np.zeros(0, np.float32), *blocks])


class Dribble(io.RawIOBase):
    """A stream that gives the bytes of its reads one by one, and None where nothing is there yet."""

    def __init__(self, *reads):
        self.reads = list(reads)

    def read(self, size=-1):
        return self.reads.pop(0) if self.reads else b""


@pytest.mark.parametrize("seconds", [1 / RATE, 0.002, 0.0333, 10])
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_file_gives_its_samples_in_blocks_of_any_size(tmp_path, wave, seconds, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, wave, RATE)
    blocks = list(wav_blocks(path, seconds, RATE))
    assert {block.dtype for block in blocks} == {np.dtype(np.float32)}
    assert {len(block) for block in blocks[:-1]} <= {block_length(seconds, RATE)}
    assert (joined(blocks) == wave / np.float32(32768)).all()


@pytest.mark.parametrize("size", [1, 7, 160, 10000])
def test_pcm_gives_what_the_file_gives(tmp_path, wave, size):
    soundfile.write(tmp_path / "a.wav", wave, RATE)
    expected = joined(wav_blocks(tmp_path / "a.wav", 0.02, RATE))
    blocks = list(pcm_blocks(io.BytesIO(wave.astype("<i2").tobytes()), size, RATE))
    assert max(map(len, blocks)) <= max(size, 2)  # the first four bytes are looked at together
    assert (joined(blocks) == expected).all()


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 999])
def test_a_samples_second_byte_may_come_later(wave, cut):
    data = wave.astype("<i2").tobytes()
    stream = Dribble(data[:cut], None, data[cut:])
    stream.fileno = lambda: os.open(os.devnull, os.O_RDONLY)
    assert (joined(pcm_blocks(stream, 4000, RATE)) == wave / np.float32(32768)).all()


@pytest.mark.parametrize("kept", [0, 2, 4, 100])
def test_an_odd_last_byte_is_dropped_with_a_note(wave, kept):
    notes = []
    data = wave.astype("<i2").tobytes()[: kept + 1]
    assert len(joined(pcm_blocks(io.BytesIO(data), 10, RATE, note=notes.append))) == kept // 2
    assert notes == ["standard input: dropped the last byte, half of a 16-bit sample"]


def test_no_bytes_are_no_blocks():
    notes = []
    assert list(pcm_blocks(io.BytesIO(), 10, RATE, note=notes.append)) == [] and not notes


def test_one_sample_alone_arrives():
    assert joined(pcm_blocks(io.BytesIO(b"\x00\x40"), 10, RATE)).tolist() == [0.5]


@pytest.mark.parametrize("buffering", [0, -1])
def test_what_is_there_comes_at_once(buffering):
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=buffering) as stream, open(writer, "wb", buffering=0) as microphone:
        blocks = pcm_blocks(stream, 4000, RATE)
        microphone.write(b"\x00\x40" * 3)
        watchdog = threading.Timer(20, microphone.close)  # ends a read that waits for a full block
        watchdog.start()
        assert len(next(blocks)) == 3 and watchdog.is_alive()
        watchdog.cancel()
        microphone.write(b"\x00\x40" * 2)
        assert len(next(blocks)) == 2


def test_a_non_blocking_stream_is_waited_for():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with open(reader, "rb", buffering=0) as stream:
        threading.Timer(0.2, lambda: (os.write(writer, b"\x00\x40" * 5), os.close(writer))).start()
        assert len(joined(pcm_blocks(stream, 10, RATE))) == 5


@pytest.mark.parametrize("start, kind", [(b"RIFF", "WAV"), (b"fLaC", "FLAC")])
def test_a_file_with_a_header_is_not_raw_pcm(start, kind):
    with pytest.raises(ValueError, match=f"standard input: found the header of an audio file .{kind}.*arecord -t raw"):
        list(pcm_blocks(Dribble(start[:3], start[3:] + bytes(100)), 10, RATE))


KINDS = {"WAV": "WAV", "RF64": "WAV", "FLAC": "FLAC", "OGG": "Ogg", "AIFF": "AIFF", "MP3": "MP3"}
KINDS.update({kind: kind for kind in ("AU", "CAF", "W64", "VOC", "NIST")})


@pytest.mark.parametrize("kind, options", [(kind, {}) for kind in KINDS] + [("AU", {"endian": "LITTLE"})])
def test_a_stream_that_holds_a_file_is_read_as_one(tmp_path, wave, kind, options):
    if kind not in soundfile.available_formats():
        pytest.skip(f"this libsndfile writes no {kind}")
    soundfile.write(tmp_path / "a", np.tile(wave, 9), RATE, format=kind, **options)
    expected = joined(wav_blocks(tmp_path / "a", 0.02, RATE))
    data = (tmp_path / "a").read_bytes()
    assert (joined(stream_blocks(io.BytesIO(data), 0.02, RATE)) == expected).all() and len(expected) >= 9000
    reads = [data[start : start + 3] for start in range(0, len(data), 3)]
    assert (joined(stream_blocks(Dribble(*reads), 0.02, RATE)) == expected).all()
    with pytest.raises(ValueError, match=f"found the header of an audio file .{KINDS[kind]}., expected raw 16-bit PCM"):
        list(pcm_blocks(io.BytesIO(data), 10, RATE))


@pytest.mark.parametrize(
    "start, kind",
    [
        (b"\0\0\0\x20ftypisom", "MP4"),
        (b"\0\0\0\x14ftypqt  ", "MP4"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81", "Matroska or WebM"),
        (b"0&\xb2u\x8ef\xcf\x11", "WMA"),
        (b"#!AMR\n", "AMR"),
    ],
)
def test_files_that_libsndfile_does_not_read_are_not_raw_pcm_either(start, kind):
    for reads in ([start + bytes(1000)], [start[:3], start[3:6], start[6:] + bytes(1000)]):
        with pytest.raises(ValueError, match="standard input: not audio that libsndfile can read"):
            list(stream_blocks(Dribble(*reads), 0.02, RATE))
        with pytest.raises(ValueError, match=f"found the header of an audio file .{kind}."):
            list(pcm_blocks(Dribble(*reads), 10, RATE))


@pytest.mark.parametrize("size", [2, 4, 6, 8, 1000])
def test_a_stream_that_begins_in_silence_is_raw_pcm(size):
    for blocks in (stream_blocks(io.BytesIO(bytes(size)), 0.02, RATE), pcm_blocks(io.BytesIO(bytes(size)), 10, RATE)):
        assert len(joined(blocks)) == size // 2


@pytest.mark.skipif("MP3" not in soundfile.available_formats(), reason="this libsndfile writes no MP3")
@pytest.mark.parametrize("rate", [8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000])
@pytest.mark.parametrize("mode, level", [("CONSTANT", 0.0), ("CONSTANT", 0.7), ("VARIABLE", 0.5)])
def test_an_mp3_of_any_rate_is_known_without_a_tag(tmp_path, rate, mode, level):
    noise = np.random.RandomState(0).uniform(-0.1, 0.1, (rate, 2))
    soundfile.write(tmp_path / "a.mp3", noise, rate, bitrate_mode=mode, compression_level=level)
    with pytest.raises(ValueError, match="found the header of an audio file .MP3."):
        list(pcm_blocks(io.BytesIO((tmp_path / "a.mp3").read_bytes()), 1000, RATE))


@pytest.mark.parametrize(
    "start", [b"\xff\xff\xff\xff", b"\xff\xff\x10\x00", b"\xff\xfb\x90\x64", b"\xff\xf3\x88\xc4", b"\xff\xe3\x18\x00"]
)
@pytest.mark.parametrize("size", [0, 1, 100, 2000])
def test_samples_like_the_sync_of_mpeg_are_raw_pcm(wave, start, size):
    data = start + wave.astype("<i2").tobytes()[: 2 * size]
    expected = np.frombuffer(data, "<i2") / np.float32(32768)
    for blocks in (stream_blocks(io.BytesIO(data), 0.02, RATE), pcm_blocks(io.BytesIO(data), 10, RATE)):
        assert (joined(blocks) == expected).all()


def test_pcm_blocks_hold_a_sample():
    with pytest.raises(ValueError, match="block_samples is 0; expected 1 or more"):
        pcm_blocks(io.BytesIO(), 0, RATE)


def test_channels_are_averaged_the_same_in_any_block(tmp_path):
    channels = np.random.RandomState(0).uniform(-1, 1, (500, 11)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", channels, RATE, subtype="FLOAT")
    whole, single = (joined(wav_blocks(tmp_path / "a.wav", seconds, RATE)) for seconds in (1, 1 / RATE))
    assert np.abs(whole - channels.mean(axis=1)).max() < 1e-6
    assert (whole == single).all()


def test_a_file_without_samples_is_no_blocks(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), RATE)
    assert list(wav_blocks(tmp_path / "a.wav", 0.02, RATE)) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_not_finite_or_huge_are_named_by_time(tmp_path, bad):
    channels = np.zeros((RATE, 2), dtype=np.float32)
    channels[8000] = bad, -bad
    soundfile.write(tmp_path / "a.wav", channels, RATE, subtype="FLOAT")
    blocks = wav_blocks(tmp_path / "a.wav", 0.03, RATE)
    heard = []
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=r"a\.wav: found a NaN, infinite or huge sample at 0\.500 s, expected -1"),
    ):
        warnings.simplefilter("error")
        heard.extend(blocks)
    assert len(joined(heard)) == 8000


def test_a_broken_file_is_named_with_how_far_it_goes(tmp_path, monkeypatch, wave):
    soundfile.write(tmp_path / "a.flac", wave, RATE)

    def read(self, *args, **options):
        raise soundfile.LibsndfileError(1)

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    with pytest.raises(ValueError, match=r"a\.flac: cannot be decoded beyond 0\.000 s"):
        list(wav_blocks(tmp_path / "a.flac", 0.02, RATE))


def shortened(path, wave, kind="WAV", promised=None, **options):
    """A file of 1000 samples without the last 500 of them, whose header promises `promised` bytes (None: all)."""
    soundfile.write(path, wave, RATE, format=kind, **options)
    data = bytearray(path.read_bytes())
    position = data.index(b"data") + 4
    if promised is not None:
        data[position : position + 4] = promised.to_bytes(4, "little")
    path.write_bytes(data[: position + 4 + (len(data) - position - 4) // 2])


@pytest.mark.parametrize(
    "kind, options, found",
    [("WAV", {}, 1000), ("WAVEX", {}, 1000), ("WAV", {"subtype": "FLOAT"}, 2000), ("WAV", {"subtype": "ULAW"}, 500)],
)
def test_a_wav_file_that_was_cut_off_is_told_after_its_samples(tmp_path, wave, kind, options, found):
    shortened(tmp_path / "a.wav", wave, kind, **options)
    for name, blocks in (
        ("a.wav", wav_blocks(tmp_path / "a.wav", 0.02, RATE)),
        ("standard input", stream_blocks(io.BytesIO((tmp_path / "a.wav").read_bytes()), 0.02, RATE)),
    ):
        heard = []
        message = rf"{name}: ends at 0\.031 s: found {found} bytes of samples, expected the {2 * found} that its header"
        with pytest.raises(ValueError, match=message):
            heard.extend(blocks)
        assert len(joined(heard)) == 500


@pytest.mark.parametrize("promised", [999, 1000, 1044, 0x7FF00000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_wav_header_may_not_know_how_long_the_file_is(tmp_path, wave, promised):
    shortened(tmp_path / "a.wav", wave, promised=promised)
    assert len(joined(wav_blocks(tmp_path / "a.wav", 0.02, RATE))) == (499 if promised == 999 else 500)


@pytest.mark.parametrize("check", [check_audio, lambda path: wav_blocks(path, 0.02, RATE)])
def test_what_is_no_audio_file_is_refused_at_once(tmp_path, check):
    with pytest.raises(FileNotFoundError, match=r"absent\.wav: no such audio file"):
        check(tmp_path / "absent.wav")
    with pytest.raises(ValueError, match="found a folder, expected an audio file"):
        check(tmp_path)
    for name in ("a.pcm", "a.raw"):  # soundfile has another error for the latter
        (tmp_path / name).write_bytes(bytes(1000))
        with pytest.raises(ValueError, match=rf"{name}: not audio that libsndfile can read .*raw PCM.*standard input"):
            check(tmp_path / name)


def test_a_named_pipe_is_not_opened_by_the_check(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    check_audio(tmp_path / "pipe")


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_block_has_a_length(tmp_path, seconds):
    with pytest.raises(ValueError, match="seconds, expected a positive, finite number"):
        wav_blocks(tmp_path / "absent.wav", seconds, RATE)


def test_another_rate_without_soxr_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soxr", None)
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 8000)
    expected = "found a sample rate of 8000 Hz, expected 16000 Hz; `pip install soxr`"
    with pytest.raises(ValueError, match=rf"a\.wav: {expected}"):
        wav_blocks(tmp_path / "a.wav", 0.02, RATE)
    with pytest.raises(ValueError, match=f"standard input: {expected}"):
        pcm_blocks(io.BytesIO(), 10, RATE, stream_rate=8000)


def test_a_rate_is_positive():
    with pytest.raises(ValueError, match="found a sample rate of -8000 Hz, expected a positive one"):
        resampled_blocks([], -8000, RATE)


@pytest.mark.parametrize("rate", [8000, 44100])
def test_resampling_keeps_a_tone_and_depends_on_no_block_size(tmp_path, rate):
    pytest.importorskip("soxr")
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(tmp_path / "a.wav", tone, rate)
    small, large = (joined(wav_blocks(tmp_path / "a.wav", seconds, RATE)) for seconds in (0.001, 2))
    assert len(small) == RATE and (small == large).all()
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert np.abs(small - expected)[400:-400].max() < 1e-3
    pcm = io.BytesIO((np.round(tone * 32768)).astype("<i2").tobytes())
    assert np.abs(joined(pcm_blocks(pcm, 100, RATE, stream_rate=rate)) - small).max() < 1e-4


class Clock:
    def __init__(self):
        self.now, self.slept = 100.0, []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def test_a_pace_hands_a_block_over_when_its_last_sample_is_spoken():
    clock = Clock()
    pace = Pace(100, lambda: clock.now, clock.sleep)
    times = []
    for block in pace.hold_back([np.zeros(50), np.zeros(20), np.zeros(30)]):
        times.append(clock.now - 100)
        clock.now += 0.25 if len(block) == 50 else 0  # work that takes longer than the next block lasts
    assert times == pytest.approx([0.5, 0.75, 1.0])
    assert clock.slept == pytest.approx([0.5, 0.25])


def test_a_pace_knows_how_long_ago_a_sample_was():
    clock = Clock()
    pace = Pace(100, lambda: clock.now, clock.sleep)
    assert pace.since(0) == 0
    clock.now += 3
    assert pace.since(200) == pytest.approx(1) and pace.since(400) == pytest.approx(-1)
