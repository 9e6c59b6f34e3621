"""Tiny random networks."""

from types import SimpleNamespace

import pytest
import torch

from fairseq_w2v2_light.nn import Backbone, Encoder, FrameMask, OperatingPointSpace, encoder_config

POINTS = [str(point) for point in OperatingPointSpace((1, 2, 3), (1, 2), (1, 2, 3)).points()]


def config(**changes):
    keys = dict(
        conv_feature_layers="[(8, 10, 5), (8, 3, 2), (8, 2, 2)]",
        extractor_norm="group",
        encoder_layers=3,
        dim=16,
        ffn_dim=24,
        heads=2,
        conv_pos=6,
        conv_pos_groups=2,
        squeeze_factors=(1, 2, 3),
        query_pools=(1, 2),
        kv_pools=(1, 2, 3),
    )
    return encoder_config(**{**keys, **changes})


def _perturbed(module, seed):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


def encoder(seed=0, **changes):
    torch.manual_seed(seed)
    return _perturbed(Encoder(config(**changes)), seed)


def backbone(seed=0, **changes):
    torch.manual_seed(seed)
    return _perturbed(Backbone(config(**changes)), seed)


def frames(*lengths, dim=16, seed=0):
    """Random frames (batch, time, channel) with noise on padded frames, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), max(lengths), dim, generator=generator)
    return x, FrameMask.from_lengths(torch.tensor(lengths), max(lengths))


@pytest.fixture(scope="session")
def tiny():
    """The helpers of this file, by name."""
    return SimpleNamespace(points=POINTS, config=config, encoder=encoder, backbone=backbone, frames=frames)
