"""The pre-training loss, its parts and its gradients equal those of fairseq's model and `wav2vec` criterion."""

import inspect

import numpy as np
import pytest
import torch
from fairseq.criterions.wav2vec_criterion import Wav2vecCriterion
from fairseq.data.data_utils import compute_mask_indices

from fairseq_w2v2_light.criterions import LightContrastive

SAMPLES, FRAMES = 1215, 60
WEIGHTS = [0.1, 10.0]
NO_SEED = "indices" in inspect.signature(compute_mask_indices).parameters


def losses(light, stock, source, mask_indices=None, weights=WEIGHTS, seed=3, **net_input):
    """(loss, sample size, log) of ours and of fairseq's, each run from the same seeds."""
    criteria = (
        LightContrastive(None, loss_weights=weights, collapse_perplexity=0.0),
        Wav2vecCriterion(None, infonce=True, loss_weights=weights, log_keys=["prob_perplexity", "code_perplexity"]),
    )
    results = []
    for model, criterion in zip((light, stock), criteria):
        inputs = {"source": source.clone(), **net_input}
        if mask_indices is not None:
            inputs["mask_indices"] = mask_indices.clone()
        torch.manual_seed(seed)
        np.random.seed(seed)
        model.zero_grad()
        with torch.backends.mkldnn.flags(enabled=False):  # see test_gradients_do_not_depend_on_mkldnn
            loss, size, log = criterion(model, {"net_input": inputs, "id": torch.arange(len(source))})
            loss.backward()
        results.append((loss, int(size), log))
    return results


def assert_equal_losses(results, tolerance=1e-5):
    (ours, size, log), (theirs, stock_size, stock_log) = results
    assert size == stock_size > 0
    assert (ours - theirs).abs().item() <= tolerance * max(1.0, theirs.abs().item())
    for key in ("prob_perplexity", "code_perplexity"):
        if key in stock_log:
            assert float(log[key]) == pytest.approx(float(stock_log[key]), abs=1e-4)


def assert_equal_gradients(light, stock, tolerance=1e-4):
    stock_gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    compared = 0
    for name, parameter in light.named_parameters():
        if stock_gradients[name] is None:
            continue
        expected = stock_gradients[name]
        scale = max(1.0, expected.abs().max().item())
        assert (parameter.grad - expected).abs().max().item() <= tolerance * scale, name
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("layout", ("base", "large"))
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"negatives_from_everywhere": True},
        {"codebook_negatives": 3},
        {"target_glu": True},
        {"quantize_targets": False},
        {"quantize_targets": False, "negatives_from_everywhere": True},
        {"cross_sample_negatives": 4},
        {"num_negatives": 0, "cross_sample_negatives": 4},
        {"latent_dim": 8, "quantizer_depth": 2, "quantizer_factor": 3},
        {"encoder_embed_dim": 16, "final_dim": 0},
        {"feature_grad_mult": 0.1},
        {"logit_temp": 0.5, "crop_seq_to_multiple": 4},
    ),
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_loss_and_gradients(tiny, layout, training, changes):
    light, stock = tiny.pair(layout=layout, **changes)
    light.train(training), stock.train(training)
    weights = WEIGHTS if changes.get("quantize_targets", True) else None
    source, _ = tiny.audio(SAMPLES, SAMPLES, SAMPLES)
    if weights is None:
        results = losses_without_extras(light, stock, source, tiny.mask(3, FRAMES))
    else:
        results = losses(light, stock, source, tiny.mask(3, FRAMES))
    assert_equal_losses(results)
    assert_equal_gradients(light, stock)


def losses_without_extras(light, stock, source, mask_indices):
    """Without codebook fairseq's criterion has one extra term; compare the sums that both can form."""
    results = []
    for model in (light, stock):
        torch.manual_seed(3)
        model.zero_grad()
        output = model(source=source, mask_indices=mask_indices)
        logits = model.get_logits(output)
        frames = len(logits)
        loss = torch.nn.functional.cross_entropy(
            logits, model.get_targets(None, output), reduction="sum"
        ) + 10 * frames * sum(model.get_extra_losses(output))
        with torch.backends.mkldnn.flags(enabled=False):
            loss.backward()
        results.append((loss, frames, {}))
    return results


