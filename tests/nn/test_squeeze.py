"""Squeeze and unsqueeze against SEW's, written out anew, and the strided positions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq_w2v2_light.nn import OperatingPoint
from fairseq_w2v2_light.nn.positions import ConvPositions
from fairseq_w2v2_light.nn.squeeze import Unsqueeze

SEW = {"squeeze_tail": "drop", "unsqueeze_residual": False}


def sew_encode(encoder, x, factor, lengths=None):
    """SEW's encoder with its own building blocks: Conv1d with stride and weight_norm, AvgPool1d, Linear upsampling.

    Lengths of the padded rows become length // factor (asappresearch/sew, squeeze_wav2vec2.py).
    """
    config = encoder.config
    batch, time, dim = x.shape
    conv = nn.Conv1d(
        dim, dim, config.conv_pos, padding=config.conv_pos // 2, groups=config.conv_pos_groups, stride=factor
    )
    conv = nn.utils.weight_norm(conv, name="weight", dim=2)
    conv.load_state_dict(encoder.pos_conv[0].state_dict(), strict=True)
    padding = None
    if lengths is not None:
        x = x * (torch.arange(time) < lengths[:, None])[..., None]
    channels_first = x.transpose(1, 2)
    positions = conv(channels_first)
    if config.conv_pos % 2 == 0:
        positions = positions[..., :-1]
    positions = F.gelu(positions)
    pooled = nn.AvgPool1d(factor, factor)(channels_first)
    short = min(pooled.size(-1), positions.size(-1))
    y = (pooled[..., :short] + positions[..., :short]).transpose(1, 2)
    if lengths is not None:
        padding = torch.arange(short) >= (lengths // factor)[:, None]
    if not config.norm_first:
        y = encoder.layer_norm(y)
    for depth in config.layer_map:
        y = stock_layer(encoder.layers[depth], y, padding)
    if config.norm_first:
        y = encoder.layer_norm(y)
    linear = nn.Linear(dim, factor * dim)
    linear.load_state_dict(encoder.upsample[0].state_dict(), strict=True)
    y = F.gelu(linear(y))
    y = y.reshape(batch, short, factor, dim).reshape(batch, short * factor, dim)
    return F.pad(y, (0, 0, 0, time - y.size(1)))


def stock_layer(layer, x, padding):
    reference = nn.TransformerEncoderLayer(
        x.size(-1),
        layer.self_attn.heads,
        layer.fc1.out_features,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=layer.norm_first,
    ).train()  # the fast path of inference is of no use here
    attention = layer.self_attn
    state = {
        "self_attn.in_proj_weight": torch.cat(
            [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        ),
        "self_attn.in_proj_bias": torch.cat([attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias]),
    }
    names = {
        "self_attn.out_proj": attention.out_proj,
        "linear1": layer.fc1,
        "linear2": layer.fc2,
        "norm1": layer.self_attn_layer_norm,
        "norm2": layer.final_layer_norm,
    }
    for name, module in names.items():
        state.update({f"{name}.weight": module.weight, f"{name}.bias": module.bias})
    reference.load_state_dict(state, strict=True)
    return reference(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("norm_first", (False, True))
@pytest.mark.parametrize("conv_pos", (6, 7, 31))
@pytest.mark.parametrize("factor", (2, 3, 4))
@pytest.mark.parametrize("time", (12, 13, 14, 23))
def test_equals_sew_when_the_tail_is_dropped(tiny, norm_first, conv_pos, factor, time):
    encoder = tiny.encoder(squeeze_factors=(factor,), norm_first=norm_first, conv_pos=conv_pos, encoder_layers=2, **SEW)
    x, _ = tiny.frames(time, time)
    with torch.no_grad():
        ours = encoder(x, None, OperatingPoint(factor)).x
        torch.testing.assert_close(ours, sew_encode(encoder, x, factor), atol=1e-5, rtol=1e-5)
    assert ours[:, time - time % factor :].abs().sum() == 0


@pytest.mark.parametrize("factor", (2, 3))
def test_equals_sew_on_the_heard_frames_of_a_padded_batch(tiny, factor):
    encoder = tiny.encoder(squeeze_factors=(factor,), encoder_layers=2, **SEW)
    lengths = torch.tensor([18, 11, 7, 4])
    x, mask = tiny.frames(*lengths.tolist())
    with torch.no_grad():
        ours, sew = encoder(x, mask, OperatingPoint(factor)).x, sew_encode(encoder, x, factor, lengths)
    for row, length in enumerate(lengths.tolist()):
        heard = length - length % factor
        torch.testing.assert_close(ours[row, :heard], sew[row, :heard], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", (3, 6, 31, 128))
@pytest.mark.parametrize("stride", (2, 3, 4, 7))
@pytest.mark.parametrize("time", (1, 2, 11, 12))
def test_strided_positions_are_full_rate_positions_sub_sampled(kernel, stride, time):
    torch.manual_seed(0)
    positions = ConvPositions(8, kernel, 4)
    x = torch.randn(2, time, 8)
    with torch.no_grad():
        strided, full = positions(x, stride), positions(x)
    assert full.shape == x.shape
    torch.testing.assert_close(strided, full[:, ::stride], atol=1e-6, rtol=1e-5)


def test_groups_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="conv_pos_groups: 3 groups do not divide 8 channels"):
        ConvPositions(8, 6, 3)


@pytest.mark.parametrize("largest", (1, 2, 3, 4, 5, 8))
def test_blocks_of_smaller_factors(largest):
    unsqueeze = Unsqueeze(4, largest)
    assert unsqueeze.blocks(largest) == list(range(largest))
    for factor in range(1, largest + 1):
        blocks = unsqueeze.blocks(factor)
        assert len(set(blocks)) == factor and blocks == sorted(blocks)
        assert 0 <= min(blocks) and max(blocks) < largest


def test_docstring_example_of_blocks():
    assert Unsqueeze(4, 4).blocks(2) == [1, 3]


@pytest.mark.parametrize("factor", (1, 2, 3, 4))
def test_every_factor_uses_its_blocks(factor):
    unsqueeze = Unsqueeze(3, 4)
    x = torch.randn(2, 5, 3)
    with torch.no_grad():
        y = unsqueeze(x, factor, 5 * factor)
        for frame, block in enumerate(unsqueeze.blocks(factor)):
            rows = slice(block * 3, block * 3 + 3)
            expected = F.gelu(F.linear(x, unsqueeze[0].weight[rows], unsqueeze[0].bias[rows]))
            torch.testing.assert_close(y[:, frame::factor], expected)


@pytest.mark.parametrize("factor", (1, 2, 3, 4))
def test_residual_adds_the_squeezed_frame_to_each_of_its_sub_frames(factor):
    torch.manual_seed(0)
    plain, residual = Unsqueeze(3, 4), Unsqueeze(3, 4, residual=True)
    residual.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 3)
    time = 5 * factor - 1
    repeated = x.repeat_interleave(factor, dim=1)[:, :time]
    with torch.no_grad():
        torch.testing.assert_close(residual(x, factor, time), plain(x, factor, time) + repeated)


def test_residual_starts_close_to_repeated_frames():
    torch.manual_seed(0)
    unsqueeze = Unsqueeze(64, 2, residual=True)
    unsqueeze.reset_parameters()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        difference = unsqueeze(x, 2, 10) - x.repeat_interleave(2, dim=1)
    assert difference.abs().mean() < 0.2 * x.abs().mean()


@pytest.mark.parametrize("time", (7, 8, 9, 11))
def test_unsqueeze_cuts_or_pads_to_the_length(time):
    unsqueeze = Unsqueeze(3, 3)
    full = unsqueeze(torch.ones(1, 3, 3), 3, 9)
    y = unsqueeze(torch.ones(1, 3, 3), 3, time)
    assert y.shape == (1, time, 3)
    torch.testing.assert_close(y[:, :9], full[:, :time])
    assert y[:, 9:].abs().sum() == 0


def test_state_names_are_sew_s(tiny):
    encoder = tiny.encoder(squeeze_factors=(2,))
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items() if "layers." not in name}
    assert shapes == {
        "pos_conv.0.weight_g": (1, 1, 6),
        "pos_conv.0.weight_v": (16, 8, 6),
        "pos_conv.0.bias": (16,),
        "layer_norm.weight": (16,),
        "layer_norm.bias": (16,),
        "upsample.0.weight": (32, 16),
        "upsample.0.bias": (32,),
    }


def test_unsqueeze_is_initialised_as_sew_does():
    """kaiming_normal, fan_out, relu; bias 0."""
    from fairseq_w2v2_light.nn import Encoder, encoder_config

    torch.manual_seed(0)
    config = encoder_config(
        conv_feature_layers="[(8, 10, 5)]",
        extractor_norm="group",
        encoder_layers=1,
        dim=128,
        ffn_dim=8,
        heads=2,
        conv_pos=4,
        conv_pos_groups=2,
        squeeze_factors=(2,),
        unsqueeze_residual=False,
    )
    linear = Encoder(config).upsample[0]
    assert linear.weight.std().item() == pytest.approx((2 / (2 * 128)) ** 0.5, rel=0.05)
    assert linear.bias.abs().sum() == 0
