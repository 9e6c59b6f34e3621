"""Pooling over time, its inverse, and masks at pooled rates."""

import pytest
import torch

from fairseq_w2v2_light.nn.masks import FrameMask, pooled_length
from fairseq_w2v2_light.nn.pooling import mean_pool, repeat_frames


def naive_pool(row, factor, drop_tail):
    """Means of windows of one utterance, one by one."""
    windows = [row[start : start + factor] for start in range(0, len(row), factor)]
    if drop_tail and len(windows) > 1 and len(windows[-1]) < factor:
        windows.pop()
    return torch.stack([window.mean(0) for window in windows])


@pytest.mark.parametrize("drop_tail", (False, True))
@pytest.mark.parametrize("factor", (1, 2, 3, 5))
@pytest.mark.parametrize("time", (1, 2, 3, 5, 6, 7, 12))
def test_mean_pool_of_one_utterance(time, factor, drop_tail):
    x = torch.randn(2, time, 3)
    pooled = mean_pool(x, factor, drop_tail=drop_tail)
    for row in range(2):
        torch.testing.assert_close(pooled[row], naive_pool(x[row], factor, drop_tail))
    assert pooled.size(1) == pooled_length(time, factor, drop_tail)


@pytest.mark.parametrize("drop_tail", (False, True))
@pytest.mark.parametrize("factor", (2, 3, 4))
def test_mean_pool_ignores_padding(factor, drop_tail):
    lengths = (11, 1, 2, 3, 4, 6, 9)
    x = torch.randn(len(lengths), 11, 3)
    mask = FrameMask.from_lengths(torch.tensor(lengths), 11)
    pooled, pooled_mask = mean_pool(x, factor, mask, drop_tail), mask.pooled(factor, drop_tail)
    assert pooled.shape[:2] == pooled_mask.valid.shape
    for row, length in enumerate(lengths):
        expected = naive_pool(x[row, :length], factor, drop_tail)
        assert pooled_mask.valid[row].sum() == len(expected)
        torch.testing.assert_close(pooled[row, : len(expected)], expected)


def test_padding_does_not_have_to_be_zero_or_small():
    x = torch.randn(2, 5, 3)
    mask = FrameMask.from_lengths(torch.tensor([5, 3]), 5)
    loud = x.clone()
    loud[1, 3:] = 1e9
    torch.testing.assert_close(mean_pool(loud, 2, mask)[1, :2], mean_pool(x, 2, mask)[1, :2])


def test_docstring_example_of_the_mask():
    mask = FrameMask(torch.tensor([[True, True, True, False]]))
    assert mask.pooled(2).valid.tolist() == [[True, True]]
    assert mask.pooled(2, drop_tail=True).valid.tolist() == [[True, False]]


def test_nothing_padded_is_no_mask():
    assert FrameMask.from_lengths(torch.tensor([4, 4]), 4) is None


@pytest.mark.parametrize("factor", (1, 2, 3))
@pytest.mark.parametrize("time", (1, 4, 6, 7))
def test_repeat_is_the_inverse_for_constant_windows(time, factor):
    windows = torch.randn(2, -(-time // factor), 3)
    x = windows.repeat_interleave(factor, 1)[:, :time]
    torch.testing.assert_close(repeat_frames(mean_pool(x, factor), factor, time), x)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_dtype_is_kept(dtype):
    x = torch.randn(2, 5, 3).to(dtype)
    mask = FrameMask.from_lengths(torch.tensor([5, 2]), 5)
    assert mean_pool(x, 2, mask).dtype == mean_pool(x, 2).dtype == dtype


@pytest.mark.parametrize("factor", (2, 3))
@pytest.mark.parametrize("time", (1, 6, 7, 8))
def test_gradient_of_the_mean_of_any_view(time, factor):
    """Of frames that lie apart, in double precision, last window full or not."""
    wide = torch.randn(2, 2 * time, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mean_pool(x[:, ::2], factor), wide)
    view = wide.detach()[:, 1::2]
    torch.testing.assert_close(mean_pool(view, factor)[0], naive_pool(view[0], factor, False))
