"""Pruning as a criterion: what it adds to the other loss, whom it moves and when, what it logs, what it refuses."""

import logging
from types import SimpleNamespace

import pytest
import torch
from fairseq.criterions.ctc import CtcCriterion, CtcCriterionConfig
from fairseq.logging import metrics
from tiny_checkpoints import ctc_model, save_ctc

from fairseq_w2v2_light.compress.prune import prune_checkpoint
from fairseq_w2v2_light.criterions import (
    LightContrastive,
    LightDistill,
    LightDistillConfig,
    LightPrune,
    LightPruneConfig,
)
from fairseq_w2v2_light.criterions.sparsity import METHODS, ramped
from fairseq_w2v2_light.models.w2v2_light import GATES_GROUP
from fairseq_w2v2_light.study.cost import cost, load_subject

UNITS = ["conv", "heads", "ffn", "hidden"]
TRANSFORMER = UNITS[1:]
# log alpha of a gate that is as good as never open
CLOSED = -8.0


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, checkpoints):
    """Path of an ungated pre-training checkpoint."""
    return checkpoints.light(tmp_path_factory.mktemp("prune") / "encoder.pt", seed=3, encoder_layerdrop=0.0).path


def gated_ctc(encoder, units=UNITS, closed=0.0, **keys):
    """A gated CTC model in training mode, of whose gates about the fraction `closed` is closed."""
    torch.manual_seed(1)
    keys = {"prune_units": units, "feature_grad_mult": 1.0, "layerdrop": 0.0, **keys}
    model = ctc_model(encoder, **keys).train()
    with torch.no_grad():
        model.w2v_encoder.proj.weight.normal_()
    close(model.w2v_encoder.w2v_model, closed)
    return model


def close(network, fraction):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.gates.parameters():
            parameter[torch.rand(parameter.shape, generator=generator) < fraction] = CLOSED


def network_of(model):
    return model.w2v_encoder.w2v_model if hasattr(model, "w2v_encoder") else model


def task_of(model, checkpoints, **changes):
    cfg = SimpleNamespace(normalize=False, sample_rate=16000, data="/nowhere")
    task = SimpleNamespace(cfg=cfg, encoder_config=network_of(model).config)
    if hasattr(model, "w2v_encoder"):
        task.__dict__.update(target_dictionary=checkpoints.letters(), blank_symbol="<s>")
    task.__dict__.update(changes)
    return task


def build(model, checkpoints, task=None, **keys):
    keys = {"sentence_avg": False, **keys}
    return LightPrune(LightPruneConfig(**keys), task or task_of(model, checkpoints))


def ctc(model, checkpoints, sentence_avg=False):
    settings = CtcCriterionConfig(zero_infinity=True, post_process="letter")
    settings.sentence_avg = sentence_avg
    return CtcCriterion(settings, task_of(model, checkpoints))


def make_sample(checkpoints):
    source, padding = checkpoints.audio(1500, 900)
    return {
        "id": torch.arange(2),
        "net_input": {"source": source, "padding_mask": padding},
        "target": torch.tensor([[4, 5, 7], [5, 6, 1]]),
        "target_lengths": torch.tensor([3, 2]),
        "ntokens": 5,
    }


def at_update(model, update, seed=0):
    """The same random draws each time."""
    model.set_num_updates(update)
    network_of(model).calls = 0
    torch.manual_seed(seed)


def run(criterion, model, sample, update=0):
    at_update(model, update)
    return criterion(model, sample)


def penalty(criterion, log, update, first=0):
    """The penalty by hand, from what was logged."""
    total = 0.0
    for name, (l1, l2) in zip(criterion.multipliers.constraints, criterion.multipliers.values.tolist()):
        gap = float(log[f"prune@expected_{name}"]) / 100 - ramped(
            criterion.targets[name], update - first, criterion.ramp_updates
        )
        total += l1 * gap + l2 * gap * gap
    return total


