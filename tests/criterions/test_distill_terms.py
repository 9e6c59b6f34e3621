"""Each term against a computation by hand, frame by frame; padding; which way gradients flow."""

import math

import pytest
import torch

from fairseq_w2v2_light.criterions.distill_terms import (
    Frames,
    align,
    cosine_distance,
    kl_divergence,
    lengths_of,
    mean_squared_error,
    parse_hidden_map,
)

LENGTHS = (6, 3, 1)
TERMS = {
    "mse": mean_squared_error,
    "kl": kl_divergence,
    "cosine": cosine_distance,
}


def batch(seed=0, channels=5, dtype=torch.float32):
    """(student, teacher, valid): three utterances of 6, 3 and 1 frames in rows of 6."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(3, 6, channels, generator=generator).to(dtype) for _ in range(2))
    valid = torch.arange(6) < torch.tensor(LENGTHS).unsqueeze(1)
    return student, teacher, valid


def frame_by_frame(function, student, teacher):
    values = [
        function(student[row, frame].double(), teacher[row, frame].double())
        for row, length in enumerate(LENGTHS)
        for frame in range(length)
    ]
    return sum(values) / len(values)


def test_mse_is_the_mean_over_valid_frames_and_channels():
    student, teacher, valid = batch()
    expected = frame_by_frame(
        lambda s, t: sum((float(a) - float(b)) ** 2 for a, b in zip(s, t)) / len(s), student, teacher
    )
    assert mean_squared_error(student, teacher, valid).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_that_of_two_distributions_times_the_squared_temperature(temperature):
    student, teacher, valid = batch()

    def divergence(s, t):
        p = [math.exp(value / temperature) for value in t.tolist()]
        q = [math.exp(value / temperature) for value in s.tolist()]
        p, q = [a / sum(p) for a in p], [b / sum(q) for b in q]
        return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q))

    expected = frame_by_frame(divergence, student, teacher)
    assert kl_divergence(student, teacher, valid, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_cosine_is_one_minus_the_cosine_of_the_angle():
    student, teacher, valid = batch()

    def distance(s, t):
        dot = sum(a * b for a, b in zip(s.tolist(), t.tolist()))
        return 1 - dot / math.sqrt(sum(a * a for a in s.tolist()) * sum(b * b for b in t.tolist()))

    expected = frame_by_frame(distance, student, teacher)
    assert cosine_distance(student, teacher, valid).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_zero_for_equal_tensors_and_positive_otherwise(name):
    student, teacher, valid = batch()
    assert TERMS[name](student, student.clone(), valid).item() == pytest.approx(0, abs=1e-6)
    assert TERMS[name](student, teacher, valid).item() > 0.1


@pytest.mark.parametrize("garbage", [1e6, math.inf, math.nan])
@pytest.mark.parametrize("name", TERMS)
def test_padding_never_enters(name, garbage):
    student, teacher, valid = batch()
    expected = TERMS[name](student, teacher, valid)
    student, teacher = student.clone(), teacher.clone()
    student[~valid] = teacher[~valid] = garbage
    assert torch.equal(TERMS[name](student, teacher, valid), expected)


@pytest.mark.parametrize("name", TERMS)
def test_gradients_flow_into_the_valid_frames_of_the_student(name):
    student, teacher, valid = batch()
    student.requires_grad_()
    TERMS[name](student, teacher, valid).backward()
    assert student.grad[valid].abs().sum(-1).min() > 0
    assert student.grad[~valid].abs().max() == 0


@pytest.mark.parametrize("name", TERMS)
def test_half_precision_is_computed_in_fp32(name):
    student, teacher, valid = batch(dtype=torch.bfloat16)
    value = TERMS[name](student, teacher, valid)
    assert value.dtype == torch.float32
    assert torch.equal(value, TERMS[name](student.float(), teacher.float(), valid))


def frames(x, lengths, hop):
    return Frames(x, torch.tensor(lengths), hop)


def ramp(*lengths, rate=1.0):
    """Sequences whose value at each frame is its time in units of 1 / rate, 99 in the padding."""
    x = torch.full((len(lengths), max(lengths), 1), 99.0)
    for row, length in enumerate(lengths):
        x[row, :length, 0] = (torch.arange(length) + 0.5) / rate
    return x


def test_equal_rates_are_cut_to_the_shorter_sequence():
    teacher, student, valid = align(frames(ramp(6, 4), [6, 4], 320), frames(ramp(5, 4), [5, 4], 320))
    assert teacher.shape == student.shape == (2, 5, 1)
    assert torch.equal(teacher[valid], student[valid])
    assert valid.sum(1).tolist() == [5, 4]


def test_a_squeezed_student_sees_means_of_valid_teacher_frames():
    teacher, _, valid = align(frames(ramp(5, 4), [5, 4], 320), frames(torch.zeros(2, 3, 1), [3, 2], 640))
    assert teacher[0, :, 0].tolist() == [1.0, 3.0, 4.5]
    assert teacher[1, :2, 0].tolist() == [1.0, 3.0]
    assert valid.sum(1).tolist() == [3, 2]


def test_a_squeezed_teacher_is_repeated():
    teacher, _, valid = align(frames(ramp(3), [3], 640), frames(torch.zeros(1, 5, 1), [5], 320))
    assert teacher[0, :, 0].tolist() == [0.5, 0.5, 1.5, 1.5, 2.5]
    assert valid.all()


def test_other_rates_are_interpolated_at_the_centres_of_the_students_frames():
    teacher = frames(ramp(30, 20), [30, 20], 320)
    student = frames(torch.zeros(2, 20, 1), [20, 13], 480)
    x, _, valid = align(teacher, student)
    centres = (torch.arange(20) + 0.5) * 1.5
    assert torch.allclose(x[0, :, 0], centres, atol=1e-5)
    assert torch.allclose(x[1, :13, 0], centres[:13], atol=1e-5)
    assert valid.sum(1).tolist() == [20, 13]


@pytest.mark.parametrize("hops", [(320, 640), (640, 320), (320, 480), (320, 320)])
def test_alignment_does_not_look_at_padding(hops):
    def value(garbage):
        teacher, student = torch.full((1, 12, 2), garbage), torch.full((1, 12, 2), garbage)
        teacher[:, :5] = torch.arange(10.0).view(5, 2)
        student[:, :4] = 1.0
        x, y, valid = align(frames(teacher, [5], hops[0]), frames(student, [4], hops[1]))
        return mean_squared_error(y, x, valid)

    assert torch.equal(value(0.0), value(1e9))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("every:2", [(0, 1), (1, 3), (2, 5)]),
        ("every:1", [(0, 0), (1, 1), (2, 2)]),
        ("last", [(2, 5)]),
        ("0:0, 2:4", [(0, 0), (2, 4)]),
    ],
)
def test_hidden_maps(text, expected):
    assert parse_hidden_map(text, 3, 6) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("every:3", "layer 8 of the teacher, which has 6 layers"),
        ("0:6", "layer 6 of the teacher, which has 6 layers"),
        ("3:1", "layer 3 of the student, which has 3 layers"),
        ("0:1,0:2", "lists a student layer twice"),
        ("every:0", "expected 'every:2', 'last', or student:teacher pairs"),
        ("first", "expected 'every:2', 'last', or student:teacher pairs"),
        ("", "expected 'every:2', 'last', or student:teacher pairs"),
    ],
)
def test_a_bad_hidden_map_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match="criterion.hidden_map: .*") as error:
        parse_hidden_map(text, 3, 6)
    assert message in str(error.value)


def test_lengths_from_a_padding_mask():
    mask = torch.tensor([[False, False, True], [False, False, False]])
    assert lengths_of(mask, torch.zeros(2, 3, 1)).tolist() == [2, 3]
    assert lengths_of(None, torch.zeros(2, 3, 1)).tolist() == [3, 3]
