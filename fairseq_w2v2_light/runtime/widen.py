"""Hidden channels that pruning removed come back as zeros, where the network is faster with them than without."""

from __future__ import annotations

from dataclasses import replace
from typing import Dict, Optional, Tuple

import torch
from torch import Tensor

from ..nn.backbone import Backbone
from ..nn.config import EncoderConfig
from ..nn.positions import WeightNormConv1d
from .ctc import CtcModel


def widen_(model: CtcModel) -> bool:
    """Gives a pruned model that has a few hidden channels less than its positions have places for those back, as zeros.

    It computes the same. Its LayerNorms, over the original width, become ordinary ones, and its positions need not
    move channels: with 191 of 192 channels left a small network wins 4 %. Replaces `model.backbone`, whose config
    states the wider network, and `model.head`; returns False, and changes nothing, where there is nothing to win.
    """
    config = model.backbone.config
    wide = _wider(config)
    if wide is None:
        return False
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in CtcModel(wide, model.symbols).state_dict().items()}
        backbone = Backbone(wide)
    positions = model.backbone.encoder.pos_conv[0]
    weights = {
        name: _spread(value, shapes[name], positions.places, wide.dim) for name, value in model.state_dict().items()
    }
    prefix = "backbone.encoder.pos_conv.0."
    weights.update({prefix + name: value for name, value in _position_weights(positions).items()})
    backbone.load_state_dict(
        {name[len("backbone.") :]: value for name, value in weights.items() if name.startswith("backbone.")},
        assign=True,
    )
    head = torch.nn.Linear(wide.dim, len(model.symbols), device="meta")
    head.load_state_dict({name: weights[f"head.{name}"] for name in ("weight", "bias")}, assign=True)
    model.backbone = backbone.train(model.training).requires_grad_(False)
    model.head = head.train(model.training).requires_grad_(False)
    return True


def _wider(config: EncoderConfig) -> Optional[EncoderConfig]:
    """The wider network, None where there is none, or it would be more than a few channels wider."""
    groups = config.conv_pos_group_dims
    width = max(groups) * config.conv_pos_groups if groups else config.dim
    features = config.features_dim if config.projects else width
    norms = config.conv_norm_dims
    if not config.dim < width <= min(config.norm_dim, config.dim + config.dim // 16):
        return None
    # a stream's state has the width of the network that began it
    if config.streams or (not config.projects and (not norms or norms[-1] < width)):
        return None
    return replace(
        config,
        conv_layers=(*config.conv_layers[:-1], (features, *config.conv_layers[-1][1:])),
        dim=width,
        head_dim=config.head_size,
        conv_pos_group_dims=(),
        project_features=config.projects,
    )


@torch.no_grad()
def _position_weights(conv: WeightNormConv1d) -> Dict[str, Tensor]:
    """Its parameters with zeros for the channels that are not there, whose outputs it leaves out itself."""
    there = torch.zeros_like(conv.bias).index_fill(0, conv.places, 1)
    weight = conv.weight() * there[:, None, None]
    norm = torch.linalg.vector_norm(weight, dim=(0, 1), keepdim=True)
    return {"weight_g": norm, "weight_v": weight, "bias": conv.bias * there}


def _spread(value: Tensor, shape: Tuple[int, ...], places: Tensor, width: int) -> Tensor:
    """`value` in zeros of `shape`: an axis that is longer there has blocks of `width` channels, taken at `places`."""
    for axis, (old, new) in enumerate(zip(value.shape, shape)):
        if old != new:
            index = torch.cat([places + block * width for block in range(new // width)])
            zeros = value.new_zeros(*value.shape[:axis], new, *value.shape[axis + 1 :])
            value = zeros.index_copy(axis, index, value)
    return value
