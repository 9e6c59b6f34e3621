"""Operating points: how many frames the Transformer sees in one call.

An operating point names three factors: squeeze (the Transformer runs at 1/s of the frame rate), query pooling and
key-value pooling (attention runs with 1/q of the queries and 1/k of the keys). Its text form is `s2q1k2`; pooling
factors may differ per layer: `s1q1-1-2-2k1`, or run-length `s1q1x6-2x6k2`. A streaming model's point also has the chunk
that it hears at a time, in frames: `s1q1k1c24`; without it, the largest one of the model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from dataclasses import dataclass
from typing import Iterator, Sequence, Tuple

_FORM = re.compile(r"s(\d+)q([\dx-]+)k([\dx-]+)(?:c(\d+))?")
_ITEM = re.compile(r"(\d+)(?:x(\d+))?")
_EXPECTED = "expected sSqQkK, for example s2q1k2 (per layer: s1q1-1-2-2k1 or s1q1x6-2x6k1; streaming: s1q1k1c24)"
_MOST_LAYERS = 1000
_MOST_POINTS = 1000


@dataclass(frozen=True)
class OperatingPoint:
    """What one call chooses: squeeze factor, query pooling, key-value pooling, and the chunk of a streaming model.

    `query` and `key_value` hold one factor for all layers, or one per depth. `chunk` is in frames of the frontend; 0
    means the whole utterance or, for a model that only streams, its largest chunk. Raises ValueError for factors below
    1 and a chunk below 0.
    """

    squeeze: int = 1
    query: Tuple[int, ...] = (1,)
    key_value: Tuple[int, ...] = (1,)
    chunk: int = 0

    def __post_init__(self):
        for name in ("query", "key_value"):
            factors = tuple(int(factor) for factor in getattr(self, name))
            if not factors:
                raise ValueError(f"operating point: {name} needs at least one pooling factor; {_EXPECTED}")
            object.__setattr__(self, name, factors[:1] if len(set(factors)) == 1 else factors)
        if min(self.squeeze, *self.query, *self.key_value) < 1:
            raise ValueError(f"operating point '{self}': every factor must be 1 or more; {_EXPECTED}")
        if self.chunk < 0:
            raise ValueError(f"operating point '{self}': chunk {self.chunk} is below 0; {_EXPECTED}")

    @classmethod
    def parse(cls, text: str) -> OperatingPoint:
        """Reads the text form; raises ValueError that quotes `text` when it is malformed."""
        match = _FORM.fullmatch(str(text).strip())
        if match is None:
            raise ValueError(f"operating point '{text}': {_EXPECTED}")
        squeeze, query, key_value, chunk = match.groups()
        return cls(int(squeeze), _parse_factors(query, text), _parse_factors(key_value, text), int(chunk or 0))

    def __str__(self) -> str:
        chunk = f"c{self.chunk}" if self.chunk else ""
        return f"s{self.squeeze}q{_format_factors(self.query)}k{_format_factors(self.key_value)}{chunk}"

    def query_pool(self, depth: int) -> int:
        """Query pooling factor of the layer at `depth` (from 0)."""
        return self.query[depth] if len(self.query) > 1 else self.query[0]

    def kv_pool(self, depth: int) -> int:
        """Key-value pooling factor of the layer at `depth` (from 0)."""
        return self.key_value[depth] if len(self.key_value) > 1 else self.key_value[0]


def _parse_factors(part: str, text: str) -> Tuple[int, ...]:
    factors = []
    for item in part.split("-"):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise ValueError(f"operating point '{text}': '{item}' is no pooling factor; {_EXPECTED}")
        count = int(match.group(2) or 1)
        if not 1 <= count <= _MOST_LAYERS:
            raise ValueError(f"operating point '{text}': '{item}' is for {count} layers; {_EXPECTED}")
        factors.extend([int(match.group(1))] * count)
    return tuple(factors)


def _format_factors(factors: Sequence[int]) -> str:
    if len(factors) == 1:
        return str(factors[0])
    runs = [(factor, len(list(run))) for factor, run in itertools.groupby(factors)]
    return "-".join(f"{factor}x{count}" if count > 1 else str(factor) for factor, count in runs)


@dataclass(frozen=True)
class OperatingPointSpace:
    """The operating points that a model is trained for.

    `squeeze`, `query`, `key_value` and `chunk` (in frames; 0: the whole utterance) are the configured sets; `depth` is
    the number of layer applications. With `per_layer`, each group of `map_every` layers (the layers that share one
    attention map) draws its own pooling.
    """

    squeeze: Tuple[int, ...] = (1,)
    query: Tuple[int, ...] = (1,)
    key_value: Tuple[int, ...] = (1,)
    depth: int = 12
    per_layer: bool = False
    map_every: int = 1
    chunk: Tuple[int, ...] = (0,)

    def __post_init__(self):
        for key, factors in zip(("squeeze_factors", "query_pools", "kv_pools"), self._sets()):
            if not factors or min(factors) < 1 or len(set(factors)) != len(factors):
                raise ValueError(f"{key}: found {list(factors)}, expected distinct integers of 1 or more, like [1, 2]")
        if not self.chunk or min(self.chunk) < 0 or len(set(self.chunk)) != len(self.chunk):
            raise ValueError(
                f"chunk_frames: found {list(self.chunk)}, expected distinct numbers of frames like [24] (0: the whole "
                "utterance)"
            )
        count = math.prod(len(factors) for factors in (*self._sets(), self.chunk))
        if count > _MOST_POINTS:
            raise ValueError(f"squeeze_factors: found {count:,} operating points, expected at most {_MOST_POINTS:,}")

    def _sets(self) -> Tuple[Tuple[int, ...], ...]:
        return self.squeeze, self.query, self.key_value

    @property
    def is_stochastic(self) -> bool:
        """Whether there is more than one operating point to draw from."""
        return any(len(factors) > 1 for factors in (*self._sets(), self.chunk))

    @property
    def default(self) -> OperatingPoint:
        """The point with the least reduction."""
        return OperatingPoint(min(self.squeeze), (min(self.query),), (min(self.key_value),), self.default_chunk)

    @property
    def default_chunk(self) -> int:
        """The whole utterance (0) where the model is trained for it, else the largest chunk."""
        return 0 if 0 in self.chunk else max(self.chunk)

    def draw(self, seed: int, update: int) -> OperatingPoint:
        """Draws the point of one training update: uniform over the sets, a pure function of (seed, update).

        The same on every rank, in every gradient-accumulation step of the update and in recomputation. "Our reading"
        of stochastic wav2vec 2.0 (arXiv 2204.11934), whose abstract says only that factors are sampled uniformly.
        """
        generator = random.Random(f"operating point {seed} {update}")

        def draw_pool(factors):
            if not self.per_layer:
                return (generator.choice(factors),)
            groups = -(-self.depth // self.map_every)
            drawn = [generator.choice(factors) for _ in range(groups)]
            return tuple(drawn[depth // self.map_every] for depth in range(self.depth))

        squeeze, query, key_value = generator.choice(self.squeeze), draw_pool(self.query), draw_pool(self.key_value)
        return OperatingPoint(squeeze, query, key_value, generator.choice(self.chunk))

    def points(self) -> Iterator[OperatingPoint]:
        """Every point with the same pooling in all layers, least reduction first."""
        chunks = sorted(self.chunk, key=lambda chunk: -chunk if chunk else -math.inf)
        for squeeze, query, key_value in itertools.product(*(sorted(factors) for factors in self._sets())):
            for chunk in chunks:
                yield OperatingPoint(squeeze, (query,), (key_value,), chunk)

    def check(self, point: OperatingPoint) -> OperatingPoint:
        """`point`, with the model's chunk where it names none.

        Raises ValueError when the model was not trained for it or cannot run it.
        """
        if point.chunk == 0:
            point = dataclasses.replace(point, chunk=self.default_chunk)
        self._check_trained(point, "squeeze factor", (point.squeeze,), self.squeeze)
        self._check_trained(point, "query pooling", point.query, self.query)
        self._check_trained(point, "key-value pooling", point.key_value, self.key_value)
        self._check_trained(point, "chunk", (point.chunk,), self.chunk)
        for name, factors in (("query", point.query), ("key-value", point.key_value)):
            if len(factors) == 1:
                continue
            if len(factors) != self.depth:
                raise ValueError(
                    f"operating point '{point}': {len(factors)} {name} pooling factors for {self.depth} layers; "
                    f"give one factor, or {self.depth}"
                )
            for depth, factor in enumerate(factors):
                owner = depth - depth % self.map_every
                if factor != factors[owner]:
                    raise ValueError(
                        f"operating point '{point}': layer {depth} reuses the attention map of layer {owner} "
                        f"(attention_map_every={self.map_every}), so their {name} pooling must be equal; "
                        f"found {factor} and {factors[owner]}"
                    )
        return point

    def _check_trained(self, point: OperatingPoint, name: str, found: Sequence[int], trained: Sequence[int]) -> None:
        missing = sorted(set(found) - set(trained))
        if missing:
            raise ValueError(
                f"operating point '{point}': the model was not trained with {name} {missing[0]}; "
                f"it was trained with {sorted(trained)}; choose one of those, or fine-tune it with that factor"
            )
