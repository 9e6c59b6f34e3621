"""What a model costs: parameters, bytes, MACs, memory and latency of a recipe, a checkpoint or a model folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Dict, List, Optional, Protocol, Tuple

import torch
from torch import nn

from ..nn.backbone import Backbone
from ..nn.config import EncoderConfig
from ..nn.counts import SAMPLE_RATE, count_macs, widths_of
from ..nn.latency import algorithmic_latency
from ..nn.operating_point import OperatingPoint
from ..nn.parts import PARTS, part_of
from ..runtime.folder import bytes_by_dtype, is_model_folder, read_folder

LETTERS = 32
# seconds of audio that are counted at most: eleven days
LONGEST = 10**6


class Subject(Protocol):
    """A model to count.

    network: its configuration. own_point: the text of the operating point that it is fixed to, empty: none. vocabulary:
    labels of its CTC head, 0: pre-training. pretraining_heads: a CTC model that keeps those as well
    (`model.keep_pretraining_heads`). normalizes: whether it hears normalised audio. stored_dtype: of the
    weights in a folder.
    """

    name: str
    network: EncoderConfig
    own_point: str
    vocabulary: int
    pretraining_heads: bool
    normalizes: bool
    stored_dtype: Optional[str]
    sample_rate: int

    def build(self) -> nn.Module:
        """The network, without memory and without gates."""


@dataclass
class FolderSubject:
    """A model folder as a `Subject`."""

    network: EncoderConfig
    own_point: str
    vocabulary: int
    normalizes: bool
    name: str = "model folder"
    pretraining_heads: bool = False
    stored_dtype: str = "float32"
    sample_rate: int = SAMPLE_RATE

    def build(self) -> nn.Module:
        """The network, without memory."""
        with torch.device("meta"):
            return Backbone(replace(self.network, prune_units=()))


def load_subject(source: str, overrides: List[str], vocabulary: Optional[int] = None) -> Subject:
    """Reads a recipe (path or name), checkpoint or model folder; the former two with `model.key=value` overrides.

    `vocabulary` is the size of the label dictionary where the source does not say (default 32: LibriSpeech's
    letters). An offline checkpoint that `model.chunk_frames` makes stream gets causal positions, as in training. Raises
    ValueError for an override that is malformed or of a key that the model does not have.
    """
    if is_model_folder(source):
        if overrides:
            raise ValueError(f"'{source}': a model folder is as it is; leave out {' '.join(overrides)}")
        model = read_folder(source)
        labels = len(model.symbols)
        own = dict(stored_dtype=model.stored_dtype, sample_rate=model.sample_rate)
        return FolderSubject(model.config, str(model.point), labels, model.normalize, **own)
    from .configured import configured_subject  # fairseq's configurations; a folder needs no fairseq

    return configured_subject(source, overrides, vocabulary)


def count_parameters(subject: Subject) -> Dict[str, int]:
    """Stored parameters by part, counted on the model itself (built without memory); shared ones count once.

    Parts: frontend, projection, positions, layers, unsqueeze, norms (with the mask vector), heads (quantiser and
    projections of pre-training, or the CTC projection). Gates are no part of a model's size: pruning removes them.
    """
    return _count_parameters(subject, subject.build())[0]


def _count_parameters(subject: Subject, model: nn.Module) -> Tuple[Dict[str, int], int]:
    """The stored parameters by part, and how many those heads of pre-training have that a CTC model has dropped."""
    parts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        parts[part_of(name)] += parameter.numel()
    if not subject.vocabulary:
        return parts, 0
    dropped = 0 if subject.pretraining_heads else parts["heads"]
    parts["heads"] += (subject.network.dim + 1) * subject.vocabulary - dropped
    return parts, dropped


def cost(subject: Subject, seconds: float = 10.0, point: str = "", dry_run: bool = False) -> Dict[str, Any]:
    """Everything that can be counted, as one JSON-ready dict.

    `parameters` are stored ones, `effective_parameters` what they would be without sharing,
    `parameters_with_pretraining_heads` what a CTC model would have had it kept those (Shrinking Bigfoot counts so, and
    so do others who say 317 M); `bytes` in fp32, `bytes_by_dtype` those of a model folder, which stores no heads of
    pre-training and no mask vector; `stored_dtype`: of a folder's weights, None of others; `macs` of inference on
    `seconds` of audio, at the model's sample rate and the operating point (`point`, else the model's own): squeezing is
    a part of the positions, whose strided convolution does it, and of `unsqueeze`; `latency_ms`: the algorithmic one
    there, None where it is unbounded; `kept`: what pruning left, see `kept_widths`.

    With `dry_run`, which takes a second, also `activation_bytes` of that inference, the most alive at once, and
    `activation_bytes_by_part`: the most during the frontend and during the Transformer; see study/memory.py.
    """
    config = subject.network
    chosen = operating_point(subject, point)
    model = subject.build()
    parameters, dropped = _count_parameters(subject, model)
    samples = round(seconds * subject.sample_rate)
    macs = count_macs(config, samples, chosen, subject.vocabulary)
    waits = algorithmic_latency(config, chosen)
    total = sum(parameters.values())
    stored = [sum(parameter.numel() for parameter in layer.parameters()) for layer in model.encoder.layers]
    result = {
        "model": subject.name,
        "kind": "ctc" if subject.vocabulary else "pretraining",
        "keeps_pretraining_heads": bool(subject.vocabulary and subject.pretraining_heads),
        "parameters": total,
        "effective_parameters": total - sum(stored) + sum(stored[index] for index in config.layer_map),
        "parameters_with_pretraining_heads": total + dropped,
        "bytes": 4 * total,
        "bytes_by_dtype": bytes_by_dtype(config, subject.vocabulary),
        "stored_dtype": subject.stored_dtype,
        "parameters_by_part": parameters,
        "seconds": seconds,
        "operating_point": str(chosen),
        "macs": sum(macs.values()),
        "macs_by_part": macs,
        "latency_ms": None if waits is None else 1000 * waits.total / subject.sample_rate,
        "layers": config.depth,
        "unique_layers": config.unique_layers,
        "attention_maps": sum(
            config.heads_of(stored) > 0 for stored in config.layer_map[:: config.attention_map_every]
        ),
        "operating_points": [str(trained) for trained in config.operating_points.points()],
        "kept": kept_widths(config),
    }
    if dry_run:
        from .memory import activation_memory  # torch's tensors without values take seconds to import

        parts = activation_memory(config, samples, chosen, subject.vocabulary, subject.normalizes)
        result.update(activation_bytes=max(parts.values()), activation_bytes_by_part=parts)
    return result


def kept_widths(config: EncoderConfig) -> Dict[str, List[int]]:
    """What pruning left of a network; empty where its configuration speaks of none.

    heads, ffn (summed over the stored layers) and hidden: [those there are, those there were]; frontend: the channels
    of each layer.
    """
    if not (config.layer_heads or config.layer_ffn or config.norm_dim or config.conv_norm_dims):
        return {}
    widths, layers = widths_of(config), config.unique_layers
    return {
        "heads": [sum(widths.heads), config.heads * layers],
        "ffn": [sum(widths.ffn), config.ffn_dim * layers],
        "hidden": [config.dim, config.norm_dim or config.dim],
        "frontend": list(widths.conv),
    }


def operating_point(subject: Subject, point: str = "") -> OperatingPoint:
    """The operating point that the text `point` names; empty: the model's own fixed one, else its least reduction."""
    points = subject.network.operating_points
    text = point or subject.own_point
    return points.check(OperatingPoint.parse(text)) if text else points.default


