"""LF-MMI against the enumeration of every path, and against a recursion over explicit states."""

import functools
import itertools

import pytest
import torch

from fairseq_w2v2_light.criterions.denominator import MIN_LOG_PROBABILITY, DenominatorGraph
from fairseq_w2v2_light.criterions.lfmmi import distillation_lfmmi, lfmmi_loss, log_partition, posteriors

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
SIZES = [(1, 1), (1, 4), (2, 5), (3, 4), (4, 6), (5, 5)]  # labels, frames
ORDERS = (2, 3)


@functools.lru_cache(maxsize=None)
def random_graph(labels, order, sharpness=1.0):
    """Random probabilities; each history's sum to 1."""
    generator = torch.Generator().manual_seed(10 * labels + order)
    histories = 1 if order == 2 else labels + 1

    def draw(*shape):
        scores = sharpness * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return scores.log_softmax(-1).clamp_min(MIN_LOG_PROBABILITY)

    start, arcs = draw(labels + 1), draw(histories, labels, labels + 1)
    symbols = SPECIALS + [f"l{index}" for index in range(labels)]
    return DenominatorGraph(symbols, range(4, 4 + labels), start[:-1], arcs[..., :-1], arcs[..., -1], start[-1])


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


# references


def transcript_of(path):
    """Merges repeats and drops blanks (0)."""
    return tuple(k for i, k in enumerate(path) if k and (i == 0 or path[i - 1] != k))


def language_model(graph, transcript):
    """log p of labels 1 to L, arc by arc."""
    if not transcript:
        return graph.log_empty.item()
    before, value = 0, graph.log_start[transcript[0] - 1].item()
    for last, following in zip(transcript, transcript[1:]):
        value += graph.log_transitions[before, last - 1, following - 1].item()
        before = last if graph.order == 3 else 0
    return value + graph.log_final[before, transcript[-1] - 1].item()


@functools.lru_cache(maxsize=None)
def all_paths(graph, frames):
    """Every sequence of symbols (paths, frames), its transcript, and its n-gram log-probability."""
    paths = list(itertools.product(range(len(graph.labels) + 1), repeat=frames))
    transcripts = [transcript_of(path) for path in paths]
    known = {transcript: language_model(graph, transcript) for transcript in set(transcripts)}
    weights = torch.tensor([known[transcript] for transcript in transcripts], dtype=torch.float64)
    return torch.tensor(paths), transcripts, weights


def path_scores(logits, graph):
    """Scores of every path through one utterance (time, symbols), and their transcripts."""
    paths, transcripts, weights = all_paths(graph, logits.size(0))
    columns = torch.tensor([graph.blank] + graph.labels)
    scores = logits[:, columns].gather(1, paths.t()).sum(0)
    return scores + weights, transcripts


def enumerated_log_z(logits, graph):
    return torch.stack([path_scores(one, graph)[0].logsumexp(0) for one in logits])


def enumerated_loss(logits, graph, transcript):
    scores, transcripts = path_scores(logits, graph)
    numerator = scores[torch.tensor([found == transcript for found in transcripts])]
    return scores.logsumexp(0) - numerator.logsumexp(0)


def enumerated_divergence(student, teacher, graph):
    values = []
    for one, other in zip(student, teacher):
        q, p = (path_scores(logits, graph)[0].log_softmax(0) for logits in (one, other))
        values.append((p.exp() * (p - q)).sum())
    return torch.stack(values)


def explicit_log_z(logits, graph):
    """log Z of one utterance in float64: a recursion over a list of states with every arc written out."""
    size = len(graph.labels)
    before = range(size + 1) if graph.order == 3 else (0,)
    histories = [(a, b) for a in before for b in range(1, size + 1)]
    states = [(None, 0)] + [(history, kind) for history in histories for kind in (0, 1)]
    index = {state: number for number, state in enumerate(states)}
    arcs = torch.full((len(states), len(states)), float("-inf"), dtype=torch.float64)
    final = torch.empty(len(states), dtype=torch.float64)
    for (history, kind), number in index.items():
        arcs[number, index[(history, 0)]] = 0  # a blank
        if kind:
            arcs[number, number] = 0  # the same label again
        final[number] = graph.log_final[history[0], history[1] - 1] if history else graph.log_empty
        for label in range(1, size + 1):
            if history is None:
                arcs[number, index[((0, label), 1)]] = graph.log_start[label - 1]
            elif not (kind and label == history[1]):
                following = (history[1] if graph.order == 3 else 0, label)
                weight = graph.log_transitions[history[0], history[1] - 1, label - 1]
                arcs[number, index[(following, 1)]] = weight
    symbols = torch.tensor([graph.labels[history[1] - 1] if kind else graph.blank for history, kind in states])
    alpha = torch.full((len(states),), float("-inf"), dtype=torch.float64)
    alpha[0] = 0
    for frame in logits.double():
        # -1e300 instead of -inf keeps autograd's logsumexp free of NaN
        alpha = (alpha.unsqueeze(1) + arcs).clamp_min(-1e300).logsumexp(0) + frame[symbols]
    return (alpha + final).logsumexp(0)


