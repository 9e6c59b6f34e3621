"""CTC decoding of a stream: log-probabilities come chunk by chunk, the state is an explicit, immutable value.

    state = BeamState.start(blank=0, beam=10)
    for log_probs in chunks:                    # (time, symbols) each
        state = state.advance(log_probs)
        stable, state = state.drain()           # tokens that no future frame changes
        show(stable, state.tokens)              # ... and the best guess of the rest
    last, state = state.flush()

Nothing depends on how the frames are divided over calls of `advance`, nor on when a state is drained.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence, Tuple, Type, TypeVar, Union

import numpy as np
import torch
from torch import Tensor

from .beam import Beam, PrefixSearch, Token

LogProbs = Union[np.ndarray, Tensor]
State = TypeVar("State", bound="DecoderState")

_BEAM_ARRAYS = ("ends_blank", "ends_token", "path_blank", "path_token")
_BEAM_TUPLES = ("prefixes", "bounds_blank", "bounds_token")


@dataclass(frozen=True, eq=False)
class DecoderState:
    """What greedy and beam decoding have in common.

    blank: index of CTC's blank. never: indices that are never decoded. silent: indices of labels in which nothing is
    spoken (the word boundary), for `trailing_silence` and `is_empty`. frames: frames heard since the stream began.
    segment_start: frames heard at the last flush. trailing_silence: frames since the last one whose most probable
    symbol was neither blank nor silent, or since the last flush. drained: whether anything spoken was drained since.
    """

    blank: int
    never: Tuple[int, ...]
    silent: Tuple[int, ...]
    frames: int
    segment_start: int
    trailing_silence: int
    drained: bool

    @property
    def tokens(self) -> Tuple[Token, ...]:
        """The best labelling so far since the last flush, without what was drained."""
        raise NotImplementedError

    @property
    def is_empty(self) -> bool:
        """Whether nothing spoken was decoded since the last flush, drained tokens included."""
        return not (self.drained or self._any_spoken(self.tokens))

    def advance(self: State, log_probs: LogProbs) -> State:
        """The state after more frames: (time, symbols) log-probabilities, time 0 included.

        Raises ValueError for another shape, for NaN, and where `blank` or `never` are no symbols.
        """
        frames = self._frames(log_probs)
        if len(frames) == 0:
            return self
        best = frames.argmax(axis=1)
        return dataclasses.replace(
            self._decoded(frames, best),
            frames=self.frames + len(frames),
            trailing_silence=int(self._trailing_silence(best)[-1]),
        )

    def silences(self, log_probs: LogProbs) -> np.ndarray:
        """(time,) `trailing_silence` after each of the frames that `advance` would hear."""
        return self._trailing_silence(self._frames(log_probs).argmax(axis=1))

    def drain(self: State) -> Tuple[Tuple[Token, ...], State]:
        """Takes away the leading tokens that no future frame can change, so that the state stays small."""
        raise NotImplementedError

    def flush(self: State) -> Tuple[Tuple[Token, ...], State]:
        """Ends the labelling: all of `tokens`, and a state that decodes anew but keeps counting frames."""
        raise NotImplementedError

    def to_dict(self) -> Dict[str, Any]:
        """Numbers, strings, lists and tensors that torch.save keeps; `decoder_from_dict` is the way back."""
        raise NotImplementedError

    def _decoded(self: State, frames: np.ndarray, best: np.ndarray) -> State:
        raise NotImplementedError

    def _frames(self, log_probs: LogProbs) -> np.ndarray:
        if isinstance(log_probs, Tensor):
            log_probs = log_probs.detach().cpu().double().numpy()
        frames = np.array(log_probs, dtype=np.float64)
        if frames.ndim != 2:
            raise ValueError(f"log_probs has shape {frames.shape}; expected (time, symbols)")
        for name, indices in (("blank", (self.blank,)), ("never", self.never)):
            if any(not 0 <= index < frames.shape[1] for index in indices):
                raise ValueError(f"{name} is {getattr(self, name)}; expected indices below {frames.shape[1]} symbols")
        if np.isnan(frames).any():
            raise ValueError("log_probs has NaN values: the model, or its input, is broken")
        frames[:, list(self.never)] = -np.inf
        return frames

    def _trailing_silence(self, best: np.ndarray) -> np.ndarray:
        position = np.arange(len(best))
        spoken = ~np.isin(best, (self.blank, *self.silent))
        last = np.maximum.accumulate(np.where(spoken, position, -1 - self.trailing_silence))
        return position - last

    def _fresh(self: State, **fields: Any) -> State:
        return dataclasses.replace(self, segment_start=self.frames, trailing_silence=0, drained=False, **fields)

    def _any_spoken(self, tokens: Sequence[Token]) -> bool:
        return any(token.index not in self.silent for token in tokens)

    def _common_dict(self) -> Dict[str, Any]:
        common = {field.name: getattr(self, field.name) for field in dataclasses.fields(DecoderState)}
        return {**common, "never": list(self.never), "silent": list(self.silent)}


@dataclass(frozen=True)
class GreedyState(DecoderState):
    """Decodes each frame's most probable symbol, repetitions merged; a token's frames are those of its run.

    pending: tokens that were not drained. last: the last frame's most probable symbol.
    """

    pending: Tuple[Token, ...]
    last: Optional[int]

    @classmethod
    def start(cls, blank: int, never: Sequence[int] = (), silent: Sequence[int] = ()) -> "GreedyState":
        """The state before the first frame."""
        return cls(blank, tuple(never), tuple(silent), 0, 0, 0, False, pending=(), last=None)

    @property
    def tokens(self) -> Tuple[Token, ...]:
        return self.pending

    def drain(self) -> Tuple[Tuple[Token, ...], "GreedyState"]:
        """Drains all tokens but a last one that the next frame may go on with."""
        count = len(self.pending) - (self.last is not None and self.last != self.blank)
        stable = self.pending[:count]
        drained = self.drained or self._any_spoken(stable)
        return stable, dataclasses.replace(self, pending=self.pending[count:], drained=drained)

    def flush(self) -> Tuple[Tuple[Token, ...], "GreedyState"]:
        return self.pending, self._fresh(pending=(), last=None)

    def to_dict(self) -> Dict[str, Any]:
        pending = [list(token) for token in self.pending]
        return {"decoder": "greedy", **self._common_dict(), "pending": pending, "last": self.last}

    @classmethod
    def _from_dict(cls, saved: Dict[str, Any]) -> "GreedyState":
        pending = tuple(Token(*token) for token in saved["pending"])
        return cls(**{**_common_from_dict(saved), "pending": pending, "last": saved["last"]})

    def _decoded(self, frames: np.ndarray, best: np.ndarray) -> "GreedyState":
        changes = (np.flatnonzero(np.diff(best)) + 1).tolist()
        tokens = list(self.pending)
        for start, end in zip([0] + changes, changes + [len(best)]):
            symbol = int(best[start])
            if symbol == self.blank:
                continue
            first = self.frames + start
            if start == 0 and symbol == self.last:
                first = tokens.pop().start
            tokens.append(Token(symbol, first, self.frames + end))
        return dataclasses.replace(self, pending=tuple(tokens), last=int(best[-1]))


@dataclass(frozen=True, eq=False)
class BeamState(DecoderState):
    """Prefix beam search; a token's frames are those of the best alignment that the search has kept (Viterbi).

    The search is that of `decode.prefix_beam_search`, but for prefixes that leave more than `max_pending` tokens
    undecided (see `Beam.settle`).
    """

    search: PrefixSearch
    hypotheses: Beam

    @classmethod
    def start(
        cls,
        blank: int,
        beam: int,
        never: Sequence[int] = (),
        max_symbols: Optional[int] = 50,
        min_log_prob: Optional[float] = -16.0,
        max_pending: int = 200,
        silent: Sequence[int] = (),
    ) -> "BeamState":
        """The state before the first frame; `decode.prefix_beam_search` explains the settings."""
        search = PrefixSearch(blank, beam, max_symbols, min_log_prob, max_pending)
        return cls(blank, tuple(never), tuple(silent), 0, 0, 0, False, search=search, hypotheses=Beam.start())

    @property
    def tokens(self) -> Tuple[Token, ...]:
        return self.hypotheses.tokens()

    def drain(self) -> Tuple[Tuple[Token, ...], "BeamState"]:
        """Drains the tokens that all prefixes in the beam share, but for the last one of the shortest."""
        stable = self.hypotheses.settled
        drained = self.drained or self._any_spoken(stable)
        return stable, dataclasses.replace(self, hypotheses=self.hypotheses._replace(settled=()), drained=drained)

    def flush(self) -> Tuple[Tuple[Token, ...], "BeamState"]:
        return self.tokens, self._fresh(hypotheses=Beam.start(self.frames))

    def to_dict(self) -> Dict[str, Any]:
        beam = self.hypotheses
        saved: Dict[str, Any] = {"decoder": "beam", **self._common_dict(), "search": dataclasses.asdict(self.search)}
        saved["settled"] = [list(token) for token in beam.settled]
        saved["settled_until"] = beam.settled_until
        saved.update({name: torch.tensor(getattr(beam, name)) for name in _BEAM_ARRAYS})
        saved.update({name: [list(row) for row in getattr(beam, name)] for name in _BEAM_TUPLES})
        return saved

    @classmethod
    def _from_dict(cls, saved: Dict[str, Any]) -> "BeamState":
        beam = Beam(
            frames=saved["frames"],
            settled=tuple(Token(*token) for token in saved["settled"]),
            settled_until=saved["settled_until"],
            **{name: saved[name].numpy().copy() for name in _BEAM_ARRAYS},
            **{name: [tuple(row) for row in saved[name]] for name in _BEAM_TUPLES},
        )
        return cls(**_common_from_dict(saved), search=PrefixSearch(**saved["search"]), hypotheses=beam)

    def _decoded(self, frames: np.ndarray, best: np.ndarray) -> "BeamState":
        return dataclasses.replace(self, hypotheses=functools.reduce(self.search.step, frames, self.hypotheses))


def decoder_from_dict(saved: Dict[str, Any]) -> DecoderState:
    """The state that `to_dict` has saved; it goes on identically. Raises ValueError for anything else."""
    kinds: Dict[str, Type[Union[GreedyState, BeamState]]] = {"greedy": GreedyState, "beam": BeamState}
    kind = saved.get("decoder")
    if kind not in kinds:
        raise ValueError(f"decoder is {kind!r}; expected one of {', '.join(kinds)}: is this a saved decoder state?")
    try:
        return kinds[kind]._from_dict(saved)
    except KeyError as error:
        raise ValueError(f"a saved {kind} decoder state without {error}; it was not saved by this version") from None


def _common_from_dict(saved: Dict[str, Any]) -> Dict[str, Any]:
    common = {field.name: saved[field.name] for field in dataclasses.fields(DecoderState)}
    return {**common, "never": tuple(saved["never"]), "silent": tuple(saved["silent"])}
