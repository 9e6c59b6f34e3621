"""`light_contrastive`: wav2vec 2.0's pre-training loss with summable logs and a look at every operating point."""

import logging
import math
from dataclasses import dataclass, field
from typing import List

import torch
import torch.nn.functional as F
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics

logger = logging.getLogger(__name__)


@dataclass
class LightContrastiveConfig(FairseqDataclass):
    loss_weights: List[float] = field(
        default_factory=lambda: [0.1, 10.0],
        metadata={"help": "weights of the diversity loss and of the feature penalty (wav2vec 2.0 base: 0.1, 10)"},
    )
    collapse_perplexity: float = field(
        default=2.0,
        metadata={"help": "warn when the codebooks' perplexity per group falls below this (1 is a dead codebook)"},
    )


@register_criterion("light_contrastive", dataclass=LightContrastiveConfig)
class LightContrastive(FairseqCriterion):
    """InfoNCE over masked frames + diversity of the codebooks + feature penalty (wav2vec 2.0, eqs. 2 to 4).

    The value is that of fairseq's `wav2vec` criterion with `infonce: true` and the same loss_weights. Logging outputs
    can be summed across workers, so that training on CPU (gloo) works. Loss (bits) and accuracy are also logged per
    operating point, as `loss_s2q1k2` and `accuracy_s2q1k2`.
    """

    def __init__(self, task, loss_weights, collapse_perplexity):
        super().__init__(task)
        if len(loss_weights) != 2:
            raise ValueError(
                f"criterion.loss_weights: found {list(loss_weights)}, expected two: diversity, feature penalty"
            )
        self.diversity_weight, self.penalty_weight = loss_weights
        self.collapse_perplexity = collapse_perplexity
        self.warned_at = None

    def forward(self, model, sample, reduce=True):
        """Returns the summed loss, the number of masked frames, and the logging output."""
        output = model(**sample["net_input"])
        logits = model.get_logits(output).float()
        targets = model.get_targets(sample, output)
        frames = targets.numel()

        contrastive = F.cross_entropy(logits, targets, reduction="sum")
        penalty = output["features_pen"].float() * frames
        diversity = torch.zeros_like(contrastive)
        if "prob_perplexity" in output:
            codes = output["num_vars"]
            diversity = (codes - output["prob_perplexity"].float()) / codes * frames
        loss = contrastive + self.diversity_weight * diversity + self.penalty_weight * penalty

        correct = _correct(logits)
        log = {
            "loss": loss.detach(),
            "contrastive": contrastive.detach(),
            "diversity": diversity.detach(),
            "feature_penalty": penalty.detach(),
            "correct": correct,
            "ntokens": frames,
            "nsentences": sample["id"].numel(),
            "sample_size": frames,
            "batches": 1,
        }
        point = output.get("operating_point")
        if point is not None and "-" not in point:  # points that pool per layer are too many to log one by one
            log.update({f"loss@{point}": contrastive.detach(), f"correct@{point}": correct, f"frames@{point}": frames})
        if "code_perplexity" in output:
            for key in ("code_perplexity", "prob_perplexity", "temp"):
                log[key] = torch.as_tensor(output[key]).item()
            if model.training:
                self._warn_of_collapse(model, log["code_perplexity"])
        return loss, frames, log

    def _warn_of_collapse(self, model, perplexity: float) -> None:
        per_group = perplexity / model.quantizer.groups
        update = getattr(model, "num_updates", None) or 0
        if per_group >= self.collapse_perplexity or (self.warned_at is not None and update < self.warned_at + 100):
            return
        self.warned_at = update
        logger.warning(
            f"the codebook is collapsing at update {update}: perplexity {per_group:.2f} per group of "
            f"{model.quantizer.num_vars} codes (1 means that every frame gets the same code, and nothing is learnt). "
            "Raise the diversity weight (criterion.loss_weights), lower optimization.lr, lengthen the warm-up, or use "
            "larger batches (optimization.update_freq)"
        )

    @staticmethod
    def reduce_metrics(logging_outputs) -> None:
        """Aggregates logging outputs from data-parallel training."""

        def total(key):
            return sum(log.get(key, 0) for log in logging_outputs)

        def item(value):
            return value.item() if torch.is_tensor(value) else value

        frames = item(total("sample_size"))
        per_frame = 1 / max(frames, 1)
        metrics.log_scalar("loss", item(total("loss")) * per_frame / math.log(2), frames, round=3)
        metrics.log_scalar("contrastive", item(total("contrastive")) * per_frame / math.log(2), frames, round=3)
        metrics.log_scalar("diversity", item(total("diversity")) * per_frame, frames, round=3)
        metrics.log_scalar("feature_penalty", item(total("feature_penalty")) * per_frame, frames, round=3)
        metrics.log_scalar("accuracy", item(total("correct")) * per_frame, frames, round=3)
        metrics.log_scalar("ntokens", item(total("ntokens")))
        metrics.log_scalar("nsentences", item(total("nsentences")))
        batches = max(item(total("batches")), 1)
        for key in ("code_perplexity", "prob_perplexity", "temp"):
            if any(key in log for log in logging_outputs):
                metrics.log_scalar(key, item(total(key)) / batches, batches, round=3)
        for point in sorted({key[5:] for log in logging_outputs for key in log if key.startswith("loss@")}):
            point_frames = item(total(f"frames@{point}"))
            if point_frames:
                loss = item(total(f"loss@{point}")) / point_frames / math.log(2)
                metrics.log_scalar(f"loss_{point}", loss, point_frames, round=3)
                accuracy = item(total(f"correct@{point}")) / point_frames
                metrics.log_scalar(f"accuracy_{point}", accuracy, point_frames, round=3)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: every worker logs the same keys, because all draw the same operating point."""
        return True


def _correct(logits) -> int:
    """Masked frames whose true target scores highest; ties of all scores do not count (as in fairseq)."""
    with torch.no_grad():
        if logits.numel() == 0:
            return 0
        best = logits.argmax(-1) == 0
        return int((best & (logits.argmin(-1) != 0)).sum())
