"""Students of every kind of teacher: what is copied, what is new, and who can use the result."""

import shutil

import pytest
import torch
from fairseq import checkpoint_utils, tasks
from omegaconf import OmegaConf

from fairseq_w2v2_light.compress.student import StudentSpec, format_report, make_student, parse_layers
from fairseq_w2v2_light.models.checkpoint import load_encoder
from fairseq_w2v2_light.study.cost import cost, load_subject

KINDS = ("stock", "light", "shared", "light_ctc", "wav2vec_ctc")


@pytest.fixture(params=KINDS)
def teacher(request, teachers):
    return teachers[request.param]


def read(path):
    return torch.load(str(path), map_location="cpu")


def layers_of(weights, index):
    prefix = f"encoder.layers.{index}."
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# which layers


@pytest.mark.parametrize(
    "text, depth, depths",
    [
        ("every:2", 24, tuple(range(0, 24, 2))),
        ("every:3", 12, (0, 3, 6, 9)),
        ("every:1", 3, (0, 1, 2)),
        ("every:5", 12, (0, 5, 10)),
        ("first:4", 12, (0, 1, 2, 3)),
        ("last:4", 12, (8, 9, 10, 11)),
        ("0,3,6,9", 12, (0, 3, 6, 9)),
        (" 2, 1 ", 3, (2, 1)),
        ("11", 12, (11,)),
    ],
)
def test_layers_that_a_text_chooses(text, depth, depths):
    assert parse_layers(text, depth) == depths


@pytest.mark.parametrize(
    "text", ("every", "every:", "every:x", "middle:3", "0;1", "0,", "-1", "1-3", "every:2,3", "1.5")
)
def test_a_text_that_is_no_choice(text):
    with pytest.raises(ValueError, match=r"--layers '.*': expected every:N, first:N, last:N, or depths"):
        parse_layers(text, 12)


@pytest.mark.parametrize(
    "text, message",
    [
        ("0,12", r"depth 12 is beyond the teacher's 12 layers; choose 0 to 11"),
        ("first:13", r"found 13, expected 1 to 12"),
        ("last:0", r"found 0, expected 1 to 12"),
        ("every:0", r"found 0, expected 1 to 12"),
        ("0,3,3", r"depth 3 is there twice; to share a layer use --unique-layers"),
    ],
)
def test_layers_that_the_teacher_does_not_have(text, message):
    with pytest.raises(ValueError, match=message):
        parse_layers(text, 12)


# what is copied


def test_everything_but_the_layers_left_out_is_copied(teacher, tmp_path):
    report = make_student(teacher, tmp_path / "student.pt", StudentSpec(layers="every:2"))
    source, student = load_encoder(teacher), load_encoder(tmp_path / "student.pt")
    shared = len({name.split(".")[2] for name in source.model if name.startswith("encoder.layers.")}) < 6
    for index, depth in enumerate((0, 2, 4)):
        stored = depth * 2 // 6 if shared else depth
        assert equal(layers_of(student.model, index), layers_of(source.model, stored))
    rest = {name: value for name, value in source.model.items() if not name.startswith("encoder.layers.")}
    assert equal(rest, {name: value for name, value in student.model.items() if not name.startswith("encoder.layers.")})
    assert (source.head is None) == (student.head is None)
    if source.head is not None:
        assert equal(source.head, student.head) and student.symbols == source.symbols
    assert [layer.teacher_depth for layer in report.layers] == [0, 2, 4]
    assert all(layer.copied == "all" for layer in report.layers)
    assert all(new == 0 for _, _, new, _ in report.parts.values())
    assert student.cfg.model.encoder_layers == 3 and student.cfg.model.unique_layers == 0


