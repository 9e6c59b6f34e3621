"""CTC decoding: greedy and prefix beam search over log-probabilities, without fairseq."""

import functools
import math
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .beam import Beam, PrefixSearch


@dataclass(frozen=True)
class Hypothesis:
    """One decoded labelling of one utterance.

    tokens: label indices, without blanks and with repetitions merged.
    score: natural log of the labelling's probability, summed over all its alignments.
    frames: for each token, the index of its first frame.
    """

    tokens: Tuple[int, ...]
    score: float
    frames: Tuple[int, ...]


def greedy(log_probs: Tensor, lengths: Optional[Tensor] = None, blank: int = 0) -> List[Hypothesis]:
    """Merges repetitions in, and drops blanks from, each frame's most probable symbol.

    log_probs: (batch, time, symbols), normalised over symbols. lengths: (batch,) frames that are not padding; all by
    default. Returns one hypothesis an utterance; the frames are those of the most probable alignment.
    """
    lengths = _check(log_probs, lengths, blank)
    best = log_probs.argmax(dim=-1).cpu().numpy()
    tokens, frames = [], []
    for row, length in zip(best, lengths):
        row = row[:length]
        starts = np.flatnonzero(np.diff(row, prepend=-1))
        starts = starts[row[starts] != blank]
        tokens.append(tuple(row[starts].tolist()))
        frames.append(tuple(starts.tolist()))
    scores = [
        labelling_log_probs(utterance[:length], [labels], blank)[0]
        for utterance, length, labels in zip(log_probs, lengths, tokens)
    ]
    return [Hypothesis(*fields) for fields in zip(tokens, scores, frames)]


def prefix_beam_search(
    log_probs: Tensor,
    lengths: Optional[Tensor] = None,
    blank: int = 0,
    beam: int = 10,
    nbest: int = 1,
    max_symbols: Optional[int] = 50,
    min_log_prob: Optional[float] = -16.0,
) -> List[List[Hypothesis]]:
    """Searches the labellings of highest probability, summed over alignments (Graves 2006; Hannun 2014).

    log_probs: (batch, time, symbols), normalised over symbols. lengths: (batch,) frames that are not padding; all by
    default. beam: prefixes kept after each frame. nbest: hypotheses returned an utterance, at most; fewer where fewer
    have any probability. A frame extends prefixes only by its `max_symbols` most probable symbols, and only by those
    of at least `min_log_prob`; None switches either pruning off. Scores are exact whatever the pruning: each returned
    labelling is scored again over all its alignments, and the list sorted by that.
    """
    search = PrefixSearch(blank, beam, max_symbols, min_log_prob)
    if not 1 <= nbest <= beam:
        raise ValueError(f"nbest is {nbest}; expected 1 to beam={beam}")
    lengths = _check(log_probs, lengths, blank)
    results = []
    for utterance, length in zip(log_probs, lengths):
        utterance = utterance[:length].detach().double().cpu()
        found = functools.reduce(search.step, utterance.numpy(), Beam.start())
        labellings = found.labellings()[:nbest]
        scores = labelling_log_probs(utterance, labellings, blank)
        hypotheses = [
            Hypothesis(tokens, score, best_alignment(utterance, tokens, blank))
            for tokens, score in zip(labellings, scores)
        ]
        results.append(sorted(hypotheses, key=lambda hypothesis: -hypothesis.score))
    return results


def labelling_log_probs(log_probs: Tensor, labellings: Sequence[Sequence[int]], blank: int = 0) -> List[float]:
    """Log-probability of each labelling of one utterance, summed over its alignments (the CTC forward sum).

    log_probs: (time, symbols). Returns natural logs, -inf for a labelling that does not fit into the frames.
    """
    length = log_probs.size(0)
    if length == 0:
        return [0.0 if len(tokens) == 0 else -math.inf for tokens in labellings]
    longest = max(1, max((len(tokens) for tokens in labellings), default=1))
    filler = 1 if blank == 0 else 0
    targets = torch.tensor([list(tokens) + [filler] * (longest - len(tokens)) for tokens in labellings])
    loss = F.ctc_loss(
        log_probs.detach().double().cpu().unsqueeze(1).expand(-1, len(labellings), -1),
        targets.reshape(len(labellings), longest),
        torch.full((len(labellings),), length),
        torch.tensor([len(tokens) for tokens in labellings]),
        blank=blank,
        reduction="none",
    )
    return (-loss).tolist()


def best_alignment(log_probs: Tensor, tokens: Sequence[int], blank: int = 0) -> Tuple[int, ...]:
    """First frame of each token in the most probable alignment of `tokens` to one utterance (Viterbi).

    log_probs: (time, symbols). Raises ValueError where the tokens do not fit into the frames.
    """
    if len(tokens) == 0:
        return ()
    # States: blank, token, blank, token, ..., blank.
    states = np.full(2 * len(tokens) + 1, blank)
    states[1::2] = tokens
    emissions = log_probs.detach().double().cpu().numpy()[:, states]
    can_skip = np.zeros(len(states), dtype=bool)
    can_skip[3::2] = states[3::2] != states[1:-2:2]
    score = np.full(len(states), -np.inf)
    score[:2] = emissions[0, :2] if len(emissions) else -np.inf
    steps = np.zeros(emissions.shape, dtype=np.int8)
    for t in range(1, len(emissions)):
        one = np.concatenate([[-np.inf], score[:-1]])
        two = np.where(can_skip, np.concatenate([[-np.inf, -np.inf], score[:-2]]), -np.inf)
        choices = np.stack([score, one, two])
        steps[t] = choices.argmax(axis=0)
        score = choices.max(axis=0) + emissions[t]
    state = len(states) - 1 if score[-1] > score[-2] else len(states) - 2
    if score[state] == -np.inf:
        raise ValueError(f"{len(tokens)} tokens do not fit into {len(emissions)} frames")
    first = [0] * len(tokens)
    for t in range(len(emissions) - 1, -1, -1):
        if state % 2:
            first[state // 2] = t
        state -= int(steps[t, state])
    return tuple(first)


def _check(log_probs: Tensor, lengths: Optional[Tensor], blank: int) -> List[int]:
    if log_probs.dim() != 3:
        raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}; expected (batch, time, symbols)")
    batch, time, symbols = log_probs.shape
    if not 0 <= blank < symbols:
        raise ValueError(f"blank is {blank}; expected an index below {symbols}, the number of symbols")
    if lengths is None:
        lengths = torch.full((batch,), time)
    if tuple(lengths.shape) != (batch,) or not bool(((lengths >= 0) & (lengths <= time)).all()):
        raise ValueError(f"lengths is {lengths.tolist()}; expected {batch} numbers of frames from 0 to {time}")
    if bool(torch.isnan(log_probs).any()):
        raise ValueError("log_probs has NaN values: the model, or its input, is broken")
    return lengths.tolist()
