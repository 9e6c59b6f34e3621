"""Audio as it arrives: blocks of mono float32 samples from a file or from a stream of raw PCM, in bounded memory.

How the audio is cut into blocks changes no sample. Where the rate differs from the one asked for, the audio is
resampled as a stream by the package soxr; without it that is an error.
"""

import io
import logging
import math
import re
import select
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable, Iterator, Optional, Sequence, Union

import numpy as np
import soundfile

# what soundfile raises for a file that it cannot read; TypeError, whatever the file holds, where its name ends in .raw
UNREADABLE = (soundfile.SoundFileError, RuntimeError, TypeError)

_BYTES_PER_SAMPLE = 2
_FULL_SCALE = 32768
# integers of 32 bits that nobody scaled; the square of 2**64 is beyond float32
_LARGEST_SAMPLE = 2.0**31
_LARGEST_READ = 1 << 20
_MOST_CHANNELS = 32
_LOWEST_RATE, _HIGHEST_RATE = 1000, 10_000_000
# what libsndfile says where a header does not know
_UNKNOWN_FRAMES = 2**62
# bytes of samples that a WAV header promises without knowing: what programs write that cannot go back to it
_UNKNOWN_BYTES = 0x7FF00000
# some programs count the header in
_MISCOUNTED_BYTES = 128
_HEADER_BYTES = 4
# Raw samples start with one of these by an accident of 1 in 2**32 at most.
_HEADERS = {b"RIFF": "WAV", b"RIFX": "WAV", b"RF64": "WAV", b"fLaC": "FLAC", b"OggS": "Ogg", b"FORM": "AIFF"}
_HEADERS.update({b"ID3\x02": "MP3", b"ID3\x03": "MP3", b"ID3\x04": "MP3", b".snd": "AU", b"dns.": "AU", b"caff": "CAF"})
_HEADERS.update({b"riff": "W64", b"Crea": "VOC", b"NIST": "NIST"})
# libsndfile reads none of these, and says so
_HEADERS.update({b"\x1aE\xdf\xa3": "Matroska or WebM", b"0&\xb2u": "WMA", b"#!AM": "AMR"})
# of MPEG layer III: rates in Hz by the bits of the version (2.5, none, 2, 1), kbit/s of version 1 and of the others
_MPEG_RATES = {0: (11025, 12000, 8000), 2: (22050, 24000, 16000), 3: (44100, 48000, 32000)}
_MPEG_BITRATES = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG_LOW_BITRATES = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)

_log = logging.getLogger(__name__)

# one channel: floats in [-1, 1] or 16-bit integers; a torch tensor will do
Samples = Union[np.ndarray, Sequence[float], Any]


