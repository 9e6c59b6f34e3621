"""Recordings to text, without fairseq: files of any length and format, in batches, in bounded memory.

recognizer = Recognizer.from_pretrained("model", operating_point="s2q1k2")
for transcript in recognizer.transcribe(["a.wav", "b.mp3"]):
    print(transcript.source, transcript.text)
"""

from __future__ import annotations

import math
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Deque, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..nn.frontend import receptive_field
from ..nn.operating_point import OperatingPoint
from .alignment import TimedWord, timed_words, token_confidences
from .audio import array_blocks, stream_blocks, wav_blocks
from .beam import Token
from .ctc import CtcModel
from .incremental import BeamState, GreedyState
from .load import load_ctc
from .prepare import prepare_, require_device
from .text import Labels
from .windows import Window, Windowing, cut_windows, join_frame

_BLOCK_SECONDS = 1.0
BATCH_SECONDS = 20.0
# windows that are sorted by length together, in batches
_POOL_BATCHES = 8
# A stretch without a pause is decoded in parts, so that its log-probabilities need bounded memory.
_DECODE_SECONDS = 60.0

_PACK_ROWS = 500

# Batches are padded to a multiple of this: oneDNN keeps memory for each shape that it has met.
LENGTH_GRID_SECONDS = 0.5

_DEFAULT = Windowing()


@dataclass(frozen=True)
class AudioStream:
    """A source that is a binary stream: raw 16-bit mono PCM of `sample_rate` Hz (0: the model's), or an audio file."""

    stream: BinaryIO
    sample_rate: int = 0
    name: str = "standard input"


Source = Union[str, Path, AudioStream, Tuple[Any, int]]


@dataclass(frozen=True)
class Transcript:
    """What was said in one recording.

    words: with their times in seconds and confidences. seconds: audio read. source: its path or name; empty for
    samples. error: why the recording could not be read on, or None; text and words are those of what was read before.
    """

    text: str
    words: Tuple[TimedWord, ...]
    seconds: float
    source: str
    error: Optional[str] = None


class GreedyDecoder:
    """Each frame's most probable symbol, repetitions merged."""

    def __init__(self, labels: Labels):
        self._start = GreedyState.start(labels.blank, labels.never)

    def decode(self, log_probs: Union[np.ndarray, Tensor]) -> Tuple[Token, ...]:
        """The labels that (frames, symbols) log-probabilities spell."""
        return self._start.advance(log_probs).tokens


class BeamDecoder:
    """Prefix beam search without a language model; see `decode.prefix_beam_search`."""

    def __init__(self, labels: Labels, beam: int):
        self._start = BeamState.start(labels.blank, beam, labels.never)

    def decode(self, log_probs: Union[np.ndarray, Tensor]) -> Tuple[Token, ...]:
        """The most probable labels of (frames, symbols) log-probabilities."""
        return self._start.advance(log_probs).tokens


