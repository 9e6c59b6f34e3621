"""Scores and targets of pre-training equal fairseq's, which computes them the long way."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Model
from fairseq.modules import GumbelVectorQuantizer

from fairseq_w2v2_light.models.contrastive import GumbelQuantizer, contrastive_logits

BATCH, FRAMES, DIM, NEGATIVES = 2, 5, 6, 7


def vectors(drawn=0, dtype=torch.float32):
    """predictions, pool, targets, negatives and drawn ones, with equal vectors among them."""
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(BATCH, FRAMES, DIM, generator=generator)
    pool = torch.randn(3 * FRAMES, DIM, generator=generator)
    pool[4], pool[9] = pool[1], pool[1]
    pool[6] = 0
    targets = torch.arange(BATCH * FRAMES).view(BATCH, FRAMES)
    negatives = torch.randint(0, len(pool), (BATCH, FRAMES, NEGATIVES), generator=generator)
    negatives[0, 1, 0], negatives[0, 4, 3], negatives[1, 4, 6] = 4, 9, 1
    more = torch.randn(drawn, BATCH, FRAMES, DIM, generator=generator)
    if drawn:
        more[1, 0, 2] = pool[2]
    tensors = [tensor.to(dtype).requires_grad_() for tensor in (predictions, pool, more)]
    return tensors[0], tensors[1], targets, negatives, tensors[2] if drawn else None


def stock_logits(predictions, pool, targets, negatives, temperature, drawn=None):
    candidates = pool[negatives].permute(2, 0, 1, 3)
    if drawn is not None:
        candidates = torch.cat([candidates, drawn])
    return Wav2Vec2Model.compute_preds(SimpleNamespace(logit_temp=temperature), predictions, pool[targets], candidates)


@pytest.mark.parametrize("drawn", (0, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_logits_and_gradients(drawn, dtype):
    results = []
    for function in (contrastive_logits, stock_logits):
        predictions, pool, targets, negatives, more = vectors(drawn, dtype)
        logits = function(predictions, pool, targets, negatives, 0.1, more)
        loss = logits.float().logsumexp(0).sum() - logits[0].float().sum()
        inputs = [predictions, pool, *([more] if drawn else [])]
        results.append((logits, torch.autograd.grad(loss, inputs)))
    (ours, gradients), (theirs, stock_gradients) = results
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    assert ours.dtype == theirs.dtype == dtype and ours.shape == (1 + NEGATIVES + drawn, BATCH, FRAMES)
    assert torch.equal(ours.isinf(), theirs.isinf()) and int(ours.isinf().sum()) >= 3 + bool(drawn)
    assert torch.allclose(ours.float(), theirs.float(), atol=tolerance)
    for one, other in zip(gradients, stock_gradients):
        assert torch.allclose(one.float(), other.float(), atol=tolerance, rtol=tolerance)


def test_scores_are_fp32_under_autocast():
    inputs = vectors()[:4]
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_logits(*inputs, 0.1)
    assert torch.equal(found, contrastive_logits(*inputs, 0.1))


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("changes", ({}, {"groups": 1}, {"combine_groups": True}, {"weight_proj_depth": 2}), ids=str)
def test_quantiser(training, changes):
    options = dict(dim=5, num_vars=4, temp=(2.0, 0.5, 0.9), groups=2, combine_groups=False, vq_dim=6, time_first=True)
    torch.manual_seed(0)
    stock = GumbelVectorQuantizer(**{**options, **changes}).train(training)
    light = GumbelQuantizer(**{**options, **changes}).train(training)
    light.load_state_dict(stock.state_dict())
    for quantiser in (stock, light):
        quantiser.set_num_updates(3)
    x = torch.randn(3, 7, 5)
    outputs = []
    for quantiser in (light, stock):
        torch.manual_seed(1)
        output = quantiser(x, produce_targets=True)
        loss = output["x"].sin().sum() + output["prob_perplexity"]
        loss.backward()
        outputs.append((output, [parameter.grad for parameter in quantiser.parameters()]))
    (ours, gradients), (theirs, stock_gradients) = outputs
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert torch.allclose(torch.as_tensor(ours[key]), torch.as_tensor(expected), atol=1e-6), key
    for one, other in zip(gradients, stock_gradients):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-6)
