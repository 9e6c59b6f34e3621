"""light_contrastive: value, logs, their aggregation, and the warning of a collapsing codebook."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fairseq.logging import metrics

from fairseq_w2v2_light.criterions import LightContrastive, LightContrastiveConfig
from fairseq_w2v2_light.models import W2V2LightConfig, W2V2LightModel


class FixedOutput(torch.nn.Module):
    """Stands in for a model: given logits (1 + negatives, batch, frames) and terms of the loss."""

    def __init__(self, x, num_updates=0, groups=2, **terms):
        super().__init__()
        self.output = {"x": x, **terms}
        self.num_updates = num_updates
        self.quantizer = SimpleNamespace(groups=groups, num_vars=8)

    def forward(self, source):
        return dict(self.output)

    def get_logits(self, output):
        return output["x"].transpose(0, 2).reshape(-1, output["x"].size(0))

    def get_targets(self, sample, output):
        return output["x"].new_zeros(output["x"].size(1) * output["x"].size(2), dtype=torch.long)


SAMPLE = {"net_input": {"source": torch.zeros(2, 10)}, "id": torch.arange(2)}


def codes(perplexity, **more):
    return {
        "prob_perplexity": torch.tensor(10.0),
        "code_perplexity": torch.tensor(float(perplexity)),
        "num_vars": 16,
        "temp": 1.5,
        "features_pen": torch.tensor(0.25),
        **more,
    }


def run(model, weights=(0.1, 10.0), collapse_perplexity=0.0):
    return LightContrastive(None, list(weights), collapse_perplexity)(model, SAMPLE)


def test_value_is_the_sum_of_its_parts():
    torch.manual_seed(0)
    x = torch.randn(4, 2, 5)
    loss, frames, log = run(FixedOutput(x, **codes(9)))
    contrastive = -F.log_softmax(x, 0)[0].sum()
    diversity, penalty = 10 * (16 - 10.0) / 16, 10 * 0.25
    assert frames == 10
    assert loss.item() == pytest.approx(contrastive.item() + 0.1 * diversity + 10 * penalty, rel=1e-5)
    assert log["contrastive"].item() == pytest.approx(contrastive.item(), rel=1e-5)
    assert log["diversity"].item() == pytest.approx(diversity)
    assert log["feature_penalty"].item() == pytest.approx(penalty)
    assert (log["ntokens"], log["sample_size"], log["nsentences"]) == (10, 10, 2)


def test_without_codebook_there_is_no_diversity():
    x = torch.randn(4, 2, 5)
    loss, _, log = run(FixedOutput(x, features_pen=torch.tensor(0.5)))
    assert loss.item() == pytest.approx((-F.log_softmax(x, 0)[0].sum() + 10 * 10 * 0.5).item(), rel=1e-5)
    assert log["diversity"] == 0 and "code_perplexity" not in log


def test_correct_counts_frames_whose_target_wins():
    x = torch.zeros(3, 1, 4)
    x[0, 0, 0] = 1  # target wins
    x[1, 0, 1] = 1  # a negative wins
    x[0, 0, 2], x[1, 0, 2], x[2, 0, 2] = 2, 1, 0  # target wins
    assert run(FixedOutput(x, features_pen=torch.tensor(0.0)))[2]["correct"] == 2  # frame 3 is a tie of all


def test_negatives_that_equal_the_target_do_not_count():
    """fairseq sets their logits to -inf."""
    x = torch.zeros(3, 1, 2)
    x[1:] = float("-inf")
    loss, _, log = run(FixedOutput(x, features_pen=torch.tensor(0.0)))
    assert loss.item() == 0 and log["correct"] == 2


def test_an_empty_batch_is_no_error():
    loss, frames, log = run(FixedOutput(torch.zeros(4, 2, 0), features_pen=torch.tensor(0.0)))
    assert loss.item() == 0 and frames == 0 and log["correct"] == 0


def test_gradient_comes_through_every_term():
    x = torch.randn(4, 2, 5, requires_grad=True)
    penalty = torch.tensor(0.25, requires_grad=True)
    perplexity = torch.tensor(10.0, requires_grad=True)
    terms = {**codes(9), "features_pen": penalty, "prob_perplexity": perplexity}
    run(FixedOutput(x, **terms))[0].backward()
    assert x.grad.abs().sum() > 0
    assert penalty.grad.item() == pytest.approx(10 * 10)
    assert perplexity.grad.item() == pytest.approx(-0.1 * 10 / 16)


def test_logs_hold_no_graph():
    x = torch.randn(4, 2, 5, requires_grad=True)
    log = run(FixedOutput(x, operating_point="s2q1k2", **codes(9)))[2]
    assert not [key for key, value in log.items() if torch.is_tensor(value) and value.requires_grad]


@pytest.mark.parametrize("weights", ([], [0.1], [0.1, 10, 1]))
def test_two_loss_weights_are_needed(weights):
    with pytest.raises(ValueError, match="criterion.loss_weights: found .*expected two: diversity, feature penalty"):
        LightContrastive(None, weights, 2.0)


def test_fairseq_builds_it_from_its_config():
    criterion = LightContrastive.build_criterion(LightContrastiveConfig(loss_weights=[0.5, 1.0]), None)
    assert (criterion.diversity_weight, criterion.penalty_weight, criterion.collapse_perplexity) == (0.5, 1.0, 2.0)
    assert list(criterion.parameters()) == []


# logs


def reduced(logs):
    with metrics.aggregate(new_root=True) as aggregator:
        LightContrastive.reduce_metrics(logs)
    return aggregator.get_smoothed_values()


def worker_logs(points):
    torch.manual_seed(0)
    logs = []
    for count, point in enumerate(points, start=3):
        x = torch.randn(4, 2, count)
        logs.append(run(FixedOutput(x, operating_point=point, **codes(count)))[2])
    return logs


def test_logs_are_numbers_that_can_be_summed():
    for value in worker_logs(["s1q1k1"])[0].values():
        assert isinstance(value, (int, float)) or (torch.is_tensor(value) and value.numel() == 1)
    assert LightContrastive.logging_outputs_can_be_summed() is True


def test_two_workers_and_their_sum_reduce_alike():
    """What fairseq's fast_stat_sync does: sums on every worker, then over them."""
    logs = worker_logs(["s2q1k2", "s2q1k2"])
    assert set(logs[0]) == set(logs[1])
    summed = {key: logs[0][key] + logs[1][key] for key in logs[0]}
    separate, together = reduced(logs), reduced([summed])
    assert set(separate) == set(together)
    for key, value in separate.items():
        assert float(value) == pytest.approx(float(together[key]), rel=1e-5), key


