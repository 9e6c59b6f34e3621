"""Speech to text while it is spoken, without fairseq.

    recognizer = StreamingRecognizer.from_checkpoint("streaming.pt")
    for block in microphone:                     # float samples in [-1, 1], any block size
        print(recognizer.accept(block).text)     # the line so far
    print(recognizer.finish().text)

What a stream remembers is a value (`StreamingState`) that no call changes: many streams run over one model, those in
step as one batch (`accept_many`), and a state can be kept, saved and gone on with.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields, replace
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from ..nn.operating_point import OperatingPoint
from ..nn.streaming import Stream, StreamState
from .audio import Samples, as_samples
from .beam import Token
from .endpoint import Endpointing, advance_segments
from .incremental import BeamState, DecoderState, GreedyState, decoder_from_dict
from .load import CtcModel, load_ctc
from .prepare import prepare_
from .text import Labels, Word

_DEFAULT = Endpointing()


@dataclass(frozen=True)
class Segment:
    """An utterance between two silences: its text, and its words with their times in seconds since the stream began."""

    text: str
    words: Tuple[Word, ...]

    @property
    def start(self) -> float:
        """When its first word begins, in seconds."""
        return self.words[0].start if self.words else 0.0

    @property
    def end(self) -> float:
        """When its last word ends, in seconds."""
        return self.words[-1].end if self.words else 0.0


@dataclass(frozen=True)
class Partial:
    """What is known after a block of samples.

    text, words: the segment that is being spoken; its last words may still change. segments: those that ended in this
    block, which never change. seconds: audio accepted so far. chunks: how often the network ran in this call.
    """

    text: str
    words: Tuple[Word, ...]
    segments: Tuple[Segment, ...]
    seconds: float
    chunks: int


@dataclass(frozen=True)
class Final:
    """The whole transcript: its segments, their text and words joined, and the seconds of audio accepted."""

    text: str
    words: Tuple[Word, ...]
    segments: Tuple[Segment, ...]
    seconds: float


@dataclass(frozen=True)
class StreamingState:
    """What one stream remembers; of constant size, but for the words that were heard.

    network, decoder: what those remember. samples: (n,) float32, too few for the next chunk. accepted: samples so far.
    words, tokens: of the segment that is being spoken, words that will not change, and tokens behind them that will
    not either. segments: those that ended.
    """

    network: StreamState
    decoder: DecoderState
    samples: np.ndarray
    accepted: int = 0
    words: Tuple[Word, ...] = ()
    tokens: Tuple[Token, ...] = ()
    segments: Tuple[Segment, ...] = ()

    def to_dict(self) -> Dict[str, Any]:
        """Tensors, lists, numbers and strings, which torch.save and torch.load(weights_only=True) carry."""
        return {
            "network": self.network.to_dict(),
            "decoder": self.decoder.to_dict(),
            "samples": torch.tensor(self.samples),
            "accepted": self.accepted,
            "words": _words_to_list(self.words),
            "tokens": [list(token) for token in self.tokens],
            "segments": [_words_to_list(segment.words) for segment in self.segments],
        }

    @classmethod
    def from_dict(cls, saved: Dict[str, Any]) -> StreamingState:
        """The state that `to_dict` saved; raises ValueError for anything else."""
        missing = [field.name for field in fields(cls) if field.name not in saved]
        if missing:
            raise ValueError(f"a saved stream without {missing}: it was not saved by StreamingState.to_dict")
        return cls(
            StreamState.from_dict(saved["network"]),
            decoder_from_dict(saved["decoder"]),
            saved["samples"].numpy(),
            saved["accepted"],
            _words_from_list(saved["words"]),
            tuple(Token(*token) for token in saved["tokens"]),
            tuple(_segment(_words_from_list(words)) for words in saved["segments"]),
        )


class StreamingRecognizer:
    """Recognises speech chunk by chunk with a streaming CTC model; any division of the audio gives the same result.

    model: a CtcModel that was trained with chunks. operating_point: text such as s1q1k1c24 (empty: the model's own).
    beam: 1 decodes greedily, more by prefix beam search. endpointing: when a segment ends (None: with the stream).

    sample_rate: in Hz. chunk_samples: samples from one run of the network to the next. latency_ms: the algorithmic
    latency, from a sample to all text that it has an influence on. Raises ValueError for a model that cannot stream.
    """

    def __init__(
        self,
        model: CtcModel,
        operating_point: str = "",
        beam: int = 1,
        endpointing: Optional[Endpointing] = _DEFAULT,
    ):
        if beam < 1:
            raise ValueError(f"beam is {beam}; expected 1 (greedy) or more")
        if model.normalize:
            raise ValueError(
                "the model normalises mean and variance of whole utterances (task.normalize=true), which a stream "
                "cannot wait for; train it with task.normalize=false and chunk_frames"
            )
        self.model = model.eval()
        self.stream = Stream(model.backbone, OperatingPoint.parse(operating_point) if operating_point else model.point)
        self.labels = Labels(model.symbols, model.blank)
        self.beam = beam
        self.endpointing = endpointing
        self.sample_rate = model.sample_rate
        self.chunk_samples = self.stream.chunk_samples
        self.latency_ms = 1000 * (self.stream.chunk_samples + self.stream.lookahead_samples) / self.sample_rate
        self.seconds_per_frame = self.stream.hop / self.sample_rate
        self.state = self.start()

    @classmethod
    def from_checkpoint(
        cls,
        path,
        operating_point: str = "",
        beam: int = 1,
        endpointing: Optional[Endpointing] = _DEFAULT,
        dictionary=None,
        dtype: str = "auto",
    ) -> StreamingRecognizer:
        """Reads a fairseq CTC checkpoint, or a model folder; `dictionary` is a dict.ltr.txt, for one that holds none.

        dtype: see runtime/prepare.py. Raises FileNotFoundError and ValueError that name the file and what is wrong.
        """
        model = load_ctc(path, dictionary)
        try:
            recognizer = cls(model, operating_point, beam, endpointing)
            recognizer.prepare_(dtype)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return recognizer

    def prepare_(self, dtype: str = "auto") -> str:
        """Makes the model fast for chunks of this size, in place; see runtime/prepare.py."""
        return prepare_(self.model, dtype, self.stream.point.chunk + self.stream.config.lookahead)

    def start(self) -> StreamingState:
        """The state of a stream of which nothing was heard."""
        blank, never, silent = self.labels.blank, self.labels.never, self.labels.silent
        if self.beam == 1:
            decoder = GreedyState.start(blank, never, silent)
        else:
            decoder = BeamState.start(blank, self.beam, never, silent=silent)
        return StreamingState(self.stream.start(), decoder, np.zeros(0, dtype=np.float32))

    def accept(self, samples: Samples) -> Partial:
        """Hears more of the recogniser's own stream, `self.state`: (n,) samples, floats in [-1, 1] or 16-bit integers.

        Raises ValueError for samples of another shape, NaN, infinite and huge ones; nothing of such a block is heard.
        """
        (self.state,), (partial,) = self.accept_many([self.state], [samples])
        return partial

    def finish(self) -> Final:
        """Ends the recogniser's own stream: the whole transcript. The next `accept` begins another one."""
        state, self.state = self.state, self.start()
        return self.finish_state(state)

    def accept_many(
        self, states: Sequence[StreamingState], blocks: Sequence[Samples]
    ) -> Tuple[List[StreamingState], List[Partial]]:
        """Hears a block of samples of each of several streams; streams that have a chunk ready run as one batch."""
        if len(states) != len(blocks):
            raise ValueError(f"{len(states)} streams with {len(blocks)} blocks of samples; expected one block each")
        before = [len(state.segments) for state in states]
        states = [_with_samples(state, as_samples(block)) for state, block in zip(states, blocks)]
        chunks = [0] * len(states)
        while True:
            ready = defaultdict(list)
            for index, state in enumerate(states):
                needed = self.stream.samples_needed(state.network)
                if len(state.samples) >= needed:
                    ready[needed].append(index)
            if not ready:
                break
            for needed, indices in ready.items():
                stepped = self._step([states[index] for index in indices], needed)
                for index, state in zip(indices, stepped):
                    states[index] = state
                    chunks[index] += 1
        return states, [self._partial(*fields) for fields in zip(states, before, chunks)]

    def finish_state(self, state: StreamingState) -> Final:
        """Hears what is left of a stream, and gives its whole transcript."""
        frames = self.stream.finish(self._tensor([state.samples]), state.network)
        (state,) = self._decode([state], frames)
        tokens, decoder = state.decoder.flush()
        state = self._close(replace(state, decoder=decoder), tokens)
        return Final(
            " ".join(segment.text for segment in state.segments),
            tuple(word for segment in state.segments for word in segment.words),
            state.segments,
            state.accepted / self.sample_rate,
        )

    def _step(self, states: List[StreamingState], samples: int) -> List[StreamingState]:
        wave = self._tensor([state.samples[:samples] for state in states])
        frames, network = self.stream.step(wave, StreamState.stack([state.network for state in states]))
        states = [
            replace(state, network=own, samples=state.samples[samples:]) for state, own in zip(states, network.split())
        ]
        return self._decode(states, frames)

    @torch.no_grad()
    def _decode(self, states: List[StreamingState], frames: Tensor) -> List[StreamingState]:
        """Decodes new frames (batch, time, dim) of the network, stream by stream."""
        log_probs = self.model.head(frames).float().log_softmax(-1).cpu().numpy()
        return [self._decode_one(state, rows) for state, rows in zip(states, log_probs)]

    def _decode_one(self, state: StreamingState, log_probs: np.ndarray) -> StreamingState:
        closed, decoder = advance_segments(state.decoder, log_probs, self.endpointing, self.seconds_per_frame)
        for tokens in closed:
            state = self._close(state, tokens)
        stable, decoder = decoder.drain()
        tokens = state.tokens + stable
        whole = self.labels.whole_words(tokens)
        words = state.words + tuple(self.labels.words(tokens[:whole], self.seconds_per_frame))
        return replace(state, decoder=decoder, words=words, tokens=tokens[whole:])

    def _close(self, state: StreamingState, tokens: Tuple[Token, ...]) -> StreamingState:
        """Ends the segment that is being spoken with its last tokens; one without words leaves no trace."""
        words = state.words + tuple(self.labels.words(state.tokens + tokens, self.seconds_per_frame))
        segments = state.segments + ((_segment(words),) if words else ())
        return replace(state, words=(), tokens=(), segments=segments)

    def _partial(self, state: StreamingState, segments_before: int, chunks: int) -> Partial:
        words = state.words + tuple(self.labels.words(state.tokens + state.decoder.tokens, self.seconds_per_frame))
        segments = state.segments[segments_before:]
        return Partial(_segment(words).text, words, segments, state.accepted / self.sample_rate, chunks)

    def _tensor(self, samples: Sequence[np.ndarray]) -> Tensor:
        parameter = self.model.backbone.layer_norm.weight
        return torch.from_numpy(np.stack(samples)).to(parameter.device, parameter.dtype)


def _with_samples(state: StreamingState, samples: np.ndarray) -> StreamingState:
    together = np.concatenate([state.samples, samples])
    return replace(state, samples=together, accepted=state.accepted + len(samples))


def _segment(words: Tuple[Word, ...]) -> Segment:
    return Segment(" ".join(word.text for word in words), words)


def _words_to_list(words: Sequence[Word]) -> List[List[Any]]:
    return [[word.text, word.start, word.end] for word in words]


def _words_from_list(words: Sequence[Sequence[Any]]) -> Tuple[Word, ...]:
    return tuple(Word(*word) for word in words)
