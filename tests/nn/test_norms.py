"""LayerNorm of what pruning left: that of the wide layer, whose other channels are zero."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq_w2v2_light.nn.frontend import ChannelLayerNorm
from fairseq_w2v2_light.nn.norms import LayerNorm, wide_layer_norm

WIDTHS = ((1, 2), (1, 512), (2, 3), (7, 8), (12, 32), (31, 32), (100, 768), (400, 512), (767, 768), (768, 768))


def padded(x, weight, bias, eps, width):
    """The definition, in float64."""
    missing = (0, width - x.size(-1))
    x, weight, bias = (F.pad(tensor.double(), missing) for tensor in (x, weight, bias))
    return F.layer_norm(x, (width,), weight, bias, eps)[..., : width - missing[1]]


def inputs(channels, offset=0.0, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, channels, generator=generator) * scale + offset
    return x, torch.randn(channels, generator=generator) + 1, torch.randn(channels, generator=generator)


def normed(x, weight, bias, width, gradient, eps=1e-5):
    with torch.set_grad_enabled(gradient):
        return wide_layer_norm(x, weight, bias, eps, width)


@pytest.mark.parametrize("gradient", (False, True))
@pytest.mark.parametrize("channels, width", WIDTHS)
def test_equals_the_norm_over_the_padded_width(channels, width, gradient):
    for offset, scale in ((0.0, 1.0), (3.0, 1.0), (-0.5, 20.0), (0.0, 1e-4)):
        x, weight, bias = inputs(channels, offset, scale)
        expected = padded(x, weight, bias, 1e-5, width)
        found = normed(x, weight, bias, width, gradient)
        assert found.dtype == x.dtype and found.shape == x.shape
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("gradient", (False, True))
@pytest.mark.parametrize("channels, width", ((1, 2), (12, 32), (400, 512), (767, 768)))
@pytest.mark.parametrize(
    "offset, scale", ((1e3, 1.0), (-1e3, 1e-3), (1e-6, 1e-6), (5.0, 0.0), (0.0, 0.0), (1e4, 1e4), (1e-20, 1e-20))
)
def test_large_means_tiny_variances_and_silence(channels, width, gradient, offset, scale):
    x, weight, bias = inputs(channels, offset, scale)
    found = normed(x, weight, bias, width, gradient)
    # of numbers around 1000 fp32 knows the fourth digit after the point
    torch.testing.assert_close(found.double(), padded(x, weight, bias, 1e-5, width), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("gradient", (False, True))
@pytest.mark.parametrize("dtype, tolerance", ((torch.bfloat16, 0.06), (torch.float16, 0.008)))
def test_half_precision(dtype, tolerance, gradient):
    x, weight, bias = (tensor.to(dtype) for tensor in inputs(100, 0.7))
    try:
        found = normed(x, weight, bias, 128, gradient)
    except RuntimeError as error:  # torch 2.1 on a CPU
        assert "not implemented for 'Half'" in str(error)
        pytest.skip("this torch has no layer norm in fp16 on a CPU")
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), padded(x, weight, bias, 1e-5, 128), atol=tolerance, rtol=tolerance)


def test_half_precision_whose_squares_would_overflow():
    x, weight, bias = (tensor.half() for tensor in inputs(100, 300.0, 300.0))
    found = normed(x, weight, bias, 128, False)
    torch.testing.assert_close(found.double(), padded(x, weight, bias, 1e-5, 128), atol=0.01, rtol=0.01)


def test_autocast_has_the_input_in_half_precision_and_the_weights_not():
    x, weight, bias = inputs(100, 0.7)
    for gradient in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = normed(x.bfloat16(), weight, bias, 128, gradient)
        torch.testing.assert_close(found.double(), padded(x, weight, bias, 1e-5, 128), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("channels, width", ((1, 2), (12, 32), (31, 32), (100, 192)))
def test_gradients_are_those_of_the_padded_norm(channels, width):
    torch.manual_seed(0)
    results = []
    for norm, dtype in ((wide_layer_norm, torch.float32), (padded, torch.float64)):
        tensors = [tensor.to(dtype).requires_grad_() for tensor in inputs(channels, 0.7)]
        upstream = inputs(channels, seed=1)[0].to(dtype)
        results.append(torch.autograd.grad(norm(*tensors, 1e-5, width), tensors, upstream))
    for found, expected in zip(*results):
        torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-4)


def test_gradients_of_silence_are_finite():
    x = torch.zeros(1, 3, 12, requires_grad=True)
    LayerNorm(12, 32)(x).sum().backward()
    assert x.grad.isfinite().all()


def test_with_and_without_the_gradient_it_is_the_same():
    norm, x = LayerNorm(150, 192), torch.randn(1, 50, 150) + 0.3
    with torch.no_grad():
        found = norm(x)
    torch.testing.assert_close(found, norm(x).detach(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("width", (0, 24))
def test_its_own_width_is_bitwise_stock(width):
    ours, stock = LayerNorm(24, width), nn.LayerNorm(24)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    stock.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 7, 24, requires_grad=True)
    assert torch.equal(ours(x), stock(x))
    with torch.no_grad():
        assert torch.equal(ours(x), stock(x))
    assert str(ours) == str(stock)


def test_the_width_is_shown():
    assert str(LayerNorm(24, 32)).endswith("width=32)")


def test_the_input_is_not_changed():
    x = torch.randn(2, 12)
    before = x.clone()
    with torch.no_grad():
        LayerNorm(12, 32)(x)
    assert torch.equal(x, before)


def test_gates_multiply_the_result():
    norm, x, gate = LayerNorm(12, 32), torch.randn(2, 12), torch.rand(12)
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            torch.testing.assert_close(norm(x, gate), norm(x) * gate)


@pytest.mark.parametrize("gradient", (False, True))
def test_in_the_frontend_over_the_channels_of_each_frame(gradient):
    norm = ChannelLayerNorm(12, 32)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    x = torch.randn(2, 12, 9)
    with torch.set_grad_enabled(gradient):
        found = norm(x)
    expected = padded(x.transpose(1, 2), norm[1].weight, norm[1].bias, 1e-5, 32).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