def test_reduced_values():
    logs = worker_logs(["s2q1k2", "s2q1k2"])
    frames = 6 + 8
    values = reduced(logs)
    total = {key: sum(float(log[key]) for log in logs) for key in logs[0]}
    assert values["loss"] == pytest.approx(total["loss"] / frames / math.log(2), abs=2e-3)
    assert values["contrastive"] == pytest.approx(total["contrastive"] / frames / math.log(2), abs=2e-3)
    assert values["accuracy"] == pytest.approx(total["correct"] / frames, abs=2e-3)
    assert values["feature_penalty"] == pytest.approx(0.25, abs=2e-3)
    assert values["diversity"] == pytest.approx(6 / 16, abs=2e-3)
    assert values["code_perplexity"] == pytest.approx((3 + 4) / 2, abs=2e-3)
    assert values["temp"] == pytest.approx(1.5)
    assert values["loss_s2q1k2"] == values["contrastive"]
    assert values["accuracy_s2q1k2"] == values["accuracy"]


def test_every_operating_point_has_its_own_loss_and_accuracy():
    logs = worker_logs(["s1q1k1", "s2q1k2"])
    values = reduced(logs)
    for log, point in zip(logs, ("s1q1k1", "s2q1k2")):
        loss = float(log["contrastive"]) / log["sample_size"] / math.log(2)
        assert values[f"loss_{point}"] == pytest.approx(loss, abs=2e-3)
        assert values[f"accuracy_{point}"] == pytest.approx(log["correct"] / log["sample_size"], abs=2e-3)


