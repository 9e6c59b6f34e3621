"""Convolutions as products: their value and gradients are those of F.conv1d."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq_w2v2_light.nn.convolution import convolve_by_products, convolve_groups, trains_on_cpu
from fairseq_w2v2_light.nn.frontend import Frontend, TimeGroupNorm
from fairseq_w2v2_light.nn.positions import WeightNormConv1d

SHAPES = [
    # batch, in channels, channels, kernel, stride, time
    (2, 3, 4, 3, 2, 11),
    (1, 3, 4, 3, 2, 12),
    (3, 2, 5, 2, 2, 9),
    (2, 4, 3, 1, 1, 5),
    (2, 1, 4, 10, 5, 31),
    (2, 3, 2, 10, 5, 33),
    (1, 2, 3, 5, 1, 8),
    (2, 2, 2, 2, 3, 10),
    (2, 3, 3, 4, 3, 4),
]
# batch, in channels, channels, kernel, groups, time
GROUPED = [(2, 6, 4, 5, 2, 9), (1, 4, 4, 4, 4, 4), (3, 2, 6, 3, 1, 7), (2, 6, 6, 1, 3, 5)]


def inputs(batch, in_channels, channels, kernel, stride, time, bias=True, channels_last=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, in_channels, time, dtype=torch.float64, generator=generator)
    weight = torch.randn(channels, in_channels, kernel, dtype=torch.float64, generator=generator)
    if channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    given = torch.randn(channels, dtype=torch.float64, generator=generator) if bias else None
    return [None if tensor is None else tensor.requires_grad_() for tensor in (x, weight, given)]


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_conv1d(shape, bias, channels_last):
    x, weight, given = inputs(*shape, bias=bias, channels_last=channels_last)
    stride = shape[4]
    expected = F.conv1d(x, weight, given, stride)
    found = convolve_by_products(x, weight, given, stride)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-12)
    tensors = [tensor for tensor in (x, weight, given) if tensor is not None]
    gradients = (torch.autograd.grad(y.sin().sum(), tensors) for y in (found, expected))
    for one, other in zip(*gradients):
        assert torch.allclose(one, other, atol=1e-11)
    assert torch.autograd.gradcheck(lambda *_: convolve_by_products(x, weight, given, stride), tensors)


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize(
    "shape", [(2, 6, 4, 5, 2, 9), (1, 4, 4, 4, 4, 4), (3, 2, 6, 3, 1, 7), (2, 6, 6, 1, 3, 5)], ids=str
)
def test_groups(shape, bias):
    batch, in_channels, channels, kernel, groups, time = shape
    x, weight, given = inputs(batch, in_channels, channels, kernel, 1, time, bias)
    weight = weight.detach()[:, : in_channels // groups].clone().requires_grad_()
    tensors = [tensor for tensor in (x, weight, given) if tensor is not None]
    expected, found = F.conv1d(x, weight, given, groups=groups), convolve_groups(x, weight, given, groups)
    assert torch.equal(found, expected)
    gradients = (torch.autograd.grad(y.sin().sum(), tensors) for y in (found, expected))
    for one, other in zip(*gradients):
        assert one.shape == other.shape and torch.allclose(one, other, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *_: convolve_groups(x, weight, given, groups), tensors)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("options", ({}, {"causal": True}, {"group_dims": [3, 4, 2]}), ids=str)
def test_positions_train_on_what_they_infer(dtype, options):
    torch.manual_seed(0)
    channels, groups = (9, 3) if "group_dims" in options else (12, 3)
    conv = WeightNormConv1d(channels, 6, groups, **options).to(dtype)
    x = torch.randn(2, channels, 17).to(dtype).requires_grad_()
    for stride in (1, 2):
        found = conv(x, stride)
        with torch.no_grad():
            expected = conv(x, stride)
        assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 0.05)
        found.float().square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in [x, *conv.parameters()])


def test_only_gradients_that_are_asked_for():
    x, weight, bias = inputs(*SHAPES[0])
    x.requires_grad_(False)
    convolve_by_products(x, weight, bias, 2).sum().backward()
    assert x.grad is None and weight.grad is not None and bias.grad is not None
    x.requires_grad_(True), weight.requires_grad_(False), bias.requires_grad_(False)
    weight.grad = None
    convolve_by_products(x, weight, bias, 2).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_products_are_for_gradients_on_a_cpu():
    x = torch.zeros(1, 1, 4)
    assert trains_on_cpu(x) and not trains_on_cpu(x.to("meta"))
    with torch.no_grad():
        assert not trains_on_cpu(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not trains_on_cpu(x)


@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("lengths", (None, (20, 13), (1, 20)))
def test_group_norm_in_the_weights(lengths, gated):
    torch.manual_seed(0)
    conv, norm = nn.Conv1d(1, 6, 10, 5, bias=False).double(), TimeGroupNorm(6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    gate = torch.rand(6, requires_grad=True) if gated else None
    # loud, off centre, and hardly above it: what is left of a difference of squares
    wave = torch.randn(2, 1, 105, dtype=torch.float64) * torch.tensor([300.0, 1e-2]).view(2, 1, 1).double() + 5
    lengths = None if lengths is None else torch.tensor(lengths)
    parameters = [conv.weight, norm.weight, norm.bias, *([gate] if gated else [])]
    x = conv(wave)
    y = x.double()
    if lengths is not None:
        valid = (torch.arange(x.size(-1)) < lengths.unsqueeze(1)).unsqueeze(1)
    else:
        valid = torch.ones(2, 1, x.size(-1), dtype=torch.bool)
    count = valid.sum(-1, keepdim=True)
    centred = (y - (y * valid).sum(-1, keepdim=True) / count) * valid
    variance = centred.square().sum(-1, keepdim=True) / count
    expected = centred / (variance + norm.eps).sqrt() * norm.weight[:, None] + norm.bias[:, None]
    if gated:
        expected = expected * gate[:, None]
    found = norm.of_convolution(conv, wave, lengths, gate)
    assert torch.allclose(found, expected, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(found.sin().sum(), parameters), torch.autograd.grad(expected.sin().sum(), parameters)
    ):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ("group", "layer"))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("lengths", (None, (400, 260)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_frontend_trains_on_what_it_infers(norm, bias, lengths, dtype):
    """With a gradient it computes by other means, but the same, as without, padded frames included."""
    torch.manual_seed(0)
    frontend = Frontend([(8, 10, 5), (6, 3, 2), (7, 2, 2), (5, 1, 1)], norm, bias).to(dtype)
    wave = torch.randn(2, 400).to(dtype)
    lengths = None if lengths is None else torch.tensor(lengths)
    found = frontend(wave, lengths)[0]
    with torch.no_grad():
        expected = frontend(wave, lengths)[0]
    assert found.dtype == dtype
    assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 0.1)
    found.float().square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in frontend.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


def test_frontend_trains_under_autocast():
    torch.manual_seed(0)
    frontend = Frontend([(8, 10, 5), (6, 3, 2), (7, 2, 2)])
    wave = torch.randn(2, 400)
    expected = frontend(wave)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = frontend(wave)[0]
    assert torch.allclose(found.float(), expected, atol=0.1)
    found.float().sum().backward()
    assert frontend.conv_layers[1][0].weight.grad.isfinite().all()
