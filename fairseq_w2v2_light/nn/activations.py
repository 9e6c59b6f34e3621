"""Activation functions by the names that fairseq configurations use."""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "swish": F.silu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


def get_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function called `name`; raises ValueError that lists the known names."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation_fn: found '{name}', expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