class Recognizer:
    """Recognises speech in recordings with a CTC model.

    model: a CtcModel. operating_point: text such as s2q1k2 (empty: the model's own). decoder: has `decode`, from
    (frames, symbols) log-probabilities to a tuple of Token (None: greedy); it may be set later. windowing: how long
    recordings are cut. dtype: that the model runs in, for information.

    labels, sample_rate (Hz), point (an OperatingPoint), frame_seconds: of the model. Raises ValueError for a point that
    the model was not trained for.
    """

    def __init__(
        self,
        model: CtcModel,
        operating_point: str = "",
        decoder: Optional[Any] = None,
        windowing: Windowing = _DEFAULT,
        dtype: str = "float32",
    ):
        self.model = model.eval()
        config = model.config
        point = OperatingPoint.parse(operating_point) if operating_point else model.point
        self.point = config.operating_points.check(point)
        self.labels = Labels(model.symbols, model.blank)
        self.decoder = GreedyDecoder(self.labels) if decoder is None else decoder
        self.windowing = windowing
        self.dtype = dtype
        self.sample_rate = model.sample_rate
        self.frame_seconds = model.hop / self.sample_rate

    @classmethod
    def from_pretrained(
        cls,
        folder_or_checkpoint: Union[str, Path],
        operating_point: str = "",
        dtype: str = "auto",
        decoder: Optional[Any] = None,
        threads: Optional[int] = None,
        dictionary: Optional[Union[str, Path]] = None,
        device: str = "cpu",
    ) -> Recognizer:
        """Reads a model folder or a fairseq CTC checkpoint, and makes it fast on this machine.

        dtype: "auto", "float32", "bfloat16" or "int8"; see `prepare_`. threads: of torch, in the whole process (None:
        as they are). dictionary: a dict.ltr.txt, for a checkpoint that holds none. device: "cpu" or "cuda". Raises
        FileNotFoundError and ValueError that name the file and what is wrong with it.
        """
        require_device(device)
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads: found {threads}, expected 1 or more")
            torch.set_num_threads(threads)
        model = load_ctc(folder_or_checkpoint, dictionary)
        try:
            recognizer = cls(model, operating_point, decoder)
            recognizer.dtype = prepare_(model, dtype, _PACK_ROWS, device)
        except ValueError as error:
            raise ValueError(f"{folder_or_checkpoint}: {error}") from error
        return recognizer

    def transcribe(
        self,
        sources: Iterable[Source],
        batch_seconds: float = BATCH_SECONDS,
        on_progress: Optional[Callable[[float], None]] = None,
    ) -> Iterator[Transcript]:
        """Recognises recordings, and yields their transcripts in the order of `sources`, each as soon as it is done.

        sources: paths of audio files, (samples, sample rate) of (n,) or (n, channels) floats or 16-bit integers, or
        AudioStreams. batch_seconds: audio that the network hears at once, padding included, unless one window is
        longer; memory grows with it, the text does not change. on_progress: is told the seconds of audio recognised
        so far. A source that cannot be read gives a transcript with `error`, and stops none of the others. Raises
        ValueError for one source that is in no list.
        """
        if isinstance(sources, (str, bytes, os.PathLike, AudioStream)):
            raise ValueError(f"sources is {sources!r}; expected a list of sources, [{sources!r}] for one")
        if not (batch_seconds > 0 and math.isfinite(batch_seconds)):
            raise ValueError(f"batch_seconds is {batch_seconds}; expected a positive, finite number")
        waiting: Deque[_Job] = deque()
        pool: List[Tuple[_Job, Window]] = []
        pooled = 0
        progress = _Progress(on_progress, self.sample_rate)
        for source in sources:
            job = _Job(self, source)
            waiting.append(job)
            for window in job.windows():
                pool.append((job, window))
                pooled += len(window.samples)
                if pooled >= _POOL_BATCHES * batch_seconds * self.sample_rate:
                    self._recognise(pool, batch_seconds, progress)
                    pool, pooled = [], 0
                    yield from _finished(waiting)
            yield from _finished(waiting)
        self._recognise(pool, batch_seconds, progress)
        yield from _finished(waiting)

    def log_probs(self, waves: Sequence[Any], batch_seconds: float = BATCH_SECONDS) -> List[np.ndarray]:
        """(frames, symbols) float32 log-probabilities of each of several (n,) float32 waves at `sample_rate`.

        Waves of similar length run as one padded batch of `batch_seconds`, which changes no result. One that is too
        short for a frame has none. Raises ValueError for samples that are not finite.
        """
        waves = [torch.as_tensor(wave, dtype=torch.float32) for wave in waves]
        results = [np.zeros((0, len(self.labels)), dtype=np.float32) for _ in waves]
        for rows, batch in self._batches(waves, batch_seconds):
            for row, log_probs in zip(rows, batch):
                results[row] = log_probs
        return results

    def _recognise(self, pool: List[Tuple[_Job, Window]], batch_seconds: float, progress: _Progress) -> None:
        """Runs the network on windows, sorted by length, and hands each job what it says, in order."""
        waves = [torch.from_numpy(window.samples) for _, window in pool]
        results = [np.zeros((0, len(self.labels)), dtype=np.float32) for _ in pool]
        for rows, batch in self._batches(waves, batch_seconds):
            for row, log_probs in zip(rows, batch):
                results[row] = log_probs
            progress.add(sum(len(waves[row]) for row in rows))
        for (job, window), log_probs in zip(pool, results):
            job.hear(window, log_probs)

    def _batches(self, waves: Sequence[Tensor], batch_seconds: float) -> Iterator[Tuple[List[int], List[np.ndarray]]]:
        """Runs `waves` in batches, the longest first; rows of each batch, and what the network says of them."""
        rows = [row for row, wave in enumerate(waves) if self.model.config.frames(len(wave)) >= self._least_frames]
        for batch in batched([len(waves[row]) for row in rows], int(batch_seconds * self.sample_rate)):
            batch = [rows[index] for index in batch]
            yield batch, self._run([waves[row] for row in batch])

    @torch.no_grad()
    def _run(self, waves: List[Tensor]) -> List[np.ndarray]:
        weight = self.model.backbone.layer_norm.weight
        batch = pad_sequence(waves, batch_first=True).to(weight.device)
        grid = round(LENGTH_GRID_SECONDS * self.sample_rate)
        batch = F.pad(batch, (0, -batch.size(1) % grid))
        padded = len(waves) > 1 or batch.size(1) > len(waves[0])
        lengths = torch.tensor([len(wave) for wave in waves]) if padded else None
        try:
            logits, frames = self.model(batch, lengths, self.point)
        except torch.cuda.OutOfMemoryError as error:
            heard = batch.size(1) / self.sample_rate
            raise ValueError(
                f"the GPU has too little memory for {len(waves)} x {heard:.1f} s of audio at once; lower "
                "--batch-seconds (batch_seconds) or the length of windows"
            ) from error
        log_probs = logits.float().log_softmax(-1).cpu().numpy()
        if frames is None:
            return [log_probs[0]]
        return [row[:count] for row, count in zip(log_probs, frames.tolist())]

    @property
    def _least_frames(self) -> int:
        """Frames of the frontend below which the network has nothing to say."""
        return self.point.squeeze if self.model.config.squeeze_tail == "drop" else 1

    @property
    def _align(self) -> int:
        """Samples between the starts of overlapping windows are a multiple of this: the same frames, squeezed alike."""
        frames = [self.point.squeeze * pool for pool in (*self.point.query, *self.point.key_value)]
        return self.model.hop * math.lcm(*frames, self.point.chunk or 1)