def test_a_student_with_all_layers_is_its_teacher(teachers, tmp_path):
    make_student(teachers["light_ctc"], tmp_path / "student.pt", StudentSpec(layers="every:1"))
    (teacher,), _, _ = checkpoint_utils.load_model_ensemble_and_task([teachers["light_ctc"]])
    (student,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "student.pt")])
    source = torch.randn(2, 900, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (
            model.eval()(source=source, padding_mask=None)["encoder_out"] for model in (teacher, student)
        )
    assert torch.equal(expected, found)
    assert cfg.model._name == "light_ctc" and cfg.task._name == "audio_ctc"
    assert list(task.target_dictionary.symbols)[-4:] == list("ABC|")


def test_further_layers_start_anew_with_the_seed(teachers, tmp_path):
    spec = StudentSpec(layers="0,5", layers_n=4, seed=3)
    report = make_student(teachers["light"], tmp_path / "a.pt", spec)
    make_student(teachers["light"], tmp_path / "b.pt", spec)
    make_student(teachers["light"], tmp_path / "c.pt", StudentSpec(layers="0,5", layers_n=4, seed=4))
    a, b, c = (load_encoder(tmp_path / f"{name}.pt").model for name in "abc")
    source = load_encoder(teachers["light"]).model
    assert equal(a, b)
    assert equal(layers_of(a, 1), layers_of(source, 5)) and equal(layers_of(a, 1), layers_of(c, 1))
    assert not equal(layers_of(a, 2), layers_of(c, 2)) and not equal(layers_of(a, 2), layers_of(a, 3))
    assert [layer.teacher_depth for layer in report.layers] == [0, 5, None, None]
    assert report.parts["layers"][0] == report.parts["layers"][2] == 32


def test_the_seed_leaves_the_caller_s_generator_alone(teachers, tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    make_student(teachers["light"], tmp_path / "student.pt", StudentSpec(layers="0"))
    assert torch.equal(torch.rand(3), expected)


def test_another_width_keeps_the_frontend_only(teachers, tmp_path):
    spec = StudentSpec(width=24, ffn=40, heads=2, layers_n=3)
    report = make_student(teachers["light_ctc"], tmp_path / "student.pt", spec)
    source, student = load_encoder(teachers["light_ctc"]), load_encoder(tmp_path / "student.pt")
    copied = {
        name for name in student.model if torch.equal(student.model[name], source.model.get(name, torch.empty(0)))
    }
    # the first LayerNorm is over the frontend's channels
    assert copied == {name for name in student.model if name.startswith(("feature_extractor.", "layer_norm."))}
    assert student.model["encoder.layers.2.fc1.weight"].shape == (40, 24)
    assert student.head["weight"].shape == (8, 24) and not student.head["bias"].any()
    assert report.parts["frontend"][2:] == [0, 0] and report.parts["positions"][:2] == [0, 0]
    assert report.parts["layers"][:2] == [0, 0] and report.parts["CTC head"] == [0, 0, 2, 8 * 24 + 8]


def test_pre_training_heads_are_copied_where_they_fit(teachers, tmp_path):
    make_student(teachers["light"], tmp_path / "student.pt", StudentSpec(width=24, heads=2, layers="every:3"))
    source, student = (load_encoder(path).model for path in (teachers["light"], tmp_path / "student.pt"))
    for name in ("quantizer.vars", "quantizer.weight_proj.weight", "project_q.weight"):
        assert torch.equal(student[name], source[name])
    assert student["final_proj.weight"].shape == (12, 24)
    assert student["final_proj.bias"].shape == source["final_proj.bias"].shape
    assert not torch.equal(student["final_proj.bias"], source["final_proj.bias"]), "a bias without its weight"


def test_another_ffn_keeps_the_attention(teachers, tmp_path):
    report = make_student(teachers["light"], tmp_path / "student.pt", StudentSpec(layers="4", ffn=20))
    source, student = (load_encoder(path).model for path in (teachers["light"], tmp_path / "student.pt"))
    found, expected = layers_of(student, 0), layers_of(source, 4)
    assert torch.equal(found["self_attn.v_proj.bias"], expected["self_attn.v_proj.bias"])
    assert not torch.equal(found["fc2.bias"], expected["fc2.bias"])
    assert report.layers[0].copied == "final_layer_norm, self_attn, self_attn_layer_norm"
    assert "teacher depth 4, in part: final_layer_norm, self_attn" in format_report(report)


def test_other_heads_start_with_new_attention(teachers, tmp_path):
    make_student(teachers["light"], tmp_path / "student.pt", StudentSpec(layers="4", heads=2))
    source, student = (load_encoder(path).model for path in (teachers["light"], tmp_path / "student.pt"))
    found, expected = layers_of(student, 0), layers_of(source, 4)
    assert not torch.equal(found["self_attn.q_proj.weight"], expected["self_attn.q_proj.weight"])
    assert torch.equal(found["fc1.weight"], expected["fc1.weight"])


def test_a_shared_student_stores_the_first_chosen_layers(teachers, tmp_path):
    spec = StudentSpec(layers="1,4", layers_n=5, unique_layers=2)
    report = make_student(teachers["light"], tmp_path / "student.pt", spec)
    source, student = (load_encoder(path) for path in (teachers["light"], tmp_path / "student.pt"))
    assert (student.cfg.model.encoder_layers, student.cfg.model.unique_layers) == (5, 2)
    assert not layers_of(student.model, 2)
    for index, depth in enumerate((1, 4)):
        assert equal(layers_of(student.model, index), layers_of(source.model, depth))
    assert [layer.depths for layer in report.layers] == [(0, 1, 2), (3, 4)]
    assert "student layer 1 (at depths 3, 4) <- teacher depth 4" in format_report(report)


def test_an_own_layer_map(teachers, tmp_path):
    spec = StudentSpec(layers="every:2", unique_layers=2, overrides={"layer_map": "cycle"})
    report = make_student(teachers["light"], tmp_path / "student.pt", spec)
    assert [(layer.depths, layer.teacher_depth) for layer in report.layers] == [((0, 2), 0), ((1,), 2)]


def test_depths_of_a_shared_teacher_become_own_layers(teachers, tmp_path):
    """2 stored layers serve 6 depths: 0-2 and 3-5."""
    make_student(teachers["shared"], tmp_path / "student.pt", StudentSpec(layers="2,3,5"))
    source, student = (load_encoder(path).model for path in (teachers["shared"], tmp_path / "student.pt"))
    for index, stored in enumerate((0, 1, 1)):
        assert equal(layers_of(student, index), layers_of(source, stored))
    assert torch.equal(student["encoder.upsample.0.weight"], source["encoder.upsample.0.weight"])


def test_overrides_set_keys_of_the_encoder(teachers, tmp_path):
    overrides = {"squeeze_factors": "[1,2]", "dropout": "0.3"}
    report = make_student(teachers["light_ctc"], tmp_path / "s.pt", StudentSpec(layers="0", overrides=overrides))
    student = load_encoder(tmp_path / "s.pt")
    assert student.cfg.model.squeeze_factors == [1, 2] and student.cfg.model.dropout == 0.3
    assert report.parts["unsqueeze"][2] == 2, "the unsqueeze layer is new"
    assert read(tmp_path / "s.pt")["cfg"]["model"]["squeeze_factors"] is None, "the encoder's factors are in force"


def test_half_precision_weights_become_fp32(make, teachers, tmp_path):
    state = read(teachers["light"])
    state["model"] = {
        name: value.half() if value.is_floating_point() else value for name, value in state["model"].items()
    }
    torch.save(state, tmp_path / "half.pt")
    make_student(tmp_path / "half.pt", tmp_path / "student.pt", StudentSpec(layers="first:2"))
    student = load_encoder(tmp_path / "student.pt").model
    assert {value.dtype for value in student.values() if value.is_floating_point()} == {torch.float32}
    assert torch.equal(student["encoder.layers.1.fc1.weight"], state["model"]["encoder.layers.1.fc1.weight"].float())


# who can use it


def test_the_checkpoint_is_one_before_any_update(teacher, tmp_path):
    make_student(teacher, tmp_path / "student.pt", StudentSpec(layers="first:2"))
    state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "student.pt"))
    assert [history["num_updates"] for history in state["optimizer_history"]] == [0]
    assert state["last_optimizer_state"] is None and "val_loss" not in state["extra_state"]
    assert state["extra_state"]["train_iterator"] == {"epoch": 1, "iterations_in_epoch": 0}


