"""A network that pruning left one hidden channel short, which the runtime gives back to it."""

import torch

from fairseq_w2v2_light.nn import encoder_config
from fairseq_w2v2_light.runtime.ctc import CtcModel


def pruned(**changes):
    """A CTC model with random weights: 31 of 32 hidden channels are left, unequally in the groups of its positions."""
    keys = dict(
        conv_feature_layers="[(16, 10, 5), (16, 3, 2), (31, 2, 2)]",
        extractor_norm="layer",
        conv_norm_dims=(16, 16, 32),
        encoder_layers=2,
        dim=31,
        ffn_dim=24,
        heads=4,
        head_dim=8,
        norm_dim=32,
        conv_pos=8,
        conv_pos_groups=4,
        conv_pos_group_dims=(8, 7, 8, 8),
    )
    torch.manual_seed(0)
    model = CtcModel(encoder_config(**{**keys, **changes}), ["<s>", "A", "B"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval().requires_grad_(False)