def reduced(logs):
    with metrics.aggregate(new_root=True) as root:
        LightPrune.reduce_metrics(logs)
    return root.get_smoothed_values()


def assert_same_log(log, expected):
    assert {key: log[key] for key in expected} == expected
    assert all(key.startswith(("prune@", "loss_of@", "prunings")) for key in set(log) - set(expected))


# ---- the other loss


@pytest.mark.parametrize("sentence_avg", [False, True])
def test_ctc_in_validation_is_fairseqs(encoder, checkpoints, sentence_avg):
    model, sample = gated_ctc(encoder, closed=0.3).eval(), make_sample(checkpoints)
    criterion = build(model, checkpoints, sentence_avg=sentence_avg)
    stock = ctc(model, checkpoints, sentence_avg)
    with torch.no_grad():
        loss, size, log = run(criterion, model, sample)
        expected, expected_size, expected_log = run(stock, model, sample)
    assert float(loss) == float(expected) > 0
    assert size == expected_size == (2 if sentence_avg else 5)
    assert_same_log(log, expected_log)
    assert log["w_total"] == 2
    with metrics.aggregate(new_root=True) as root:
        CtcCriterion.reduce_metrics([expected_log])
    values = reduced([log])
    assert {key: values[key] for key in root.get_smoothed_values()} == root.get_smoothed_values()
    assert "wer" in values and "uer" in values


@pytest.mark.parametrize("method", list(METHODS))
def test_ctc_in_training_has_the_penalty_times_the_sample_size(encoder, checkpoints, method):
    model = gated_ctc(encoder, TRANSFORMER if method == "transformer" else UNITS, closed=0.2)
    sample = make_sample(checkpoints)
    criterion = build(model, checkpoints, method=method, target=0.5, cnn_target=0.3, ramp_updates=10)
    criterion.multipliers.values.data[:, 0] = 3.0
    loss, size, log = run(criterion, model, sample, 4)
    expected, expected_size, expected_log = run(ctc(model, checkpoints), model, sample, 4)
    assert size == expected_size == 5
    assert_same_log(log, expected_log)
    added = penalty(criterion, log, 4)
    assert abs(added) > 0.1
    assert float(loss.detach()) == pytest.approx(float(expected.detach()) + 5 * added, rel=1e-4)


def test_contrastive_is_light_contrastive(checkpoints, tmp_path):
    keys = dict(prune_units=UNITS, feature_grad_mult=1.0, encoder_layerdrop=0.0, mask_prob=0.5)
    model = checkpoints.light(tmp_path / "gated.pt", **keys).model.train()
    sample = {key: item for key, item in make_sample(checkpoints).items() if "target" not in key}
    task = task_of(model, checkpoints)
    criterion = build(model, checkpoints, task, loss="contrastive", loss_weights=[0.3, 2.0], target=0.5)
    plain = LightContrastive(task, [0.3, 2.0], 2.0)
    loss, size, log = run(criterion, model, sample)
    expected, expected_size, expected_log = run(plain, model, sample)
    assert size == expected_size > 0
    assert_same_log(log, expected_log)
    assert float(loss) == pytest.approx(float(expected.detach()) + size * penalty(criterion, log, 0), rel=1e-4)
    loss.backward()
    assert all(gate.grad.abs().sum() > 0 for gate in model.gates.parameters())
    assert {"contrastive", "code_perplexity", "expected_mac", "loss_s1q1k1"} <= set(reduced([log]))
    model.eval()
    with torch.no_grad():
        assert float(run(criterion, model, sample)[0]) == float(run(plain, model, sample)[0])


