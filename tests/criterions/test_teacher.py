"""Teacher: the same outputs as the model it was loaded from, and every teacher that does not fit."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq_w2v2_light.criterions.teacher import Teacher
from fairseq_w2v2_light.export.folder import export_folder
from fairseq_w2v2_light.nn.config import PRUNE_UNITS
from fairseq_w2v2_light.runtime.load import load_ctc

STOCHASTIC = dict(squeeze_factors=[1, 2, 3], query_pools=[1, 2], kv_pools=[1, 2])
SQUEEZED = dict(squeeze_factors=[2], unsqueeze_factor=2)
HOP = 20


@pytest.fixture(scope="module")
def files(checkpoints, tmp_path_factory):
    """Teachers as checkpoints, written once."""
    folder = tmp_path_factory.mktemp("teachers")
    return SimpleNamespace(
        stock=checkpoints.stock(folder / "stock.pt"),
        stock_base=checkpoints.stock(folder / "stock_base.pt", layout="base"),
        stock_ctc=checkpoints.stock_ctc(folder / "stock_ctc.pt"),
        light=checkpoints.light(folder / "light.pt", unique_layers=2, attention_map_every=2, **STOCHASTIC),
        light_ctc=checkpoints.light_ctc(folder / "light_ctc.pt", **STOCHASTIC),
        squeezed_ctc=checkpoints.light_ctc(folder / "squeezed_ctc.pt", **SQUEEZED),
        streaming_ctc=checkpoints.light_ctc(folder / "streaming_ctc.pt", chunk_frames=[4], left_context_frames=8),
        sew_ctc=checkpoints.light_ctc(
            folder / "sew_ctc.pt", encoder="stochastic_sew", squeeze_factors=[2], squeeze_tail="drop"
        ),
    )


def logits_of(checkpoint, source, padding_mask=None):
    with torch.no_grad():
        return checkpoint.model(source=source, padding_mask=padding_mask)["encoder_out"].transpose(0, 1)


def hidden_of(model, source, **keys):
    """The outputs (batch, time, channel) of every layer."""
    with torch.no_grad():
        results = model.extract_features(source, None, mask=False, **keys)["layer_results"]
    return [result[0].transpose(0, 1) for result in results]


def close(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


# its outputs


FRAMES = {"streaming_ctc": 900 // HOP}


@pytest.mark.parametrize("name", ("stock_ctc", "light_ctc", "squeezed_ctc", "sew_ctc", "streaming_ctc"))
def test_logits_are_those_of_the_model(files, checkpoints, name):
    checkpoint = getattr(files, name)
    teacher = Teacher.load(checkpoint.path, needs_logits=True)
    source, _ = checkpoints.audio(900)
    output = teacher(source)
    assert (
        output.logits.shape == (1, FRAMES.get(name, (900 - 30) // HOP + 1), 8) and output.logits.dtype == torch.float32
    )
    close(output.logits, logits_of(checkpoint, source))


@pytest.mark.parametrize("layout", ("base", "large"))
def test_gates_of_the_teacher_close_what_they_close_in_the_model(checkpoints, tmp_path, layout):
    def close_some(weights):
        generator = torch.Generator().manual_seed(0)
        for name, value in weights.items():
            if ".gates." in f".{name}":
                value.copy_(torch.randn(value.shape, generator=generator) * 3)

    keys = dict(layout=layout, prune_units=list(PRUNE_UNITS), feature_grad_mult=1.0, edit=close_some)
    checkpoint = checkpoints.light_ctc(tmp_path / "gated.pt", **keys)
    source, padding_mask = checkpoints.audio(900, 700)
    teacher = Teacher.load(checkpoint.path, needs_logits=True, layers=(1, 3))
    output = teacher(source, padding_mask)
    with torch.no_grad():
        expected, lengths = load_ctc(checkpoint.path)(source, torch.tensor([900, 700]))
    assert torch.equal(output.lengths, lengths)
    for row, length in enumerate(lengths):
        close(output.logits[row, :length], expected[row, :length], 1e-5)
    expected = hidden_of(checkpoint.encoder, source[:1])
    for needs_logits in (True, False):
        teacher = Teacher.load(checkpoint.path, needs_logits=needs_logits, layers=(1, 3))
        for depth, hidden in teacher(source[:1]).hidden.items():
            close(hidden, expected[depth], 1e-5)


@pytest.mark.parametrize("name", ("stock_ctc", "light_ctc", "squeezed_ctc", "sew_ctc", "streaming_ctc"))
def test_a_model_folder_teaches_what_its_checkpoint_does(files, checkpoints, tmp_path, name):
    path = getattr(files, name).path
    export_folder(path, tmp_path / "folder")
    teachers = [Teacher.load(source, needs_logits=True, layers=(1, 3)) for source in (path, tmp_path / "folder")]
    expected, found = (teacher(*checkpoints.audio(900, 700)) for teacher in teachers)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert teachers[0].symbols == teachers[1].symbols and teachers[0].fingerprint != teachers[1].fingerprint


def test_a_model_folder_in_int8_teaches_its_weights_as_floats(files, checkpoints, tmp_path):
    export_folder(files.light_ctc.path, tmp_path / "int8", dtype="int8")
    teacher = Teacher.load(tmp_path / "int8", needs_logits=True, dtype="bfloat16", operating_point="s2q1k2")
    expected = Teacher.load(files.light_ctc.path, needs_logits=True, operating_point="s2q1k2")
    found, expected = (teacher(checkpoints.audio(900)[0]).logits for teacher in (teacher, expected))
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_model_folder_that_does_not_fit(checkpoints, tmp_path):
    checkpoint = checkpoints.light_ctc(tmp_path / "a.pt", task={"normalize": True, "sample_rate": 8000})
    export_folder(checkpoint.path, tmp_path / "folder")
    source, padding_mask = checkpoints.audio(900, 700)
    outputs = [
        Teacher.load(path, needs_logits=True)(source, padding_mask) for path in (checkpoint.path, tmp_path / "folder")
    ]
    torch.testing.assert_close(*outputs, atol=0, rtol=0)
    with pytest.raises(ValueError, match="criterion.teacher: .*folder: was trained on audio of 8000 Hz"):
        Teacher.load(tmp_path / "folder", sample_rate=16000)
    with pytest.raises(ValueError, match="criterion.teacher: .*folder: its dictionary"):
        Teacher.load(tmp_path / "folder", needs_logits=True, symbols=["<s>", "<pad>", "</s>", "<unk>", "x"])


@pytest.mark.parametrize("name", ("stock", "stock_base", "light"))
def test_hidden_layers_are_those_of_the_model(files, checkpoints, name):
    checkpoint = getattr(files, name)
    teacher = Teacher.load(checkpoint.path, layers=(3, 1))
    source, _ = checkpoints.audio(900)
    output = teacher(source)
    expected = hidden_of(checkpoint.model, source)
    assert output.logits is None and set(output.hidden) == {1, 3}
    assert (output.hop, output.squeeze, output.dim) == (HOP, 1, 32) == (teacher.hop, teacher.squeeze, teacher.dim)
    for depth in (1, 3):
        close(output.hidden[depth], expected[depth])


@pytest.mark.parametrize("layers, logits", (((0,), False), ((1, 2), True), ((), True)))
def test_only_what_is_asked_for(files, checkpoints, layers, logits):
    output = Teacher.load(files.light_ctc.path, layers=layers, needs_logits=logits)(checkpoints.audio(900)[0])
    assert tuple(output.hidden) == layers and (output.logits is not None) == logits
    expected = hidden_of(files.light_ctc.encoder, checkpoints.audio(900)[0])
    for depth in layers:
        close(output.hidden[depth], expected[depth])


@pytest.mark.parametrize("name", ("stock_ctc", "light_ctc", "squeezed_ctc", "sew_ctc"))
@pytest.mark.parametrize("samples", ((900, 500, 333), (400, 900)))
def test_padding_changes_nothing_and_is_zero(files, checkpoints, name, samples):
    teacher = Teacher.load(getattr(files, name).path, layers=(0, 3), needs_logits=True)
    source, padding_mask = checkpoints.audio(*samples)
    together = teacher(source, padding_mask)
    for row, count in enumerate(samples):
        alone = teacher(source[row : row + 1, :count])
        frames, hidden_frames = alone.logits.size(1), alone.hidden[0].size(1)
        assert together.lengths[row] == alone.lengths[0] == frames
        assert together.hidden_lengths[row] == alone.hidden_lengths[0] == hidden_frames
        close(together.logits[row, :frames], alone.logits[0])
        assert not together.logits[row, frames:].any()
        for depth in (0, 3):
            close(together.hidden[depth][row, :hidden_frames], alone.hidden[depth][0])
            assert not together.hidden[depth][row, hidden_frames:].any()


def test_a_squeezed_teacher_has_hidden_layers_at_its_own_rate(files, checkpoints):
    teacher = Teacher.load(files.squeezed_ctc.path, layers=(2,), needs_logits=True)
    output = teacher(checkpoints.audio(900)[0])
    frames = (900 - 30) // HOP + 1
    assert teacher.squeeze == output.squeeze == 2
    assert output.logits.size(1) == frames == output.lengths[0]
    assert output.hidden[2].size(1) == -(-frames // 2) == output.hidden_lengths[0]


def test_the_operating_point_can_be_chosen(files, checkpoints):
    source, _ = checkpoints.audio(900)
    for point, squeeze in (("", 1), ("s3q2k1", 3)):
        teacher = Teacher.load(files.light.path, layers=(1,), operating_point=point)
        expected = hidden_of(files.light.model, source, operating_point=point or "s1q1k1")[1]
        assert teacher.squeeze == squeeze
        close(teacher(source).hidden[1], expected)


def test_a_checkpoint_with_a_fixed_point_runs_there(checkpoints, tmp_path):
    path = checkpoints.light(tmp_path / "fixed.pt", operating_point="s2q1k2", **STOCHASTIC).path
    assert str(Teacher.load(path).point) == "s2q1k2"
    assert str(Teacher.load(path, operating_point="s1q1k1").point) == "s1q1k1"


def test_layers_can_be_chosen_after_loading(files, checkpoints):
    teacher = Teacher.load(files.stock.path)
    assert teacher.depth == 4
    teacher.layers = [2, 0, 2]
    assert teacher.layers == (0, 2)
    assert set(teacher(checkpoints.audio(900)[0]).hidden) == {0, 2}


# frozen, and outside of everything


def test_it_is_frozen_and_no_module(files, checkpoints):
    holder = nn.Module()
    holder.teacher = Teacher.load(files.light_ctc.path, layers=(0,), needs_logits=True)
    assert list(holder.parameters()) == [] and holder.state_dict() == {}
    holder.train()
    source = checkpoints.audio(900)[0].requires_grad_()
    first, second = holder.teacher(source), holder.teacher(source)
    assert not first.logits.requires_grad and not first.hidden[0].requires_grad
    assert torch.equal(first.logits, second.logits), "dropout or masking is on"


def test_dropout_of_the_checkpoint_is_off(checkpoints, tmp_path):
    keys = dict(dropout=0.5, attention_dropout=0.5, activation_dropout=0.5, encoder_layerdrop=0.9, dropout_input=0.5)
    teacher = Teacher.load(checkpoints.light(tmp_path / "drop.pt", **keys).path, layers=(3,))
    source, _ = checkpoints.audio(900)
    assert torch.equal(teacher(source).hidden[3], teacher(source).hidden[3])


def test_bfloat16_is_close_and_returns_float32(files, checkpoints):
    source, padding_mask = checkpoints.audio(900, 600)
    exact = Teacher.load(files.stock_ctc.path, layers=(0,), needs_logits=True)(source, padding_mask)
    half = Teacher.load(files.stock_ctc.path, layers=(0,), needs_logits=True, dtype="bfloat16")(source, padding_mask)
    assert half.logits.dtype == half.hidden[0].dtype == torch.float32
    assert 0 < (half.logits - exact.logits).abs().max() < 0.1 * exact.logits.abs().max()


def test_half_precision_audio_and_autocast(files, checkpoints):
    """common.fp16 turns the audio of every batch to half precision; common.amp runs everything under autocast."""
    teacher = Teacher.load(files.stock_ctc.path, needs_logits=True)
    source, _ = checkpoints.audio(900)
    expected = teacher(source.half().float()).logits
    assert torch.equal(teacher(source.half()).logits, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher(source.half()).logits, expected)


def test_the_fingerprint_is_of_the_file_and_of_how_it_runs(files, checkpoints, tmp_path):
    first = Teacher.load(files.light.path)
    with open(files.light.path, "rb") as file:
        assert first.content == hashlib.sha256(file.read()).hexdigest()
    others = [
        Teacher.load(files.light.path, dtype="bfloat16"),
        Teacher.load(files.light.path, operating_point="s2q1k1"),
        Teacher.load(files.stock.path),
    ]
    assert len({teacher.fingerprint for teacher in [first, *others]}) == 4
    assert Teacher.load(files.light.path, operating_point="s1q1k1").fingerprint == first.fingerprint


# normalisation


def test_a_teacher_of_normalised_audio_normalises_each_utterance(checkpoints, tmp_path):
    checkpoint = checkpoints.stock(tmp_path / "normalised.pt", task={"normalize": True})
    source, padding_mask = checkpoints.audio(900, 500)
    source = 3 * source + 0.5 * (~padding_mask)
    found = Teacher.load(checkpoint.path, layers=(3,), normalize=False)(source, padding_mask)
    teacher = Teacher.load(checkpoint.path, layers=(3,), normalize=True)
    for row, count in enumerate((900, 500)):
        audio = source[row, :count]
        expected = teacher(F.layer_norm(audio, audio.shape)[None]).hidden[3][0]
        close(found.hidden[3][row, : len(expected)], expected)
        assert (teacher(audio[None]).hidden[3][0] - expected).abs().max() > 1e-3


def test_audio_that_the_student_s_task_has_normalised_is_lost_to_the_teacher(files):
    with pytest.raises(ValueError, match="criterion.teacher: .*light.pt.*set task.normalize=false"):
        Teacher.load(files.light.path, normalize=True)


def test_another_sample_rate(checkpoints, tmp_path):
    path = checkpoints.stock(tmp_path / "8k.pt", task={"sample_rate": 8000}).path
    assert Teacher.load(path, sample_rate=8000)
    with pytest.raises(ValueError, match="8k.pt: .*8000 Hz, but task.sample_rate is 16000"):
        Teacher.load(path, sample_rate=16000)


# teachers that do not fit


def test_logits_of_a_pretrained_teacher(files):
    with pytest.raises(ValueError, match="criterion.teacher: .*stock.pt .*without labels.* fine-tune"):
        Teacher.load(files.stock.path, needs_logits=True)


@pytest.mark.parametrize(
    "letters, words",
    (
        ("ABD|", ("symbol number 6", "'C' in the teacher's", "'D' in the student's")),
        ("ABC|D", ("8 symbols", "9 symbols", "symbol number 8", "nothing in the teacher's", "'D'")),
        ("ABC", ("symbol number 7", "'|' in the teacher's", "nothing in the student's")),
    ),
)
def test_another_dictionary(files, checkpoints, letters, words):
    with pytest.raises(ValueError, match="criterion.teacher: .*stock_ctc.pt: its dictionary") as error:
        Teacher.load(files.stock_ctc.path, needs_logits=True, symbols=checkpoints.letters(letters).symbols)
    for word in words:
        assert word in str(error.value)


def test_the_dictionary_matters_for_logits_only(files, checkpoints):
    assert Teacher.load(files.stock_ctc.path, needs_logits=True, symbols=checkpoints.letters().symbols)
    assert Teacher.load(files.stock_ctc.path, layers=(0,), symbols=checkpoints.letters("XY").symbols)


def test_a_checkpoint_without_dictionary_is_judged_by_the_number_of_labels(files, checkpoints, tmp_path):
    state = torch.load(files.stock_ctc.path, weights_only=False)
    state["task_state"] = {}
    torch.save(state, tmp_path / "old.pt")
    assert Teacher.load(tmp_path / "old.pt", needs_logits=True, symbols=checkpoints.letters("XYZ|").symbols)
    with pytest.raises(ValueError, match="old.pt: has 8 labels .*the student's dictionary 7"):
        Teacher.load(tmp_path / "old.pt", needs_logits=True, symbols=checkpoints.letters("XYZ").symbols)


@pytest.mark.parametrize("layers", ((4,), (0, 23), (-1,)))
def test_a_layer_beyond_the_teacher_s(files, layers):
    with pytest.raises(ValueError, match=f"stock.pt has 4 layers.*found layer {layers[-1]}, expected 0 to 3"):
        Teacher.load(files.stock.path, layers=layers)


def test_weights_with_nan(checkpoints, tmp_path):
    def diverge(weights):
        weights["encoder.layers.1.fc1.weight"][0, 0] = float("nan")

    path = checkpoints.stock(tmp_path / "nan.pt", edit=diverge).path
    with pytest.raises(ValueError, match="criterion.teacher: .*nan.pt: parameter 'encoder.layers.1.fc1.weight'"):
        Teacher.load(path)


def test_a_head_with_nan(checkpoints, tmp_path):
    def diverge(weights):
        weights["w2v_encoder.proj.bias"][0] = float("inf")

    path = checkpoints.stock_ctc(tmp_path / "nan.pt", edit=diverge).path
    with pytest.raises(ValueError, match="nan.pt: parameter 'bias' has NaN"):
        Teacher.load(path, needs_logits=True)


def test_outputs_with_nan(files, checkpoints):
    source, _ = checkpoints.audio(900)
    source[0, 100] = float("nan")
    with pytest.raises(ValueError, match="stock.pt: gives NaN or infinite outputs.*prepare check"):
        Teacher.load(files.stock.path, layers=(0,))(source)


def test_an_operating_point_that_the_teacher_does_not_have(files):
    with pytest.raises(ValueError, match="light.pt: operating point 's4q1k1': the model was not trained with squeeze"):
        Teacher.load(files.light.path, operating_point="s4q1k1")
    with pytest.raises(ValueError, match="stock.pt: operating point 'fast': expected sSqQkK"):
        Teacher.load(files.stock.path, operating_point="fast")


def test_a_teacher_with_layers_that_are_not_ours(checkpoints, tmp_path):
    state = torch.load(checkpoints.stock(tmp_path / "stock.pt").path, weights_only=False)
    state["cfg"]["model"]["layer_type"] = "conformer"
    torch.save(state, tmp_path / "conformer.pt")
    with pytest.raises(ValueError, match="conformer.pt: .*model.layer_type: found conformer, expected transformer"):
        Teacher.load(tmp_path / "conformer.pt")


def test_an_unknown_dtype(files):
    with pytest.raises(ValueError, match="criterion.teacher_dtype: found 'int8', expected one of float32, float16"):
        Teacher.load(files.stock.path, dtype="int8")


def test_float16_needs_a_gpu(files, checkpoints):
    teacher = Teacher.load(files.stock.path, layers=(0,), dtype="float16")
    with pytest.raises(ValueError, match="criterion.teacher_dtype: found float16 on a CPU"):
        teacher(checkpoints.audio(900)[0])


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="criterion.teacher: .* is a folder; expected a fairseq checkpoint file"):
        Teacher.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="criterion.teacher: .*config.json: format: found None"):
        Teacher.load(tmp_path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="criterion.teacher: .*none.pt: no such checkpoint"):
        Teacher.load(tmp_path / "none.pt")


def test_a_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "file.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="criterion.teacher: .*file.pt: not a checkpoint"):
        Teacher.load(tmp_path / "file.pt")
