"""Parameters that stay in fp32, whatever becomes of the model around them."""

from __future__ import annotations

import torch
from torch import nn


class Fp32Parameters(nn.Module):
    """A module whose own parameters and gradients stay in fp32: under `half()`, and when loaded from half precision."""

    def _apply(self, function, *args, **kwargs):
        precise = {
            name: (value.detach().clone(), None if value.grad is None else value.grad.clone())
            for name, value in self.named_parameters(recurse=False)
        }
        super()._apply(function, *args, **kwargs)
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.dtype != torch.float32:
                value, gradient = precise[name]
                # a gradient must have the dtype of its parameter at any time
                parameter.grad = None
                parameter.data = value.to(parameter.device)
                parameter.grad = None if gradient is None else gradient.to(parameter.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name, _ in self.named_parameters(recurse=False):
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{name}"] = state_dict[f"{prefix}{name}"].float()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
