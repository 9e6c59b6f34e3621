"""The denominator graph of LF-MMI: a smoothed n-gram over the labels, to be composed with the CTC topology."""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from fairseq_w2v2_light.data.manifest import SPECIAL_SYMBOLS, first_difference
from fairseq_w2v2_light.files import atomic_path

ORDERS = (2, 3)
# An order-3 graph holds a probability for every three labels.
MAX_LABELS_ORDER_3 = 256
# Smallest log-probability of an arc; why the recursion over frames needs one stands in lfmmi.py.
MIN_LOG_PROBABILITY = -35.0

KIND = "w2v2-light denominator graph"
VERSION = 1
_ARRAYS = ("log_start", "log_transitions", "log_final", "log_empty")
_REBUILD = "build it again with `w2v2-light denominator DATA`"
_COUNT_AT_ONCE = 1 << 20  # labels
_SCORE_AT_ONCE = 512  # transcripts

PathLike = Union[str, Path]


@dataclass(frozen=True)
class GraphTensors:
    """The graph as the recursion wants it. A history is (group, member): order 2 has one group and the last label as
    member; order 3 has the last label as group and the one before it as member. Label 0 stands for <s>, so that there
    are L + 1 members and, in order 3, groups. Arcs into label 0 do not exist.

    columns: (1 + L,) dictionary indices of the blank and of the labels; position: (symbols,) the label of each symbol
    of the dictionary, -1 for those that are none.
    log_arcs: (groups, members, labels). arcs: (groups, 2 members, labels), probabilities, first from each history's
    blank, then from its last label, which needs a blank before it is said again; reverse: arcs, the last two dimensions
    exchanged. log_final: (groups, members), that of the start being the probability of an empty transcript.
    """

    columns: torch.Tensor
    position: torch.Tensor
    log_arcs: torch.Tensor
    arcs: torch.Tensor
    reverse: torch.Tensor
    log_final: torch.Tensor


