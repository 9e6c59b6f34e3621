"""Multiply-accumulates (MACs) of one forward pass, by part, from shapes alone."""

from __future__ import annotations

from typing import Dict

from ..nn.config import EncoderConfig
from ..nn.frontend import frame_lengths, receptive_field
from ..nn.masks import pooled_length
from ..nn.operating_point import OperatingPoint

SAMPLE_RATE = 16000


def count_macs(
    config: EncoderConfig, samples: int, point: OperatingPoint = OperatingPoint(), vocabulary: int = 0
) -> Dict[str, int]:
    """MACs of inference on one utterance of `samples` samples at an operating point; norms and activations are free.

    Keys: frontend, projection, positions, attention, ffn, unsqueeze, head (a CTC projection to `vocabulary` symbols).
    Formulas (10) to (12) of HJ-Pruning (arXiv 2302.14132), with the frame counts that squeeze and pooling leave: its
    own figures are those of s1q1k1. A layer that reuses an attention map skips q_proj, k_proj and the scores.
    """
    config.operating_points.check(point)
    field, _ = receptive_field(config.conv_layers)
    if samples < field:
        raise ValueError(f"audio of {samples} samples is too short to count: one frame needs {field} samples")
    frames = frame_lengths(samples, config.conv_layers)
    drop_tail = config.squeeze_tail == "drop"
    squeezed = pooled_length(frames, point.squeeze, drop_tail)
    dim = config.dim

    return {
        "frontend": _frontend_macs(config, samples),
        "projection": frames * config.features_dim * dim if config.features_dim != dim else 0,
        "positions": pooled_length(frames, point.squeeze) * dim * (dim // config.conv_pos_groups) * config.conv_pos,
        "attention": sum(_attention_macs(config, depth, squeezed, point) for depth in range(config.depth)),
        "ffn": config.depth * 2 * squeezed * dim * config.ffn_dim,
        "unsqueeze": squeezed * dim * point.squeeze * dim if point.squeeze > 1 else 0,
        "head": frames * dim * vocabulary,
    }


def _frontend_macs(config: EncoderConfig, samples: int) -> int:
    macs, in_channels, frames = 0, 1, samples
    for channels, kernel, stride in config.conv_layers:
        frames = (frames - kernel) // stride + 1
        macs += frames * channels * in_channels * kernel
        in_channels = channels
    return macs


def _attention_macs(config: EncoderConfig, depth: int, frames: int, point: OperatingPoint) -> int:
    queries = pooled_length(frames, point.query_pool(depth))
    keys = pooled_length(frames, point.kv_pool(depth))
    inner = config.dim
    value_and_output = (keys + queries) * config.dim * inner + queries * keys * inner
    if depth % config.attention_map_every:
        return value_and_output
    return value_and_output + (queries + keys) * config.dim * inner + queries * keys * inner