def test_logs_of_updates_are_weighted_by_frames():
    logs = worker_logs(["s1q1k1", "s2q1k2", "s1q1k1"])
    with metrics.aggregate(new_root=True) as aggregator:
        for log in logs:
            LightContrastive.reduce_metrics([log])
    value = aggregator.get_smoothed_values()["loss_s1q1k1"]
    expected = sum(float(logs[i]["contrastive"]) for i in (0, 2)) / (6 + 10) / math.log(2)
    assert value == pytest.approx(expected, abs=2e-3)


def test_no_frames_at_all():
    log = run(FixedOutput(torch.zeros(4, 2, 0), operating_point="s1q1k1", features_pen=torch.tensor(0.0)))[2]
    assert reduced([log])["loss"] == 0


def tiny_model(**changes):
    torch.manual_seed(0)
    keys = dict(
        conv_feature_layers="[(8, 10, 5), (8, 4, 4)]",
        extractor_mode="layer_norm",
        encoder_layers=6,
        encoder_embed_dim=16,
        encoder_ffn_embed_dim=16,
        encoder_attention_heads=2,
        conv_pos=4,
        conv_pos_groups=2,
        quantize_targets=True,
        final_dim=8,
        latent_vars=4,
        num_negatives=4,
        mask_length=3,
    )
    return W2V2LightModel(W2V2LightConfig(**{**keys, **changes})).train()


def test_a_real_model_logs_its_operating_point():
    model = tiny_model(squeeze_factors=[1, 2], operating_point="s2q1k1")
    sample = {"net_input": {"source": torch.randn(2, 1200)}, "id": torch.arange(2)}
    log = LightContrastive(None, [0.1, 10], 0.0)(model, sample)[2]
    assert log["frames@s2q1k1"] == log["sample_size"] > 0


def test_per_layer_points_do_not_make_a_metric_each():
    """There are thousands; every metric is kept for good, printed, and saved in the checkpoint."""
    model = tiny_model(squeeze_factors=[1, 2], query_pools=[1, 2], kv_pools=[1, 2], pool_per_layer=True)
    criterion = LightContrastive(None, [0.1, 10], 0.0)
    sample = {"net_input": {"source": torch.randn(2, 1200)}, "id": torch.arange(2)}
    names = set()
    for update in range(25):
        model.set_num_updates(update)
        names |= set(reduced([criterion(model, sample)[2]]))
    uniform_points = 8
    assert len([name for name in names if name.startswith("loss_")]) <= uniform_points


# collapse


def warnings_of(caplog, model, collapse_perplexity=2.0, criterion=None):
    criterion = criterion or LightContrastive(None, [0.1, 10], collapse_perplexity)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        criterion(model, SAMPLE)
    return [record.getMessage() for record in caplog.records if "collaps" in record.getMessage()]


@pytest.mark.parametrize("perplexity, warns", ((2.2, True), (3.9, True), (4.1, False), (16.0, False)))
def test_collapse_is_judged_per_group(caplog, perplexity, warns):
    messages = warnings_of(caplog, FixedOutput(torch.randn(4, 2, 5), **codes(perplexity)).train())
    assert bool(messages) == warns


def test_the_warning_says_what_and_what_to_do(caplog):
    model = FixedOutput(torch.randn(4, 2, 5), num_updates=321, **codes(2.2)).train()
    (message,) = warnings_of(caplog, model)
    for words in ("update 321", "1.10 per group of 8 codes", "criterion.loss_weights", "optimization.lr"):
        assert words in message


def test_the_warning_is_repeated_now_and_then(caplog):
    model = FixedOutput(torch.randn(4, 2, 5), **codes(2.2)).train()
    criterion = LightContrastive(None, [0.1, 10], 2.0)
    warned = []
    for update in range(0, 260, 10):
        model.num_updates = update
        if warnings_of(caplog, model, criterion=criterion):
            warned.append(update)
    assert warned == [0, 100, 200]


def test_no_warning_in_validation(caplog):
    assert not warnings_of(caplog, FixedOutput(torch.randn(4, 2, 5), **codes(2.0)).eval())


def test_no_warning_without_codebook(caplog):
    assert not warnings_of(caplog, FixedOutput(torch.randn(4, 2, 5), features_pen=torch.tensor(0.0)).train())
