"""Audio files: what is wrong with one, and how to make it 16 kHz mono."""

import math
import os
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import soundfile

from fairseq_w2v2_light.data.manifest import RECEPTIVE_FIELD, SAMPLE_RATE
from fairseq_w2v2_light.runtime.audio import UNREADABLE

# Only these encodings can hold NaN or infinity: others need no decoding to rule them out.
FLOAT_SUBTYPES = ("FLOAT", "DOUBLE")
# Share of the common band below which resampling passes everything; above, a cosine falls to zero.
PASS_BAND = 0.95


class Inspection(NamedTuple):
    """Findings about one file: `reason` is None for a usable one, else a fixed phrase; `detail` is for people.

    `convertible` says that resampling and mixing down would cure the reason. `frames` counts 16 kHz samples when the
    file is usable.
    """

    frames: int = 0
    reason: Optional[str] = None
    detail: str = ""
    convertible: bool = False


def _samples_problem(path: Path, frames: int) -> Optional[Inspection]:
    """Decodes everything in blocks; finds unreadable, missing and non-finite samples."""
    read = 0
    try:
        for block in soundfile.blocks(str(path), blocksize=1 << 20, dtype="float32"):
            finite = np.isfinite(block)
            if not finite.all():
                return Inspection(reason="NaN samples", detail=f"{int((~finite).sum())} samples are NaN or infinite")
            read += len(block)
    except UNREADABLE as error:
        return Inspection(reason="not audio", detail=f"cannot be decoded: {error}")
    if read != frames:
        return Inspection(reason="not audio", detail=f"holds {read} samples, its header says {frames}: truncated")
    return None


def inspect_audio(path: Path, min_frames: int = RECEPTIVE_FIELD, deep: bool = False) -> Inspection:
    """Says whether training can use a file: 16 kHz, mono, `min_frames` samples or more (counted at 16 kHz), finite.

    `deep` decodes every file; otherwise only those whose encoding can hold NaN are decoded.
    """
    if not path.is_file():
        return Inspection(reason="missing file", detail="no such file")
    if not os.access(path, os.R_OK):
        return Inspection(reason="unreadable file", detail="no permission to read it")
    if path.stat().st_size == 0:
        return Inspection(reason="zero length", detail="the file has 0 bytes")
    try:
        header = soundfile.info(str(path))
    except UNREADABLE as error:
        return Inspection(reason="not audio", detail=str(error))
    if header.frames <= 0:
        return Inspection(reason="zero length", detail="the file has 0 samples")
    frames = resampled_length(header.frames, header.samplerate)
    if frames < min_frames:
        unit = "samples" if header.samplerate == SAMPLE_RATE else f"samples at {SAMPLE_RATE} Hz"
        return Inspection(reason="too short", detail=f"{frames} {unit}, expected at least {min_frames}")
    if deep or header.subtype in FLOAT_SUBTYPES:
        problem = _samples_problem(path, header.frames)
        if problem:
            return problem
    if header.samplerate != SAMPLE_RATE:
        detail = f"{header.samplerate} Hz, expected {SAMPLE_RATE} Hz"
        return Inspection(frames, "wrong sample rate", detail, convertible=True)
    if header.channels != 1:
        return Inspection(frames, "not mono", f"{header.channels} channels, expected 1", convertible=True)
    return Inspection(frames)


def resampled_length(frames: int, rate: int, new_rate: int = SAMPLE_RATE) -> int:
    """Samples after resampling `frames` samples from `rate` to `new_rate`."""
    return -(-frames * new_rate // rate)


def resample(wave: np.ndarray, rate: int, new_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Band-limited resampling by the Fourier transform.

    wave: (time,) float. Returns (ceil(time * new_rate / rate),) float32. Everything above the lower of the two Nyquist
    frequencies is removed (no aliasing); a cosine from 95 % of it keeps ringing short. Padding with 20 ms of silence on
    each side keeps the ends from wrapping round.
    """
    if rate == new_rate:
        return np.asarray(wave, dtype=np.float32)
    step, new_step = rate // math.gcd(rate, new_rate), new_rate // math.gcd(rate, new_rate)
    margin = -(-rate // 50 // step)
    blocks = 2 * margin + -(-len(wave) // step)
    padded = np.zeros(blocks * step)
    padded[margin * step : margin * step + len(wave)] = wave
    spectrum = np.fft.rfft(padded)
    bins = min(blocks * step, blocks * new_step) // 2 + 1
    position = np.arange(bins) / (bins - 1)
    fall = np.clip((position - PASS_BAND) / (1 - PASS_BAND), 0, 1)
    kept = spectrum[:bins] * (0.5 + 0.5 * np.cos(np.pi * fall))
    resampled = np.fft.irfft(kept, blocks * new_step) * (new_step / step)
    start = margin * new_step
    return resampled[start : start + resampled_length(len(wave), rate, new_rate)].astype(np.float32)


def write_flac(path: Path, wave: np.ndarray) -> None:
    """Writes (time,) float samples in [-1, 1] as 16-bit FLAC at 16 kHz; louder ones are clipped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pcm = np.round(np.clip(wave, -1, 32767 / 32768) * 32768).astype(np.int16)
    soundfile.write(str(path), pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")


def convert_audio(source: Path, destination: Path) -> int:
    """Writes `source` as 16 kHz mono FLAC (channels averaged); returns the number of samples written."""
    wave, rate = soundfile.read(str(source), dtype="float32", always_2d=True)
    wave = resample(wave.mean(axis=1), rate)
    write_flac(destination, wave)
    return len(wave)
