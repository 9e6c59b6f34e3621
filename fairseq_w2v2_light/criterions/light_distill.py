"""`light_distill`: a small student learns from a large wav2vec 2.0 teacher, from transcripts, or from both."""

import os
from dataclasses import dataclass, field
from typing import Dict, List, Optional

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.ctc import CtcCriterion, CtcCriterionConfig
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from fairseq.logging.meters import safe_round
from torch import nn

from ..nn.frontend import receptive_field
from ..nn.operating_point import OperatingPoint
from . import distill_terms as terms
from .denominator import DenominatorGraph
from .lfmmi import distillation_lfmmi, lfmmi_loss
from .teacher import Teacher
from .teacher_cache import CachedTeacher, DatasetIdentity

# weight -> what the term needs
TEACHER_LOGITS = ("kl_weight", "logits_mse_weight", "cosine_weight", "mmi_weight")
LABELS = ("ctc_weight", "mmi_transcript_weight")
GRAPH = ("mmi_weight", "mmi_transcript_weight")
WEIGHTS = ("hidden_weight", *TEACHER_LOGITS, *LABELS, "feature_penalty_weight")


@dataclass
class LightDistillConfig(FairseqDataclass):
    teacher: str = field(
        default="",
        metadata={
            "help": "absolute path of the teacher: a wav2vec2, wav2vec_ctc or light_ctc checkpoint, ours, or a model "
            "folder"
        },
    )
    teacher_dtype: str = field(default="float32", metadata={"help": "float32, float16 or bfloat16"})
    teacher_operating_point: str = field(
        default="", metadata={"help": "where the teacher runs, e.g. s1q1k1; empty: its least reduction"}
    )
    teacher_cache: str = field(
        default="",
        metadata={
            "help": "absolute path of a folder that keeps the teacher's outputs, so that every epoch after the first "
            "is cheap"
        },
    )
    teacher_cache_dtype: str = field(default="float16", metadata={"help": "how the cache stores: float16 or float32"})
    hidden_weight: float = field(
        default=0.0, metadata={"help": "weight of the MSE of hidden layers, summed over the pairs of hidden_map"}
    )
    hidden_map: str = field(
        default="every:2",
        metadata={
            "help": "which teacher layer each student layer imitates: 'every:n' (student layer i from n*i, 1-based), "
            "'last', or pairs student:teacher such as '0:1,1:3' (0-based)"
        },
    )
    kl_weight: float = field(default=0.0, metadata={"help": "weight of T^2 KL(teacher || student) of the labels"})
    temperature: float = field(default=1.0, metadata={"help": "T of the KL term"})
    logits_mse_weight: float = field(default=0.0, metadata={"help": "weight of the MSE of the logits"})
    cosine_weight: float = field(default=0.0, metadata={"help": "weight of the cosine distance of the logits"})
    mmi_weight: float = field(
        default=0.0, metadata={"help": "weight of distillation LF-MMI: sequence-level KL over the denominator graph"}
    )
    mmi_transcript_weight: float = field(
        default=0.0, metadata={"help": "weight of training LF-MMI, against the transcripts"}
    )
    denominator: str = field(
        default="", metadata={"help": "absolute path of the graph for LF-MMI, made by `w2v2-light denominator`"}
    )
    feature_penalty_weight: float = field(
        default=0.0, metadata={"help": "weight of the mean square of the frontend's output"}
    )
    ctc_weight: float = field(default=0.0, metadata={"help": "weight of CTC on the transcripts"})
    zero_infinity: bool = field(
        default=True, metadata={"help": "leave out utterances with more labels than frames, whose loss is infinite"}
    )
    post_process: str = field(
        default="letter", metadata={"help": "how labels become words for the validation WER (fairseq's ctc)"}
    )
    mask_student: bool = field(
        default=False,
        metadata={"help": "mask the student's frames in training, on the pre-training task; a CTC student: apply_mask"},
    )


