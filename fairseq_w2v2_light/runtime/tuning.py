"""The weights of a language model decoder, found on a development set: the network runs once, decoding many times."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Callable, Iterable, List, Optional, Sequence

import numpy as np

from .lm import LanguageModelDecoder, Weights
from .scoring import Totals, score, totals
from .text import Labels


@dataclass(frozen=True)
class Trial:
    """Weights, and how well a set was recognised with them."""

    weights: Weights
    totals: Totals

    @property
    def errors(self):
        """By which trials are compared: errors in words, then in characters."""
        return self.totals.words.errors, self.totals.characters.errors


def grid(lm_weights: Iterable[float], word_scores: Iterable[float], sil_scores: Iterable[float]) -> List[Weights]:
    """Every combination, each once."""
    return list(dict.fromkeys(Weights(*values) for values in itertools.product(lm_weights, word_scores, sil_scores)))


def draw(
    count: int,
    lm_weights: Sequence[float],
    word_scores: Sequence[float],
    sil_scores: Sequence[float],
    seed: int = 0,
) -> List[Weights]:
    """`count` combinations drawn uniformly between the smallest and the largest of each list, rounded to 0.01.

    Finds good weights in fewer trials than a grid where one of them matters little (Bergstra and Bengio, 2012).
    """
    generator = np.random.default_rng(seed)
    ranges = [(min(values), max(values)) for values in (lm_weights, word_scores, sil_scores)]
    return [Weights(*(round(float(generator.uniform(*ends)), 2) for ends in ranges)) for _ in range(count)]


def sweep(
    decoder: LanguageModelDecoder,
    log_probs: Sequence[np.ndarray],
    references: Sequence[str],
    candidates: Iterable[Weights],
    on_trial: Optional[Callable[[Trial], None]] = None,
) -> List[Trial]:
    """Decodes (frames, labels) log-probabilities of utterances with each candidate; the best trials first.

    Of trials that are equally good, the one that was tried first comes first. on_trial: is told each as it is done.
    """
    trials = []
    for weights in candidates:
        trial = Trial(weights, error_totals(decoder.with_weights(weights), decoder.labels, log_probs, references))
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial)
    return sorted(trials, key=lambda trial: trial.errors)


def error_totals(decoder, labels: Labels, log_probs: Sequence[np.ndarray], references: Sequence[str]) -> Totals:
    """Decodes utterances with any decoder (a LanguageModelDecoder, GreedyDecoder, ...) and scores their texts.

    Raises ValueError unless there are as many references as utterances.
    """
    if len(log_probs) != len(references):
        raise ValueError(f"{len(log_probs)} utterances with {len(references)} references; expected one for each")
    texts = (labels.text(token.index for token in decoder.decode(frames)) for frames in log_probs)
    return totals(
        score(str(number), reference, text) for number, (reference, text) in enumerate(zip(references, texts), start=1)
    )