def gradient(values, inputs):
    return torch.autograd.grad(values.sum(), inputs)[0]


def close(found, expected, tolerance=1e-9):
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= tolerance


# value and gradient equal the enumeration of all paths


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("labels", "frames"), SIZES)
def test_log_partition_is_the_sum_over_all_paths(labels, frames, order):
    graph = random_graph(labels, order)
    logits = random_logits(2, frames, 4 + labels).requires_grad_()
    found, expected = log_partition(logits, None, graph), enumerated_log_z(logits, graph)
    close(found, expected)
    close(gradient(found, logits), gradient(expected, logits))


def test_the_largest_case_in_the_promise():
    """5 labels, 6 frames, order 3: 46,656 paths."""
    graph = random_graph(5, 3)
    logits = random_logits(1, 6, 9).requires_grad_()
    found, expected = log_partition(logits, None, graph), enumerated_log_z(logits, graph)
    close(found, expected)
    close(gradient(found, logits), gradient(expected, logits))


TRANSCRIPTS = [(), (1,), (1, 1), (2, 1), (1, 1, 1), (2, 2, 1), (1, 2, 3, 2), (3, 3, 1, 2)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=str)
def test_training_loss_is_the_posterior_of_the_transcripts_alignments(transcript, order):
    graph = random_graph(3, order)
    logits = random_logits(1, 6, 7, seed=len(transcript)).requires_grad_()
    targets = torch.tensor([[3 + label for label in transcript] + [1] * (5 - len(transcript))])
    found = lfmmi_loss(logits, None, targets, torch.tensor([len(transcript)]), graph)
    expected = enumerated_loss(logits[0], graph, transcript).unsqueeze(0)
    close(found, expected)
    close(gradient(found, logits), gradient(expected, logits))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("transcript", [(), (2,)], ids=str)
def test_training_loss_of_a_single_frame(transcript, order):
    graph = random_graph(2, order)
    logits = random_logits(1, 1, 6).requires_grad_()
    targets = torch.tensor([[3 + label for label in transcript]]).long().view(1, -1)
    found = lfmmi_loss(logits, torch.tensor([1]), targets, torch.tensor([len(transcript)]), graph)
    expected = enumerated_loss(logits[0], graph, transcript).unsqueeze(0)
    close(found, expected)
    close(gradient(found, logits), gradient(expected, logits))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("labels", "frames"), SIZES)
def test_distillation_loss_is_the_divergence_of_path_distributions(labels, frames, order):
    graph = random_graph(labels, order)
    student = random_logits(2, frames, 4 + labels, seed=1).requires_grad_()
    teacher = random_logits(2, frames, 4 + labels, seed=2)
    found, expected = distillation_lfmmi(student, teacher, None, graph), enumerated_divergence(student, teacher, graph)
    close(found, expected)
    close(gradient(found, student), gradient(expected, student))


@pytest.mark.parametrize("order", ORDERS)
def test_the_explicit_recursion_agrees_with_the_enumeration(order):
    """The reference of the tests below is right."""
    graph = random_graph(3, order)
    logits = random_logits(1, 5, 7)
    close(explicit_log_z(logits[0], graph), enumerated_log_z(logits, graph)[0])


@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck(order):
    graph = random_graph(2, order)
    student = random_logits(2, 4, 6, seed=3).requires_grad_()
    teacher = random_logits(2, 4, 6, seed=4)
    lengths = torch.tensor([4, 3])
    targets, target_lengths = torch.tensor([[4, 4], [5, 1]]), torch.tensor([2, 1])
    assert torch.autograd.gradcheck(lambda x: log_partition(x, lengths, graph), student)
    assert torch.autograd.gradcheck(lambda x: lfmmi_loss(x, lengths, targets, target_lengths, graph), student)
    assert torch.autograd.gradcheck(lambda x: distillation_lfmmi(x, teacher, lengths, graph), student)


