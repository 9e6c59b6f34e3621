import numpy as np
import pytest
import soundfile

from fairseq_w2v2_light.data.audio import convert_audio, inspect_audio, resample, resampled_length
from fairseq_w2v2_light.data.manifest import audio_header_problem


def sine(hertz, rate, seconds=0.5):
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_a_tone_in_both_bands_survives_resampling(rate):
    got = resample(sine(1000, rate), rate)
    expected = sine(1000, 16000)
    assert len(got) == len(expected)
    assert np.abs(got - expected)[400:-400].max() < 2e-3


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
def test_a_tone_above_the_new_band_does_not_alias(rate):
    got = resample(sine(9000, rate), rate)
    assert np.abs(got[400:-400]).max() < 1e-3


def test_resampling_keeps_white_noise_in_its_band():
    noise = np.random.RandomState(0).standard_normal(8000)
    spectrum = np.abs(np.fft.rfft(resample(noise, 8000)))
    assert spectrum[: len(spectrum) // 2].mean() > 50 * spectrum[len(spectrum) // 2 + 100 :].mean()


@pytest.mark.parametrize("frames", [1, 2, 441, 1000])
def test_short_waves_resample(frames):
    assert resample(np.ones(frames), 22050).shape == (resampled_length(frames, 22050),)


def test_same_rate_is_left_alone():
    wave = np.float32([0.1, 0.2])
    assert (resample(wave, 16000) == wave).all()


def test_usable_audio_gives_its_length(tmp_path, tone):
    finding = inspect_audio(tone(tmp_path / "a.wav", seconds=0.5))
    assert (finding.reason, finding.frames) == (None, 8000)


@pytest.mark.parametrize("name", ["a.wav", "a.raw"])
@pytest.mark.parametrize("content, reason", [(b"", "zero length"), (b"not audio at all", "not audio")])
def test_files_that_are_no_audio(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    assert inspect_audio(tmp_path / name).reason == reason


def test_a_file_without_permission(tmp_path, tone, monkeypatch):
    path = tone(tmp_path / "a.wav")
    monkeypatch.setattr("os.access", lambda *args: False)
    assert inspect_audio(path)[1:3] == ("unreadable file", "no permission to read it")
    assert audio_header_problem(path) == f"no permission to read the audio file: {path}"


def test_missing_file(tmp_path):
    assert inspect_audio(tmp_path / "a.wav").reason == "missing file"


@pytest.mark.parametrize("frames, reason", [(0, "zero length"), (1, "too short"), (399, "too short"), (400, None)])
def test_the_receptive_field_is_the_shortest_audio(tmp_path, frames, reason):
    soundfile.write(str(tmp_path / "a.wav"), np.zeros(frames, np.int16), 16000)
    assert inspect_audio(tmp_path / "a.wav").reason == reason


def test_rate_and_channels_are_convertible(tmp_path, tone):
    rate = inspect_audio(tone(tmp_path / "a.wav", rate=8000))
    assert (rate.reason, rate.convertible, rate.detail) == ("wrong sample rate", True, "8000 Hz, expected 16000 Hz")
    stereo = inspect_audio(tone(tmp_path / "b.wav", channels=2))
    assert (stereo.reason, stereo.convertible) == ("not mono", True)


def test_nan_samples_are_found_without_asking(tmp_path, nan_wave):
    finding = inspect_audio(nan_wave(tmp_path / "a.wav"))
    assert (finding.reason, finding.detail) == ("NaN samples", "1 samples are NaN or infinite")


def test_a_truncated_file_is_found_when_decoding(tmp_path, tone):
    path = tone(tmp_path / "a.flac", seconds=3)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert inspect_audio(path).reason is None
    assert inspect_audio(path, deep=True).reason == "not audio"


def test_conversion_resamples_and_mixes_down(tmp_path, tone):
    frames = convert_audio(tone(tmp_path / "a.wav", rate=44100, channels=2), tmp_path / "out" / "a.flac")
    wave, rate = soundfile.read(str(tmp_path / "out" / "a.flac"))
    assert (rate, wave.shape, frames) == (16000, (8000,), 8000)
    assert np.abs(wave - 0.1 * sine(440, 16000))[200:-200].max() < 1e-3
