"""Chunked attention: which frames of a streaming model hear which others, as a mask over the whole utterance.

Frames are cut into chunks of `size`. A chunk attends to `left` frames before it, to itself, and to `ahead` frames
after it. Look-ahead frames are copies that belong to their chunk: they hear what it hears and are thrown away at the
end, while their originals, in the chunks after, hear more. So look-ahead does not add up from layer to layer (Emformer,
arXiv 2010.10759), and what a frame hears ends `ahead` frames after its chunk, whatever the depth.

Copies stand behind the originals, so that every layer treats both alike. Example, 5 frames, size 2, ahead 1:

    frame   0  1  2  3  4  -  2  4  -
    chunk   0  0  1  1  2  2  0  1  2      (- are no frames; they fill the last chunk up)
"""

from __future__ import annotations

from typing import Dict, Optional, Tuple

import torch
from torch import Tensor

from .masks import FrameMask, pooled_length


class ChunkLayout:
    """Where the frames of `time` frames and their copies stand, for one chunk size; all in (squeezed) frames."""

    def __init__(self, time: int, size: int, left: int, ahead: int, device=None):
        self.time = time
        self.size = size
        self.left = left
        chunks = pooled_length(time, size)
        originals = torch.arange(chunks * size if ahead else time, device=device)
        numbers = torch.arange(chunks, device=device)
        copies = ((numbers + 1) * size).unsqueeze(1) + torch.arange(ahead, device=device)
        self.originals = originals.size(0)
        # the frame that stands at each place, and the chunk that it belongs to
        self.frame = torch.cat([originals, copies.flatten()])
        self.chunk = torch.cat([originals // size, numbers.repeat_interleave(ahead)])

    def extend(self, x: Tensor) -> Tensor:
        """Adds the copies: (batch, time, channel) -> (batch, places, channel)."""
        if self.frame.size(0) == self.time:
            return x
        return x.index_select(1, self.frame.clamp(max=self.time - 1))

    def restrict(self, x: Tensor) -> Tensor:
        """Takes them away again: (batch, places, channel) -> (batch, time, channel)."""
        return x[:, : self.time]

    def hears(self, query_pool: int = 1, kv_pool: int = 1) -> Tensor:
        """(pooled places, pooled places) bool: True where a query's chunk hears a key. Windows never cross chunks."""
        query_chunk = self.chunk[::query_pool].unsqueeze(1)
        chunk, frame = self.chunk[::kv_pool], self.frame[::kv_pool]
        is_copy = torch.arange(chunk.size(0), device=chunk.device) >= pooled_length(self.originals, kv_pool)
        past = (chunk < query_chunk) & (frame >= query_chunk * self.size - self.left) & ~is_copy
        return past | (chunk == query_chunk)


class ChunkMask:
    """What layers ask of a FrameMask, for the places of a ChunkLayout; `mask` marks the valid frames (None: all).

    `valid` is (batch or 1, places) bool, or None when every place holds a valid frame.
    """

    def __init__(self, layout: ChunkLayout, mask: Optional[FrameMask] = None):
        self.layout = layout
        self.valid: Optional[Tensor] = None
        if mask is not None:
            lengths = mask.valid.sum(1, keepdim=True)
            self.valid = layout.frame < lengths
        elif layout.frame.size(0) > layout.time:
            self.valid = (layout.frame < layout.time).unsqueeze(0)
        self._attention: Dict[Tuple[int, int], Tensor] = {}

    def attention(self, query_pool: int = 1, kv_pool: int = 1) -> Tensor:
        """(batch or 1, 1, pooled places, pooled places) bool: True where a query may attend to a key.

        Queries that are no frames keep their own chunk, so that no row of the softmax is empty.
        """
        key = (query_pool, kv_pool)
        if key not in self._attention:
            hears = self.layout.hears(query_pool, kv_pool).unsqueeze(0)
            if self.valid is not None:
                # a window is valid when its first frame is: real frames come first
                queries, keys = self.valid[:, ::query_pool], self.valid[:, ::kv_pool]
                hears = hears & (keys.unsqueeze(1) | ~queries.unsqueeze(2))
            self._attention[key] = hears.unsqueeze(1)
        return self._attention[key]