def test_fairseq_builds_it_from_the_file_alone(teacher, tmp_path):
    make_student(teacher, tmp_path / "student.pt", StudentSpec(layers="first:2"))
    (model,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "student.pt")])
    assert cfg.model._name in ("w2v2_light", "light_ctc")
    assert cfg.task._name in tasks.TASK_REGISTRY
    with torch.no_grad():
        model.eval()(source=torch.randn(1, 900), padding_mask=None)


@pytest.mark.parametrize("name", ("light_ctc", "wav2vec_ctc"))
def test_fine_tuning_starts_from_it(teacher, name, make, tmp_path):
    make_student(teacher, tmp_path / "student.pt", StudentSpec(layers="1,3"))
    student = load_encoder(tmp_path / "student.pt")
    model = make.ctc_model(tmp_path / "student.pt", name)
    weights = model.w2v_encoder.w2v_model.state_dict()
    assert equal(layers_of(weights, 1), layers_of(student.model, 1)) and not layers_of(weights, 2)
    if student.head is not None:
        copied = torch.equal(model.w2v_encoder.proj.weight, student.head["weight"])
        assert copied == (name == "light_ctc"), "stock starts its head anew"


def test_a_student_of_a_student(teachers, tmp_path):
    """Shrinking Bigfoot's chain."""
    make_student(teachers["wav2vec_ctc"], tmp_path / "three.pt", StudentSpec(layers="every:2"))
    make_student(tmp_path / "three.pt", tmp_path / "two.pt", StudentSpec(layers="0,2"))
    source, student = (load_encoder(path) for path in (teachers["wav2vec_ctc"], tmp_path / "two.pt"))
    assert equal(layers_of(student.model, 1), layers_of(source.model, 4)) and equal(student.head, source.head)


