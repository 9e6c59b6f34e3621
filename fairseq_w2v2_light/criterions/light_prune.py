"""`light_prune`: training with gates that close until a fraction of the model is gone (HJ-Pruning)."""

import logging
from dataclasses import dataclass, field
from typing import Dict, List, NamedTuple, Optional

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.ctc import CtcCriterion, CtcCriterionConfig
from fairseq.logging import metrics
from omegaconf import II

from ..nn.config import EncoderConfig
from ..nn.counts import count_macs, count_parameters, expected_widths
from ..nn.gates import GateValues
from ..nn.operating_point import OperatingPoint
from .light_contrastive import LightContrastive
from .light_distill import LightDistill, LightDistillConfig
from .sparsity import METHODS, VIRTUAL_SAMPLES, Multipliers, check_method, kept_bars, opened, ramped, sparsities

logger = logging.getLogger(__name__)

LOSSES = {"ctc": CtcCriterion, "contrastive": LightContrastive, "distill": LightDistill}
# which of them a log is of, and what light_prune adds to it
_LOSS, _ADDED, _CALLS = "loss_of@", "prune@", "prunings"


@dataclass
class LightPruneConfig(LightDistillConfig):
    loss: str = field(
        default="ctc",
        metadata={
            "help": "what is trained besides: 'ctc', 'contrastive' (as light_contrastive) or 'distill' (the terms of "
            "light_distill)"
        },
    )
    method: str = field(
        default="mac",
        metadata={
            "help": "what the target is a fraction of: 'size' (all parameters), 'sepsize' (parameters of the "
            "Transformer layers, and cnn_target of those of the frontend), 'mac' (MACs of 10 s of audio) or "
            "'transformer' (parameters of the Transformer layers, the frontend left alone)"
        },
    )
    target: float = field(default=0.4, metadata={"help": "the fraction to prune, 0 to below 1"})
    cnn_target: float = field(
        default=0.0, metadata={"help": "method sepsize: the fraction of the frontend's parameters to prune"}
    )
    ramp_updates: int = field(
        default=0, metadata={"help": "updates over which the target grows from 0, from the first that is not frozen"}
    )
    stiffness: float = field(
        default=500.0,
        metadata={
            "help": "where the multiplier of the squared gap between sparsity and target starts: large values follow "
            "the ramp closely; 0: HJ-Pruning's text as it stands"
        },
    )
    report_updates: int = field(
        default=500, metadata={"help": "every so many updates, log what each layer keeps (0: at validations only)"}
    )
    loss_weights: List[float] = field(
        default_factory=lambda: [0.1, 10.0],
        metadata={"help": "loss contrastive: weights of the diversity loss and of the feature penalty"},
    )
    collapse_perplexity: float = field(
        default=2.0,
        metadata={"help": "loss contrastive: warn when the codebooks' perplexity per group falls below this"},
    )
    sentence_avg: bool = II("optimization.sentence_avg")


class _State(NamedTuple):
    """What the gates do at an update. target, expected, reached: fractions by constraint."""

    update: int
    target: Dict[str, float]
    expected: Dict[str, torch.Tensor]
    reached: Dict[str, torch.Tensor]
    parameters: float
    macs: float
    bars: str


