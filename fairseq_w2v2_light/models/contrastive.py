"""Targets and scores of pre-training as matrix products: fairseq's values, a fraction of its time and memory.

fairseq gathers the vectors of all negatives, a hundred for each masked frame, and multiplies every one of all code
vectors by a number that is zero but for one of them.
"""

from __future__ import annotations

from typing import Any, Dict, Optional

import torch
import torch.nn.functional as F
from fairseq.modules import GumbelVectorQuantizer
from torch import Tensor


def contrastive_logits(
    predictions: Tensor,
    pool: Tensor,
    targets: Tensor,
    negatives: Tensor,
    temperature: float,
    drawn: Optional[Tensor] = None,
) -> Tensor:
    """Cosine similarities over `temperature` (wav2vec 2.0, eq. 3): (1 + n + m, batch, frames), the target's first.

    predictions: (batch, frames, dim). pool: (p, dim), what targets and negatives are taken from; targets (batch,
    frames) and negatives (batch, frames, n): rows of it. drawn: (m, batch, frames, dim), further negatives. One that
    equals its target has -inf. Computed in fp32, in the dtype of `predictions`.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        compared, candidates = _normalised(predictions), _normalised(pool)
        rows = torch.cat([targets.unsqueeze(-1), negatives], dim=-1)
        logits = (compared.flatten(0, 1) @ candidates.t()).gather(1, rows.flatten(0, 1)).view_as(rows)
        # equal vectors have the same number
        values = pool.detach()
        # as CUDA's unique of rows has no bfloat16 everywhere
        values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        numbers = torch.unique(values, dim=0, return_inverse=True)[1]
        is_target = numbers[negatives] == numbers[targets].unsqueeze(-1)
        if drawn is not None:
            more = torch.einsum("btd,mbtd->btm", compared, _normalised(drawn))
            logits = torch.cat([logits, more], dim=-1)
            same = (drawn == pool[targets]).all(-1).permute(1, 2, 0)
            is_target = torch.cat([is_target, same], dim=-1)
        logits = (logits / temperature).type_as(predictions)
    is_target = F.pad(is_target, (1, 0), value=False)
    return logits.masked_fill(is_target, float("-inf")).permute(2, 0, 1)


def _normalised(x: Tensor) -> Tensor:
    # torch.cosine_similarity's smallest norm
    return F.normalize(x.float(), dim=-1, eps=1e-8)


class GumbelQuantizer(GumbelVectorQuantizer):
    """fairseq's quantiser of (batch, time, channel), whose codebooks are looked up by a product for each group."""

    def forward(self, x: Tensor, produce_targets: bool = False) -> Dict[str, Any]:
        """The code vectors `x` (batch, time, vq dim) with num_vars, temp, code_perplexity and prob_perplexity.

        produce_targets: also `targets`, the chosen codes (batch, time, groups).
        """
        batch, time, _ = x.shape
        scores = self.weight_proj(x.reshape(batch * time, -1)).view(batch * time * self.groups, self.num_vars)
        best = scores.detach().max(-1)[1].view(-1, 1)
        hard = torch.zeros_like(scores).scatter_(-1, best, 1.0)
        probabilities = torch.softmax(scores.view(batch * time, self.groups, -1).float(), dim=-1)
        chosen = hard
        if self.training:
            chosen = F.gumbel_softmax(scores.float(), tau=self.curr_temp, hard=True).type_as(scores)
        codebooks = self.vars.view(-1, self.num_vars, self.vars.size(-1)).expand(self.groups, -1, -1)
        codes = torch.einsum("ngv,gvd->ngd", chosen.view(batch * time, self.groups, -1), codebooks)
        result = {
            "num_vars": self.num_vars * self.groups,
            "temp": self.curr_temp,
            "code_perplexity": _perplexity(hard.view(batch * time, self.groups, -1).float()),
            "prob_perplexity": _perplexity(probabilities),
            "x": codes.reshape(batch, time, -1),
        }
        if produce_targets:
            result["targets"] = chosen.argmax(-1).view(batch, time, self.groups).detach()
        return result


def _perplexity(choices: Tensor) -> Tensor:
    """Of the mean of `choices` (frames, groups, codes), summed over groups."""
    mean = choices.mean(0)
    return torch.exp(-torch.sum(mean * torch.log(mean + 1e-7), dim=-1)).sum()
