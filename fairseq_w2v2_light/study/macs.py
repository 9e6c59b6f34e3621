"""Multiply-accumulates (MACs) of one forward pass, by part, from shapes alone."""

from __future__ import annotations

from typing import Dict, Iterator, List, NamedTuple

from ..nn.config import EncoderConfig
from ..nn.frontend import receptive_field
from ..nn.masks import pooled_length
from ..nn.operating_point import OperatingPoint

SAMPLE_RATE = 16000


class _Pass(NamedTuple):
    """One run of the Transformer: over the whole utterance, or over a chunk.

    frames: those that it is for. heard: those that it runs, look-ahead included. past: squeezed frames before them
    whose keys and values are at hand.
    """

    frames: int
    heard: int
    past: int


def count_macs(
    config: EncoderConfig, samples: int, point: OperatingPoint = OperatingPoint(), vocabulary: int = 0
) -> Dict[str, int]:
    """MACs of inference on one utterance of `samples` samples at an operating point; norms and activations are free.

    Keys: frontend, projection, positions, attention, ffn, unsqueeze, head (a CTC projection to `vocabulary` symbols).
    Formulas (10) to (12) of HJ-Pruning (arXiv 2302.14132), with the frame counts that squeeze and pooling leave: its
    own figures are those of s1q1k1. A layer that reuses an attention map skips q_proj, k_proj and the scores.

    A point with a chunk is counted as `nn.streaming.Stream` runs it, chunk by chunk: scores only over the left context
    and the chunk with its look-ahead, look-ahead frames in the Transformer twice, and the frontend's lower layers again
    over the samples that a chunk shares with the one before.
    """
    point = config.operating_points.check(point)
    field, hop = receptive_field(config.conv_layers)
    fewest = field - config.frontend_padding
    if samples < fewest:
        raise ValueError(f"audio of {samples} samples is too short to count: one frame needs {fewest} samples")
    frames = config.frames(samples)
    blocks = _blocks(config, samples, hop, point)
    passes = list(_passes(config, frames, point))
    drop_tail = config.squeeze_tail == "drop"
    dim = config.dim
    squeezed = [pooled_length(one.heard, point.squeeze, drop_tail) for one in passes]
    own = sum(pooled_length(one.frames, point.squeeze, drop_tail) for one in passes)
    positions = sum(pooled_length(one.heard, point.squeeze) for one in passes)

    return {
        "frontend": sum(_frontend_macs(config, config.frontend_padding + block) for block in blocks),
        "projection": frames * config.features_dim * dim if config.features_dim != dim else 0,
        "positions": positions * dim * (dim // config.conv_pos_groups) * config.conv_pos,
        "attention": sum(
            _attention_macs(config, depth, now, one.past, point)
            for now, one in zip(squeezed, passes)
            for depth in range(config.depth)
        ),
        "ffn": config.depth * 2 * sum(squeezed) * dim * config.ffn_dim,
        "unsqueeze": own * dim * point.squeeze * dim if point.squeeze > 1 else 0,
        "head": frames * dim * vocabulary,
    }


def _blocks(config: EncoderConfig, samples: int, hop: int, point: OperatingPoint) -> List[int]:
    """Samples that the frontend hears at a time, without those of before."""
    if not point.chunk:
        return [samples]
    ahead, step = config.lookahead * hop, point.chunk * hop
    steps = max(0, (samples - ahead) // step)
    blocks = [step] * steps
    if steps:
        blocks[0] += ahead
    rest = (samples - sum(blocks)) // hop * hop
    return blocks + [rest] if rest else blocks


def _passes(config: EncoderConfig, frames: int, point: OperatingPoint) -> Iterator[_Pass]:
    if not point.chunk:
        yield _Pass(frames, frames, 0)
        return
    drop_tail = config.squeeze_tail == "drop"
    heard_before = 0
    for start in range(0, frames, point.chunk):
        own = min(point.chunk, frames - start)
        heard = min(own + config.lookahead, frames - start)
        if drop_tail and heard_before and heard < point.squeeze:
            return
        yield _Pass(own, heard, min(heard_before, config.left_context // point.squeeze))
        heard_before += pooled_length(own, point.squeeze, drop_tail)


def _frontend_macs(config: EncoderConfig, samples: int) -> int:
    macs, in_channels, frames = 0, 1, samples
    for channels, kernel, stride in config.conv_layers:
        frames = (frames - kernel) // stride + 1
        macs += frames * channels * in_channels * kernel
        in_channels = channels
    return macs


def _attention_macs(config: EncoderConfig, depth: int, frames: int, past: int, point: OperatingPoint) -> int:
    queries = pooled_length(frames, point.query_pool(depth))
    keys = pooled_length(frames, point.kv_pool(depth))
    heard = keys + pooled_length(past, point.kv_pool(depth))
    inner = config.dim
    value_and_output = (keys + queries) * config.dim * inner + queries * heard * inner
    if depth % config.attention_map_every:
        return value_and_output
    return value_and_output + (queries + keys) * config.dim * inner + queries * heard * inner