def test_each_rows_gradient_has_its_own_weight():
    graph = random_graph(2, 2)
    logits = random_logits(2, 4, 6).requires_grad_()
    weights = torch.tensor([3.0, -0.5], dtype=torch.float64)
    both = gradient(log_partition(logits, None, graph), logits)
    close(gradient(weights * log_partition(logits, None, graph), logits), weights.view(2, 1, 1) * both)


# what the losses are


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("order", ORDERS)
def test_equal_logits_have_no_divergence_and_no_gradient(order, dtype):
    graph = random_graph(28, order)
    student = random_logits(7, 20, 32, dtype=dtype).requires_grad_()
    loss = distillation_lfmmi(student, student.detach().clone(), None, graph)
    assert (loss == 0).all()
    assert (gradient(loss, student) == 0).all()


@pytest.mark.parametrize("distance", (1e-6, 1e-3, 1.0, 30.0))
def test_divergence_is_never_negative(distance):
    graph = random_graph(5, 2)
    teacher = random_logits(8, 50, 9, dtype=torch.float32)
    student = teacher + distance * random_logits(8, 50, 9, seed=1, dtype=torch.float32)
    loss = distillation_lfmmi(student, teacher, None, graph)
    assert (loss >= 0).all()
    if distance >= 1:
        assert (loss > 1).all()


def test_training_loss_is_not_negative_and_vanishes_for_a_sure_model():
    graph = random_graph(3, 2)
    path = torch.tensor([0, 4, 4, 0, 4, 5, 0, 6] * 100)
    logits = 60.0 * torch.nn.functional.one_hot(path, 7).float().unsqueeze(0)
    transcript = torch.tensor([[4, 4, 5, 6] * 100])
    loss = lfmmi_loss(logits, None, transcript, torch.tensor([400]), graph)
    assert -1e-3 < loss.item() < 1e-3
    other = transcript.clone()
    other[0, 7] = 5
    assert lfmmi_loss(logits, None, other, torch.tensor([400]), graph).item() > 50


def test_no_gradient_reaches_the_teacher():
    graph = random_graph(2, 2)
    student = random_logits(1, 4, 6, seed=1).requires_grad_()
    teacher = random_logits(1, 4, 6, seed=2).requires_grad_()
    distillation_lfmmi(student, teacher, None, graph).sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("order", ORDERS)
def test_a_constant_added_to_a_frame_cancels(order):
    graph = random_graph(3, order)
    student, teacher = random_logits(2, 6, 7, seed=1), random_logits(2, 6, 7, seed=2)
    constants = random_logits(2, 6, 1, seed=3, scale=100.0)
    targets, lengths = torch.tensor([[4, 5], [6, 6]]), torch.tensor([2, 2])
    close(
        distillation_lfmmi(student + constants, teacher - constants, None, graph),
        distillation_lfmmi(student, teacher, None, graph),
    )
    close(
        lfmmi_loss(student + constants, None, targets, lengths, graph),
        lfmmi_loss(student.log_softmax(-1), None, targets, lengths, graph),
    )
    moved = log_partition(student + constants, None, graph)
    close(moved, log_partition(student, None, graph) + constants.sum((1, 2)))


@pytest.mark.parametrize("junk", (50.0, -1e4, float("-inf"), float("nan")))
def test_symbols_outside_of_the_graph_take_no_part(junk):
    graph = random_graph(3, 2)
    clean = random_logits(2, 5, 7).requires_grad_()
    dirty = clean.detach().clone()
    dirty[..., 1:4] = junk
    dirty.requires_grad_()
    teacher = random_logits(2, 5, 7, seed=1)
    targets, lengths = torch.tensor([[4, 5], [6, 6]]), torch.tensor([2, 2])
    for loss in (
        lambda x: log_partition(x, None, graph),
        lambda x: lfmmi_loss(x, None, targets, lengths, graph),
        lambda x: distillation_lfmmi(x, teacher, None, graph),
    ):
        assert torch.equal(loss(dirty), loss(clean))
        assert torch.equal(gradient(loss(dirty), dirty), gradient(loss(clean), clean))
        assert (gradient(loss(dirty), dirty)[..., 1:4] == 0).all()


