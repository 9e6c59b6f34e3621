"""Streaming students of offline teachers, and students that hear audio as it is of teachers that normalise it."""

import pytest
import torch
import torch.nn.functional as F
from fairseq import checkpoint_utils
from tiny_checkpoints import LAYOUTS, ctc_model

from fairseq_w2v2_light.compress.student import StudentSpec, format_report, make_student
from fairseq_w2v2_light.models.checkpoint import load_encoder
from fairseq_w2v2_light.nn import OperatingPoint
from fairseq_w2v2_light.nn.positions import causal_weights

STREAM = {"chunk_frames": "[4]", "left_context_frames": "8"}
G, V = (f"encoder.pos_conv.0.weight_{part}" for part in "gv")
FIRST = "feature_extractor.conv_layers.0.0.weight"
KINDS = ("light", "light_ctc")


@pytest.fixture(scope="module")
def layer_norm_teachers(make, tmp_path_factory):
    """Offline teachers that could stream, pre-trained and fine-tuned; "loud" ones heard normalised audio."""
    folder = tmp_path_factory.mktemp("layer_norm")
    paths = {"light": make.pretrained(folder / "light.pt", **LAYOUTS["large"])}
    paths["light_ctc"] = make.fine_tuned(folder / "light_ctc.pt", paths["light"])
    for kind in KINDS:
        state = torch.load(paths[kind], map_location="cpu")
        cfg = state["cfg"]
        cfg["task"]["normalize"] = True
        if kind == "light_ctc":
            cfg["model"]["normalize"] = cfg["model"]["w2v_args"]["task"]["normalize"] = True
        paths[f"loud {kind}"] = str(folder / f"loud_{kind}.pt")
        torch.save(state, paths[f"loud {kind}"])
    return paths


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def load(path):
    (model,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    return model.eval(), cfg


def output(model, wave):
    """Logits, or the frames of a pre-trained model, (time, batch, channel)."""
    with torch.no_grad():
        if hasattr(model, "w2v_encoder"):
            return model(source=wave, padding_mask=None)["encoder_out"]
        return model.extract_features(wave)["x"].transpose(0, 1)


def noise(samples=1000, seed=0):
    """Audio with mean 0 and standard deviation 1."""
    wave = torch.randn(1, samples, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return ((wave - wave.mean()) / wave.std(unbiased=False)).float()


# positions


def test_positions_of_an_offline_teacher_become_causal(layer_norm_teachers, kind, tmp_path):
    path = layer_norm_teachers[kind]
    report = make_student(path, tmp_path / "student.pt", StudentSpec(layers="every:2", overrides=STREAM))
    source, student = load_encoder(path), load_encoder(tmp_path / "student.pt")
    expected = causal_weights(source.model[G], source.model[V])
    assert torch.equal(student.model[G], expected[0]) and torch.equal(student.model[V], expected[1])
    model = student.cfg.model
    assert (model.conv_pos, list(model.chunk_frames), model.left_context_frames) == (5, [4], 8)
    assert report.parts["positions"] == [3, 5 + 32 * 8 * 5 + 32, 0, 0]
    assert "note: streaming: the positions' 8 taps became 5 causal ones" in format_report(report)
    assert all(new == 0 for _, _, new, _ in report.parts.values())


def test_fine_tuning_that_turns_on_streaming_starts_from_the_same_weights(layer_norm_teachers, tmp_path):
    make_student(
        layer_norm_teachers["light_ctc"], tmp_path / "student.pt", StudentSpec(layers="every:1", overrides=STREAM)
    )
    keys = dict(chunk_frames=[4], left_context_frames=8)
    trained = ctc_model(layer_norm_teachers["light_ctc"], **keys).state_dict()
    student, _ = load(tmp_path / "student.pt")
    assert all(torch.equal(trained[name], value) for name, value in student.state_dict().items())


def test_the_student_streams_when_loaded(layer_norm_teachers, kind, tmp_path):
    make_student(layer_norm_teachers[kind], tmp_path / "student.pt", StudentSpec(layers="0,3", overrides=STREAM))
    model, cfg = load(tmp_path / "student.pt")
    encoder = model.w2v_encoder.w2v_model if kind == "light_ctc" else model
    assert encoder.current_operating_point() == OperatingPoint(chunk=4)
    wave = noise()
    changed = wave.clone()
    changed[:, 80 * 5 :] = 0
    first, second = output(model, wave), output(model, changed)
    assert torch.equal(first[: 4 * 5], second[: 4 * 5]) and not torch.equal(first[4 * 5 :], second[4 * 5 :])


def test_a_student_of_a_streaming_student_keeps_its_positions(layer_norm_teachers, kind, tmp_path):
    make_student(layer_norm_teachers[kind], tmp_path / "six.pt", StudentSpec(layers="every:1", overrides=STREAM))
    report = make_student(
        tmp_path / "six.pt", tmp_path / "two.pt", StudentSpec(layers="0,3", overrides={"chunk_frames": "[8]"})
    )
    six, two = load_encoder(tmp_path / "six.pt"), load_encoder(tmp_path / "two.pt")
    assert torch.equal(six.model[V], two.model[V]) and two.cfg.model.conv_pos == 5
    assert list(two.cfg.model.chunk_frames) == [8] and report.notes == []


def test_light_ctc_keys_of_the_teacher_do_not_hide_those_of_the_student(layer_norm_teachers, tmp_path):
    """A fine-tuned model's own chunk_frames is of its training; the encoder's counts."""
    make_student(layer_norm_teachers["light_ctc"], tmp_path / "s.pt", StudentSpec(layers="0", overrides=STREAM))
    model = torch.load(str(tmp_path / "s.pt"), map_location="cpu")["cfg"]["model"]
    assert model["chunk_frames"] is None and model["w2v_args"]["model"]["chunk_frames"] == [4]


def test_other_taps_start_anew(layer_norm_teachers, tmp_path):
    """Even as many as the teacher's: those heard the future."""
    for taps in (8, 12):
        overrides = {**STREAM, "conv_pos": str(taps)}
        report = make_student(
            layer_norm_teachers["light"], tmp_path / "s.pt", StudentSpec(layers="0", overrides=overrides)
        )
        assert report.parts["positions"][:3] == [0, 0, 3]
        assert report.notes == [f"streaming: the positions start anew, with {taps} causal taps"]
        assert load_encoder(tmp_path / "s.pt").model[V].shape[-1] == taps


def test_another_width_has_new_causal_positions(layer_norm_teachers, tmp_path):
    spec = StudentSpec(width=16, heads=2, layers_n=2, overrides=STREAM)
    report = make_student(layer_norm_teachers["light_ctc"], tmp_path / "student.pt", spec)
    assert load_encoder(tmp_path / "student.pt").cfg.model.conv_pos == 5
    assert report.parts["positions"][0] == 0 and report.parts["frontend"][2] == 0 and report.notes == []


# the level of the audio


def test_at_the_stated_level_the_student_is_its_teacher(layer_norm_teachers, kind, tmp_path):
    path = layer_norm_teachers[f"loud {kind}"]
    report = make_student(path, tmp_path / "student.pt", StudentSpec(layers="every:1", input_level=0.05))
    teacher, student = load(path)[0], load(tmp_path / "student.pt")[0]
    wave = 0.05 * noise()
    normalised = F.layer_norm(wave, wave.shape)
    torch.testing.assert_close(output(student, wave), output(teacher, normalised), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output(student, 2 * wave), output(teacher, normalised), atol=1e-3)
    assert "note: audio: the student hears it as it is (task.normalize=false)" in format_report(report)


def test_the_saved_configuration_says_false_everywhere(layer_norm_teachers, kind, tmp_path):
    spec = StudentSpec(layers="every:1", overrides=STREAM, input_level=0.05)
    make_student(layer_norm_teachers[f"loud {kind}"], tmp_path / "student.pt", spec)
    cfg = torch.load(str(tmp_path / "student.pt"), map_location="cpu")["cfg"]
    assert cfg["task"]["normalize"] is False
    if kind == "light_ctc":
        assert cfg["model"]["normalize"] is False and cfg["model"]["w2v_args"]["task"]["normalize"] is False
    load(tmp_path / "student.pt")
    assert ctc_model(tmp_path / "student.pt").cfg.normalize is False


def test_a_new_first_convolution_is_for_that_level_too(layer_norm_teachers, tmp_path):
    """Another frontend starts anew; it must not hear audio twenty times as quiet as another new one."""
    shape = "[(12, 10, 5), (12, 3, 2), (12, 2, 2)]"
    spec = dict(layers="0", overrides={"conv_feature_layers": shape})
    make_student(layer_norm_teachers["loud light"], tmp_path / "a.pt", StudentSpec(**spec))
    make_student(layer_norm_teachers["loud light"], tmp_path / "b.pt", StudentSpec(**spec, input_level=0.1))
    a, b = (load_encoder(tmp_path / f"{name}.pt").model[FIRST] for name in "ab")
    torch.testing.assert_close(a, b * (0.1**2 + 1e-5) ** 0.5)


def test_the_teacher_is_left_as_it_is(layer_norm_teachers, tmp_path):
    before = torch.load(layer_norm_teachers["loud light_ctc"], map_location="cpu")
    spec = StudentSpec(layers="0", overrides=STREAM, input_level=0.1)
    make_student(layer_norm_teachers["loud light_ctc"], tmp_path / "s.pt", spec)
    after = torch.load(layer_norm_teachers["loud light_ctc"], map_location="cpu")
    assert after["cfg"] == before["cfg"]
    assert all(torch.equal(after["model"][name], value) for name, value in before["model"].items())


# students that cannot be


@pytest.mark.parametrize(
    "teacher, spec, message",
    [
        (
            "loud light",
            dict(overrides=STREAM),
            r"--input-level: a streaming student cannot normalise .*0\.05 for Libri",
        ),
        ("loud light_ctc", dict(overrides=STREAM), "--input-level: a streaming student cannot normalise"),
        ("light", dict(input_level=0.05), r"--input-level 0.05: the teacher was trained with task.normalize=false"),
        ("loud light", dict(input_level=0.0), "--input-level 0: expected a standard deviation of audio above 0"),
        ("loud light", dict(input_level=-0.1), "--input-level -0.1: expected"),
        ("loud light", dict(input_level=float("nan")), "--input-level nan: expected"),
        (
            "loud light",
            dict(input_level=30.0),
            "--input-level 30: expected a standard deviation of audio above 0 and up",
        ),
        ("light", dict(overrides={**STREAM, "squeeze_factors": "[3]"}), "chunk_frames: 4 frames are no multiple of 3"),
    ],
)
def test_students_that_cannot_be(layer_norm_teachers, tmp_path, teacher, spec, message):
    with pytest.raises(ValueError, match=message):
        make_student(layer_norm_teachers[teacher], tmp_path / "student.pt", StudentSpec(layers="every:2", **spec))
    assert list(tmp_path.iterdir()) == []


def test_a_group_norm_teacher_cannot_stream(teachers, tmp_path):
    with pytest.raises(ValueError, match="extractor_mode: found 'default', a GroupNorm .* use a model trained with"):
        make_student(teachers["light_ctc"], tmp_path / "student.pt", StudentSpec(layers="0", overrides=STREAM))


def test_there_is_no_way_back_to_the_whole_utterance(layer_norm_teachers, tmp_path):
    make_student(layer_norm_teachers["light"], tmp_path / "s.pt", StudentSpec(layers="every:1", overrides=STREAM))
    offline = StudentSpec(layers="0", overrides={"chunk_frames": "[]"})
    with pytest.raises(ValueError, match="'model.chunk_frames': found no chunk, but the teacher is a streaming model"):
        make_student(tmp_path / "s.pt", tmp_path / "offline.pt", offline)
    both = StudentSpec(layers="0", overrides={"chunk_frames": "[0,4]"})
    make_student(tmp_path / "s.pt", tmp_path / "both.pt", both)
    assert load_encoder(tmp_path / "both.pt").cfg.model.conv_pos == 5