@pytest.mark.parametrize("layout", ("base", "large"))
@pytest.mark.parametrize("conv_pos", (7, 8))
def test_gradients_do_not_depend_on_mkldnn(tiny, layout, conv_pos):
    """torch 2.1's GELU has garbage gradients on CPUs where its input is contiguous and its output's gradient is not.

    Stock fairseq's frontend and positions meet that case; ours must not.
    """
    light = tiny.light(layout=layout, conv_pos=conv_pos).train()
    source, _ = tiny.audio(SAMPLES, SAMPLES)
    criterion = LightContrastive(None, loss_weights=WEIGHTS, collapse_perplexity=0.0)
    gradients = []
    for enabled in (False, True):
        light.zero_grad()
        torch.manual_seed(0)
        with torch.backends.mkldnn.flags(enabled=enabled):
            inputs = {"source": source, "mask_indices": tiny.mask(2, FRAMES)}
            criterion(light, {"net_input": inputs, "id": torch.arange(2)})[0].backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in light.named_parameters()})
    for name, expected in gradients[0].items():
        scale = max(1.0, expected.abs().max().item())
        assert (gradients[1][name] - expected).abs().max().item() <= 1e-3 * scale, name


@pytest.mark.parametrize("layout", ("base", "large"))
@pytest.mark.parametrize("before", (False, True))
def test_channel_masks(tiny, layout, before):
    light, stock = tiny.pair(layout=layout, mask_channel_prob=0.3, mask_channel_length=4, mask_channel_before=before)
    if before and NO_SEED:
        pytest.skip("fairseq-fixed draws this mask from fresh entropy and takes none")
    source, _ = tiny.audio(SAMPLES, SAMPLES)
    channels = None if before else tiny.mask(2, 32)[:, None].expand(-1, FRAMES, -1)
    results = losses(light.train(), stock.train(), source, tiny.mask(2, FRAMES), mask_channel_indices=channels)
    assert_equal_losses(results)
    assert_equal_gradients(light, stock)


@pytest.mark.skipif(NO_SEED, reason="fairseq-fixed draws its masks from fresh entropy")
@pytest.mark.parametrize("changes", ({}, {"mask_channel_prob": 0.3, "mask_channel_length": 4}), ids=("time", "both"))
def test_drawn_masks_at_equal_numpy_seed(tiny, changes):
    light, stock = tiny.pair(encoder_layerdrop=0.3, **changes)
    source, _ = tiny.audio(SAMPLES, SAMPLES)
    for seed in range(4):
        results = losses(light.train(), stock.train(), source, seed=seed)
        assert_equal_losses(results)


@pytest.mark.parametrize("layout", ("base", "large"))
def test_dropped_layers(tiny, layout):
    light, stock = tiny.pair(layout=layout, encoder_layerdrop=0.3)
    source, _ = tiny.audio(SAMPLES, SAMPLES)
    for seed in range(5):
        results = losses(light.train(), stock.train(), source, tiny.mask(2, FRAMES), seed=seed)
        assert_equal_losses(results)
        assert_equal_gradients(light, stock)


def test_double_precision(tiny):
    light, stock = tiny.pair(layout="large")
    source, _ = tiny.audio(SAMPLES, SAMPLES, dtype=torch.float64)
    results = losses(light.double().train(), stock.double().train(), source, tiny.mask(2, FRAMES))
    assert_equal_losses(results, 1e-6)
    assert_equal_gradients(light, stock, tolerance=1e-5)


def test_padded_batch_with_the_layer_norm_frontend(tiny):
    """The feature penalty is over valid frames here, over all in stock: its weight is 0."""
    light, stock = tiny.pair(layout="large")
    source, padding_mask = tiny.audio(SAMPLES, 700)
    mask = torch.zeros(2, FRAMES, dtype=torch.bool)
    mask[:, 3:12] = True
    results = losses(light, stock, source, mask, weights=[0.1, 0.0], padding_mask=padding_mask)
    assert_equal_losses(results)


def test_feature_penalty_ignores_padding(tiny):
    light, _ = tiny.pair(layout="large")
    source, padding_mask = tiny.audio(SAMPLES, 700)
    mask = tiny.mask(1, 34).new_zeros(2, FRAMES)
    mask[:, 3:12] = True
    with torch.no_grad():
        batch = light(source, padding_mask, mask_indices=mask)["features_pen"]
        frames = [light.features(source[row : row + 1, :count])[0] for row, count in enumerate((SAMPLES, 700))]
    assert batch.item() == pytest.approx(torch.cat(frames, 1).square().mean().item(), rel=1e-5)


def test_drawn_masks_depend_on_numpy_seed_only(tiny):
    light, _ = tiny.pair()
    x = torch.randn(2, 40, 32)
    masks = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        torch.rand(3)
        masks.append(light.apply_mask(x, None)[1])
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