@pytest.mark.parametrize("order", ORDERS)
def test_posteriors_are_the_gradient_and_sum_to_one(order):
    graph = random_graph(3, order)
    logits = random_logits(3, 6, 7).requires_grad_()
    lengths = torch.tensor([6, 1, 4])
    log_z, occupancy = posteriors(logits, lengths, graph)
    close(log_z, log_partition(logits, lengths, graph))
    close(occupancy, gradient(log_partition(logits, lengths, graph), logits))
    inside = (torch.arange(6) < lengths.unsqueeze(1)).double()
    close(occupancy.sum(-1), inside)
    assert not occupancy.requires_grad


# padding


@pytest.mark.parametrize("junk", (0.0, 1e30, float("inf"), float("-inf"), float("nan")))
@pytest.mark.parametrize("order", ORDERS)
def test_a_padded_batch_is_its_utterances_one_by_one(order, junk):
    graph = random_graph(3, order)
    lengths = torch.tensor([7, 3, 1])
    student, teacher = (random_logits(3, 7, 7, seed=seed, dtype=torch.float32) for seed in (1, 2))
    for row, length in enumerate(lengths.tolist()):
        student[row, length:], teacher[row, length:] = junk, junk
    student.requires_grad_()
    targets, target_lengths = torch.tensor([[4, 4, 5], [6, 1, 1], [1, 1, 1]]), torch.tensor([3, 1, 0])
    losses = {
        "partition": lambda x, y, n, t, u: log_partition(x, n, graph),
        "training": lambda x, y, n, t, u: lfmmi_loss(x, n, t, u, graph),
        "distillation": lambda x, y, n, t, u: distillation_lfmmi(x, y, n, graph),
    }
    for loss in losses.values():
        batch = loss(student, teacher, lengths, targets, target_lengths)
        slope = gradient(batch, student)
        for row, length in enumerate(lengths.tolist()):
            one = student.detach()[row : row + 1, :length].requires_grad_()
            other, labels = teacher[row : row + 1, :length], target_lengths[row : row + 1]
            alone = loss(one, other, None, targets[row : row + 1, : int(labels)], labels)
            close(batch[row : row + 1], alone, 1e-5)
            close(slope[row : row + 1, :length], gradient(alone, one), 1e-5)
            assert (slope[row, length:] == 0).all()


# transcripts


def test_a_transcript_that_does_not_fit_costs_inf_and_has_no_gradient():
    graph = random_graph(2, 2)
    logits = random_logits(3, 3, 6).requires_grad_()
    targets, target_lengths = torch.tensor([[4, 4], [4, 4], [4, 5]]), torch.tensor([2, 2, 2])
    lengths = torch.tensor([3, 2, 2])  # `4 4` needs a blank between
    loss = lfmmi_loss(logits, lengths, targets, target_lengths, graph)
    assert torch.isfinite(loss).tolist() == [True, False, True] and loss[1] > 0
    slope = gradient(loss, logits)
    assert (slope[1] == 0).all() and torch.isfinite(slope).all() and slope[0].abs().sum() > 0
    zeroed = lfmmi_loss(logits, lengths, targets, target_lengths, graph, zero_infinity=True)
    assert zeroed[1] == 0 and torch.equal(zeroed[[0, 2]], loss[[0, 2]])
    assert torch.equal(gradient(zeroed, logits), slope)


@pytest.mark.parametrize("width", (0, 2))
def test_a_batch_of_empty_transcripts(width):
    graph = random_graph(2, 2)
    logits = random_logits(2, 3, 6).requires_grad_()
    targets = torch.ones(2, width, dtype=torch.long)
    loss = lfmmi_loss(logits, None, targets, torch.zeros(2, dtype=torch.long), graph)
    expected = torch.stack([enumerated_loss(one, graph, ()) for one in logits])
    close(loss, expected)
    close(gradient(loss, logits), gradient(expected, logits))