@register_criterion("light_distill", dataclass=LightDistillConfig)
class LightDistill(FairseqCriterion):
    """Weighted sum of distillation terms; those of weight 0 are neither computed nor logged.

    Every term is a mean over the valid frames of the student (CTC and LF-MMI: the sum over the utterances divided by
    their frames), so that weights mean the same for every batch; the sample size is the number of frames, whatever
    `sentence_avg` says. Trains light_ctc models on audio_ctc or fairseq's audio_finetuning, and w2v2_light or
    stochastic_sew on a pre-training task (hidden layers and the feature penalty only). The teacher runs frozen and
    unmasked, and is part of no checkpoint; the projections W_i of the hidden layers are, as the criterion's.
    """

    def __init__(self, cfg: LightDistillConfig, task):
        super().__init__(task)
        self.weights = {name[: -len("_weight")]: getattr(cfg, name) for name in WEIGHTS if getattr(cfg, name) != 0}
        self.temperature = cfg.temperature
        self.zero_infinity = cfg.zero_infinity
        self.mask_student = cfg.mask_student
        network = _student_network(task)
        self.hop = receptive_field(network.conv_layers)[1]
        dictionary = _target_dictionary(task)
        _check(cfg, self.weights, dictionary is not None)

        self.pairs: List[tuple] = []
        # in a list, so that it is no submodule: in no state dict, not wrapped for data parallelism, not converted
        self._teacher = []
        if _uses(cfg, ("hidden_weight", *TEACHER_LOGITS)):
            self._teacher.append(self._load_teacher(cfg, task, network, dictionary))
        # W_i of DistillW2V2; none where the widths are equal
        self.projections = nn.ModuleList()
        if self.pairs and self._teacher[0].dim != network.dim:
            self.projections.extend(nn.Linear(network.dim, self._teacher[0].dim, bias=False) for _ in self.pairs)

        self.graph: Optional[DenominatorGraph] = None
        if _uses(cfg, GRAPH):
            self.graph = DenominatorGraph.load(cfg.denominator)
            self.graph.check_dictionary(list(dictionary.symbols), f"criterion.denominator: {cfg.denominator}")
        self.ctc = None
        if dictionary is not None:
            self.pad, self.eos = dictionary.pad(), dictionary.eos()
            settings = CtcCriterionConfig(zero_infinity=cfg.zero_infinity, post_process=cfg.post_process)
            settings.sentence_avg = True
            self.ctc = CtcCriterion(settings, task)

    def _load_teacher(self, cfg, task, network, dictionary):
        teacher = Teacher.load(
            cfg.teacher,
            needs_logits=_uses(cfg, TEACHER_LOGITS),
            dtype=cfg.teacher_dtype,
            operating_point=cfg.teacher_operating_point,
            symbols=None if dictionary is None else list(dictionary.symbols),
            normalize=bool(getattr(task.cfg, "normalize", False)),
            sample_rate=getattr(task.cfg, "sample_rate", None),
        )
        if cfg.hidden_weight != 0:
            self.pairs = terms.parse_hidden_map(cfg.hidden_map, network.depth, teacher.depth)
            teacher.layers = [layer for _, layer in self.pairs]
        if not cfg.teacher_cache:
            return teacher
        return CachedTeacher(teacher, cfg.teacher_cache, DatasetIdentity.of(task.cfg.data), cfg.teacher_cache_dtype)

    def forward(self, model, sample, reduce=True):
        """Returns the loss (sum over the frames), the number of frames, and the logging output."""
        output = self._run_student(model, sample)
        teacher = self._teacher[0](**_audio(sample)) if self._teacher else None
        # a CTC student's logits, or the frames of one without labels
        x = output["x"] if self.ctc is None else output["encoder_out"].transpose(0, 1)
        student = terms.Frames(x, terms.lengths_of(output["padding_mask"], x), self.hop)
        frames = int(student.lengths.sum())

        values: Dict[str, torch.Tensor] = {}
        log = {}
        if "hidden" in self.weights:
            values["hidden"] = self._hidden(output, teacher, student)
        if teacher is not None and teacher.logits is not None:
            values.update(self._labels(student, teacher, frames))
        if "mmi_transcript" in self.weights:
            values["mmi_transcript"] = self._transcript_mmi(student, sample["target"]) / frames
        if self.ctc is not None and ("ctc" in self.weights or not model.training):
            ctc, log = self._ctc(model, output, sample)
            if "ctc" in self.weights:
                values["ctc"] = ctc / frames
        if "feature_penalty" in self.weights:
            values["feature_penalty"] = output["features_pen"].float()

        loss = frames * sum(self.weights[name] * value for name, value in values.items())
        log = {key: value for key, value in log.items() if key.endswith(("_errors", "_total"))}
        log.update({f"term@{name}": value.detach() * frames for name, value in values.items()})
        log.update(loss=loss.detach(), ntokens=frames, nsentences=sample["id"].numel(), sample_size=frames)
        return loss, frames, log

    def _run_student(self, model, sample):
        if self.ctc is not None:
            return model(**sample["net_input"])
        return model(**sample["net_input"], features_only=True, mask=self.mask_student and model.training)

    def _hidden(self, output, teacher, student):
        """Sum over the layer map of MSE(H^S W, H^T); dropped layers of the student have no term."""
        layers = dict(zip(output["layer_depths"], output["layer_results"]))
        padding = output["layer_padding_mask"]
        hop = self.hop * _squeeze_of(output)
        # every layer may be dropped, and the loss needs a gradient all the same
        total = student.x.float().reshape(-1)[0] * 0.0
        for index, (depth, teacher_depth) in enumerate(self.pairs):
            if depth not in layers:
                continue
            hidden = layers[depth][0].transpose(0, 1)
            if self.projections:
                hidden = self.projections[index](hidden)
            own = terms.Frames(hidden, terms.lengths_of(padding, hidden), hop)
            other = terms.Frames(teacher.hidden[teacher_depth], teacher.hidden_lengths, teacher.hop * teacher.squeeze)
            target, hidden, valid = terms.align(other, own)
            total = total + terms.mean_squared_error(hidden, target, valid)
        return total

    def _labels(self, student, teacher, frames):
        """The terms that compare logits."""
        target, logits, valid = terms.align(terms.Frames(teacher.logits, teacher.lengths, teacher.hop), student)
        functions = {
            "kl": lambda: terms.kl_divergence(logits, target, valid, self.temperature),
            "logits_mse": lambda: terms.mean_squared_error(logits, target, valid),
            "cosine": lambda: terms.cosine_distance(logits, target, valid),
            "mmi": lambda: distillation_lfmmi(logits, target, valid.sum(-1), self.graph).sum() / frames,
        }
        return {name: compute() for name, compute in functions.items() if name in self.weights}

    def _transcript_mmi(self, student, target):
        keep = (target != self.pad) & (target != self.eos)
        loss = lfmmi_loss(
            student.x, student.lengths, target, keep.sum(-1), self.graph, zero_infinity=self.zero_infinity
        )
        return loss.sum()

    def _ctc(self, model, output, sample):
        """fairseq's CTC loss (sum) and, in validation, its error counts, from the output that is already there."""
        # it writes into the logits of padded frames
        computed = _Computed(model, {**output, "encoder_out": output["encoder_out"].clone()})
        loss, _, log = self.ctc(computed, sample)
        return loss, log

    @staticmethod
    def reduce_metrics(logging_outputs) -> None:
        """Aggregates logging outputs: the loss and each term, a mean over frames (nats), and the word error rate."""

        def total(key):
            value = sum(log.get(key, 0) for log in logging_outputs)
            return value.item() if torch.is_tensor(value) else value

        frames = max(total("sample_size"), 1)
        metrics.log_scalar("loss", total("loss") / frames, frames, round=4)
        for key in sorted({key for log in logging_outputs for key in log if key.startswith("term@")}):
            metrics.log_scalar(key[len("term@") :], total(key) / frames, frames, round=4)
        metrics.log_scalar("ntokens", total("ntokens"))
        metrics.log_scalar("nsentences", total("nsentences"))
        for name, errors, count in (("uer", "c_errors", "c_total"), ("wer", "w_errors", "w_total")):
            if total(count) == 0:
                continue
            metrics.log_scalar(f"_{errors}", total(errors))
            metrics.log_scalar(f"_{count}", total(count))
            metrics.log_derived(name, _percentage(f"_{errors}", f"_{count}"))

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: every worker logs the same keys."""
        return True


class _Computed:
    """Stands in for a model whose output is there, so that fairseq's CTC criterion does not run it again."""

    def __init__(self, model, output):
        self.training = model.training
        self.get_normalized_probs = model.get_normalized_probs
        self.output = output

    def __call__(self, **net_input):
        return self.output