def test_distill_is_light_distill(encoder, checkpoints, tmp_path):
    teacher = checkpoints.stock_ctc(tmp_path / "teacher.pt", seed=1).path
    terms = dict(teacher=teacher, kl_weight=0.7, hidden_weight=0.5, hidden_map="every:1", ctc_weight=0.3)
    model, sample = gated_ctc(encoder, closed=0.2), make_sample(checkpoints)
    criterion = build(model, checkpoints, loss="distill", target=0.5, **terms)
    plain = LightDistill(LightDistillConfig(**terms), task_of(model, checkpoints))
    loss, size, log = run(criterion, model, sample)
    expected, expected_size, expected_log = run(plain, model, sample)
    assert size == expected_size > 10
    assert_same_log(log, expected_log)
    assert float(loss) == pytest.approx(float(expected.detach()) + size * penalty(criterion, log, 0), rel=1e-4)
    assert {"kl", "hidden", "ctc", "expected_mac", "loss"} <= set(reduced([log]))
    model.eval()
    with torch.no_grad():
        assert float(run(criterion, model, sample)[0]) == float(run(plain, model, sample)[0])


def test_projections_of_distillation_are_saved_with_the_multipliers(encoder, checkpoints, tmp_path):
    wide = checkpoints.light_ctc(tmp_path / "wide.pt", seed=2, encoder_embed_dim=64).path
    terms = dict(loss="distill", teacher=wide, hidden_weight=1.0, hidden_map="0:0,1:3")
    criterion = build(gated_ctc(encoder), checkpoints, **terms)
    shapes = {name: tuple(value.shape) for name, value in criterion.state_dict().items()}
    projections = {f"loss.projections.{pair}.weight": (64, 32) for pair in (0, 1)}
    assert shapes == {"multipliers.values": (1, 2), **projections}


def test_a_checkpoint_of_a_criterion_without_parameters(encoder, checkpoints):
    """fairseq's trainer loads its None when a model is fine-tuned from it."""
    criterion = build(gated_ctc(encoder), checkpoints, stiffness=7.0)
    criterion.load_state_dict(None, strict=True)
    assert criterion.multipliers.values.tolist() == [[0.0, 7.0]]
    criterion.load_state_dict({"multipliers.values": torch.tensor([[1.0, 2.0]])}, strict=True)
    assert criterion.multipliers.values.tolist() == [[1.0, 2.0]]


# ---- gradients


