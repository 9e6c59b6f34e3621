"""Convolutions as products of spectra: the direct sum, in less time."""

import pytest
import torch
import torch.nn.functional as F

from fairseq_w2v2_light.nn.positions import ConvPositions
from fairseq_w2v2_light.runtime import pack
from fairseq_w2v2_light.runtime.fourier import FourierConv1d, can_transform, fourier_serves
from fairseq_w2v2_light.runtime.products import can_convolve

pytestmark = pytest.mark.skipif(not can_transform(), reason="this torch has no Fourier transforms")
needs_direct = pytest.mark.skipif(not can_convolve(), reason="this torch has no packed convolution")


def weights(channels, inner, kernel):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(channels, inner, kernel, generator=generator) / (inner * kernel) ** 0.5


@pytest.mark.parametrize("stride", (1, 2, 3, 5))
@pytest.mark.parametrize("kernel", (1, 2, 7, 16, 31, 128))
def test_it_is_the_direct_sum(kernel, stride):
    """Fewer frames than taps, one block and several, in batches, at any number of zeros before them."""
    weight, bias = weights(12, 3, kernel), torch.randn(12)
    fourier = FourierConv1d(weight, bias, 4, stride)
    for batch, time in ((1, 1), (2, 5), (3, 130), (1, 700)):
        x = torch.randn(batch, time, 12)
        for before in {0, kernel // 2, kernel - 1}:
            frames = -(-time // stride)
            padded = F.pad(x.double().transpose(1, 2), (before, kernel * (stride + 1)))
            exact = F.conv1d(padded, weight.double(), bias.double(), stride, groups=4).transpose(1, 2)[:, :frames]
            found = fourier(x, before, frames)
            assert found.shape == (batch, frames, 12) and found.dtype == torch.float32
            torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)


def test_more_channels_out_than_in_and_no_bias():
    weight = weights(10, 3, 9)
    x = torch.randn(2, 40, 6)
    expected = F.conv1d(x.transpose(1, 2), weight, stride=2, padding=4, groups=2).transpose(1, 2)
    torch.testing.assert_close(FourierConv1d(weight, None, 2, 2)(x, 4, 20), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", (lambda x: x.to(torch.bfloat16), lambda x: x.double(), lambda x: x.mT.contiguous().mT))
def test_its_input_is_read_as_it_stands_and_stays(make):
    weight = weights(8, 4, 33)
    x = make(torch.randn(2, 50, 8))
    before, fourier = x.clone(), FourierConv1d(weight, torch.zeros(8), 2)
    expected = F.conv1d(x.float().transpose(1, 2), weight, padding=16, groups=2).transpose(1, 2)
    torch.testing.assert_close(fourier(x, 16, 50), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(x, before)


def test_few_taps_of_few_channels_are_left_to_the_direct_sum():
    wide, narrow = weights(80, 40, 9), weights(8, 4, 48)
    assert fourier_serves(wide, 3) and fourier_serves(narrow, 2) and not fourier_serves(narrow, 3)


@needs_direct
@pytest.mark.parametrize("stride", (1, 2, 3, 4))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("group_dims", ((), (5, 6, 4, 6)))
def test_positions(stride, causal, group_dims):
    """With 64 taps: spectra up to stride 2, then the direct sum; centred, causal, and as pruning leaves them."""
    torch.manual_seed(0)
    channels = sum(group_dims) or 24
    positions = ConvPositions(channels, 64, 4, causal=causal, group_dims=group_dims).requires_grad_(False)
    positions[0].bias.normal_()
    packed = pack.PackedPositions(positions)
    for frames in (1, 4, 63, 64, 300):
        for batch in (1, 3):
            x = torch.randn(batch, frames, channels)
            torch.testing.assert_close(packed(x, stride), positions(x, stride), atol=1e-5, rtol=1e-5)
    assert list(packed._fourier) == ([stride] if stride <= 2 else [])


@needs_direct
def test_chunks_of_a_stream_are_direct_until_they_are_long():
    torch.manual_seed(0)
    positions = ConvPositions(8, 33, 2, causal=True).requires_grad_(False)
    packed = pack.PackedPositions(positions)
    whole = torch.randn(1, 200, 8)
    expected = positions(whole)
    for start, end, spectra in ((32, 40, False), (40, 64, False), (64, 97, True), (97, 200, True)):
        found = packed(whole[:, start:end], past=whole[:, start - 32 : start])
        torch.testing.assert_close(found, expected[:, start:end], atol=1e-5, rtol=1e-5)
        assert bool(packed._fourier) == spectra


@needs_direct
def test_a_torch_without_transforms_convolves_directly(monkeypatch):
    monkeypatch.setattr(pack, "can_transform", lambda: False)
    positions = ConvPositions(8, 33, 2).requires_grad_(False)
    packed = pack.PackedPositions(positions)
    x = torch.randn(2, 50, 8)
    torch.testing.assert_close(packed(x), positions(x), atol=1e-5, rtol=1e-5)
    assert packed._fourier is None

    def missing(*args, **kwargs):
        raise RuntimeError("fft: ATen not compiled with FFT support")

    monkeypatch.setattr(torch.fft, "rfft", missing)
    assert not can_transform()


@needs_direct
def test_spectra_made_in_inference_mode_serve_outside_of_it():
    positions = ConvPositions(8, 33, 2).requires_grad_(False)
    packed, x = pack.PackedPositions(positions), torch.randn(1, 50, 8)
    with torch.inference_mode():
        inside = packed(x)
    outside = packed(x.clone().requires_grad_())
    outside.sum().backward()
    assert torch.equal(inside, outside.detach())