def _percentage(errors: str, count: str):
    return lambda meters: safe_round(meters[errors].sum * 100.0 / max(meters[count].sum, 1), 3)


def _audio(sample):
    net_input = sample["net_input"]
    return {"source": net_input["source"], "padding_mask": net_input.get("padding_mask")}


def _squeeze_of(output) -> int:
    return OperatingPoint.parse(output["operating_point"]).squeeze


def _uses(cfg, names) -> bool:
    return any(getattr(cfg, name) != 0 for name in names)


def _student_network(task):
    network = getattr(task, "encoder_config", None)
    if network is None:
        raise ValueError(
            "criterion light_distill: the student is no model of this plugin; expected model._name to be light_ctc "
            "(it starts from stock checkpoints too), w2v2_light or stochastic_sew"
        )
    return network


def _target_dictionary(task):
    """The dictionary of a CTC task, None for a pre-training task."""
    return getattr(task, "target_dictionary", None) if hasattr(task, "blank_symbol") else None


def _check(cfg, weights, labelled: bool) -> None:
    """Raises ValueError for settings that cannot train."""
    if not weights:
        raise ValueError(
            f"criterion light_distill: every weight is 0; set at least one of {', '.join(WEIGHTS)} (criterion.…)"
        )
    for name in WEIGHTS:
        if getattr(cfg, name) < 0:
            raise ValueError(f"criterion.{name}: found {getattr(cfg, name)}, expected 0 or more")
    if cfg.temperature <= 0:
        raise ValueError(f"criterion.temperature: found {cfg.temperature}, expected more than 0")

    if cfg.teacher_cache and not os.path.isabs(cfg.teacher_cache):
        raise ValueError(
            f"criterion.teacher_cache: found '{cfg.teacher_cache}', expected an absolute path: fairseq-hydra-train "
            "changes the working directory"
        )

    def users(names):
        return ", ".join(name for name in names if getattr(cfg, name) != 0)

    if _uses(cfg, ("hidden_weight", *TEACHER_LOGITS)) and not cfg.teacher:
        raise ValueError(
            f"criterion.teacher: empty, but needed by {users(('hidden_weight', *TEACHER_LOGITS))}; give a checkpoint, "
            "criterion.teacher=/absolute/path/checkpoint_best.pt"
        )
    if _uses(cfg, GRAPH) and not cfg.denominator:
        raise ValueError(
            f"criterion.denominator: empty, but needed by {users(GRAPH)}; make a graph with `w2v2-light denominator "
            "DATA` and give its absolute path"
        )
    if not labelled and _uses(cfg, (*TEACHER_LOGITS, *LABELS)):
        raise ValueError(
            f"criterion light_distill: {users((*TEACHER_LOGITS, *LABELS))} need a CTC student (model light_ctc on task "
            "audio_ctc); a pre-training task has hidden_weight and feature_penalty_weight only"
        )