def test_every_gate_and_multiplier_gets_a_gradient(encoder, checkpoints):
    model = gated_ctc(encoder)
    criterion = build(model, checkpoints, method="sepsize", target=0.5, cnn_target=0.5)
    run(criterion, model, make_sample(checkpoints))[0].backward()
    for name, parameter in [*model.named_parameters(), *criterion.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for name, gate in network_of(model).gates.named_parameters():
        assert gate.grad.abs().sum() > 0, name
    assert (criterion.multipliers.values.grad != 0).all()


def test_the_penalty_alone_closes_gates_and_its_multipliers_ascend(encoder, checkpoints):
    model, sample = gated_ctc(encoder), make_sample(checkpoints)
    criterion = build(model, checkpoints, target=0.5)
    criterion.multipliers.values.data[:] = torch.tensor([[-2.0, 50.0]])
    loss, size, log = run(criterion, model, sample)
    (loss - run(criterion.loss, model, sample)[0]).backward()
    for gate in network_of(model).gates.parameters():
        # descending lowers log alpha
        assert (gate.grad.sum() if gate.numel() > 1 else gate.grad) > 0
    gap = float(log["prune@expected_mac"]) / 100 - 0.5
    assert gap < 0
    expected = torch.tensor([[-gap, -gap * gap]]) * size
    torch.testing.assert_close(criterion.multipliers.values.grad, expected, rtol=1e-4, atol=1e-6)


def test_gates_and_multipliers_are_groups_of_the_optimizer(encoder, checkpoints):
    model = gated_ctc(encoder)
    criterion = build(model, checkpoints)
    groups = {getattr(parameter, "param_group", "default") for parameter in model.parameters()}
    assert groups == {"default", GATES_GROUP}
    assert [parameter.param_group for parameter in criterion.parameters()] == ["multipliers"]


# ---- updates that train the CTC head alone


def test_frozen_updates_prune_nothing(encoder, checkpoints):
    model, sample = gated_ctc(encoder, freeze_finetune_updates=3), make_sample(checkpoints)
    criterion = build(model, checkpoints, target=0.5, ramp_updates=4)
    before = {name: value.clone() for name, value in [*model.state_dict().items(), *criterion.state_dict().items()]}
    for update in range(3):
        loss, size, log = run(criterion, model, sample, update)
        assert float(loss.detach()) == float(run(ctc(model, checkpoints), model, sample, update)[0].detach())
        loss.backward()
        assert log["prune@target_mac"] == 0
    assert all(gate.grad is None or not gate.grad.any() for gate in network_of(model).gates.parameters())
    assert criterion.multipliers.values.grad is not None and not criterion.multipliers.values.grad.any()
    optimizer = torch.optim.Adam([*model.parameters(), *criterion.parameters()], lr=0.1)
    optimizer.step()
    after = [*model.state_dict().items(), *criterion.state_dict().items()]
    changed = {name for name, value in after if not torch.equal(value, before[name])}
    assert changed == {"w2v_encoder.proj.weight", "w2v_encoder.proj.bias"}


def test_the_ramp_starts_after_the_frozen_updates(encoder, checkpoints):
    model, sample = gated_ctc(encoder, freeze_finetune_updates=3), make_sample(checkpoints)
    criterion = build(model, checkpoints, target=0.4, ramp_updates=4)
    targets = []
    for update in (3, 4, 5, 6, 7, 20):
        loss, size, log = run(criterion, model, sample, update)
        targets.append(log["prune@target_mac"])
        added = float(loss.detach()) - float(run(ctc(model, checkpoints), model, sample, update)[0].detach())
        assert added == pytest.approx(size * penalty(criterion, log, update, 3), abs=1e-3)
    assert targets == pytest.approx([0, 10, 20, 30, 40, 40])


def test_without_a_ramp_the_target_holds_from_the_first_update(encoder, checkpoints):
    model = gated_ctc(encoder)
    log = run(build(model, checkpoints, target=0.3), model, make_sample(checkpoints))[2]
    assert log["prune@target_mac"] == pytest.approx(30)


# ---- logs


@pytest.mark.parametrize("layout", ["large", "base"])
@pytest.mark.parametrize("method", ["size", "mac"])
def test_the_log_is_of_the_model_that_prune_makes(checkpoints, tmp_path, layout, method):
    start = checkpoints.light(tmp_path / "start.pt", layout=layout, encoder_layerdrop=0.0).path
    model = gated_ctc(start, closed=0.4)
    # as many of each group of the positional convolution: those that keep fewer are stored padded
    hidden = network_of(model).gates.hidden.log_alpha.data
    hidden.fill_(2 * hidden.max()).view(-1, 8)[:, ::3] = CLOSED
    criterion = build(model, checkpoints, method=method, target=0.3)
    with torch.no_grad():
        log = run(criterion, model.eval(), make_sample(checkpoints))[2]
    values = reduced([log, log])

    gated, pruned = tmp_path / "gated.pt", tmp_path / "pruned.pt"
    dictionary = checkpoints.letters()
    save_ctc(gated, model, {"_name": "audio_finetuning"}, dictionary)
    prune_checkpoint(gated, pruned)
    after, before = cost(load_subject(str(pruned), [])), cost(load_subject(str(gated), []))
    assert values["parameters_m"] == pytest.approx(after["parameters"] / 1e6, abs=1e-3)
    assert float(log["prune@parameters_m"]) == pytest.approx(after["parameters"] / 1e6, rel=1e-6)
    assert float(log["prune@gmacs"]) == pytest.approx(after["macs"] / 1e9, rel=1e-6)
    what = {"size": "parameters", "mac": "macs"}[method]
    removed = 100 * (1 - after[what] / before[what])
    assert removed > 20
    assert values[f"reached_{method}"] == pytest.approx(removed, abs=1e-2)
    # gates as good as closed, and as at the start: what is expected is nearly what is decided
    assert values[f"expected_{method}"] == pytest.approx(removed, abs=3)
    assert values[f"target_{method}"] == pytest.approx(30)
    assert values[f"l1_{method}"] == 0 and values[f"l2_{method}"] == LightPruneConfig.stiffness


def test_logs_of_two_workers_are_summed(encoder, checkpoints):
    model = gated_ctc(encoder, closed=0.3)
    criterion = build(model, checkpoints, method="sepsize", target=0.4, cnn_target=0.2)
    assert LightPrune.logging_outputs_can_be_summed() is True
    logs = [run(criterion, model, make_sample(checkpoints))[2] for _ in range(2)]
    assert logs[0].keys() == logs[1].keys()
    summed = {key: logs[0][key] + logs[1][key] for key in logs[0]}
    idle = {key: value * 0 for key, value in logs[0].items()}
    values = reduced(logs)
    assert reduced([summed]) == values == reduced([*logs, idle])
    assert {f"{kind}_{name}" for kind in ("target", "expected", "reached") for name in ("cnn", "transformer")} <= set(
        values
    )
    assert (values["target_cnn"], values["target_transformer"]) == (20, 40)


def test_one_report_a_validation(encoder, checkpoints, caplog):
    model, sample = gated_ctc(encoder, closed=0.3), make_sample(checkpoints)
    criterion = build(model, checkpoints, target=0.4, report_updates=0)

    def reports(train, valid, update):
        caplog.clear()
        with caplog.at_level(logging.INFO), torch.no_grad():
            model.train()
            for index in range(train):
                run(criterion, model, sample, update + index)
            model.eval()
            for _ in range(valid):
                criterion(model, sample)
        return [record.getMessage() for record in caplog.records if "pruned" in record.getMessage()]

    (first,) = reports(train=2, valid=3, update=0)
    (second,) = reports(train=2, valid=3, update=2)
    assert first.startswith("update 2: mac ") and second.startswith("update 4: mac ")
    for word in ("% pruned (expected ", "target 40.0)", " M parameters, ", " GMACs left: conv ", "heads ", "hidden "):
        assert word in first
    assert reports(train=2, valid=0, update=4) == []


def test_reports_in_training(encoder, checkpoints, caplog):
    model, sample = gated_ctc(encoder), make_sample(checkpoints)
    criterion = build(model, checkpoints, report_updates=2)
    with caplog.at_level(logging.INFO):
        for update in range(1, 6):
            run(criterion, model, sample, update)
            # the second batch of the same update (update_freq)
            criterion(model, sample)
    reports = [record.getMessage() for record in caplog.records if "pruned" in record.getMessage()]
    assert [text.split(":")[0] for text in reports] == ["update 2", "update 4"]


def test_macs_are_those_of_the_models_operating_point(checkpoints, tmp_path):
    start = checkpoints.light(tmp_path / "squeezed.pt", squeeze_factors=[1, 2], encoder_layerdrop=0.0).path
    found = {}
    for point in ("", "s2q1k1"):
        model = gated_ctc(start, operating_point=point)
        found[point] = run(build(model, checkpoints), model, make_sample(checkpoints))[2]["prune@gmacs"]
    assert found["s2q1k1"] < 0.9 * found[""]


# ---- half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_multipliers_stay_in_fp32(encoder, checkpoints, dtype):
    model = gated_ctc(encoder)
    criterion = build(model, checkpoints)
    values = torch.tensor([[0.12345678, 100.0001]])
    criterion.multipliers.values.data.copy_(values)
    parameter = criterion.multipliers.values
    criterion = criterion.half() if dtype == torch.float16 else criterion.bfloat16()
    assert criterion.multipliers.values is parameter and parameter.dtype == torch.float32
    assert torch.equal(parameter, values)
    assert parameter.param_group == "multipliers"


def test_the_penalty_of_a_half_precision_model_is_that_of_fp32(encoder, checkpoints):
    model, sample = gated_ctc(encoder, closed=0.2), make_sample(checkpoints)
    criterion = build(model, checkpoints, target=0.5)
    expected = run(criterion, model, sample)[2]
    sample["net_input"]["source"] = sample["net_input"]["source"].bfloat16()
    model, criterion = model.bfloat16(), criterion.bfloat16()
    loss, _, log = run(criterion, model, sample)
    assert float(log["prune@expected_mac"]) == float(expected["prune@expected_mac"])
    assert loss.isfinite()
    loss.backward()
    assert all(gate.grad.dtype == torch.float32 for gate in network_of(model).gates.parameters())
    assert all(gate.grad.isfinite().all() for gate in network_of(model).gates.parameters())


# ---- refusals


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"method": "macs"}, "criterion.method: found 'macs', expected one of size, sepsize, mac, transformer"),
        ({"loss": "wav2vec"}, "criterion.loss: found 'wav2vec', expected one of ctc, contrastive, distill"),
        ({"target": 1.0}, "criterion.target: found 1.0, expected the fraction to prune, from 0 to below 1"),
        ({"target": -0.1}, "criterion.target: found -0.1, expected the fraction to prune"),
        ({"target": float("nan")}, "criterion.target: found nan"),
        ({"method": "sepsize", "cnn_target": 1.5}, "criterion.cnn_target: found 1.5, expected the fraction"),
        ({"stiffness": -1.0}, "criterion.stiffness: found -1.0, expected 0 or more"),
        ({"ramp_updates": -1}, "criterion.ramp_updates: found -1, expected 0 or more"),
        ({"report_updates": -5}, "criterion.report_updates: found -5, expected 0 or more"),
        ({"method": "transformer"}, "prunes the Transformer only; set model.prune_units=.heads,ffn,hidden."),
        ({"loss": "contrastive"}, "criterion.loss: found 'contrastive', which needs a pre-training model"),
        ({"loss": "distill"}, "criterion.kl_weight and others: every weight is 0|every weight is 0"),
    ],
)
def test_bad_settings_say_what_to_do(encoder, checkpoints, keys, message):
    model = gated_ctc(encoder)
    with pytest.raises(ValueError, match=message):
        build(model, checkpoints, **keys)


