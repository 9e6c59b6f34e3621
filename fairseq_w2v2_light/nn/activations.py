"""Activation functions by the names that fairseq configurations use."""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _linear(x: Tensor) -> Tensor:
    return x


# named functions, not lambdas: modules that hold one can be pickled
_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "relu": F.relu,
    "relu_squared": _relu_squared,
    "swish": F.silu,
    "tanh": torch.tanh,
    "linear": _linear,
}


def get_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function called `name`; raises ValueError that lists the known names."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation_fn: found '{name}', expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
