"""Streaming: the same network as over a whole utterance, one chunk at a time, with what it must remember as a value.

Chunk by chunk, `Stream` computes what `Backbone.encode` computes with the chunk mask (nn/chunks.py). A state never
changes: a step returns a new one. States of several streams stack into one batch and split again.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .attention import KeyValue
from .backbone import Backbone
from .frontend import receptive_field
from .masks import pooled_length
from .operating_point import OperatingPoint
from .squeeze import squeeze

# held while a place in a Memory's storage is taken
_TAKING = threading.Lock()


class Memory:
    """The newest keys and values of one layer, (batch, heads, `size`, head dim): `key` (None: not kept), `value`.

    A value as far as its users see. Inside, later frames are written behind it into the same storage, so that a step
    copies only its own; a state that is gone on with a second time, in another thread, too, finds its place taken, and
    moves to new storage.
    """

    def __init__(self, storage: KeyValue, size: int, end: Optional[int] = None, written: Optional[List[int]] = None):
        self._storage = storage
        self.size = size
        self._end = storage.value.size(2) if end is None else end
        # shared by all that write into this storage: how far it is taken
        self._written = [self._end] if written is None else written

    @property
    def key(self) -> Optional[Tensor]:
        return self._storage.frames(self._end - self.size, self._end).key

    @property
    def value(self) -> Tensor:
        return self._storage.frames(self._end - self.size, self._end).value

    def append(self, own: KeyValue, known: int, kept: int) -> Tuple[KeyValue, Memory]:
        """The newest `known` frames with all of `own` behind them, and the memory that keeps `kept` frames of `own`."""
        frames = own.value.size(2)
        place = self if self._takes(frames, kept) else self._moved(self.size + max(self.size, 4 * frames), kept)
        storage, end = place._storage, place._end
        for part, new in zip(storage, own):
            if part is not None:
                part[:, :, end : end + frames] = new
        return storage.frames(end - known, end + frames), Memory(storage, self.size, end + kept, place._written)

    def _takes(self, frames: int, kept: int) -> bool:
        """Whether `frames` may be written behind this, of which `kept` are then taken.

        They may not where others were written already, and where there is no room. What is written beyond those that
        are kept, the next step overwrites.
        """
        with _TAKING:
            free = self._written[0] == self._end and self._end + frames <= self._storage.value.size(2)
            if free:
                self._written[0] += kept
            return free

    def row(self, row: int) -> Memory:
        """That of one stream of the batch; a view."""
        storage = KeyValue(*(None if part is None else part[row : row + 1] for part in self._storage))
        return Memory(storage, self.size, self._end, self._written)

    def _moved(self, room: int, kept: int) -> Memory:
        """A copy with room for frames behind it, of which `kept` are taken."""
        parts = []
        for part in (self.key, self.value):
            if part is not None:
                with torch.inference_mode(False):  # steps in and outside of that mode may write to it
                    storage = part.new_empty(part.size(0), part.size(1), room, part.size(3))
                storage[:, :, : self.size] = part
                part = storage
            parts.append(part)
        return Memory(KeyValue(*parts), self.size, self.size, [self.size + kept])


@dataclass(frozen=True, eq=False)
class StreamState:
    """What a batch of streams remembers between two chunks; of constant size but for `ahead`, empty at first.

    samples: (batch, frontend padding), the last samples. ahead: (batch, look-ahead, dim), frames that were heard as
    look-ahead only. frames: (batch, conv_pos - 1, dim), the frames before those, for the positions. memory: keys and
    values per depth, (batch, heads, left context / pooling, head dim), newest last. heard: squeezed frames that each
    stream has run so far; what `memory` has beyond them is no frame. origin: the batch and its row that this is a view
    of, if any.
    """

    samples: Tensor
    ahead: Tensor
    frames: Tensor
    memory: Tuple[Memory, ...]
    heard: Tuple[int, ...]
    origin: Optional[Tuple[StreamState, int]] = field(default=None, repr=False)

    @staticmethod
    def stack(states: Sequence[StreamState]) -> StreamState:
        """One batch of several states, which must hold equally many look-ahead frames.

        States that are all rows of one batch that was split, in order, are that batch: nothing is copied.
        """
        batch = states[0].origin[0] if states[0].origin else None
        if batch is not None and len(states) == len(batch.heard):
            if all(state.origin == (batch, row) for row, state in enumerate(states)):
                return batch
        if len(states) == 1:
            return states[0]
        return StreamState(
            torch.cat([state.samples for state in states]),
            torch.cat([state.ahead for state in states]),
            torch.cat([state.frames for state in states]),
            tuple(_stack_memory(layer) for layer in zip(*(state.memory for state in states))),
            sum((state.heard for state in states), ()),
        )

    def split(self) -> List[StreamState]:
        """The states of the streams of a batch, one by one; views of it."""
        if len(self.heard) == 1:
            return [self]
        return [
            StreamState(
                self.samples[row : row + 1],
                self.ahead[row : row + 1],
                self.frames[row : row + 1],
                tuple(layer.row(row) for layer in self.memory),
                (heard,),
                origin=(self, row),
            )
            for row, heard in enumerate(self.heard)
        ]

    def to_dict(self) -> Dict[str, Any]:
        """Tensors, lists and numbers, which torch.save and torch.load(weights_only=True) carry."""
        return {
            "samples": self.samples.clone(),
            "ahead": self.ahead.clone(),
            "frames": self.frames.clone(),
            "keys": [None if layer.key is None else layer.key.clone() for layer in self.memory],
            "values": [layer.value.clone() for layer in self.memory],
            "heard": list(self.heard),
        }

    @classmethod
    def from_dict(cls, saved: Dict[str, Any]) -> StreamState:
        """The state that `to_dict` saved."""
        memory = tuple(
            Memory(KeyValue(key, value), value.size(2)) for key, value in zip(saved["keys"], saved["values"])
        )
        return cls(saved["samples"], saved["ahead"], saved["frames"], memory, tuple(saved["heard"]))


def _stack_memory(layers: Sequence[Memory]) -> Memory:
    key = None if layers[0].key is None else torch.cat([layer.key for layer in layers])
    value = torch.cat([layer.value for layer in layers])
    return Memory(KeyValue(key, value), value.size(2))


class _LayerPast:
    """What one layer is given in a step: its memory, of which `known` frames are real; and what it leaves behind."""

    def __init__(self, memory: Memory, known: int, kept: int):
        self.memory = memory
        self._known, self._kept = known, kept

    def extend(self, own: KeyValue) -> KeyValue:
        together, self.memory = self.memory.append(own, self._known, self._kept)
        return together


class _PastMask:
    """What layers ask of a mask in a step: which remembered frames are real, stream by stream."""

    valid = None

    def __init__(self, missing: Tensor, frames: int):
        self._missing = missing  # (batch,) squeezed frames that memory lacks
        self._frames = frames  # squeezed frames of memory and step together, from the first that any stream has

    def attention(self, query_pool: int = 1, kv_pool: int = 1) -> Tensor:
        """(batch, 1, 1, pooled frames) bool."""
        frames = torch.arange(pooled_length(self._frames, kv_pool), device=self._missing.device)
        return (frames >= (self._missing // kv_pool).unsqueeze(1))[:, None, None, :]


class Stream:
    """Runs a streaming backbone chunk by chunk at one operating point.

    Raises ValueError for a model, or an operating point, that hears the whole utterance.

    chunk_samples: samples from one chunk to the next. lookahead_samples: how many more the first chunk waits for.
    """

    def __init__(self, backbone: Backbone, point: Optional[OperatingPoint] = None):
        config = backbone.config
        points = config.operating_points
        self.point = points.default if point is None else points.check(point)
        if not self.point.chunk:
            raise ValueError(
                f"operating point '{self.point}' hears the whole utterance, which cannot be streamed; "
                + (
                    f"choose a chunk, like {self.point}c{max(points.chunk)}"
                    if config.streams
                    else "train the model with chunk_frames (config/distillation/streaming_480ms.yaml)"
                )
            )
        self.backbone = backbone
        self.config = config
        with torch.no_grad():
            self._gates = backbone.gate_values()
        self.hop = receptive_field(config.conv_layers)[1]
        self.chunk_samples = self.point.chunk * self.hop
        self.lookahead_samples = config.lookahead * self.hop
        self._remembered = [
            config.left_context // self.point.squeeze // self.point.kv_pool(depth) for depth in range(config.depth)
        ]

    def start(self, streams: int = 1) -> StreamState:
        """The state before the first sample."""
        config, device = self.config, next(self.backbone.parameters()).device
        dtype = next(self.backbone.parameters()).dtype
        zeros = lambda *shape: torch.zeros(streams, *shape, device=device, dtype=dtype)  # noqa: E731
        memory = []
        for depth, frames in enumerate(self._remembered):
            empty = zeros(config.heads_of(config.layer_map[depth]), frames, config.head_size)
            key = empty if depth % config.attention_map_every == 0 else None
            memory.append(Memory(KeyValue(key, empty), frames))
        return StreamState(
            zeros(config.frontend_padding),
            zeros(0, config.dim),
            zeros(config.conv_pos - 1, config.dim),
            tuple(memory),
            (0,) * streams,
        )

    def samples_needed(self, state: StreamState) -> int:
        """How many samples the next step takes."""
        return (self.point.chunk + self.config.lookahead - state.ahead.size(1)) * self.hop

    @torch.no_grad()
    def step(self, samples: Tensor, state: StreamState) -> Tuple[Tensor, StreamState]:
        """Hears `samples_needed` samples (batch, samples) and gives the next chunk of frames (batch, chunk, dim)."""
        if samples.size(1) != self.samples_needed(state):
            raise ValueError(f"a step takes {self.samples_needed(state)} samples, found {samples.size(1)}")
        x, state = self._hear(samples, state)
        return self._run(x, self.point.chunk, state)

    @torch.no_grad()
    def finish(self, samples: Tensor, state: StreamState) -> Tensor:
        """Hears the last `samples` (1, samples), fewer than a step's, and gives all frames that are left.

        Samples after the last whole frame are not heard, as in the frontend over a whole utterance.
        """
        x, state = self._hear(samples, state)
        outputs = []
        while x.size(1):
            frames = min(self.point.chunk, x.size(1))
            y, state = self._run(x[:, : frames + self.config.lookahead], frames, state)
            outputs.append(y)
            x = x[:, frames:]
        return torch.cat(outputs, dim=1) if outputs else samples.new_zeros(1, 0, self.config.dim)

    def _hear(self, samples: Tensor, state: StreamState) -> Tuple[Tensor, StreamState]:
        """All frames (batch, time, dim) that have not been a chunk's own yet, and the state without them."""
        if [memory.size for memory in state.memory] != self._remembered:
            raise ValueError(
                f"the state is of another model, or another operating point than '{self.point}'; go on with the one "
                "that it was made with"
            )
        whole = samples.size(1) // self.hop * self.hop
        wave = torch.cat([state.samples, samples[:, :whole]], dim=1)
        if not whole:
            return state.ahead, state
        frames, _ = self.backbone.feature_extractor.convolve(wave, gates=self._gates.conv)
        x = self.backbone.project(self.backbone.normalise(frames, self._gates))
        x = torch.cat([state.ahead, self.backbone.encoder.enter(x, self._gates)], dim=1)
        return x, replace(state, origin=None, samples=wave[:, wave.size(1) - state.samples.size(1) :])

    def _run(self, x: Tensor, frames: int, state: StreamState) -> Tuple[Tensor, StreamState]:
        """Encodes the first `frames` frames of `x`, a chunk and its look-ahead."""
        config, point, encoder = self.config, self.point, self.backbone.encoder
        before = torch.cat([state.frames, x[:, :frames]], dim=1)[:, frames:]
        new = replace(state, origin=None, ahead=x[:, frames:], frames=before)
        drop_tail = config.squeeze_tail == "drop"
        if drop_tail and x.size(1) < point.squeeze and any(state.heard):
            return torch.zeros_like(x), new
        gates = self._gates
        hidden = squeeze(x, encoder.pos_conv, point.squeeze, None, drop_tail, state.frames, gates.hidden)
        if not config.norm_first:
            hidden = encoder.norm(hidden, gates)

        own = pooled_length(frames, point.squeeze, drop_tail)
        most = config.left_context // point.squeeze
        known = [min(heard, most) for heard in state.heard]
        past = [
            _LayerPast(memory, *(pooled_length(count, point.kv_pool(depth)) for count in (max(known), own)))
            for depth, memory in enumerate(state.memory)
        ]
        mask = None
        if min(known) < max(known):
            missing = torch.tensor([max(known) - frames for frames in known], device=x.device)
            mask = _PastMask(missing, max(known) + hidden.size(1))
        hidden, _, _ = encoder.run_layers(hidden, mask, point, past=past, gates=gates, keep_layers=False)
        hidden = hidden[:, :own]

        if config.norm_first:
            hidden = encoder.norm(hidden, gates)
        if point.squeeze > 1:
            hidden = encoder.upsample(hidden, point.squeeze, frames, gates.hidden)
        memory = tuple(layer.memory for layer in past)
        return hidden, replace(new, memory=memory, heard=tuple(heard + own for heard in state.heard))
