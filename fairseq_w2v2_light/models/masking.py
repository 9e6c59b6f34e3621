"""Span masks that depend on a seed only, so that a resumed run masks what an uninterrupted one would."""

import contextlib
import inspect

import numpy as np
import torch
from fairseq.data.data_utils import compute_mask_indices, numpy_seed

_SEEDED = "indices" in inspect.signature(compute_mask_indices).parameters


def span_mask(shape, padding_mask, prob, length, selection, other, **options) -> torch.Tensor:
    """fairseq's compute_mask_indices as a bool tensor of `shape` (batch, time), drawn from numpy's global generator.

    fairseq-fixed (and fairseq's HEAD) draws from fresh entropy unless it is told seed, epoch and indices; 0.12.2 draws
    from the global generator and takes none of them.
    """
    if _SEEDED:
        options.update(seed=int(np.random.randint(2**31 - 1)), epoch=0, indices=torch.arange(shape[0]))
    return torch.from_numpy(compute_mask_indices(shape, padding_mask, prob, length, selection, other, **options))


def training_randomness(seed: int, num_updates, call: int):
    """A context in which numpy's global generator is a function of (seed, update, call); none outside a trainer.

    Ranks differ, as their masks should. The state from before is restored at the end.
    """
    if num_updates is None:
        return contextlib.nullcontext()
    rank = torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
    return numpy_seed(seed, num_updates, call, rank)