def test_the_blank_need_not_be_the_first_symbol():
    graph = random_graph(2, 2)
    moved = DenominatorGraph(
        ["a", "b", "-"], [1, 0], graph.log_start, graph.log_transitions, graph.log_final, graph.log_empty, blank=2
    )
    logits = random_logits(1, 5, 6)
    other = logits[..., [5, 4, 0]]
    close(log_partition(other, None, moved), log_partition(logits, None, graph))
    one, two = torch.tensor([[4, 4, 5]]), torch.tensor([[1, 1, 0]])
    lengths = torch.tensor([3])
    close(lfmmi_loss(other, None, two, lengths, moved), lfmmi_loss(logits, None, one, lengths, graph))


# precision


@pytest.mark.parametrize("order", ORDERS)
def test_3000_frames_in_float32(order):
    graph = random_graph(5, order)
    student, teacher = (random_logits(2, 3000, 9, seed=seed, dtype=torch.float32, scale=4.0) for seed in (1, 2))
    targets = torch.randint(4, 9, (2, 500), generator=torch.Generator().manual_seed(0))
    target_lengths, lengths = torch.tensor([500, 300]), torch.tensor([3000, 2345])

    def compute(student, teacher):
        student = student.clone().requires_grad_()
        losses = (
            log_partition(student, lengths, graph),
            lfmmi_loss(student, lengths, targets, target_lengths, graph),
            distillation_lfmmi(student, teacher, lengths, graph),
        )
        return [(loss.detach(), gradient(loss, student)) for loss in losses]

    for (single, slope), (double, exact) in zip(compute(student, teacher), compute(student.double(), teacher.double())):
        assert torch.isfinite(single).all() and torch.isfinite(slope).all()
        assert ((single - double) / double).abs().max() < 2e-7
        close(slope, exact, 5e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("kind", ("signs", "normal", "one label", "no blank"))
@pytest.mark.parametrize("order", ORDERS)
def test_logits_of_ten_thousand(order, kind, dtype):
    graph = random_graph(4, order)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 2, (1, 40, 8), generator=generator) * 2e4 - 1e4
    if kind == "normal":
        logits = random_logits(1, 40, 8, scale=1e4)
    elif kind == "one label":
        logits = torch.full((1, 40, 8), -1e4)
        logits[..., 5] = 1e4
    elif kind == "no blank":
        logits = random_logits(1, 40, 8)
        logits[..., 0] = -1e4
    logits = logits.to(dtype).requires_grad_()
    found, expected = log_partition(logits, None, graph), explicit_log_z(logits[0], graph).unsqueeze(0)
    close(found, expected, 1e-6 * expected.abs().max().item())
    # the logits of float32 are themselves known to 1e-3 only, and so are differences of paths
    close(gradient(found, logits), gradient(expected, logits), 1e-9 if dtype == torch.float64 else 5e-3)
    teacher = logits.detach().flip(1)
    loss = distillation_lfmmi(logits, teacher, None, graph)
    training = lfmmi_loss(logits, None, torch.tensor([[4, 4, 6]]), torch.tensor([3]), graph)
    for value in (loss, training):
        assert torch.isfinite(value).all() and (value >= -1e-2).all()
        assert torch.isfinite(gradient(value, logits)).all()


@pytest.mark.parametrize("scale", (1.0, 30.0, 100.0, 300.0))
@pytest.mark.parametrize("order", ORDERS)
def test_arcs_at_the_limit_of_what_a_graph_may_hold(order, scale):
    """Where float32 must drop the most: arcs down to e^-35, scores of every size."""
    graph = random_graph(4, order, sharpness=20.0)
    assert graph.log_transitions.min() == MIN_LOG_PROBABILITY
    logits = random_logits(1, 30, 8, scale=scale).float().requires_grad_()
    found, expected = log_partition(logits, None, graph), explicit_log_z(logits[0], graph).unsqueeze(0)
    close(found, expected, 1e-6 * (1 + expected.abs().max().item()))
    close(gradient(found, logits), gradient(expected, logits), 1e-5 * max(scale, 1.0))


