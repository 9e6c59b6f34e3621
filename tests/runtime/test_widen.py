"""Pruned hidden channels that come back as zeros."""

import pytest
import torch
from pruned_model import pruned

from fairseq_w2v2_light.runtime.widen import widen_


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"norm_first": True},
        {"conv_feature_layers": "[(16, 10, 5), (32, 2, 2)]", "conv_norm_dims": ()},
        {"squeeze_factors": (1, 2, 3)},
    ),
)
def test_the_wider_network_computes_the_same(changes):
    model = pruned(**changes)
    wave, lengths = torch.randn(2, 1500), torch.tensor([1500, 900])
    points = list(model.backbone.config.operating_points.points())
    expected = [model(wave, lengths, point) for point in points]
    assert widen_(model)
    config = model.backbone.config
    assert (config.dim, config.conv_pos_group_dims) == (32, ())
    assert model.backbone.encoder.pos_conv[0].places is None
    for point, (logits, counts) in zip(points, expected):
        found, found_counts = model(wave, lengths, point)
        assert torch.equal(found_counts, counts)
        for row, count in enumerate(counts.tolist()):
            torch.testing.assert_close(found[row, :count], logits[row, :count], atol=1e-5, rtol=1e-5)
    assert not widen_(model)


@pytest.mark.parametrize(
    "changes",
    (
        {"norm_dim": 0},
        {"conv_norm_dims": ()},
        {"conv_pos_group_dims": (16, 5, 5, 5), "norm_dim": 64, "conv_norm_dims": (16, 16, 64)},
        {"chunk_frames": (8,), "left_context_frames": 8},
        {
            "dim": 28,
            "conv_pos_group_dims": (),
            "conv_feature_layers": "[(16, 10, 5), (28, 2, 2)]",
            "conv_norm_dims": (),
        },
    ),
    ids=("narrow norms", "narrow frontend norm", "very unequal groups", "streaming", "equal groups"),
)
def test_where_nothing_is_to_be_won_nothing_changes(changes):
    model = pruned(**changes)
    backbone, config = model.backbone, model.backbone.config
    assert not widen_(model)
    assert model.backbone is backbone and model.backbone.config is config