def test_cost_counts_it(teachers, tmp_path):
    report = make_student(teachers["light_ctc"], tmp_path / "student.pt", StudentSpec(layers="every:2"))
    counted = cost(load_subject(str(tmp_path / "student.pt"), []), 1.0)
    assert counted["kind"] == "ctc" and counted["layers"] == 3
    assert counted["parameters"] == sum(copied + new for _, copied, _, new in report.parts.values())


# dictionaries


def test_a_dictionary_for_a_checkpoint_that_holds_none(make, teachers, tmp_path):
    make.fine_tuned(tmp_path / "old.pt", teachers["light"], has_dictionary=False)
    report = make_student(tmp_path / "old.pt", tmp_path / "without.pt", StudentSpec(layers="0"))
    assert "holds no dictionary" in report.notes[0] and "note: " in format_report(report)
    (tmp_path / "dict.ltr.txt").write_text("A 1\nB 1\nC 1\n| 1\n")
    report = make_student(tmp_path / "old.pt", tmp_path / "s.pt", StudentSpec(layers="0"), tmp_path / "dict.ltr.txt")
    assert report.notes == [] and load_encoder(tmp_path / "s.pt").symbols == list(make.letters().symbols)


@pytest.mark.parametrize(
    "lines, message",
    [("A 1\nB 1\n", r"6 symbols .*expected 8"), ("B 1\nA 1\nC 1\n| 1\n", "not the dictionary that the teacher's")],
)
def test_a_dictionary_of_others(teachers, tmp_path, lines, message):
    (tmp_path / "dict.txt").write_text(lines)
    with pytest.raises(ValueError, match=f"--dictionary .*dict.txt: {message}"):
        make_student(teachers["light_ctc"], tmp_path / "s.pt", StudentSpec(layers="0"), tmp_path / "dict.txt")
    assert not (tmp_path / "s.pt").exists()


def test_a_dictionary_where_there_are_no_labels(teachers, tmp_path):
    with pytest.raises(ValueError, match="--dictionary .*pre-trained checkpoint, which has no labels"):
        make_student(teachers["light"], tmp_path / "s.pt", StudentSpec(layers="0"), "dict.txt")
    with pytest.raises(FileNotFoundError, match="--dictionary: .*none.txt: no such file"):
        make_student(teachers["light_ctc"], tmp_path / "s.pt", StudentSpec(layers="0"), str(tmp_path / "none.txt"))


# students that cannot be


@pytest.mark.parametrize(
    "spec, message",
    [
        (StudentSpec(layers="0,6"), "--layers '0,6': depth 6 is beyond the teacher's 6 layers"),
        (StudentSpec(), "a student needs --layers .* or --layers-n"),
        (StudentSpec(layers="every:2", layers_n=2), "--layers-n 2: fewer than the 3 layers that --layers 'every:2'"),
        (StudentSpec(layers_n=0), "a student needs --layers"),
        (StudentSpec(width=30, layers_n=2), "--width 30 is not divisible by 4 attention heads"),
        (StudentSpec(layers="0", heads=5), "--width 32 is not divisible by 5 attention heads"),
        (StudentSpec(layers="0", heads=0), "--heads 0: expected 1 or more"),
        (StudentSpec(layers="0", ffn=-1), "--ffn -1: expected 1 or more"),
        (StudentSpec(layers="0,1", unique_layers=3), "--unique-layers 3: expected 1 to 2"),
        (StudentSpec(layers="0,1", unique_layers=0), "--unique-layers 0: expected 1 to 2"),
        (StudentSpec(layers="0", overrides={"nonsense": "1"}), "'model.nonsense': the model has no such key"),
        (StudentSpec(layers="0", overrides={"encoder_layers": "2"}), "'model.encoder_layers': give --layers"),
        (StudentSpec(layers="0", overrides={"encoder_embed_dim": "2"}), "'model.encoder_embed_dim': give --width"),
        (StudentSpec(layers="0", overrides={"conv_pos": "wide"}), "override: model.conv_pos=wide"),
        (StudentSpec(layers="0", width=30, heads=2), "conv_pos_groups: 4 groups do not divide 30 channels"),
    ],
)
def test_students_that_cannot_be(teachers, tmp_path, spec, message):
    with pytest.raises(ValueError, match=message):
        make_student(teachers["light"], tmp_path / "student.pt", spec)
    assert list(tmp_path.iterdir()) == []


