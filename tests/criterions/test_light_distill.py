"""The criterion as a whole: its terms from real models, padding, gradients, what it refuses."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fairseq_w2v2_light.criterions import LightDistill, LightDistillConfig
from fairseq_w2v2_light.criterions.denominator import estimate
from fairseq_w2v2_light.criterions.distill_terms import Frames, align, kl_divergence, mean_squared_error
from fairseq_w2v2_light.criterions.lfmmi import distillation_lfmmi, lfmmi_loss

ALL = dict(
    hidden_weight=0.5,
    kl_weight=1.5,
    logits_mse_weight=0.25,
    cosine_weight=0.75,
    mmi_weight=0.1,
    mmi_transcript_weight=0.2,
    ctc_weight=0.3,
    feature_penalty_weight=2.0,
    hidden_map="0:1,1:3",
)
NAMES = {name[: -len("_weight")]: value for name, value in ALL.items() if name.endswith("_weight")}


@pytest.fixture(scope="module")
def files(tmp_path_factory, checkpoints):
    """Paths: a teacher of 4 layers, others of it, a denominator graph."""
    root = tmp_path_factory.mktemp("distill")
    symbols = checkpoints.letters().symbols
    graph = estimate([[4, 5, 7], [5, 5, 6], [4]], symbols, order=2)
    graph.save(root / "graph.npz")
    estimate([[4, 5]], checkpoints.letters("ABX|").symbols).save(root / "other_graph.npz")
    return SimpleNamespace(
        teacher=checkpoints.stock_ctc(root / "teacher.pt", seed=1).path,
        wide=checkpoints.light_ctc(root / "wide.pt", seed=2, encoder_embed_dim=64).path,
        squeezed=checkpoints.light_ctc(root / "squeezed.pt", seed=3, squeeze_factors=[2]).path,
        unlabelled=checkpoints.stock(root / "pretrained.pt").path,
        foreign=checkpoints.stock_ctc(root / "foreign.pt", dictionary=checkpoints.letters("ABX|")).path,
        graph=str(root / "graph.npz"),
        other_graph=str(root / "other_graph.npz"),
        loaded_graph=graph,
        root=root,
    )


@pytest.fixture
def student(tmp_path, checkpoints):
    """A CTC student of two layers, in training mode, without masks and dropout."""

    def build(**keys):
        keys = {"seed": 5, "encoder_layers": 2, "encoder_layerdrop": 0.0, **keys}
        model = checkpoints.light_ctc(tmp_path / "student.pt", **keys).model
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.w2v_encoder.apply_mask = False
        model.w2v_encoder.w2v_model.feature_grad_mult = 1.0
        return model

    return build


def task_of(model, checkpoints, **changes):
    network = getattr(model, "config", None) or model.w2v_encoder.w2v_model.config
    cfg = SimpleNamespace(normalize=False, sample_rate=16000, data="/nowhere")
    task = SimpleNamespace(cfg=cfg, target_dictionary=checkpoints.letters(), blank_symbol="<s>", encoder_config=network)
    task.__dict__.update(changes)
    return task


def build(files, model, checkpoints, task=None, **keys):
    keys = {"teacher": files.teacher, "denominator": files.graph, **keys}
    return LightDistill(LightDistillConfig(**keys), task or task_of(model, checkpoints))


def make_sample(checkpoints, *lengths, targets=None, pad=1):
    source, padding = checkpoints.audio(*lengths)
    targets = targets or [[4, 5, 7], [5, 5], [6]][: len(lengths)]
    width = max(len(target) for target in targets)
    return {
        "id": torch.arange(len(lengths)),
        "net_input": {"source": source, "padding_mask": padding},
        "target": torch.tensor([target + [pad] * (width - len(target)) for target in targets]),
        "target_lengths": torch.tensor([len(target) for target in targets]),
        "ntokens": sum(len(target) for target in targets),
    }


def value(log, name):
    return float(log[f"term@{name}"]) / log["sample_size"]


def test_every_term_is_what_its_function_says(files, student, checkpoints):
    model = student().eval()
    criterion = build(files, model, checkpoints, **ALL)
    sample = make_sample(checkpoints, 1500, 900, 600)
    loss, frames, log = criterion(model, sample)

    output = model(**sample["net_input"])
    logits = output["encoder_out"].transpose(0, 1).detach()
    lengths = (~output["padding_mask"]).sum(1)
    teacher = criterion._teacher[0](**sample["net_input"])
    valid = torch.arange(logits.size(1)) < lengths.unsqueeze(1)
    hidden = sum(
        mean_squared_error(output["layer_results"][i][0].transpose(0, 1), teacher.hidden[j], valid)
        for i, j in ((0, 1), (1, 3))
    )
    log_probs = F.log_softmax(logits, -1).transpose(0, 1)
    targets, counts = sample["target"], sample["target_lengths"]
    expected = {
        "hidden": hidden,
        "kl": kl_divergence(logits, teacher.logits, valid),
        "logits_mse": mean_squared_error(logits, teacher.logits, valid),
        "cosine": (1 - F.cosine_similarity(logits, teacher.logits, dim=-1))[valid].mean(),
        "mmi": distillation_lfmmi(logits, teacher.logits, lengths, files.loaded_graph).sum() / frames,
        "mmi_transcript": lfmmi_loss(logits, lengths, targets, counts, files.loaded_graph).sum() / frames,
        "ctc": F.ctc_loss(log_probs, targets, lengths, counts, reduction="sum") / frames,
        "feature_penalty": output["features_pen"],
    }
    assert frames == int(lengths.sum())
    for name, reference in expected.items():
        assert value(log, name) == pytest.approx(float(reference.detach()), rel=1e-4), name
    total = sum(weight * float(expected[name].detach()) for name, weight in NAMES.items())
    assert float(loss) / frames == pytest.approx(total, rel=1e-4)


def test_padding_changes_no_term(files, student, checkpoints):
    model = student()
    criterion = build(files, model, checkpoints, **ALL)
    together = criterion(model, make_sample(checkpoints, 1500, 900))[2]
    source, _ = checkpoints.audio(1500, 900)
    alone = []
    for row, (length, target) in enumerate(((1500, [4, 5, 7]), (900, [5, 5]))):
        sample = make_sample(checkpoints, length, targets=[target])
        sample["net_input"] = {"source": source[row : row + 1, :length], "padding_mask": None}
        alone.append(criterion(model, sample)[2])
    for name in NAMES:
        both = sum(float(log[f"term@{name}"]) for log in alone)
        assert float(together[f"term@{name}"]) == pytest.approx(both, rel=1e-4), name


def test_the_student_gets_gradients_and_the_teacher_none(files, student, checkpoints):
    for name in NAMES:
        model = student()
        model.zero_grad()
        criterion = build(files, model, checkpoints, **{f"{name}_weight": 1.0, "hidden_map": ALL["hidden_map"]})
        criterion(model, make_sample(checkpoints, 1500, 900))[0].backward()
        gradient = model.w2v_encoder.w2v_model.feature_extractor.conv_layers[0][0].weight.grad
        assert gradient is not None and gradient.abs().sum() > 0, name
        for teacher in criterion._teacher:
            assert all(not p.requires_grad and p.grad is None for p in teacher._network.parameters())


def test_the_teacher_is_in_no_state_dict(files, student, checkpoints):
    model = student()
    criterion = build(files, model, checkpoints, **ALL)
    assert list(criterion.state_dict()) == []
    assert list(criterion.parameters()) == []


def test_projections_where_widths_differ_are_learnt_and_saved(files, student, checkpoints):
    model = student()
    criterion = build(files, model, checkpoints, teacher=files.wide, hidden_weight=1.0, hidden_map="0:0,1:3")
    assert {name: tuple(p.shape) for name, p in criterion.named_parameters()} == {
        "projections.0.weight": (64, 32),
        "projections.1.weight": (64, 32),
    }
    sample = make_sample(checkpoints, 1500, 900)
    criterion(model, sample)[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in criterion.parameters())

    output = model.eval()(**sample["net_input"])
    teacher = criterion._teacher[0](**sample["net_input"])
    valid = ~output["padding_mask"]
    expected = sum(
        mean_squared_error(
            F.linear(output["layer_results"][i][0].transpose(0, 1), criterion.projections[i].weight),
            teacher.hidden[j],
            valid,
        )
        for i, j in ((0, 0), (1, 3))
    )
    assert value(criterion(model, sample)[2], "hidden") == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("point", ["s1q1k1", "s2q1k1", "s3q2k2"])
@pytest.mark.parametrize("other", ["teacher", "squeezed"])
def test_squeezed_students_and_teachers_are_aligned(files, student, checkpoints, point, other):
    model = student(squeeze_factors=[1, 2, 3], query_pools=[1, 2], kv_pools=[1, 2])
    model.w2v_encoder.w2v_model.operating_point = model.w2v_encoder.w2v_model.check_operating_point(point)
    criterion = build(files, model, checkpoints, teacher=getattr(files, other), **{**ALL, "hidden_map": "1:3"})
    sample = make_sample(checkpoints, 1500, 910)
    loss, frames, log = criterion(model, sample)
    loss.backward()
    assert all(torch.isfinite(torch.tensor(value(log, name))) for name in NAMES)

    output = model(**sample["net_input"])
    factor = int(point[1])
    lengths = (~output["padding_mask"]).sum(1)
    hidden = output["layer_results"][1][0].transpose(0, 1)
    student_frames = Frames(hidden, (lengths + factor - 1) // factor, 20 * factor)
    teacher = criterion._teacher[0](**sample["net_input"])
    target, hidden, valid = align(
        Frames(teacher.hidden[3], teacher.hidden_lengths, 20 * teacher.squeeze), student_frames
    )
    assert value(log, "hidden") == pytest.approx(float(mean_squared_error(hidden, target, valid)), rel=1e-4)


def test_another_frontend(files, student, checkpoints):
    model = student(conv_feature_layers="[(8, 12, 10), (16, 3, 3)]")
    criterion = build(files, model, checkpoints, **{**ALL, "hidden_map": "1:3"})
    assert criterion.hop == 30
    loss, frames, log = criterion(model, make_sample(checkpoints, 1500, 900))
    loss.backward()
    assert torch.isfinite(loss) and all(value(log, name) > 0 for name in NAMES)


def test_a_dropped_layer_of_the_student_has_no_hidden_term(files, student, checkpoints):
    model = student()
    criterion = build(files, model, checkpoints, hidden_weight=1.0, hidden_map="0:1,1:3")
    sample = make_sample(checkpoints, 1500)
    output = model(**sample["net_input"])
    teacher = criterion._teacher[0](**sample["net_input"])
    student = Frames(output["encoder_out"].transpose(0, 1), None, 20)
    full = float(criterion._hidden(output, teacher, student))
    output["layer_results"], output["layer_depths"] = output["layer_results"][1:], output["layer_depths"][1:]
    last = float(criterion._hidden(output, teacher, student))
    assert 0 < last < full
    output["layer_results"], output["layer_depths"] = [], []
    assert float(criterion._hidden(output, teacher, student)) == 0


def test_validation_counts_errors_and_the_log_has_every_term(files, student, checkpoints):
    from fairseq.logging import metrics

    model = student().eval()
    criterion = build(files, model, checkpoints, **ALL)
    logs = [criterion(model, make_sample(checkpoints, 1500, 900))[2] for _ in range(2)]
    assert logs[0]["w_total"] > 0 and logs[0]["c_total"] == 5
    with metrics.aggregate(new_root=True) as root:
        LightDistill.reduce_metrics(logs)
    values = root.get_smoothed_values()
    assert set(NAMES) <= set(values)
    assert values["wer"] == pytest.approx(100 * logs[0]["w_errors"] / logs[0]["w_total"], abs=1e-2)
    expected = sum(NAMES[name] * values[name] for name in NAMES)
    assert values["loss"] == pytest.approx(expected, rel=1e-3)


def test_the_cache_gives_the_same_loss(files, student, checkpoints, tmp_path):
    (tmp_path / "train.tsv").write_text(f"{tmp_path}\na.wav\t1500\nb.wav\t900\n")
    model = student()
    task = task_of(model, checkpoints)
    task.cfg.data = str(tmp_path)
    keys = {**ALL, "teacher_cache": str(tmp_path / "cache"), "teacher_cache_dtype": "float32"}
    sample = make_sample(checkpoints, 1500, 900)
    direct = build(files, model, checkpoints, **ALL)(model, sample)[0]
    first = build(files, model, checkpoints, task, **keys)
    assert first(model, sample)[0].item() == pytest.approx(direct.item(), rel=1e-5)
    second = build(files, model, checkpoints, task, **keys)
    assert second(model, sample)[0].item() == pytest.approx(direct.item(), rel=1e-5)
    assert second._teacher[0].misses == 0 and second._teacher[0].hits == 2


def test_hidden_layers_on_the_pretraining_task(files, checkpoints, tmp_path):
    model = checkpoints.light(tmp_path / "s.pt", encoder_layers=2, encoder_layerdrop=0.0).model.train()
    task = SimpleNamespace(
        cfg=SimpleNamespace(normalize=False, sample_rate=16000, data="/nowhere"), encoder_config=model.config
    )
    criterion = build(
        files, model, checkpoints, task, hidden_weight=1.0, feature_penalty_weight=0.1, teacher=files.unlabelled
    )
    sample = {key: item for key, item in make_sample(checkpoints, 1500, 900).items() if "target" not in key}
    loss, frames, log = criterion(model, sample)
    loss.backward()
    assert value(log, "hidden") > 0 and value(log, "feature_penalty") > 0
    assert model.encoder.layers[1].fc1.weight.grad.abs().sum() > 0


def test_the_mask_of_the_pretraining_student(files, checkpoints, tmp_path):
    no_dropout = dict.fromkeys(("dropout", "attention_dropout", "encoder_layerdrop"), 0.0)
    model = checkpoints.light(tmp_path / "s.pt", encoder_layers=2, **no_dropout).model.train()
    task = SimpleNamespace(
        cfg=SimpleNamespace(normalize=False, sample_rate=16000, data="/nowhere"), encoder_config=model.config
    )
    sample = {key: item for key, item in make_sample(checkpoints, 1500).items() if "target" not in key}
    losses = {}
    for masked in (False, True):
        criterion = build(
            files, model, checkpoints, task, hidden_weight=1.0, teacher=files.unlabelled, mask_student=masked
        )
        losses[masked] = {float(criterion(model, sample)[0]) for _ in range(2)}
    assert len(losses[False]) == 1
    assert losses[True] != losses[False]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({}, "every weight is 0"),
        ({"kl_weight": -1.0}, "criterion.kl_weight: found -1.0, expected 0 or more"),
        ({"kl_weight": 1.0, "temperature": 0.0}, "criterion.temperature: found 0.0"),
        ({"kl_weight": 1.0, "teacher_cache": "cache"}, "criterion.teacher_cache: found 'cache', expected an absolute"),
        ({"kl_weight": 1.0, "teacher": ""}, "criterion.teacher: empty, but needed by kl_weight"),
        ({"mmi_weight": 1.0, "denominator": ""}, "criterion.denominator: empty, but needed by mmi_weight"),
        ({"hidden_weight": 1.0, "hidden_map": "every:3"}, "layer 5 of the teacher, which has 4 layers"),
        ({"hidden_weight": 1.0, "hidden_map": "2:0"}, "layer 2 of the student, which has 2 layers"),
        ({"kl_weight": 1.0, "teacher": "unlabelled"}, "a pre-trained encoder without labels"),
        ({"kl_weight": 1.0, "teacher": "foreign"}, "symbol number 6 is 'X' in the teacher's and 'C' in the student's"),
        ({"mmi_weight": 1.0, "denominator": "other_graph"}, "built for another dictionary: at index 6"),
        ({"kl_weight": 1.0, "teacher": "/nowhere/t.pt"}, "criterion.teacher: .*no such checkpoint file"),
        ({"mmi_weight": 1.0, "denominator": "/nowhere/g.npz"}, "no such denominator graph"),
    ],
)
def test_bad_settings_say_what_to_do(files, student, checkpoints, keys, message):
    keys = {
        key: getattr(files, item) if isinstance(item, str) and hasattr(files, item) else item
        for key, item in keys.items()
    }
    model = student()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(files, model, checkpoints, **keys)


def test_a_pretraining_task_has_no_logits(files, checkpoints, tmp_path):
    model = checkpoints.light(tmp_path / "s.pt").model
    task = SimpleNamespace(cfg=SimpleNamespace(normalize=False), encoder_config=model.config)
    with pytest.raises(ValueError, match="kl_weight, ctc_weight need a CTC student"):
        build(files, model, checkpoints, task, kl_weight=1.0, ctc_weight=1.0)


def test_a_foreign_student_is_refused(files, checkpoints):
    task = SimpleNamespace(cfg=SimpleNamespace(normalize=False), target_dictionary=checkpoints.letters())
    with pytest.raises(ValueError, match="expected model._name to be light_ctc"):
        build(files, None, checkpoints, task, ctc_weight=1.0)
