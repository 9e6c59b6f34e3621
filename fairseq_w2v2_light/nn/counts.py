"""Parameters and multiply-accumulates (MACs) of a network, by part, from shapes alone: exact ones and expected ones."""

from __future__ import annotations

from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Union

from torch import Tensor

from .config import EncoderConfig
from .frontend import receptive_field
from .gates import GateValues
from .masks import pooled_length
from .operating_point import OperatingPoint

SAMPLE_RATE = 16000

Number = Union[int, float, Tensor]


class Widths(NamedTuple):
    """What pruning makes smaller; numbers, or 0-dim tensors where they are expected values.

    conv: channels of each frontend layer. heads, ffn: attention heads and inner FFN channels of each stored layer.
    dim: channels between the layers.
    """

    conv: Sequence[Number]
    heads: Sequence[Number]
    ffn: Sequence[Number]
    dim: Number


def widths_of(config: EncoderConfig) -> Widths:
    """The widths that a network has."""
    stored = range(config.unique_layers)
    return Widths(
        [channels for channels, _, _ in config.conv_layers],
        [config.heads_of(layer) for layer in stored],
        [config.ffn_of(layer) for layer in stored],
        config.dim,
    )


def expected_widths(config: EncoderConfig, probabilities: GateValues) -> Widths:
    """The widths that a network is expected to keep: sums of P(z != 0), with gradients; its own where it has no gates.

    `probabilities` are those of `Gates.probabilities`. The sums are what HJ-Pruning (arXiv 2302.14132) puts into its
    formulas (10) to (12).
    """
    own = widths_of(config)

    def expected(widths: Sequence[int], values: Optional[Sequence[Optional[Tensor]]]) -> Sequence[Number]:
        if values is None:
            return widths
        return [width if value is None else value.sum() for width, value in zip(widths, values)]

    return Widths(
        expected(own.conv, probabilities.conv),
        expected(own.heads, probabilities.heads),
        expected(own.ffn, probabilities.ffn),
        own.dim if probabilities.hidden is None else probabilities.hidden.sum(),
    )


class _Pass(NamedTuple):
    """One run of the Transformer: over the whole utterance, or over a chunk.

    frames: those that it is for. heard: those that it runs, look-ahead included. past: squeezed frames before them
    whose keys and values are at hand.
    """

    frames: int
    heard: int
    past: int


def count_macs(
    config: EncoderConfig,
    samples: int,
    point: OperatingPoint = OperatingPoint(),
    vocabulary: int = 0,
    widths: Optional[Widths] = None,
) -> Dict[str, Number]:
    """MACs of inference on one utterance of `samples` samples at an operating point; norms and activations are free.

    Keys: frontend, projection, positions, attention, ffn, unsqueeze, head (a CTC projection to `vocabulary` symbols).
    Formulas (10) to (12) of HJ-Pruning (arXiv 2302.14132), with the frame counts that squeeze and pooling leave: its
    own figures are those of s1q1k1. A layer that reuses an attention map skips q_proj, k_proj and the scores.

    A point with a chunk is counted as `nn.streaming.Stream` runs it, chunk by chunk: scores only over the left context
    and the chunk with its look-ahead, look-ahead frames in the Transformer twice, and the frontend's lower layers again
    over the samples that a chunk shares with the one before.

    `widths` replace the network's own, those of `expected_widths` for one; the counts are then tensors with gradients.
    Positions have groups of unequal size padded, and that share of padding at every width.
    """
    point = config.operating_points.check(point)
    field, hop = receptive_field(config.conv_layers)
    fewest = field - config.frontend_padding
    if samples < fewest:
        raise ValueError(
            f"audio of {samples} samples is too short to count: one frame needs {fewest} samples; count more seconds"
        )
    widths = widths_of(config) if widths is None else widths
    frames = config.frames(samples)
    blocks = _blocks(config, samples, hop, point)
    passes = list(_passes(config, frames, point))
    drop_tail = config.squeeze_tail == "drop"
    dim = widths.dim
    squeezed = [pooled_length(one.heard, point.squeeze, drop_tail) for one in passes]
    own = sum(pooled_length(one.frames, point.squeeze, drop_tail) for one in passes)
    positions = sum(pooled_length(one.heard, point.squeeze) for one in passes)

    return {
        "frontend": _frontend_macs(config, [config.frontend_padding + block for block in blocks], widths),
        "projection": frames * widths.conv[-1] * dim if config.projects else 0,
        "positions": positions * _position_weights(config, dim),
        "attention": sum(
            _attention_macs(config, depth, squeezed, passes, point, widths) for depth in range(config.depth)
        ),
        "ffn": 2 * sum(squeezed) * dim * sum(widths.ffn[stored] for stored in config.layer_map),
        "unsqueeze": own * point.squeeze * dim * dim if point.squeeze > 1 else 0,
        "head": frames * vocabulary * dim,
    }


