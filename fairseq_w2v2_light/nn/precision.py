"""What stays in fp32, whatever becomes of the model around it: some parameters, and convolutions on CPUs."""

from __future__ import annotations

from typing import Callable, Optional

import torch
from torch import Tensor, nn


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


def convolve(
    convolution: Callable[[Tensor, Tensor, Optional[Tensor]], Tensor], x: Tensor, weight: Tensor, bias: Optional[Tensor]
) -> Tensor:
    """`convolution` of (x, weight, bias), computed in fp32 where they are bfloat16 on a CPU.

    With AMX, oneDNN of torch 2.13 computes garbage for some numbers of channels in a group, and NaN of some gradients.
    """
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return convolution(x, weight, bias)
    return convolution(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
