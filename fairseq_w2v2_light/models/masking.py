"""Span masks that depend on a seed only, so that a resumed run masks what an uninterrupted one would."""

import contextlib

import torch
from fairseq.data.data_utils import compute_mask_indices, numpy_seed

from .. import compat


def span_mask(shape, padding_mask, prob, length, selection, other, **options) -> torch.Tensor:
    """fairseq's compute_mask_indices as a bool tensor of `shape` (batch, time), drawn from numpy's global generator."""
    options.update(compat.mask_seeds(shape[0]))
    try:
        return torch.from_numpy(compute_mask_indices(shape, padding_mask, prob, length, selection, other, **options))
    except (ValueError, IndexError):
        # fairseq crashes when it draws no span for a row, which narrow models and short utterances do
        if options.get("min_masks", 0) > 0 or prob * shape[1] >= length:
            raise
        return torch.zeros(shape, dtype=torch.bool)


def training_randomness(seed: int, num_updates, call: int):
    """A context in which numpy's global generator is a function of (seed, update, call); none outside a trainer.

    Ranks differ, as their masks should. The state from before is restored at the end.
    """
    if num_updates is None:
        return contextlib.nullcontext()
    rank = (
        torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
    )
    return numpy_seed(seed, num_updates, call, rank)