def format_cost(result: Dict[str, Any]) -> str:
    """The table that `w2v2-light cost` prints."""
    parameters, macs = result["parameters_by_part"], result["macs_by_part"]
    head = "CTC head" if result["kind"] == "ctc" else "pre-training heads"
    head = "CTC and pre-training heads" if result["keeps_pretraining_heads"] else head
    rows = [
        ("frontend", parameters["frontend"], macs["frontend"]),
        ("projection", parameters["projection"], macs["projection"]),
        ("positions", parameters["positions"], macs["positions"]),
        (f"layers ({result['unique_layers']} stored, {result['layers']} deep)", parameters["layers"], None),
        ("  attention", None, macs["attention"]),
        ("  FFN", None, macs["ffn"]),
        ("squeeze (unsqueeze layer)", parameters["unsqueeze"], macs["unsqueeze"]),
        ("norms, mask vector", parameters["norms"], None),
        (head, parameters["heads"], macs["head"]),
        ("total", result["parameters"], result["macs"]),
    ]
    lines = [
        f"{result['model']} at {result['operating_point']}, {result['seconds']:g} s of audio",
        f"{'part':<28} {'parameters':>13} {'MMACs':>11}",
    ]
    for name, stored, count in rows:
        stored = "" if stored is None else f"{stored:,}"
        count = "" if count is None else f"{count / 1e6:,.1f}"
        lines.append(f"{name:<28} {stored:>13} {count:>11}")
    lines.append(
        f"{result['bytes'] / 2**20:.1f} MiB in fp32; {result['effective_parameters']:,} parameters without sharing; "
        f"{result['attention_maps']} attention maps"
    )
    lines.append(_format_bytes(result))
    if "activation_bytes" in result:
        parts = result["activation_bytes_by_part"]
        shares = ", ".join(f"{_mib(size)} in the {part}" for part, size in parts.items())
        lines.append(
            f"activation memory {_mib(result['activation_bytes'])} (fp32, batch 1, beside the weights): {shares}"
        )
    waits = result["latency_ms"]
    lines.append(
        "algorithmic latency "
        + ("unbounded: it hears the whole utterance" if waits is None else f"{waits:.1f} ms")
        + " (--latency explains)"
    )
    if result["kept"]:
        lines.append(_format_kept(result["kept"]))
    if result["parameters_with_pretraining_heads"] != result["parameters"]:
        lines.append(
            f"{result['parameters_with_pretraining_heads']:,} parameters with the heads of pre-training, which "
            "published counts often include (the 317 M of LARGE, for one)"
        )
    return "\n".join(lines)


def _format_bytes(result: Dict[str, Any]) -> str:
    sizes, stored = result["bytes_by_dtype"], result["stored_dtype"]
    others = ", ".join(f"{_mib(size)} in {dtype}" for dtype, size in sizes.items() if dtype != stored)
    if stored is None:
        return f"as a model folder {others}" + ("" if result["kind"] == "ctc" else " (the network without heads)")
    return f"stored in {stored}: {_mib(sizes[stored])}; it would be {others}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _format_kept(kept: Dict[str, List[int]]) -> str:
    units = [("heads", "heads"), ("ffn", "FFN channels"), ("hidden", "hidden channels")]
    parts = [f"{kept[unit][0]:,} of {kept[unit][1]:,} {name}" for unit, name in units]
    return f"pruned to {', '.join(parts)}; frontend {' '.join(str(channels) for channels in kept['frontend'])}"