def count_parameters(config: EncoderConfig, vocabulary: int = 0, widths: Optional[Widths] = None) -> Dict[str, Number]:
    """Stored parameters by part (those of `parts.PARTS`), without gates and the heads of pre-training.

    norms: with the mask vector. heads: a CTC projection to `vocabulary` symbols. `widths` as of `count_macs`; what a
    block has whatever its width, biases and a norm, is there in full from an expected width of 1 on.
    """
    widths = widths_of(config) if widths is None else widths
    features, dim = widths.conv[-1], widths.dim
    factor = config.unsqueeze_factor
    return {
        "frontend": _frontend_parameters(config, widths),
        "projection": (features + 1) * dim if config.projects else 0,
        "positions": _position_weights(config, dim) + config.conv_pos + _position_channels(config, dim),
        "layers": sum(_layer_parameters(config, heads, ffn, dim) for heads, ffn in zip(widths.heads, widths.ffn)),
        "unsqueeze": factor * (dim + 1) * dim if factor > 1 else 0,
        "norms": 2 * features + 3 * dim,
        "heads": (dim + 1) * vocabulary,
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


def _frontend_macs(config: EncoderConfig, blocks: Sequence[int], widths: Widths) -> Number:
    macs, in_channels, lengths = 0, 1, list(blocks)
    for channels, (_, kernel, stride) in zip(widths.conv, config.conv_layers):
        lengths = [(length - kernel) // stride + 1 for length in lengths]
        macs = macs + sum(lengths) * kernel * channels * in_channels
        in_channels = channels
    return macs


def _attention_macs(
    config: EncoderConfig,
    depth: int,
    squeezed: Sequence[int],
    passes: Sequence[_Pass],
    point: OperatingPoint,
    widths: Widths,
) -> Number:
    query_pool, kv_pool = point.query_pool(depth), point.kv_pool(depth)
    projected = products = 0
    for frames, one in zip(squeezed, passes):
        queries, keys = pooled_length(frames, query_pool), pooled_length(frames, kv_pool)
        projected += queries + keys
        products += queries * (keys + pooled_length(one.past, kv_pool))
    # queries and keys, scores and mixtures
    times = 1 if depth % config.attention_map_every else 2
    inner = widths.heads[config.layer_map[depth]] * config.head_size
    return inner * (times * projected * widths.dim + times * products)


def _position_weights(config: EncoderConfig, dim: Number) -> Number:
    """Weights of the positional convolution, which has groups of unequal size padded to the largest."""
    return _position_channels(config, dim) * _largest_group(config, dim) * config.conv_pos


def _position_channels(config: EncoderConfig, dim: Number) -> Number:
    return config.conv_pos_groups * _largest_group(config, dim)


def _largest_group(config: EncoderConfig, dim: Number) -> Number:
    groups = config.conv_pos_group_dims
    largest = max(groups) if groups else config.dim // config.conv_pos_groups
    # an int stays one
    return largest if not isinstance(dim, Tensor) and dim == config.dim else largest * (dim / config.dim)


def _frontend_parameters(config: EncoderConfig, widths: Widths) -> Number:
    parameters, in_channels = 0, 1
    for index, (channels, (_, kernel, _)) in enumerate(zip(widths.conv, config.conv_layers)):
        normed = config.extractor_norm == "layer" or index == 0
        per_channel = kernel * in_channels + (1 if config.conv_bias else 0) + (2 if normed else 0)
        parameters = parameters + channels * per_channel
        in_channels = channels
    return parameters


def _layer_parameters(config: EncoderConfig, heads: Number, ffn: Number, dim: Number) -> Number:
    inner = heads * config.head_size
    attention = inner * (4 * dim + 3) + _present(heads) * dim
    feed_forward = ffn * (2 * dim + 1) + _present(ffn) * dim
    # pre-LN norms go with their blocks, post-LN ones stay
    norms = _present(heads) + _present(ffn) if config.norm_first else 2
    return attention + feed_forward + norms * 2 * dim


def _present(width: Number) -> Number:
    """1 of a block that is there, 0 of one that is gone; an expected width below 1 is the block's own probability."""
    return width.clamp(max=1) if isinstance(width, Tensor) else min(1, width)
