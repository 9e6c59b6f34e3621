"""Causal convolutional positions, and the conversion of centred ones into them."""

import pytest
import torch
import torch.nn.functional as F

from fairseq_w2v2_light.nn.positions import (
    FRAME_CORRELATION,
    ConvPositions,
    WeightNormConv1d,
    causal_kernel,
    causal_weights,
)

KERNELS = (1, 2, 5, 8, 31, 128)


def conv(kernel, causal=False, seed=0):
    """A convolution of 6 channels in 2 groups with random g, v and bias."""
    torch.manual_seed(seed)
    made = WeightNormConv1d(6, kernel, 2, causal)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made.double()


def converted(centred, correlation=None):
    """The causal convolution that a centred one becomes; correlation: None is the default."""
    causal = WeightNormConv1d(6, causal_kernel(centred.kernel), 2, causal=True).double()
    options = {} if correlation is None else {"correlation": correlation}
    g, v = causal_weights(centred.weight_g.detach(), centred.weight_v.detach(), **options)
    causal.load_state_dict({"weight_g": g, "weight_v": v, "bias": centred.bias.detach()})
    return causal


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the convolution


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_hears_the_present_and_the_past_only(kernel):
    x = noise(1, 6, 150).requires_grad_()
    (gradient,) = torch.autograd.grad(conv(kernel, causal=True)(x)[..., 140].sum(), x)
    heard = gradient.abs().sum((0, 1)).nonzero().flatten()
    assert (heard.min(), heard.max()) == (140 - (kernel - 1), 140)


@pytest.mark.parametrize("kernel", (1, 4, 7))
def test_it_is_the_sum_over_its_taps(kernel):
    causal, x = conv(kernel, causal=True), noise(2, 6, 20)
    weight, width = causal.weight(), 3
    expected = causal.bias[None, :, None].expand(2, 6, 20).clone()
    for time in range(20):
        for tap in range(kernel):
            heard = time - (kernel - 1) + tap
            for group in range(2 if heard >= 0 else 0):
                rows = slice(group * width, (group + 1) * width)
                expected[:, rows, time] += x[:, rows, heard] @ weight[rows, :, tap].T
    torch.testing.assert_close(causal(x), expected)


@pytest.mark.parametrize("stride", (1, 2, 3, 5))
@pytest.mark.parametrize("time", (1, 4, 20, 21))
def test_strided_is_the_full_rate_at_every_stride_th_frame(time, stride):
    causal, x = conv(7, causal=True), noise(2, 6, time)
    assert causal(x, stride).shape == (2, 6, -(-time // stride))
    torch.testing.assert_close(causal(x, stride), causal(x)[..., ::stride])


@pytest.mark.parametrize("kernel", (1, 4, 7))
def test_the_past_goes_on_where_zeros_stood(kernel):
    causal, x = conv(kernel, causal=True), noise(2, 6, 20)
    whole = causal(x)
    torch.testing.assert_close(causal(x, 1, torch.zeros(2, 6, kernel - 1, dtype=x.dtype)), whole)
    for start in range(kernel, 20, 3):
        past = x[..., start - (kernel - 1) : start]
        torch.testing.assert_close(causal(x[..., start:], 1, past), whole[..., start:])
        torch.testing.assert_close(causal(x[..., start:], 2, past), whole[..., start::2])


def test_positions_take_time_before_channels():
    positions = ConvPositions(6, 4, 2, causal=True).double()
    x, past = noise(2, 9, 6), noise(2, 3, 6, seed=1)
    expected = F.gelu(positions[0](torch.cat([past, x], 1).transpose(1, 2))[..., 3:].transpose(1, 2))
    torch.testing.assert_close(positions(x, 1, past), expected)
    torch.testing.assert_close(positions(x, 3, past), expected[:, ::3])


def test_state_names_are_those_of_centred_ones():
    assert ConvPositions(6, 4, 2, causal=True).state_dict().keys() == ConvPositions(6, 4, 2).state_dict().keys()


# ---- the conversion


@pytest.mark.parametrize("kernel, taps", ((1, 1), (2, 2), (3, 2), (31, 16), (95, 48), (128, 65)))
def test_taps_of_the_causal_one(kernel, taps):
    assert causal_kernel(kernel) == taps
    g, v = causal_weights(torch.rand(1, 1, kernel), torch.randn(6, 3, kernel))
    assert (g.shape, v.shape) == ((1, 1, taps), (6, 3, taps))


@pytest.mark.parametrize("correlation", (None, 0.0, 0.3, 1.0))
@pytest.mark.parametrize("kernel", KERNELS)
def test_past_taps_stay_and_the_guessed_future_joins_the_present(kernel, correlation):
    centred = conv(kernel)
    before, after = centred.weight(), converted(centred, correlation).weight()
    present, correlation = kernel // 2, FRAME_CORRELATION if correlation is None else correlation
    torch.testing.assert_close(after[..., :present], before[..., :present])
    expected = sum(before[..., present + ahead] * correlation**ahead for ahead in range(kernel - present))
    torch.testing.assert_close(after[..., -1], expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_g_and_v_are_a_weight_norm_of_the_kernel(kernel):
    causal = converted(conv(kernel))
    torch.testing.assert_close(causal.weight(), causal.weight_v)
    torch.testing.assert_close(causal.weight_g, causal.weight_v.square().sum((0, 1), keepdim=True).sqrt())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_constant_signal_keeps_its_positions_with_correlation_1(kernel):
    centred = conv(kernel)
    x = noise(1, 6, 1).expand(1, 6, 300)
    steady = slice(kernel, 300 - kernel)
    torch.testing.assert_close(converted(centred, 1.0)(x)[..., steady], centred(x)[..., steady])


@pytest.mark.parametrize("correlation", (None, 0.0, 1.0))
@pytest.mark.parametrize("kernel", (5, 8, 31))
def test_a_signal_that_goes_on_as_guessed_does_too(kernel, correlation):
    """From there on it has the centred positions, whatever came before; where it does not, it has others."""
    centred, factor = conv(kernel), FRAME_CORRELATION if correlation is None else correlation
    decay = factor ** torch.arange(1, 61, dtype=torch.float64)
    x = noise(1, 6, 40)
    x = torch.cat([x, x[..., -1:] * decay], dim=-1)
    found, expected = converted(centred, correlation)(x), centred(x)
    torch.testing.assert_close(found[..., 39:60], expected[..., 39:60])
    assert (found[..., 20:35] - expected[..., 20:35]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_the_type_of_the_weights_stays(dtype):
    centred = conv(8).to(dtype)
    g, v = causal_weights(centred.weight_g, centred.weight_v)
    assert g.dtype == v.dtype == dtype
    expected = conv(8).weight()[..., :4]
    torch.testing.assert_close(v[..., :4].double(), expected, atol=5e-3 if dtype == torch.float16 else 1e-6, rtol=5e-3)