def test_a_target_beyond_what_gates_can_remove(encoder, checkpoints):
    model = gated_ctc(encoder, ["heads"])
    with pytest.raises(ValueError) as error:
        build(model, checkpoints, method="size", target=0.9)
    for word in ("criterion.target: found 0.9", "gates on ['heads'] can remove at most ", "% of what method size"):
        assert word in str(error.value)
    assert "set model.prune_units=[conv,heads,ffn,hidden]" in str(error.value)


def test_a_model_without_gates(encoder, checkpoints):
    model = ctc_model(encoder)
    with pytest.raises(ValueError, match=r"model.prune_units: empty.*set model.prune_units=\[conv,heads,ffn,hidden\]"):
        build(model, checkpoints)


def test_a_model_of_another_plugin(encoder, checkpoints):
    task = SimpleNamespace(cfg=SimpleNamespace(normalize=False), target_dictionary=checkpoints.letters())
    with pytest.raises(ValueError, match="no gates; expected model._name to be light_ctc .*, w2v2_light or"):
        build(None, checkpoints, task)


def test_ctc_needs_labels(checkpoints, tmp_path):
    model = checkpoints.light(tmp_path / "gated.pt", prune_units=UNITS, feature_grad_mult=1.0).model
    with pytest.raises(
        ValueError, match="criterion.loss: found 'ctc', which needs labels .*'contrastive' or 'distill'"
    ):
        build(model, checkpoints)