def batched(lengths: Sequence[float], most: float) -> Iterator[List[int]]:
    """Indices of each batch, the longest lengths first: as many as are, times the longest of them, `most`, or one."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while rows:
        count = max(1, int(most // lengths[rows[0]]))
        yield rows[:count]
        rows = rows[count:]


class _Progress:
    """Tells a callback the seconds of audio recognised so far."""

    def __init__(self, callback: Optional[Callable[[float], None]], sample_rate: int):
        self._callback, self._sample_rate, self._samples = callback, sample_rate, 0

    def add(self, samples: int) -> None:
        self._samples += samples
        if self._callback is not None:
            self._callback(self._samples / self._sample_rate)


class _Job:
    """The transcription of one source: gives its windows, and hears in the same order what the network says of them."""

    def __init__(self, recognizer: Recognizer, source: Source):
        self._recognizer, self._source = recognizer, source
        self._stretch: Optional[_Stretch] = None
        self._words: List[TimedWord] = []
        self._samples = self._awaited = 0
        self._read = False
        self._error: Optional[str] = None

    def windows(self) -> Iterator[Window]:
        """The windows of the source, as far as it can be read."""
        recognizer = self._recognizer
        try:
            blocks = self._count(_open(self._source, recognizer.sample_rate))
            for window in cut_windows(blocks, recognizer.sample_rate, recognizer._align, recognizer.windowing):
                self._awaited += 1
                yield window
        except (ValueError, OSError) as error:
            self._error = _message(error)
        self._read = True

    def hear(self, window: Window, log_probs: np.ndarray) -> None:
        """Hears the (frames, symbols) log-probabilities of the next window."""
        self._awaited -= 1
        try:
            if self._stretch is None or not window.joins:
                self._close()
                self._stretch = _Stretch(self._recognizer, window)
            self._stretch.add(window, log_probs)
            if self.finished:
                self._close()
        except ValueError as error:  # the decoder's
            self._stretch = None
            self._error = self._error or _message(error)

    @property
    def finished(self) -> bool:
        """Whether everything was read and heard."""
        return self._read and not self._awaited

    def transcript(self) -> Transcript:
        self._close()
        text = " ".join(word.text for word in self._words)
        seconds = self._samples / self._recognizer.sample_rate
        return Transcript(text, tuple(self._words), seconds, _name(self._source), self._error)

    def _close(self) -> None:
        stretch, self._stretch = self._stretch, None
        if stretch is not None:
            self._words.extend(stretch.words())

    def _count(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            self._samples += len(block)
            yield block


class _Stretch:
    """Speech between two pauses: the log-probabilities of its windows, joined, and the labels decoded from them."""

    def __init__(self, recognizer: Recognizer, window: Window):
        self._recognizer = recognizer
        self._origin, self._step = window.start, window.step
        self._loudness_start = window.loudness_start
        self._loudness: List[np.ndarray] = []
        self._steps = 0
        self._log_probs = np.zeros((0, len(recognizer.labels)), dtype=np.float32)
        self._decoded = 0  # frames
        self._tokens: List[Token] = []
        self._confidences: List[float] = []

    def add(self, window: Window, log_probs: np.ndarray) -> None:
        """Adds a window, whose frames replace those that the stretch has already from where the two agree."""
        before = self._log_probs
        if window.joins:
            offset = (window.start - self._origin) // self._recognizer.model.hop - self._decoded
            shared = max(0, min(len(before) - offset, len(log_probs)))
            join = join_frame(before[offset : offset + shared], log_probs[:shared], self._recognizer.labels)
            before, log_probs = before[: offset + join], log_probs[join:]
            if len(before) * self._recognizer.frame_seconds >= _DECODE_SECONDS:
                self._decode(before)
                before = before[:0]
        self._log_probs = np.concatenate([before, log_probs])
        known = self._steps - (window.loudness_start - self._loudness_start) // self._step
        new = window.loudness[max(0, known) :]
        self._loudness.append(new)
        self._steps += len(new)

    def words(self) -> Tuple[TimedWord, ...]:
        """Ends the stretch: its words."""
        self._decode(self._log_probs)
        recognizer = self._recognizer
        config, rate = recognizer.model.config, recognizer.sample_rate
        field, hop = receptive_field(config.conv_layers)
        # the middle of what a frame hears is where it begins, and half a frame
        first_frame = self._origin + (field - hop) / 2 - config.frontend_padding
        return timed_words(
            recognizer.labels,
            self._tokens,
            self._confidences,
            first_frame / rate,
            recognizer.frame_seconds,
            np.concatenate(self._loudness),
            self._loudness_start / rate,
            self._step / rate,
        )

    def _decode(self, log_probs: np.ndarray) -> None:
        if len(log_probs):
            tokens = self._recognizer.decoder.decode(log_probs)
            self._confidences.extend(token_confidences(log_probs, tokens))
            self._tokens.extend(
                Token(index, start + self._decoded, end + self._decoded) for index, start, end in tokens
            )
        self._decoded += len(log_probs)


def _finished(waiting: Deque[_Job]) -> Iterator[Transcript]:
    """Takes away the jobs at the head of the queue that are finished; their transcripts."""
    while waiting and waiting[0].finished:
        yield waiting.popleft().transcript()


def _open(source: Source, sample_rate: int) -> Iterator[np.ndarray]:
    if isinstance(source, AudioStream):
        return stream_blocks(source.stream, _BLOCK_SECONDS, sample_rate, source.sample_rate, source.name)
    if isinstance(source, (str, Path)):
        return wav_blocks(source, _BLOCK_SECONDS, sample_rate)
    try:
        samples, rate = source
    except (TypeError, ValueError):
        raise ValueError(
            f"found a source of type {type(source).__name__}, expected a path or (samples, sample rate)"
        ) from None
    return array_blocks(samples, int(rate), _BLOCK_SECONDS, sample_rate)


def _name(source: Source) -> str:
    if isinstance(source, AudioStream):
        return source.name
    return str(source) if isinstance(source, (str, Path)) else ""


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