def test_the_output_is_not_the_teacher(teachers, tmp_path):
    path = tmp_path / "teacher.pt"
    shutil.copy(teachers["light"], path)
    (tmp_path / "link.pt").symlink_to(path)
    for out in (path, tmp_path / "link.pt"):
        with pytest.raises(ValueError, match="the student would overwrite its teacher"):
            make_student(path, out, StudentSpec(layers="0"))


def test_a_teacher_whose_training_diverged(teachers, tmp_path):
    state = read(teachers["light_ctc"])
    state["model"]["w2v_encoder.proj.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match="nan.pt: parameter 'w2v_encoder.proj.weight' has NaN"):
        make_student(tmp_path / "nan.pt", tmp_path / "student.pt", StudentSpec(layers="0"))
    assert not (tmp_path / "student.pt").exists()


@pytest.mark.parametrize("damage, found", [("remove", "found nothing"), ("reshape", r"found \(3,\)")])
def test_a_teacher_that_lacks_weights(teachers, tmp_path, damage, found):
    """They would quietly start anew."""
    state = read(teachers["light"])
    if damage == "remove":
        del state["model"]["encoder.layers.0.fc1.bias"]
    else:
        state["model"]["encoder.layers.0.fc1.bias"] = torch.ones(3)
    torch.save(state, tmp_path / "damaged.pt")
    with pytest.raises(ValueError, match=rf"damaged.pt': parameter 'encoder.layers.0.fc1.bias': {found}"):
        make_student(tmp_path / "damaged.pt", tmp_path / "student.pt", StudentSpec(layers="0"))


@pytest.mark.parametrize("kind", ("w2v2_light", "light_ctc"))
def test_a_teacher_with_gates(make, tmp_path, kind):
    """A layer's gates are no part of the layer: copied by number they would close others."""
    path = make.pretrained(tmp_path / "gated.pt", prune_units=["heads", "ffn"])
    if kind == "light_ctc":
        path = make.fine_tuned(tmp_path / "ctc.pt", path)
    message = r"the teacher has gates \(model.prune_units=\['heads', 'ffn'\]\).*first: w2v2-light prune CHECKPOINT OUT"
    with pytest.raises(ValueError, match=message):
        make_student(path, tmp_path / "student.pt", StudentSpec(layers="last:2"))
    assert not (tmp_path / "student.pt").exists()


def test_a_student_may_get_gates_of_its_own(teachers, tmp_path):
    spec = StudentSpec(layers="every:2", overrides={"prune_units": "[heads,ffn]"})
    make_student(teachers["light"], tmp_path / "student.pt", spec)
    gates = {name for name in load_encoder(tmp_path / "student.pt").model if name.startswith("gates.")}
    assert len(gates) == 6


def test_other_models_are_no_teachers(make, tmp_path):
    path = make.save(tmp_path / "lm.pt", {"_name": "transformer_lm"}, {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="model 'transformer_lm'"):
        make_student(path, tmp_path / "student.pt", StudentSpec(layers="0"))


def test_an_encoder_that_stock_does_not_know_stays_ours(teachers, tmp_path):
    make_student(teachers["stock"], tmp_path / "student.pt", StudentSpec(layers="every:3"))
    cfg = OmegaConf.create(read(tmp_path / "student.pt")["cfg"])
    assert cfg.model._name == "w2v2_light" and cfg.task == OmegaConf.create(read(teachers["stock"])["cfg"]["task"])
