"""Projection heads of contrastive pre-training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fp32BatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d computed in fp32, whatever the dtype of its input and parameters.

    On several GPUs each has the mean and variance of its own batches, in SEW's code, too, and the checkpoint those of
    the first one: what is evaluated in pre-training may differ a little after a restart. No fine-tuned model has it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, variance = self.running_mean.float(), self.running_var.float()
        y = F.batch_norm(
            x.float(), mean, variance, self.weight.float(), self.bias.float(), self.training, self.momentum, self.eps
        )
        if self.training and mean is not self.running_mean:
            with torch.no_grad():
                self.running_mean.copy_(mean)
                self.running_var.copy_(variance)
        return y.type_as(x)


class ProjectionMLP(nn.Module):
    """SEW's two-layer projection: 1x1 convolution, BatchNorm, ReLU, 1x1 convolution.

    (batch, time, in) -> (batch, time, out). State names are SEW's (mlp v3): `net.0`, `net.1`, `net.3`.
    Source: SEW's code (asappresearch/sew); arXiv 2109.06870 for the idea of MLP prediction heads.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = 4096):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(in_dim, hidden_dim, 1, bias=False),
            Fp32BatchNorm1d(hidden_dim),
            nn.ReLU(),
            nn.Conv1d(hidden_dim, out_dim, 1),
        )
        for conv in (self.net[0], self.net[3]):
            nn.init.xavier_normal_(conv.weight)
        nn.init.zeros_(self.net[3].bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(1, 2)).transpose(1, 2).contiguous()