class DenominatorGraph:
    """An n-gram of order 2 or 3 over labels, in natural-log probabilities, in which every arc exists.

    symbols: every symbol of the dictionary, in its order. labels: the dictionary index of each of the L graph labels.
    blank: the dictionary index of CTC's blank.
    log_start: (L,), p(c | <s>). log_empty: p(</s> | <s>).
    log_transitions: order 2: (1, L, L), [0, b, c] = p(c | b); order 3: (L + 1, L, L), [a, b, c] = p(c | a, b), where
    a = 0 is <s> and a = i + 1 is label i. log_final: order 2: (1, L), p(</s> | b); order 3: (L + 1, L), p(</s> | a, b).
    Raises ValueError for shapes that disagree, labels that are no labels, and arcs outside of [-35, 0].
    """

    def __init__(self, symbols, labels, log_start, log_transitions, log_final, log_empty, blank: int = 0):
        self.symbols = [str(symbol) for symbol in symbols]
        self.labels = [int(label) for label in labels]
        self.blank = int(blank)
        self.log_start, self.log_transitions, self.log_final, self.log_empty = (
            torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
            for values in (log_start, log_transitions, log_final, log_empty)
        )
        self._cache: Dict[Tuple[torch.device, torch.dtype], GraphTensors] = {}
        _check_labels(self.symbols, self.labels, self.blank)
        self._check_arcs()

    @property
    def order(self) -> int:
        """2 or 3."""
        return 2 if self.log_transitions.size(0) == 1 else 3

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the graph holds, as hexadecimal text."""
        digest = hashlib.sha256(repr((VERSION, self.symbols, self.labels, self.blank)).encode("utf-8"))
        for name in _ARRAYS:
            digest.update(getattr(self, name).numpy().astype("<f8").tobytes())
        return digest.hexdigest()

    def _check_arcs(self) -> None:
        size = len(self.labels)
        histories = self.log_transitions.size(0) if self.log_transitions.dim() == 3 else 0
        expected = {
            "log_start": (size,),
            "log_transitions": (size + 1 if histories == size + 1 else 1, size, size),
            "log_final": (size + 1 if histories == size + 1 else 1, size),
            "log_empty": (),
        }
        for name, shape in expected.items():
            values = getattr(self, name)
            if tuple(values.shape) != shape:
                raise ValueError(
                    f"denominator graph: {name} has shape {tuple(values.shape)}, expected {shape} for {size} labels "
                    f"(order 2: one table of histories; order 3: {size + 1})"
                )
            if not torch.isfinite(values).all() or values.min() < MIN_LOG_PROBABILITY or values.max() > 1e-6:
                raise ValueError(
                    f"denominator graph: {name} holds log-probabilities from {values.min():g} to {values.max():g}, "
                    f"expected all between {MIN_LOG_PROBABILITY:g} and 0; smooth the n-gram so that every arc exists"
                )
        if self.order == 3:
            _check_size(size)

    def tensors(self, device: Union[str, torch.device], dtype: torch.dtype) -> GraphTensors:
        """The graph's tensors on a device, in float32 or float64; made once for each."""
        key = (torch.device(device), dtype)
        if key not in self._cache:
            with torch.inference_mode(False):  # the first call may evaluate, a later one train
                self._cache[key] = self._build(*key)
        return self._cache[key]

    def _build(self, device: torch.device, dtype: torch.dtype) -> GraphTensors:
        size = len(self.labels) + 1
        never = float("-inf")
        if self.order == 2:
            log_arcs = torch.full((1, size, size), never, dtype=torch.float64)
            log_arcs[0, 0, 1:] = self.log_start
            log_arcs[0, 1:, 1:] = self.log_transitions[0]
            log_final = torch.cat([self.log_empty.reshape(1, 1), self.log_final], 1)
            said_again = torch.eye(size, dtype=torch.bool).unsqueeze(0)
        else:
            log_arcs = torch.full((size, size, size), never, dtype=torch.float64)
            log_arcs[0, :, 1:] = self.log_start
            log_arcs[1:, :, 1:] = self.log_transitions.transpose(0, 1)
            log_final = torch.full((size, size), never, dtype=torch.float64)
            log_final[0, 0] = self.log_empty
            log_final[1:] = self.log_final.t()
            said_again = torch.eye(size, dtype=torch.bool).unsqueeze(1)
        from_blank = log_arcs.exp()
        arcs = torch.cat([from_blank, from_blank.masked_fill(said_again, 0)], 1)
        columns = torch.tensor([self.blank] + self.labels)
        position = torch.full((len(self.symbols),), -1)
        position[columns[1:]] = torch.arange(1, size)

        weights = (log_arcs, arcs, arcs.transpose(1, 2), log_final)
        weights = [values.to(device=device, dtype=dtype).contiguous() for values in weights]
        return GraphTensors(columns.to(device), position.to(device), *weights)

    def positions(self, targets: torch.Tensor) -> torch.Tensor:
        """Graph labels (1 to L) of dictionary indices; those that the graph does not have become -1."""
        position = self.tensors(targets.device, torch.float64).position
        inside = (targets >= 0) & (targets < len(self.symbols))
        return position[targets.long().clamp(0, len(self.symbols) - 1)].masked_fill(~inside, -1)

    def score(self, positions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """log p(w) of transcripts: positions (batch, labels) in 1 to L, lengths (batch,); float64, (batch,)."""
        graph = self.tensors(positions.device, torch.float64)
        inside = torch.arange(positions.size(1), device=positions.device) < lengths.unsqueeze(1)
        labels = positions.masked_fill(~inside, 0).long()
        start = labels.new_zeros(labels.size(0), 1)
        last = torch.cat([start, labels], 1)  # the label before each label, and the last one of all
        before = torch.cat([start, last[:, :-1]], 1)
        groups, members = (torch.zeros_like(last), last) if self.order == 2 else (last, before)
        arcs = graph.log_arcs[groups[:, :-1], members[:, :-1], labels].masked_fill(~inside, 0).sum(1)
        end = lengths.long().unsqueeze(1)
        return arcs + graph.log_final[groups.gather(1, end), members.gather(1, end)].squeeze(1)

    def check_dictionary(self, symbols: Sequence[str], where: str) -> None:
        """Raises ValueError, naming the first symbol that differs, when the graph was built for another dictionary.

        symbols: every symbol of the dictionary, fairseq's own included; where: what to call it in the message.
        """
        found = [str(symbol) for symbol in symbols]
        if found == self.symbols:
            return
        index, *differing = first_difference(found, self.symbols)
        theirs, ours = ("no symbol" if symbol is None else repr(symbol) for symbol in differing)
        raise ValueError(
            f"{where}: the denominator graph was built for another dictionary: at index {index} the dictionary has "
            f"{theirs}, the graph has {ours} ({len(found)} and {len(self.symbols)} symbols); {_REBUILD} from the data "
            "of this dictionary"
        )

    def save(self, path: PathLike) -> None:
        """Writes the graph to a .npz file, in one step."""
        content = {
            "kind": np.array(KIND),
            "version": np.array(VERSION),
            "order": np.array(self.order),
            "symbols": np.array(self.symbols, dtype=np.str_),
            "labels": np.array(self.labels, dtype=np.int64),
            "blank": np.array(self.blank),
            "fingerprint": np.array(self.fingerprint),
            **{name: getattr(self, name).numpy() for name in _ARRAYS},
        }
        # An open file: numpy would add .npz to a name without it.
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **content)

    @classmethod
    def load(cls, path: PathLike) -> "DenominatorGraph":
        """Reads a graph.

        Raises FileNotFoundError when the file is missing and ValueError when it is no graph, damaged, or of a version
        that this code does not know.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such denominator graph; make it with `w2v2-light denominator DATA`")
        content = _read_npz(path)
        if "kind" not in content or str(content["kind"]) != KIND:
            raise ValueError(f"{path}: not a denominator graph; {_REBUILD}")
        version = content.get("version", "none")
        if str(version) != str(VERSION):
            raise ValueError(f"{path}: denominator graph of version {version}, expected {VERSION}; {_REBUILD}")
        try:
            arrays = [content[name] for name in _ARRAYS]
            graph = cls(content["symbols"].tolist(), content["labels"], *arrays, blank=content["blank"])
            intact = graph.fingerprint == str(content["fingerprint"])
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: damaged denominator graph ({error}); {_REBUILD}") from None
        if not intact:
            raise ValueError(f"{path}: damaged denominator graph (its fingerprint does not match); {_REBUILD}")
        return graph


def _read_npz(path: Path) -> Dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                raise ValueError(f"{path}: not a denominator graph; {_REBUILD}")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ValueError(f"{path}: damaged denominator graph ({error}); {_REBUILD}") from None


def _check_size(labels: int) -> None:
    if labels > MAX_LABELS_ORDER_3:
        raise ValueError(
            f"a denominator graph of order 3 has a probability for every three labels: found {labels} labels, expected "
            f"at most {MAX_LABELS_ORDER_3}; choose order 2"
        )


def _check_labels(symbols: List[str], labels: List[int], blank: int) -> None:
    if not labels:
        raise ValueError("denominator graph: found no label; the dictionary must hold one besides fairseq's own")
    if len(set(labels)) != len(labels):
        raise ValueError(f"denominator graph: a label is listed twice in {labels}")
    for name, index in [("blank", blank)] + [("label", label) for label in labels]:
        if not 0 <= index < len(symbols):
            raise ValueError(f"denominator graph: {name} {index} is not in the dictionary of {len(symbols)} symbols")
    if blank in labels:
        raise ValueError(f"denominator graph: index {blank} is both the blank and a label")


def estimate(
    sequences: Iterable[Sequence[int]],
    symbols: Sequence[str],
    labels: Optional[Sequence[int]] = None,
    order: int = 2,
    blank: int = 0,
) -> DenominatorGraph:
    """A graph with interpolated Witten-Bell probabilities of transcripts.

    p(c|h) = (N(h,c) + T(h) p(c|h')) / (N(h) + T(h)), where N counts, T(h) is the number of different successors of h
    and h' is h without its first label; the last resort is uniform over the labels and </s>. Every arc exists, and
    none is below e^-35 (for which a history's sum may exceed 1 by less than 1e-12, in a huge corpus).
    sequences: dictionary indices of each transcript; one may be empty. symbols: the whole dictionary, in its order.
    labels: dictionary indices of the labels (default: all but fairseq's <s>, <pad>, </s>, <unk>).
    Raises ValueError for no transcripts, symbols that are no labels, and order 3 with more than 256 labels.
    Source: Witten and Bell, 1991, method C; interpolated as in Chen and Goodman, 1998, section 2.
    """
    symbols = [str(symbol) for symbol in symbols]
    if labels is None:
        labels = [index for index, symbol in enumerate(symbols) if symbol not in SPECIAL_SYMBOLS]
    labels = [int(label) for label in labels]
    if order not in ORDERS:
        raise ValueError(f"denominator graph: found order {order}, expected 2 or 3")
    _check_labels(symbols, labels, blank)
    if order == 3:
        _check_size(len(labels))
    counts = _count(sequences, symbols, labels, order)
    size = len(labels)
    bigram_counts = counts.sum(0) if order == 3 else counts
    unigrams = _interpolate(bigram_counts.sum(0), np.full(size + 1, 1 / (size + 1)))
    bigrams = _interpolate(bigram_counts, unigrams)
    # The start has no longer history to interpolate with.
    longest = _interpolate(counts[:, 1:], bigrams[1:]) if order == 3 else bigrams[None, 1:]
    start, longest = (np.maximum(np.log(table), MIN_LOG_PROBABILITY) for table in (bigrams[0], longest))
    return DenominatorGraph(
        symbols, labels, start[:size], longest[..., :size], longest[..., size], start[size], blank=blank
    )


def _interpolate(counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Witten-Bell over the last dimension; a history that was never seen has the lower order's probabilities."""
    total = counts.sum(-1, keepdims=True)
    types = (counts > 0).sum(-1, keepdims=True)
    return np.where(total > 0, (counts + types * lower) / np.maximum(total + types, 1), lower)


def _count(sequences, symbols: List[str], labels: List[int], order: int) -> np.ndarray:
    """Counts of (history, next): (last label, next), order 3 (the one before, last label, next), float64.

    Histories: 0 is <s>, i + 1 is label i; next: i is label i, the last one is </s>.
    """
    size = len(labels) + 1
    position = np.full(len(symbols), -1)
    position[labels] = np.arange(1, size)
    counts = np.zeros((size,) * order)
    waiting, pending, number = [], 0, 0
    for number, sequence in enumerate(sequences, start=1):
        indices = np.asarray(sequence, dtype=np.int64).reshape(-1)
        if indices.size and (indices.min() < 0 or indices.max() >= len(symbols)):
            raise ValueError(f"transcript {number}: holds an index outside of the dictionary of {len(symbols)} symbols")
        known = position[indices]
        if (known < 0).any():
            symbol = symbols[indices[known < 0][0]]
            raise ValueError(f"transcript {number}: {symbol!r} is no label of the denominator graph")
        waiting.append(known)
        pending += known.size + 1
        if pending >= _COUNT_AT_ONCE:
            _add_counts(counts, waiting)
            waiting, pending = [], 0
    if number == 0:
        raise ValueError("found no transcript; a denominator graph needs at least one")
    _add_counts(counts, waiting)
    return counts


def _add_counts(counts: np.ndarray, sequences: List[np.ndarray]) -> None:
    size, order = counts.shape[0], counts.ndim
    if not sequences:
        return
    following = np.concatenate([np.append(sequence, size) for sequence in sequences]) - 1
    last = np.concatenate([np.append(0, sequence) for sequence in sequences])
    code = last * size + following
    if order == 3:
        before = np.concatenate([np.append([0, 0], sequence)[: sequence.size + 1] for sequence in sequences])
        code += before * size * size
    counts += np.bincount(code.astype(np.int64), minlength=counts.size).reshape(counts.shape)


def perplexity(graph: DenominatorGraph, sequences: Iterable[Sequence[int]]) -> float:
    """exp of minus the mean log-probability per event, an event being a label or the end of a transcript."""
    log_probability, events = 0.0, 0
    sequences = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    for first in range(0, len(sequences), _SCORE_AT_ONCE):
        some = sequences[first : first + _SCORE_AT_ONCE]
        lengths = torch.tensor([len(sequence) for sequence in some])
        labels = graph.positions(torch.nn.utils.rnn.pad_sequence(some, batch_first=True))
        log_probability += graph.score(labels, lengths).sum().item()
        events += int(lengths.sum()) + len(some)
    return float(np.exp(-log_probability / max(events, 1)))
