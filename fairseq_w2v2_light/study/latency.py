"""The algorithmic latency of a model, explained: its parts, or why it is unbounded and what to do about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, List

from ..nn.config import EncoderConfig
from ..nn.frontend import receptive_field
from ..nn.latency import algorithmic_latency
from ..nn.operating_point import OperatingPoint
from .cost import Subject, operating_point

_NORMALIZED = "task.normalize is true, with which training refuses a streaming model: set task.normalize=false"


def latency(subject: Subject, point: str = "") -> Dict[str, Any]:
    """The latency of a model as one JSON-ready dict; times in ms, counts of samples at the model's rate.

    `points`: its operating point (`point`, else its own) first, then, unless `point` names one, the others that only
    the chunk tells apart. Each has its parts, `total` and `mean` in `samples` and in `ms`, both None when it is
    unbounded. `unbounded`: why the first one is, `advice`: what to do about it (both empty when it is not).
    """
    config = subject.network
    field, hop = receptive_field(config.conv_layers)
    chosen = operating_point(subject, point)
    others = [] if point else [other for other in config.operating_points.points() if _differ_by_chunk(other, chosen)]
    unbounded, rate = _unbounded(subject, config, chosen), subject.sample_rate
    return {
        "model": subject.name,
        "operating_point": str(chosen),
        "points": [_entry(config, one, rate) for one in [chosen, *others]],
        "sample_rate": rate,
        "hop": hop,
        "receptive_field": field,
        "frontend_padding": config.frontend_padding,
        "position_taps": config.conv_pos,
        "left_context_frames": config.left_context if config.streams else None,
        "lookahead_frames": config.lookahead if config.streams else None,
        "unbounded": unbounded,
        "advice": _advice(subject, config) if unbounded else [],
        "notes": [] if unbounded or not subject.normalizes else [_NORMALIZED],
    }


def _differ_by_chunk(one: OperatingPoint, other: OperatingPoint) -> bool:
    same = (one.squeeze, one.query, one.key_value) == (other.squeeze, other.query, other.key_value)
    return same and one.chunk != other.chunk


def _entry(config: EncoderConfig, point: OperatingPoint, rate: int) -> Dict[str, Any]:
    found = algorithmic_latency(config, point)
    entry = {"operating_point": str(point), "chunk_frames": point.chunk, "samples": None, "ms": None}
    if found is not None:
        parts = {name: getattr(found, name) for name in ("frontend", "positions", "chunk", "lookahead")}
        samples = {**parts, "total": found.total, "mean": found.mean}
        entry.update(samples=samples, ms={name: _ms(value, rate) for name, value in samples.items()})
    return entry


def _ms(samples: float, rate: int) -> float:
    return 1000 * samples / rate


def _unbounded(subject: Subject, config: EncoderConfig, point: OperatingPoint) -> List[str]:
    """Why a model has no bounded latency at an operating point; empty when it has one."""
    if point.chunk:
        return []
    reasons = [f"attention: a frame hears the whole utterance, in each of {config.depth} layers"]
    if config.extractor_norm == "group":
        reasons.append("frontend: extractor_mode=default, a GroupNorm over the whole utterance")
    if subject.normalizes:
        reasons.append("audio: task.normalize=true, mean and variance of the whole utterance")
    if not config.streams:
        hop = receptive_field(config.conv_layers)[1]
        ahead = config.conv_pos - 1 - config.conv_pos // 2
        span = f"{ahead} frames ({_ms(ahead * hop, subject.sample_rate):.1f} ms)"
        reasons.append(
            f"positions: a centred kernel of {config.conv_pos} taps hears {span} ahead; this alone would be bounded"
        )
    return reasons


def _advice(subject: Subject, config: EncoderConfig) -> List[str]:
    if config.streams:
        points = config.operating_points
        streaming = replace(points.default, chunk=max(points.chunk))
        return [f"choose an operating point with a chunk, --operating-point {streaming} for one"]
    steps = []
    if config.extractor_norm == "group":
        steps.append("start from a model that was trained with extractor_mode=layer_norm: this one cannot stream")
    if subject.normalizes:
        steps.append(
            "make a student that hears audio as it is: w2v2-light student TEACHER.pt student.pt --layers every:1 "
            "--input-level 0.05"
        )
    steps.append(
        "train with model.chunk_frames=[24], as distillation/streaming_480ms does; model.w2v_path takes an offline "
        "checkpoint and makes its positions causal"
    )
    return steps


def format_latency(result: Dict[str, Any]) -> str:
    """What `w2v2-light cost --latency` prints."""
    first, *others = result["points"]
    title = f"{result['model']} at {result['operating_point']}: algorithmic latency"
    if first["samples"] is None:
        lines = [f"{title} unbounded, because of"]
        lines += [f"  {reason}" for reason in result["unbounded"]]
        lines += ["to make it stream:"] + [f"  {step}" for step in result["advice"]]
    else:
        lines = [f"{title} {first['ms']['total']:.1f} ms", *_table(result, first)]
    if others:
        lines += ["", "its other chunks:", f"{'':<20}{'latency ms':>12}{'mean ms':>10}"]
        lines += [_row_of(other) for other in others]
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])


def _table(result: Dict[str, Any], entry: Dict[str, Any]) -> List[str]:
    hop, padding, field = result["hop"], result["frontend_padding"], result["receptive_field"]
    rate = result["sample_rate"]
    past, left, ahead = result["position_taps"] - 1, result["left_context_frames"], result["lookahead_frames"]
    explained = {
        "frontend": ("frontend window", f"{_span(field, rate)}, {_span(padding, rate)} of it before the frame"),
        "positions": ("positions", f"causal: {past} frames ({_ms(past * hop, rate):.1f} ms) of the past"),
        "chunk": ("chunk", f"the first of {entry['chunk_frames']} frames waits for the others"),
        "lookahead": ("look-ahead", f"{ahead} frames after the chunk" if ahead else "none"),
        "total": ("total", "wait of a chunk's first frame"),
        "mean": ("mean", "wait of a frame, averaged over its chunk"),
    }
    lines = [f"{'part':<18}{'samples':>9}{'ms':>9}"]
    for key, (name, text) in explained.items():
        lines.append(f"{name:<18}{entry['samples'][key]:>9,.0f}{entry['ms'][key]:>9.1f}   {text}")
    return [
        *lines,
        f"history: {left} frames ({_ms(left * hop, rate):.1f} ms) before the chunk, in every layer",
        f"frame t stands for samples {hop} t to {hop} t + {hop - 1}; no frame depends on a sample "
        f"{entry['samples']['total']:,} or more after its first; compute time is not counted",
    ]


def _span(samples: int, rate: int) -> str:
    return f"{samples} samples ({_ms(samples, rate):.1f} ms)"


def _row_of(entry: Dict[str, Any]) -> str:
    if entry["samples"] is None:
        return f"{entry['operating_point']:<20}{'unbounded':>12}"
    return f"{entry['operating_point']:<20}{entry['ms']['total']:>12.1f}{entry['ms']['mean']:>10.1f}"