class Pace:
    """The clock of a recording that is being spoken: when each of its samples would have been heard.

    The first call starts it. clock: returns seconds. sleep: waits that many seconds.
    """

    def __init__(
        self,
        sample_rate: int,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._sample_rate, self._clock, self._sleep = sample_rate, clock, sleep
        self._start = None

    def since(self, samples: int) -> float:
        """Seconds since the first `samples` samples had been spoken; negative where they have not been yet."""
        now = self._clock()
        self._start = now if self._start is None else self._start
        return now - self._start - samples / self._sample_rate

    def hold_back(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields each block no earlier than its last sample is spoken; never waits for one that is late."""
        heard = 0
        self.since(heard)
        for block in blocks:
            heard += len(block)
            early = -self.since(heard)
            if early > 0:
                self._sleep(early)
            yield block


def check_audio(path: Union[str, Path]) -> None:
    """Raises FileNotFoundError or ValueError unless `path` is a file that libsndfile opens; reads its header only."""
    # a named pipe can be opened once only
    if not Path(path).is_fifo():
        _open(path).close()


def wav_blocks(path: Union[str, Path], block_seconds: float, sample_rate: int, name: str = "") -> Iterator[np.ndarray]:
    """Reads an audio file of any format, rate and number of channels that libsndfile knows, block by block.

    Returns an iterator over (time,) float32 at `sample_rate` Hz: channels averaged, 16-bit samples divided by 32768,
    `block_seconds` a block (the last is shorter; resampled ones vary). name: of the file in messages (empty: its path).
    Raises FileNotFoundError, and ValueError for what is not audio and for another rate where soxr is missing, both at
    once; ValueError while reading for samples that are NaN, infinite or huge or cannot be decoded, and at the end of a
    WAV file that is shorter than its header says.
    """
    name = name or str(path)
    block = block_length(block_seconds, sample_rate)
    file = _open(path, name)
    try:
        _check_rate(file.samplerate, name)
        if file.samplerate != sample_rate:
            block = block_length(block_seconds, file.samplerate)
        block = max(1, min(block, _LARGEST_READ // file.channels))
        return resampled_blocks(_file_blocks(file, name, block), file.samplerate, sample_rate, name)
    except ValueError:
        file.close()
        raise


def array_blocks(
    samples: Samples, rate: int, block_seconds: float, sample_rate: int, name: str = "samples"
) -> Iterator[np.ndarray]:
    """Gives (n,) or (n, channels) samples of `rate` Hz block by block, as `wav_blocks` does those of a file.

    Raises ValueError at once for another shape or type, NaN, infinite and huge samples.
    """
    shape = tuple(np.shape(samples))
    if len(shape) == 2 and 1 <= shape[1] <= _MOST_CHANNELS:
        columns = [as_samples(samples[:, channel], name) for channel in range(shape[1])]
        samples = sum(columns) / np.float32(shape[1])
    elif len(shape) == 2:
        raise ValueError(f"{name}: found shape {shape}; expected (n,) or (n, channels)")
    samples = as_samples(samples, name)
    _check_rate(rate, name)
    block = block_length(block_seconds, rate)
    blocks = (samples[start : start + block] for start in range(0, len(samples), block))
    return resampled_blocks(blocks, rate, sample_rate, name)


def stream_blocks(
    stream: BinaryIO,
    block_seconds: float,
    sample_rate: int,
    stream_rate: int = 0,
    name: str = "standard input",
    note: Callable[[str], None] = _log.warning,
) -> Iterator[np.ndarray]:
    """Reads a binary stream of raw PCM, as `pcm_blocks` does, or one that holds an audio file, as `wav_blocks` does.

    A file is first copied to a temporary one, as libsndfile moves about in it. stream_rate: Hz of raw PCM. Raises
    ValueError as those do.
    """
    start, kind = b"", None
    for data in _available(stream, _HEADER_BYTES):
        start += data
        kind = _file_kind(start)
        if kind is not None:
            break
    rest = _Prepended(start, stream)
    if not kind:
        block = block_length(block_seconds, stream_rate or sample_rate)
        yield from pcm_blocks(rest, block, sample_rate, stream_rate, name, note)
        return
    with tempfile.NamedTemporaryFile(prefix="w2v2-light-") as copy:
        for data in _available(rest, _LARGEST_READ):
            copy.write(data)
        copy.flush()
        yield from wav_blocks(copy.name, block_seconds, sample_rate, name)


def pcm_blocks(
    stream: BinaryIO,
    block_samples: int,
    sample_rate: int,
    stream_rate: int = 0,
    name: str = "standard input",
    note: Callable[[str], None] = _log.warning,
) -> Iterator[np.ndarray]:
    """Reads raw 16-bit little-endian mono PCM from a binary stream: what is there, without waiting for a full block.

    Returns an iterator over (time,) float32 at `sample_rate` Hz, the integers divided by 32768, at most
    `block_samples` of them read at once. stream_rate: Hz of the stream (0: `sample_rate`). A sample's second byte may
    come with the next read; an odd byte at the end is dropped, which `note` is told. Raises ValueError for a stream
    that starts with the header of an audio file, and as `resampled_blocks` does.
    """
    if block_samples < 1:
        raise ValueError(f"block_samples is {block_samples}; expected 1 or more")
    blocks = _decode_pcm(_available(stream, block_samples * _BYTES_PER_SAMPLE), name, note)
    return resampled_blocks(blocks, stream_rate or sample_rate, sample_rate, name)


def resampled_blocks(
    blocks: Iterable[np.ndarray], rate: int, new_rate: int, name: str = "audio"
) -> Iterator[np.ndarray]:
    """Resamples a stream of (time,) float32 blocks with soxr's stateful resampler; equal rates pass unchanged.

    Raises ValueError at once where soxr is needed and not installed. name: of the audio, for that message.
    """
    if rate == new_rate:
        return iter(blocks)
    if rate < 1:
        raise ValueError(f"{name}: found a sample rate of {rate} Hz, expected a positive one")
    try:
        import soxr
    except ImportError:
        raise ValueError(
            f"{name}: found a sample rate of {rate} Hz, expected {new_rate} Hz; `pip install soxr` to have it resampled"
        ) from None
    return _resample(blocks, soxr.ResampleStream(rate, new_rate, 1, dtype="float32"))


def is_audio(samples: np.ndarray) -> np.ndarray:
    """Which samples are finite and not so large that a network would make NaN of them."""
    return np.abs(samples) <= _LARGEST_SAMPLE


def block_length(seconds: float, sample_rate: int) -> int:
    """Samples of a block of that many seconds: 1 or more. Raises ValueError unless `seconds` is positive and finite."""
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"found a block of {seconds:g} seconds, expected a positive, finite number")
    return max(1, round(seconds * sample_rate))


def duration(path: Union[str, Path]) -> float:
    """Seconds of audio that the header of a file promises; 0 where it cannot be read, or does not say."""
    if Path(path).is_fifo():
        return 0.0
    try:
        with _open(path) as file:
            return file.frames / file.samplerate if 0 < file.frames < _UNKNOWN_FRAMES else 0.0
    except (ValueError, OSError):
        return 0.0


def as_samples(block: Samples, name: str = "samples") -> np.ndarray:
    """(n,) samples, floats in [-1, 1] or 16-bit integers, as float32; raises ValueError for any others.

    NaN, infinite and huge samples are others, too.
    """
    if hasattr(block, "detach"):
        block = block.detach().cpu()
        block = (block.float() if block.is_floating_point() else block).numpy()  # numpy knows no bfloat16
    block = np.asarray(block)
    if block.ndim != 1:
        raise ValueError(f"{name} have shape {block.shape}; expected (n,), one channel")
    if block.dtype == np.int16:
        return block.astype(np.float32) / 32768
    if block.size and not np.issubdtype(block.dtype, np.floating):
        raise ValueError(f"{name} are {block.dtype}; expected floats in [-1, 1] or 16-bit integers")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        block = block.astype(np.float32)
    if not is_audio(block).all():
        raise ValueError(
            f"{name}: found NaN, infinite or huge ones, expected floats in [-1, 1]; mend the source of the audio"
        )
    return block


def _check_rate(rate: int, name: str) -> None:
    """Raises ValueError for a sample rate that only a broken file has, and that would make years of a minute."""
    if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
        raise ValueError(f"{name}: found a sample rate of {rate} Hz, expected {_LOWEST_RATE} to {_HIGHEST_RATE} Hz")


class _Prepended(io.RawIOBase):
    """A binary stream of which some bytes were read, from its beginning."""

    def __init__(self, start: bytes, stream: BinaryIO):
        self._start, self._stream = start, stream

    def fileno(self) -> int:
        return self._stream.fileno()

    def read1(self, size: int):
        if self._start:
            data, self._start = self._start[:size], self._start[size:]
            return data
        return getattr(self._stream, "read1", self._stream.read)(size)


def _open(path: Union[str, Path], name: str = "") -> soundfile.SoundFile:
    name = name or str(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"{name}: no such audio file")
    if Path(path).is_dir():
        raise ValueError(f"{name}: found a folder, expected an audio file")
    try:
        return soundfile.SoundFile(str(path))
    except UNREADABLE as error:
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        raise ValueError(
            f"{name}: not audio that libsndfile can read ({reason}); expected WAV, FLAC, Ogg, MP3 or the like "
            "(raw PCM is read from standard input)"
        ) from None


def _file_blocks(file: soundfile.SoundFile, name: str, block: int) -> Iterator[np.ndarray]:
    with file:
        read = 0
        while True:
            try:
                samples = file.read(block, dtype="float32", always_2d=True)
            except UNREADABLE as error:
                raise ValueError(f"{name}: cannot be decoded beyond {read / file.samplerate:.3f} s: {error}") from None
            if not len(samples):
                break
            bad = np.flatnonzero(~is_audio(samples).all(axis=1))
            if len(bad):
                samples = samples[: bad[0]]
            read += len(samples)
            if len(samples):
                # channel by channel: numpy adds up a row in an order that depends on the size of the block
                yield sum(samples.T) / np.float32(samples.shape[1])
            if len(bad):
                second = read / file.samplerate
                raise ValueError(f"{name}: found a NaN, infinite or huge sample at {second:.3f} s, expected -1 to 1")
        _check_whole(file, name, read / file.samplerate)


def _check_whole(file: soundfile.SoundFile, name: str, seconds: float) -> None:
    """Raises ValueError for a WAV file that was read to its end, `seconds`, but was cut off before the promised one."""
    # libsndfile corrects the header and says so in its log only
    corrected = re.search(r"^data : (\d+) \(should be (\d+)\)$", file.extra_info, re.MULTILINE)
    if not corrected or file.format not in ("WAV", "WAVEX"):
        return
    promised, found = int(corrected[1]), int(corrected[2])
    if found + _MISCOUNTED_BYTES < promised < _UNKNOWN_BYTES:
        raise ValueError(
            f"{name}: ends at {seconds:.3f} s: found {found} bytes of samples, expected the {promised} that its header "
            "promises; copy the file again"
        )


def _available(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Yields what the stream has, up to `size` bytes at once, until it ends."""
    # of a buffered stream only read1 returns before `size` bytes have come
    read = getattr(stream, "read1", stream.read)
    while True:
        data = read(min(size, _LARGEST_READ))
        if data is None:  # non-blocking, as another program may have left standard input, and nothing there
            select.select([stream], [], [])
        elif data:
            yield data
        else:
            return


def _decode_pcm(reads: Iterable[bytes], name: str, note: Callable[[str], None]) -> Iterator[np.ndarray]:
    rest, checked = b"", False
    for data in reads:
        data = rest + data
        if not checked:
            rest = data
            kind = _file_kind(data)
            if kind is None:
                continue
            _check_raw(kind, name)
            checked = True
        whole = len(data) - len(data) % _BYTES_PER_SAMPLE
        rest = data[whole:]
        if whole:
            yield _pcm_to_float(data[:whole])
    whole = len(rest) - len(rest) % _BYTES_PER_SAMPLE
    if whole:
        yield _pcm_to_float(rest[:whole])
    if len(rest) > whole:
        note(f"{name}: dropped the last byte, half of a 16-bit sample")


def _pcm_to_float(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype="<i2").astype(np.float32) / np.float32(_FULL_SCALE)


def _file_kind(start: bytes) -> Optional[str]:
    """The kind of audio file that starts with these bytes; empty: of none, None: more of them are needed to tell."""
    if len(start) < _HEADER_BYTES:
        return None
    if start[:3] == bytes(3):  # the size of MP4's first box, whose name comes next
        return None if len(start) < 8 else "MP4" if start[4:8] == b"ftyp" else ""
    length = _mpeg_frame(start)
    if not length:
        return _HEADERS.get(start[:_HEADER_BYTES], "")
    following = start[length : length + _HEADER_BYTES]
    if len(following) < _HEADER_BYTES:
        return None
    # two frames in a row, of the same version and rate
    alike = following[1] == start[1] and (following[2] ^ start[2]) & 0x0C == 0
    return "MP3" if alike and _mpeg_frame(following) else ""


def _mpeg_frame(header: bytes) -> int:
    """Bytes of the frame of MPEG layer III that starts with this header of four bytes; 0 where it is none."""
    version, rate, bitrate = header[1] >> 3 & 3, header[2] >> 2 & 3, header[2] >> 4
    # sync, layer, version, rate, bitrate
    if header[0] != 0xFF or header[1] & 0xE6 != 0xE2 or version == 1 or rate == 3 or bitrate in (0, 15):
        return 0
    kilobits = (_MPEG_BITRATES if version == 3 else _MPEG_LOW_BITRATES)[bitrate]
    factor = 144_000 if version == 3 else 72_000
    return factor * kilobits // _MPEG_RATES[version][rate] + (header[2] >> 1 & 1)


def _check_raw(kind: str, name: str) -> None:
    """Raises ValueError where a stream starts as a `kind` of audio file does; an empty one is of none."""
    if kind:
        raise ValueError(
            f"{name}: found the header of an audio file ({kind}), expected raw 16-bit PCM; name the file "
            "instead, or have the recorder write raw samples (`arecord -t raw`)"
        )


def _resample(blocks: Iterable[np.ndarray], resampler) -> Iterator[np.ndarray]:
    for block in blocks:
        resampled = resampler.resample_chunk(block)
        if len(resampled):
            yield resampled
    resampled = resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True)
    if len(resampled):
        yield resampled