@register_criterion("light_prune", dataclass=LightPruneConfig)
class LightPrune(FairseqCriterion):
    """Another criterion's loss + sample size x penalty: an augmented Lagrangian on the expected sparsity, eqs. 4 to 6.

    The model needs gates (model.prune_units). The multipliers are the criterion's, part of its state, and in a group of
    the composite optimizer of their own. Values and logs of the other criterion are as without pruning; the penalty is
    added in training only. While light_ctc freezes its encoder nothing is pruned: no penalty, open gates.
    """

    def __init__(self, cfg: LightPruneConfig, task):
        super().__init__(task)
        self.network = _network(task)
        dictionary = getattr(task, "target_dictionary", None) if hasattr(task, "blank_symbol") else None
        self.vocabulary = 0 if dictionary is None else len(dictionary)
        self.kind, self.method = cfg.loss, cfg.method
        self.ramp_updates, self.report_updates = _updates(cfg, "ramp_updates"), _updates(cfg, "report_updates")
        _check_loss(cfg.loss, dictionary is not None)
        self.targets = {
            name: cfg.cnn_target if name == "cnn" else cfg.target for name in METHODS.get(cfg.method, ("all",))
        }
        check_method(cfg.method, self.network, self.targets, self.vocabulary)
        if cfg.stiffness < 0:
            raise ValueError(f"criterion.stiffness: found {cfg.stiffness}, expected 0 or more")
        self.multipliers = Multipliers(METHODS[cfg.method], cfg.stiffness)
        self.loss = _inner(cfg, task)
        self.updates = 0
        self.reported_at: Optional[int] = None

    def forward(self, model, sample, reduce=True):
        """Returns the loss (in training with the penalty), the sample size, and the logging output."""
        loss, sample_size, log = self.loss(model, sample)
        encoder, first = _encoder(model)
        update = encoder.num_updates or 0
        pruning = update >= first
        # in validation the trainer has counted on, the model has not
        self.updates = update if model.training else max(self.updates, update + 1)
        target = {name: ramped(value, self.updates - first, self.ramp_updates) for name, value in self.targets.items()}
        point = encoder.operating_point or self.network.operating_points.default
        with torch.set_grad_enabled(torch.is_grad_enabled() and pruning):
            expected = self._sparsities(encoder.gates.probabilities(), point)
        if model.training:
            # times 0 while frozen: data parallelism wants a gradient of every parameter
            loss = loss + (sample_size if pruning else 0) * self.multipliers.penalty(expected, target)

        state = self._state(encoder.gates.decided(), point, target, expected)
        if self._is_due(model.training):
            logger.info(_report(state))
        return loss, sample_size, {**log, f"{_LOSS}{self.kind}": 1, **self._log(state)}

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As in torch; None, what a checkpoint has whose criterion has no parameters: new multipliers."""
        return super().load_state_dict(self.state_dict() if state_dict is None else state_dict, *args, **kwargs)

    def _sparsities(self, probabilities: GateValues, point: OperatingPoint) -> Dict[str, torch.Tensor]:
        return sparsities(self.method, self.network, probabilities, self.vocabulary, point)

    @torch.no_grad()
    def _state(self, decided: GateValues, point, target, expected) -> _State:
        left = opened(decided)
        widths = expected_widths(self.network, left)
        return _State(
            self.updates,
            target,
            {name: value.detach() for name, value in expected.items()},
            self._sparsities(left, point),
            float(sum(count_parameters(self.network, self.vocabulary, widths).values())),
            float(sum(count_macs(self.network, VIRTUAL_SAMPLES, point, self.vocabulary, widths).values())),
            kept_bars(decided),
        )

    def _is_due(self, training: bool) -> bool:
        """Once at each validation, and every report_updates updates of training."""
        due = not training or (self.report_updates and self.updates % self.report_updates == 0)
        if not due or self.updates == self.reported_at:
            return False
        self.reported_at = self.updates
        return True

    def _log(self, state: _State) -> Dict[str, torch.Tensor]:
        values = {"parameters_m": state.parameters / 1e6, "gmacs": state.macs / 1e9}
        for name, multipliers in zip(self.multipliers.constraints, self.multipliers.values.detach()):
            values[f"target_{name}"] = 100 * state.target[name]
            values[f"expected_{name}"] = 100 * state.expected[name]
            values[f"reached_{name}"] = 100 * state.reached[name]
            values[f"l1_{name}"], values[f"l2_{name}"] = multipliers.clone()
        return {_CALLS: 1, **{f"{_ADDED}{key}": value for key, value in values.items()}}

    @staticmethod
    def reduce_metrics(logging_outputs) -> None:
        """Aggregates logging outputs: those of the other criterion, and the latest state of the gates.

        target, expected, reached: percent pruned, by constraint: wanted, by the gates' probabilities, and with the
        gates of evaluation. parameters_m (millions) and gmacs (10 s of audio): of the model with those. l1, l2: the
        multipliers.
        """

        def total(key):
            value = sum(log.get(key, 0) for log in logging_outputs)
            return value.item() if torch.is_tensor(value) else value

        keys = {key for log in logging_outputs for key in log}
        for kind, criterion in LOSSES.items():
            if f"{_LOSS}{kind}" in keys:
                criterion.reduce_metrics(logging_outputs)
        calls = max(total(_CALLS), 1)
        for key in sorted(key for key in keys if key.startswith(_ADDED)):
            metrics.log_scalar(key[len(_ADDED) :], total(key) / calls, weight=0, round=3)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: every worker logs the same keys."""
        return True


def _report(state: _State) -> str:
    """One line: how far pruning is, and what each layer keeps."""
    constraints = ", ".join(
        f"{name} {100 * state.reached[name]:.1f} % pruned (expected {100 * state.expected[name]:.1f}, target "
        f"{100 * state.target[name]:.1f})"
        for name in state.target
    )
    return (
        f"update {state.update}: {constraints}; {state.parameters / 1e6:.2f} M parameters, "
        f"{state.macs / 1e9:.3f} GMACs left: {state.bars}"
    )


def _encoder(model):
    """The network that has the gates, and the first update that trains it."""
    if hasattr(model, "w2v_encoder"):
        return model.w2v_encoder.w2v_model, model.w2v_encoder.freeze_finetune_updates
    return model, 0


def _network(task) -> EncoderConfig:
    network = getattr(task, "encoder_config", None)
    if network is None:
        raise ValueError(
            "criterion light_prune: the model is none of this plugin, and has no gates; expected model._name to be "
            "light_ctc (it starts from stock checkpoints too), w2v2_light or stochastic_sew"
        )
    return network


def _inner(cfg: LightPruneConfig, task) -> FairseqCriterion:
    if cfg.loss == "distill":
        return LightDistill(cfg, task)
    if cfg.loss == "contrastive":
        return LightContrastive(task, cfg.loss_weights, cfg.collapse_perplexity)
    settings = CtcCriterionConfig(zero_infinity=cfg.zero_infinity, post_process=cfg.post_process)
    settings.sentence_avg = cfg.sentence_avg
    return CtcCriterion(settings, task)


def _check_loss(loss: str, labelled: bool) -> None:
    """Raises ValueError for a loss that there is not, or that the task cannot have."""
    if loss not in LOSSES:
        raise ValueError(f"criterion.loss: found '{loss}', expected one of {', '.join(LOSSES)}")
    if loss == "ctc" and not labelled:
        raise ValueError(
            "criterion.loss: found 'ctc', which needs labels (model light_ctc on task audio_ctc); a pre-training task "
            "has 'contrastive' or 'distill'"
        )
    if loss == "contrastive" and labelled:
        raise ValueError(
            "criterion.loss: found 'contrastive', which needs a pre-training model and task; a CTC model has 'ctc' or "
            "'distill'"
        )


def _updates(cfg: LightPruneConfig, key: str) -> int:
    if getattr(cfg, key) < 0:
        raise ValueError(f"criterion.{key}: found {getattr(cfg, key)}, expected 0 or more updates")
    return getattr(cfg, key)
