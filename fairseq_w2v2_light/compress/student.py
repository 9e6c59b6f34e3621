"""Students: smaller wav2vec 2.0 checkpoints that start with the layers of a teacher."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Sequence, Set, Tuple

import torch
from fairseq.data import Dictionary
from fairseq.models.wav2vec.wav2vec2_asr import Linear
from omegaconf import DictConfig, OmegaConf, open_dict

from ..files import atomic_path
from ..models.checkpoint import (
    CTC_ENCODER,
    CTC_MODELS,
    EncoderCheckpoint,
    load_encoder,
    load_state,
    make_causal,
    model_name,
)
from ..models.recipe import apply_overrides
from ..models.w2v2_light import PRETRAINING_HEADS, W2V2LightModel, network_config
from ..nn.config import EncoderConfig, parse_conv_layers
from ..nn.layer_map import parse_layer_map
from ..nn.parts import PARTS, part_of
from ..nn.positions import causal_kernel
from .checkpoint import ctc_config, fresh_state, require_weights

# keys of the student's model that have an option of their own
_OPTIONS = {
    "encoder_layers": "--layers or --layers-n",
    "encoder_embed_dim": "--width",
    "encoder_ffn_embed_dim": "--ffn",
    "encoder_attention_heads": "--heads",
    "unique_layers": "--unique-layers",
}
_LAYERS_FORMS = "expected every:N, first:N, last:N, or depths from 0 such as 0,3,6,9"
# the median standard deviation of LibriSpeech's utterances
TYPICAL_LEVEL = 0.05
# of the layer_norm by which fairseq's task.normalize works
_NORMALIZE_EPS = 1e-5
_FIRST_CONVOLUTION = "feature_extractor.conv_layers.0.0.weight"
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class StudentSpec:
    """What a student is to be; what is None is the teacher's, and of a pruned one that of the layers it starts with.

    layers: the teacher's depths that it starts with, as `parse_layers` reads them ('': none). layers_n: its depth, when
    that is not the number of `layers`. unique_layers: stored layers of a shared student. overrides: further keys of its
    encoder, as text. seed: of the parameters that are initialised anew. input_level: makes a student that hears audio
    as it is of a teacher that hears it normalised: the standard deviation that its audio will have (samples -1 to 1).
    """

    layers: str = ""
    width: Optional[int] = None
    ffn: Optional[int] = None
    heads: Optional[int] = None
    layers_n: Optional[int] = None
    unique_layers: Optional[int] = None
    overrides: Dict[str, str] = field(default_factory=dict)
    seed: int = 1
    input_level: Optional[float] = None


@dataclass(frozen=True)
class StudentLayer:
    """Where a stored layer of the student comes from.

    depths: where the student runs it. teacher_depth: where the teacher runs the layer that it was to be copied from
    (None: it starts anew). copied: "all", "none", or the parts of the layer that fitted.
    """

    depths: Tuple[int, ...]
    teacher_depth: Optional[int]
    copied: str


@dataclass(frozen=True)
class StudentReport:
    """What `make_student` did: per part [tensors copied, values copied, tensors anew, values anew], and per layer."""

    model: str
    parts: Dict[str, List[int]]
    layers: List[StudentLayer]
    notes: List[str]


def parse_layers(text: str, depth: int) -> Tuple[int, ...]:
    """The depths (from 0) that `text` chooses among a teacher's `depth` layers.

    `every:n` takes 0, n, 2n, ... (Shrinking Bigfoot's every_k: 24 -> 12 is every:2, 12 -> 4 is every:3), `first:k` and
    `last:k` what they say; `0,3,6,9` lists depths. Raises ValueError that quotes `text`.
    """
    text = text.replace(" ", "")
    rule = re.fullmatch(r"(every|first|last):(\d+)", text)
    if rule:
        name, number = rule.group(1), int(rule.group(2))
        if not 1 <= number <= depth:
            raise ValueError(f"--layers '{text}': found {number}, expected 1 to {depth}, the teacher's layers")
        chosen = {"every": range(0, depth, number), "first": range(number), "last": range(depth - number, depth)}
        return tuple(chosen[name])
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"--layers '{text}': {_LAYERS_FORMS}")
    depths = tuple(int(item) for item in text.split(","))
    if max(depths) >= depth:
        raise ValueError(
            f"--layers '{text}': depth {max(depths)} is beyond the teacher's {depth} layers; choose 0 to {depth - 1}"
        )
    if len(set(depths)) < len(depths):
        twice = [found for found, times in Counter(depths).items() if times > 1]
        raise ValueError(f"--layers '{text}': depth {twice[0]} is there twice; to share a layer use --unique-layers")
    return depths


def make_student(teacher, target, spec: StudentSpec, dictionary: str = "") -> StudentReport:
    """Writes a student of the checkpoint `teacher` to `target`; returns what was copied and what starts anew.

    `teacher` is any stock or own checkpoint. A pre-trained one gives a pre-training checkpoint of ours, a CTC one a
    `light_ctc` checkpoint with head and dictionary (`dictionary`: path of a dict.ltr.txt, for a checkpoint that holds
    none); both as if after no update. Copied is what has the same name and shape, by modules: a module whose weight
    does not fit gets no bias either, attention needs the same number of heads, too. Unlike Shrinking Bigfoot's code
    this copies the convolutional positions and the encoder's LayerNorm. A stored layer that serves several of the
    teacher's depths is copied to each student layer that asks for one of them. A streaming student of an offline
    teacher gets the teacher's positions made causal. Raises ValueError for a student that cannot be, and for a teacher
    that is no wav2vec 2.0 checkpoint, has gates, lacks weights or has ones that are not finite.
    """
    if Path(target).exists() and Path(teacher).exists() and Path(target).samefile(teacher):
        raise ValueError(f"'{target}': the student would overwrite its teacher; choose another name")
    state = load_state(teacher)
    start = load_encoder(teacher)
    _require_no_gates(start, teacher)
    is_ctc = model_name(state["cfg"]) in CTC_MODELS
    require_weights(start, is_ctc, teacher)
    teacher_network = network_config(start.cfg.model)

    chosen = parse_layers(spec.layers, teacher_network.depth) if spec.layers else ()
    model_cfg = student_config(start.cfg.model, chosen, spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = W2V2LightModel(model_cfg)
        head = None
        if is_ctc:
            model.remove_pretraining_modules()
            head = Linear(model.config.dim, start.head["weight"].size(0))

    notes = _prepare_audio(start, model, spec)
    notes += _prepare_positions(start, teacher_network, model)
    weights = model.state_dict()
    sources = [teacher_network.layer_map[depth] for depth in chosen[: model.config.unique_layers]]
    copied = _copy(start.model, weights, sources, _other_heads(teacher_network, model.config, sources))
    parts = _count_parts(weights, copied)
    layers = _layers(model.config.layer_map, chosen, weights, copied)
    if is_ctc:
        head_weights = {f"w2v_encoder.proj.{name}": value for name, value in head.state_dict().items()}
        teacher_head = {f"w2v_encoder.proj.{name}": value for name, value in start.head.items()}
        parts["CTC head"] = _count(head_weights, _copy(teacher_head, head_weights))
        weights = {**{f"{CTC_ENCODER}{name}": value for name, value in weights.items()}, **head_weights}
        state["task_state"], task_notes = _task_state(state, start, dictionary)
        notes += task_notes
    elif dictionary:
        raise ValueError(f"--dictionary {dictionary}: '{teacher}' is a pre-trained checkpoint, which has no labels")

    encoder_cfg = OmegaConf.create({**OmegaConf.to_container(start.cfg), "model": OmegaConf.to_container(model_cfg)})
    cfg = ctc_config(state["cfg"], encoder_cfg) if is_ctc else OmegaConf.to_container(encoder_cfg, enum_to_str=True)
    with atomic_path(target) as temporary:
        torch.save(fresh_state(cfg, weights, state.get("task_state") or {}), temporary)
    return StudentReport(cfg["model"]["_name"], parts, layers, notes)


def _require_no_gates(start: EncoderCheckpoint, path) -> None:
    """Refuses a teacher with gates: by their numbers, those of one layer would close units of another one."""
    units = list(start.cfg.model.prune_units)
    if units:
        raise ValueError(
            f"'{path}': the teacher has gates (model.prune_units={units}), and a student cannot be made of it; remove "
            "what they closed first: w2v2-light prune CHECKPOINT OUT"
        )


def student_config(teacher: DictConfig, chosen: Tuple[int, ...], spec: StudentSpec) -> DictConfig:
    """The model section of the student: the teacher's with what `spec` says; `chosen` are the depths of its layers.

    Raises ValueError that names the option at fault.
    """
    for key in spec.overrides:
        if key in _OPTIONS:
            raise ValueError(f"override 'model.{key}': give {_OPTIONS[key]} instead")
    depth = len(chosen) if spec.layers_n is None else spec.layers_n
    if depth < 1:
        raise ValueError(f"a student needs --layers ({_LAYERS_FORMS}) or --layers-n, its number of layers")
    if depth < len(chosen):
        raise ValueError(f"--layers-n {depth}: fewer than the {len(chosen)} layers that --layers '{spec.layers}' takes")
    if spec.unique_layers is not None and not 1 <= spec.unique_layers <= depth:
        raise ValueError(f"--unique-layers {spec.unique_layers}: expected 1 to {depth}, the student's layers")
    values = {
        "encoder_embed_dim": spec.width,
        "encoder_ffn_embed_dim": spec.ffn,
        "encoder_attention_heads": spec.heads,
    }
    for key, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{_OPTIONS[key]} {value}: expected 1 or more")
    values = {key: teacher[key] if value is None else value for key, value in values.items()}
    sharing = {"encoder_layers": depth, "unique_layers": spec.unique_layers or 0, "layer_map": ""}
    student = apply_overrides(OmegaConf.merge(teacher, {**values, **sharing}), spec.overrides)
    network = network_config(teacher)
    shapes = _pruned_shapes(network, student, chosen, spec)
    student = OmegaConf.merge(student, {key: value for key, value in shapes.items() if key not in spec.overrides})
    width, heads = values["encoder_embed_dim"], values["encoder_attention_heads"]
    if not student.head_dim and width % heads:
        raise ValueError(
            f"--width {width} is not divisible by {heads} attention heads; set --heads to a divisor, or model.head_dim "
            f"to the channels of a head (the teacher's have {network.head_size})"
        )
    if "unsqueeze_factor" not in spec.overrides and max(student.squeeze_factors) > student.unsqueeze_factor:
        student.unsqueeze_factor = 0  # as many as squeeze_factors needs; fewer factors keep the trained weights
    if any(student.chunk_frames) and not any(teacher.chunk_frames) and "conv_pos" not in spec.overrides:
        student.conv_pos = causal_kernel(teacher.conv_pos)
    if any(teacher.chunk_frames) and not any(student.chunk_frames):
        raise ValueError(
            "override 'model.chunk_frames': found no chunk, but the teacher is a streaming model, whose causal "
            "positions cannot become centred ones; take an offline teacher, or keep a chunk beside 0, the whole "
            "utterance"
        )
    if "layer_heads" not in spec.overrides:
        _check_shared_maps(student, spec)
    return student


def _pruned_shapes(
    teacher: EncoderConfig, student: DictConfig, chosen: Tuple[int, ...], spec: StudentSpec
) -> Dict[str, Any]:
    """The student's keys for shapes that pruning left unequal, as far as they are not just the teacher's.

    A shape that the student has otherwise takes the teacher's inequalities away. What stays of `layer_heads` and
    `layer_ffn` is that of the layers that the student starts with; its further ones have the numbers of
    encoder_attention_heads and encoder_ffn_embed_dim.
    """
    shapes: Dict[str, Any] = {}
    if student.encoder_embed_dim != teacher.dim:
        shapes.update(norm_dim=0, conv_pos_group_dims=[], head_dim=0)
    if student.conv_pos_groups != teacher.conv_pos_groups:
        shapes.update(conv_pos_group_dims=[])
    if parse_conv_layers(student.conv_feature_layers) != teacher.conv_layers:
        shapes.update(conv_norm_dims=[])
    if spec.heads is not None:
        shapes.update(head_dim=0)
    stored = len(set(parse_layer_map(student.layer_map, student.encoder_layers, student.unique_layers)))
    sources = [teacher.layer_map[depth] for depth in chosen[:stored]]
    for key, changed, of_teacher, usual in (
        ("layer_heads", spec.heads, teacher.layer_heads, teacher.heads),
        ("layer_ffn", spec.ffn, teacher.layer_ffn, teacher.ffn_dim),
    ):
        kept = [of_teacher[source] for source in sources] if of_teacher and changed is None else []
        shapes[key] = kept and kept + [usual] * (stored - len(kept))
    return shapes


def _check_shared_maps(student: DictConfig, spec: StudentSpec) -> None:
    """Raises ValueError for layers with unequal heads that are to use each other's attention maps."""
    if not student.layer_heads:
        return
    for group in network_config(OmegaConf.merge(student, {"layer_heads": []})).map_groups.values():
        heads = [student.layer_heads[stored] for stored in sorted(group)]
        if len(set(heads)) > 1:
            raise ValueError(
                f"--layers '{spec.layers}': the student's layers {', '.join(map(str, sorted(group)))} share attention "
                f"maps (model.attention_map_every={student.attention_map_every}), but have {heads} heads, as pruning "
                "left them; expected equally many: choose other layers, add model.attention_map_every=1, or give "
                "--heads, with which attention starts anew"
            )


def _prepare_positions(start: EncoderCheckpoint, teacher: EncoderConfig, model: W2V2LightModel) -> List[str]:
    """Makes the teacher's positions causal for a streaming student; returns what the user should know about them.

    A student with another number of taps than they then have, `model.conv_pos`, gets new ones.
    """
    if teacher.streams or not model.config.streams:
        return []
    taps = model.config.conv_pos
    if taps != causal_kernel(teacher.conv_pos):
        start.model = {name: value for name, value in start.model.items() if part_of(name) != "positions"}
        return [f"streaming: the positions start anew, with {taps} causal taps"]
    note = make_causal(start)
    return [note] if model.config.dim == teacher.dim else []


def _prepare_audio(start: EncoderCheckpoint, model: W2V2LightModel, spec: StudentSpec) -> List[str]:
    """Makes the teacher, and what of the student starts anew, hear audio at `spec.input_level` instead of normalised.

    task.normalize divides an utterance by its standard deviation (and layer_norm's epsilon); the first convolution's
    weights are divided by what is expected instead. So audio at exactly that level, without an offset, gives what the
    teacher gives. Raises ValueError for a level where none is needed, and for none where a streaming student needs it.
    """
    level, normalizes = spec.input_level, bool(start.cfg.task.get("normalize", False))
    if level is None:
        if normalizes and model.config.streams:
            raise ValueError(
                "--input-level: a streaming student cannot normalise audio over the utterance as its teacher does "
                "(task.normalize=true); give the standard deviation that its audio will have (samples -1 to 1), like "
                f"--input-level {TYPICAL_LEVEL} for LibriSpeech"
            )
        return []
    if not 0 < level <= 1:
        raise ValueError(f"--input-level {level:g}: expected a standard deviation of audio above 0 and up to 1")
    if not normalizes:
        raise ValueError(
            f"--input-level {level:g}: the teacher was trained with task.normalize=false, so it hears audio as it is; "
            "leave the option out"
        )
    divisor = math.sqrt(level**2 + _NORMALIZE_EPS)
    start.model[_FIRST_CONVOLUTION] = start.model[_FIRST_CONVOLUTION] / divisor
    with torch.no_grad():
        model.get_parameter(_FIRST_CONVOLUTION).div_(divisor)
    with open_dict(start.cfg):
        start.cfg.task.normalize = False
    return [
        f"audio: the student hears it as it is (task.normalize=false), expected at a standard deviation of {level:g}; "
        "the first convolution's weights were divided by that"
    ]


def _other_heads(teacher: EncoderConfig, student: EncoderConfig, sources: List[int]) -> Set[str]:
    """The student's attention modules with another number of heads than where they would come from."""
    return {
        f"encoder.layers.{index}.self_attn"
        for index, source in enumerate(sources)
        if student.heads_of(index) != teacher.heads_of(source)
    }


def _copy(
    teacher: Dict[str, Any], student: Dict[str, Any], sources: Sequence[int] = (), anew: Collection[str] = ()
) -> Set[str]:
    """Replaces weights of `student` by the teacher's where a whole module fits; returns the names.

    `sources` are the teacher's stored layers for the student's layers 0, 1, ...; `anew` are modules to leave alone.
    """
    modules: Dict[str, List[Tuple[str, str]]] = {}
    for name in student:
        modules.setdefault(_module_of(name), []).append((name, _source_of(name, sources)))
    copied = set()
    for module, names in modules.items():
        fits = all(source in teacher and teacher[source].shape == student[name].shape for name, source in names)
        if fits and module not in anew:
            student.update({name: teacher[source].detach().to(student[name].dtype).clone() for name, source in names})
            copied.update(name for name, _ in names)
    return copied


def _module_of(name: str) -> str:
    """What is copied together or not at all."""
    for pattern in (
        r"feature_extractor\.conv_layers\.\d+",
        r"encoder\.layers\.\d+\.(self_attn|fc)(?=[.\d])",
        rf"{'|'.join(PRETRAINING_HEADS)}|encoder\.pos_conv|encoder\.upsample",
    ):
        found = re.match(pattern, name)
        if found:
            return found.group()
    return name.rpartition(".")[0] or name


def _source_of(name: str, sources: Sequence[int]) -> str:
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    index = int(layer.group(1))
    return f"encoder.layers.{sources[index]}.{layer.group(2)}" if index < len(sources) else ""


def _count(weights: Dict[str, Any], copied: Set[str]) -> List[int]:
    anew = [name for name in weights if name not in copied]
    return [
        len(copied),
        sum(weights[name].numel() for name in copied),
        len(anew),
        sum(weights[name].numel() for name in anew),
    ]


def _count_parts(weights: Dict[str, Any], copied: Set[str]) -> Dict[str, List[int]]:
    counts = {}
    for part in PARTS:
        names = {name for name in weights if part_of(name) == part}
        if names:
            counts[part] = _count({name: weights[name] for name in names}, copied & names)
    return counts


def _layers(layer_map, chosen, weights, copied) -> List[StudentLayer]:
    layers = []
    for stored in sorted(set(layer_map)):
        names = [name for name in weights if name.startswith(f"encoder.layers.{stored}.")]
        fitted = sorted({_module_of(name).split(".")[3] for name in names if name in copied})
        whole = all(name in copied for name in names)
        layers.append(
            StudentLayer(
                tuple(depth for depth, index in enumerate(layer_map) if index == stored),
                chosen[stored] if stored < len(chosen) else None,
                "all" if whole else ", ".join(fitted) or "none",
            )
        )
    return layers


def _task_state(state, start: EncoderCheckpoint, dictionary: str) -> Tuple[Dict[str, Any], List[str]]:
    """The checkpoint's task state, with the dictionary of its labels; and what the user should know about it."""
    task_state = dict(state.get("task_state") or {})
    labels = start.head["weight"].size(0)
    if dictionary:
        if not Path(dictionary).is_file():
            raise FileNotFoundError(f"--dictionary: {dictionary}: no such file")
        given = Dictionary.load(str(dictionary))
        if len(given) != labels:
            raise ValueError(
                f"--dictionary {dictionary}: {len(given)} symbols (with 4 of fairseq's own), expected {labels}, the "
                "rows of the teacher's CTC projection"
            )
        if start.symbols is not None and start.symbols != list(given.symbols):
            raise ValueError(f"--dictionary {dictionary}: not the dictionary that the teacher's checkpoint holds")
        return {**task_state, "target_dictionary": given}, []
    if start.symbols is None:
        return task_state, [
            "the teacher's checkpoint holds no dictionary, and light_ctc starts the head anew without one: add "
            "--dictionary dict.ltr.txt"
        ]
    return task_state, []


def format_report(report: StudentReport) -> str:
    """The table that `w2v2-light student` prints."""
    lines = [f"{'part':<24}{'copied: tensors':>16}{'parameters':>14}{'anew: tensors':>16}{'parameters':>14}"]
    rows = {**report.parts, "total": [sum(column) for column in zip(*report.parts.values())]}
    for part, (tensors, values, new_tensors, new_values) in rows.items():
        name = {"norms": "norms, mask vector", "heads": "pre-training heads"}.get(part, part)
        lines.append(f"{name:<24}{tensors:>16}{values:>14,}{new_tensors:>16}{new_values:>14,}")
    lines.append("")
    for index, layer in enumerate(report.layers):
        lines.append(f"student layer {index}{_depths(layer.depths, index)} <- {_origin(layer)}")
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _depths(depths: Tuple[int, ...], index: int) -> str:
    return "" if depths == (index,) else f" (at depths {', '.join(map(str, depths))})"


def _origin(layer: StudentLayer) -> str:
    if layer.teacher_depth is None:
        return "initialised anew"
    if layer.copied == "all":
        return f"teacher depth {layer.teacher_depth}"
    if layer.copied == "none":
        return f"initialised anew: teacher depth {layer.teacher_depth} has other shapes"
    return f"teacher depth {layer.teacher_depth}, in part: {layer.copied}; the rest initialised anew"
