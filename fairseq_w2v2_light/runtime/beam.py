"""CTC prefix beam search, one frame a step: the search of decode.py (utterances) and incremental.py (streams)."""

from dataclasses import dataclass
from typing import List, NamedTuple, Optional, Tuple

import numpy as np


class Token(NamedTuple):
    """One decoded label: its index among the symbols, and its frames [start, end) in the alignment.

    Frames are counted since the stream began.
    """

    index: int
    start: int
    end: int


class Beam(NamedTuple):
    """The prefixes that a search has kept after `frames` frames, in no order; never changed in place.

    settled: tokens that every prefix began with. prefixes: for each, the label indices after the settled ones; there
    are some, unless nothing is decoded, so that a prefix's last token is always here.
    ends_blank, ends_token: (prefixes,) log-probability of a prefix, summed over the alignments so far whose last
    symbol is a blank, or the prefix's last token. path_blank, path_token: (prefixes,) that of the best such alignment.
    bounds_blank, bounds_token: the tokens' frames in it: start, end, start, end, ...; the last token of an alignment
    that ends with it has no end yet. settled_until: end of the last settled token.
    """

    frames: int
    settled: Tuple[Token, ...]
    settled_until: int
    prefixes: List[Tuple[int, ...]]
    ends_blank: np.ndarray
    ends_token: np.ndarray
    path_blank: np.ndarray
    path_token: np.ndarray
    bounds_blank: List[Tuple[int, ...]]
    bounds_token: List[Tuple[int, ...]]

    @classmethod
    def start(cls, frames: int = 0) -> "Beam":
        """Nothing decoded, `frames` frames since the stream began."""
        certain, impossible = np.zeros(1), np.full(1, -np.inf)
        return cls(frames, (), frames, [()], certain, impossible, certain, impossible, [()], [()])

    @property
    def totals(self) -> np.ndarray:
        """(prefixes,) log-probability of each prefix, summed over its alignments so far."""
        return np.logaddexp(self.ends_blank, self.ends_token)

    def tokens(self) -> Tuple[Token, ...]:
        """The best labelling so far, in the best alignment that the search has kept of it (Viterbi)."""
        return self.settled + tuple(self._aligned(int(self.totals.argmax())))

    def labellings(self) -> List[Tuple[int, ...]]:
        """Label indices of every prefix, most probable first."""
        settled = tuple(token.index for token in self.settled)
        return [settled + self.prefixes[row] for row in np.argsort(-self.totals, kind="stable")]

    def settle(self, max_pending: Optional[int] = None) -> "Beam":
        """Settles the tokens that all prefixes begin with, and that in none of them is the last one.

        Where a prefix has more than `max_pending` others, those prefixes that disagree with the best one on the oldest
        are dropped. What is settled keeps its frames, whichever prefix will be the best one later.
        """
        beam = self
        if max_pending is not None and max(map(len, self.prefixes)) > max_pending:
            best = self.prefixes[int(self.totals.argmax())]
            if len(best) > 1:
                kept = [row for row, prefix in enumerate(self.prefixes) if len(prefix) > 1 and prefix[0] == best[0]]
            else:
                kept = [row for row, prefix in enumerate(self.prefixes) if len(prefix) <= max_pending]
            beam = self._rows(kept)
        count = _shared(beam.prefixes)
        if count == 0:
            return beam
        tokens = beam._aligned(int(beam.totals.argmax()))[:count]
        return beam._replace(
            settled=beam.settled + tuple(tokens),
            settled_until=tokens[-1].end,
            prefixes=[prefix[count:] for prefix in beam.prefixes],
            bounds_blank=[bounds[2 * count :] for bounds in beam.bounds_blank],
            bounds_token=[bounds[2 * count :] for bounds in beam.bounds_token],
        )

    def _rows(self, rows: List[int]) -> "Beam":
        arrays = ("ends_blank", "ends_token", "path_blank", "path_token")
        lists = ("prefixes", "bounds_blank", "bounds_token")
        fields = {name: getattr(self, name)[rows] for name in arrays}
        fields.update({name: [getattr(self, name)[row] for row in rows] for name in lists})
        return self._replace(**fields)

    def _aligned(self, row: int) -> List[Token]:
        bounds = self.bounds_blank[row]
        if self.path_token[row] > self.path_blank[row]:
            bounds = self.bounds_token[row] + (self.frames,)
        tokens, heard = [], self.settled_until
        for index, start, end in zip(self.prefixes[row], bounds[::2], bounds[1::2]):
            # The settled tokens before may have their frames from another prefix.
            start = max(start, heard)
            heard = max(end, start)
            tokens.append(Token(index, start, heard))
        return tokens