@pytest.mark.parametrize("order", ORDERS)
def test_symbols_may_be_impossible(order):
    graph = random_graph(3, order)
    logits = random_logits(1, 5, 7)
    logits[0, 2, 5] = float("-inf")
    logits[0, 3, 0] = float("-inf")
    logits.requires_grad_()
    found = log_partition(logits, None, graph)
    close(found, enumerated_log_z(logits.detach(), graph))
    slope = gradient(found, logits)
    assert torch.isfinite(slope).all() and slope[0, 2, 5] == 0
    teacher = logits.detach().clone()
    assert torch.isfinite(distillation_lfmmi(logits, teacher + 1, None, graph)).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_logits_are_computed_in_float32(dtype):
    graph = random_graph(4, 3)
    student, teacher = (random_logits(2, 60, 8, seed=seed).to(dtype) for seed in (1, 2))
    targets, lengths = torch.tensor([[4, 5], [6, 6]]), torch.tensor([2, 2])
    student.requires_grad_()
    exact = student.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = (
            log_partition(student, None, graph),
            lfmmi_loss(student, None, targets, lengths, graph),
            distillation_lfmmi(student, teacher, None, graph),
        )
    expected = (
        log_partition(exact, None, graph),
        lfmmi_loss(exact, None, targets, lengths, graph),
        distillation_lfmmi(exact, teacher.float(), None, graph),
    )
    for value, other in zip(found, expected):
        assert torch.equal(value, other) and value.dtype in (torch.float32, torch.float64)
        slope = gradient(value, student)
        assert slope.dtype == dtype
        close(slope, gradient(other, exact), 5e-3)


def test_only_occupancies_are_kept_for_the_gradient():
    """Never the lattice: 2 x 40 states a frame in this graph."""
    graph = random_graph(4, 3)
    student, teacher = random_logits(2, 50, 8).requires_grad_(), random_logits(2, 50, 8, seed=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        distillation_lfmmi(student, teacher, None, graph)
    assert sum(kept) <= 2 * 50 * 5 + 100


# errors


def test_nan_scores_are_named():
    graph = random_graph(2, 2)
    logits = random_logits(3, 4, 6)
    logits[1, 2, 4] = float("nan")
    with pytest.raises(ValueError, match="the scores of row 1 hold NaN or .inf"):
        log_partition(logits, None, graph)
    with pytest.raises(ValueError, match="the teacher's scores of row 1 hold NaN or .inf"):
        distillation_lfmmi(torch.zeros_like(logits), logits, None, graph)


LOGITS, LENGTHS = torch.zeros(2, 4, 6), torch.tensor([4, 2])
TARGETS, TARGET_LENGTHS = torch.tensor([[4, 5], [5, 1]]), torch.tensor([2, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=torch.zeros(4, 6)), r"scores of shape \(4, 6\), expected floating-point \(batch, time, symbols\)"),
        (dict(logits=torch.zeros(2, 4, 6).long()), "found torch.int64 scores"),
        (dict(logits=torch.zeros(2, 0, 6)), r"shape \(2, 0, 6\)"),
        (dict(logits=torch.zeros(2, 4, 7)), "scores have 7 symbols, the denominator graph's dictionary has 6; build"),
        (dict(lengths=torch.tensor([4])), r"lengths is torch.int64 of shape \(1,\), expected integers of shape \(2,\)"),
        (dict(lengths=torch.tensor([4.0, 2.0])), "lengths is torch.float32"),
        (dict(lengths=torch.tensor([4, 0])), r"lengths\[1\] is 0, expected 1 to 4 frames"),
        (dict(lengths=torch.tensor([5, 1])), r"lengths\[0\] is 5, expected 1 to 4 frames"),
        (dict(targets=torch.tensor([4, 5])), r"targets are torch.int64 of shape \(2,\)"),
        (dict(target_lengths=torch.tensor([3, 1])), r"target_lengths\[0\] is 3, expected 0 to 2 labels"),
        (dict(targets=torch.tensor([[4, 5], [3, 1]])), r"targets\[1, 0\] is 3 \('<unk>'\), which is no label"),
        (dict(targets=torch.tensor([[4, 9], [4, 1]])), r"targets\[0, 1\] is 9 \(no symbol of the dictionary\)"),
    ],
)
def test_what_training_loss_refuses(change, message):
    arguments = dict(logits=LOGITS, lengths=LENGTHS, targets=TARGETS, target_lengths=TARGET_LENGTHS)
    with pytest.raises(ValueError, match=message):
        lfmmi_loss(**{**arguments, **change}, graph=random_graph(2, 2))


def test_teacher_and_student_must_have_one_shape():
    with pytest.raises(ValueError, match=r"student logits have shape \(2, 4, 6\), teacher logits \(2, 5, 6\)"):
        distillation_lfmmi(LOGITS, torch.zeros(2, 5, 6), None, random_graph(2, 2))