@dataclass(frozen=True)
class PrefixSearch:
    """Prefix beam search (Graves 2006; Hannun 2014); see `decode.prefix_beam_search` for the settings.

    max_pending: see `Beam.settle`; None never drops a prefix for its length.
    """

    blank: int
    beam: int
    max_symbols: Optional[int] = 50
    min_log_prob: Optional[float] = -16.0
    max_pending: Optional[int] = None

    def __post_init__(self):
        for name in ("beam", "max_symbols", "max_pending"):
            value = getattr(self, name)
            if value is None and name != "beam":
                continue
            if value < 1:
                remedy = "" if name == "beam" else ", or None for no pruning"
                raise ValueError(f"{name} is {value}; expected at least 1{remedy}")

    def step(self, beam: Beam, frame: np.ndarray) -> Beam:
        """The beam after one more frame: (symbols,) float64 log-probabilities."""
        symbols = self._extensions(frame)
        last = np.array([prefix[-1] if prefix else self.blank for prefix in beam.prefixes])
        total = beam.totals

        stays_blank = total + frame[self.blank]
        stays_token = beam.ends_token + frame[last]
        # A repeated token is a new one only where a blank came between.
        extended = np.where(symbols == last[:, None], beam.ends_blank[:, None], total[:, None]) + frame[symbols]

        ends_with_token = (beam.path_token > beam.path_blank).tolist()
        path = np.maximum(beam.path_blank, beam.path_token)
        # The best alignments of all before this frame, the last token's end included.
        closed = [
            token + (beam.frames,) if with_token else blank
            for with_token, token, blank in zip(ends_with_token, beam.bounds_token, beam.bounds_blank)
        ]
        path_blank = path + frame[self.blank]
        path_token = beam.path_token + frame[last]
        bounds_token = list(beam.bounds_token)

        def into_child(row: int, symbol: int) -> Tuple[float, Tuple[int, ...]]:
            before, bounds = (beam.path_blank, beam.bounds_blank) if symbol == last[row] else (path, closed)
            return before[row] + frame[symbol], bounds[row] + (beam.frames,)

        # A prefix that extends to one already in the beam joins it.
        rows = {prefix: row for row, prefix in enumerate(beam.prefixes)}
        columns = np.full(len(frame), -1)
        columns[symbols] = np.arange(len(symbols))
        for child, column in enumerate(columns[last].tolist()):
            parent = rows.get(beam.prefixes[child][:-1])
            if column < 0 or parent is None:
                continue
            stays_token[child] = np.logaddexp(stays_token[child], extended[parent, column])
            extended[parent, column] = -np.inf
            joined, bounds = into_child(parent, int(last[child]))
            if joined > path_token[child]:
                path_token[child], bounds_token[child] = joined, bounds

        candidates = np.concatenate([np.logaddexp(stays_blank, stays_token), extended.ravel()])
        chosen = _largest(candidates, min(self.beam, len(candidates)))
        chosen = chosen[candidates[chosen] > -np.inf]
        if len(chosen) == 0:
            # An impossible frame: the best prefix before it stays.
            chosen = total.argmax(keepdims=True)

        stayed = chosen[chosen < len(last)]
        grown = chosen[chosen >= len(last)] - len(last)
        new_rows, new_columns = np.divmod(grown, max(1, len(symbols)))
        new = [
            (row, symbol, *into_child(row, symbol))
            for row, symbol in zip(new_rows.tolist(), symbols[new_columns].tolist())
        ]
        impossible = np.full(len(grown), -np.inf)
        stayed_rows = stayed.tolist()
        return Beam(
            frames=beam.frames + 1,
            settled=beam.settled,
            settled_until=beam.settled_until,
            prefixes=[beam.prefixes[row] for row in stayed_rows]
            + [beam.prefixes[row] + (symbol,) for row, symbol, _, _ in new],
            ends_blank=np.concatenate([stays_blank[stayed], impossible]),
            ends_token=np.concatenate([stays_token[stayed], extended.ravel()[grown]]),
            path_blank=np.concatenate([path_blank[stayed], impossible]),
            path_token=np.concatenate([path_token[stayed], [score for _, _, score, _ in new]]),
            # Nothing leads to a new prefix and a blank after it: those bounds only have the right length.
            bounds_blank=[closed[row] for row in stayed_rows] + [bounds + (beam.frames + 1,) for *_, bounds in new],
            bounds_token=[bounds_token[row] for row in stayed_rows] + [bounds for *_, bounds in new],
        ).settle(self.max_pending)

    def _extensions(self, frame: np.ndarray) -> np.ndarray:
        symbols = np.arange(len(frame))
        if self.min_log_prob is not None:
            symbols = np.flatnonzero(frame >= self.min_log_prob)
        symbols = symbols[symbols != self.blank]
        if self.max_symbols is not None and len(symbols) > self.max_symbols:
            symbols = symbols[_largest(frame[symbols], self.max_symbols)]
        return symbols


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    return np.argpartition(values, len(values) - count)[-count:]


def _shared(prefixes: List[Tuple[int, ...]]) -> int:
    """How many leading tokens all prefixes share, the last one of the shortest not counted."""
    shortest = min(map(len, prefixes))
    if shortest < 2:
        return 0
    # What the first and the last in lexicographic order share, all between them share too.
    low, high = min(prefixes), max(prefixes)
    count = 0
    while count < shortest - 1 and low[count] == high[count]:
        count += 1
    return count
