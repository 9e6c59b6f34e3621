"""LF-MMI: forward-backward over a denominator graph composed with the CTC topology.

An utterance's path through the graph is one symbol a frame: a label may repeat, blanks may stand anywhere, and equal
labels in a row need a blank between them. Its score is the sum of its frames' scores, plus the n-gram's log-probability
of the labels that remain when repeats are merged and blanks dropped, the end of the utterance included.

Frame scores are logits or log-probabilities alike: a constant added to a frame cancels in both losses. Symbols that
are neither blank nor label of the graph (fairseq's <pad>, </s>, <unk>) take part in nothing. Whatever stands in padded
frames is not looked at. Computation is in float32 (float64 for float64 scores), under autocast too; a process that
allows TF32 matrix products (torch.backends.cuda.matmul.allow_tf32, off by default) gets its precision.

Values are checked where that costs nothing, on the CPU: there, NaN scores, lengths of 0 or beyond the frames, and
transcripts with foreign symbols raise ValueError. On other devices a check would wait for the device; NaN scores and
foreign symbols give NaN losses there.

How sums over states become matrix products of exp(score - maximum): float32 loses what lies 87 below the maximum, and
that does not matter, because every arc of the graph exists. The same sequences of symbols can follow any two states,
and their n-gram probabilities differ in at most order - 1 factors, each at least e^-35 (MIN_LOG_PROBABILITY). So a
state 87 below the best one adds less than e^(70 - 87), float32's own rounding, to log Z and to any posterior. Backward,
likewise: a state that is lost lies 87 below one that the same predecessors reach at the price of at most two such
factors. Scores stay logarithms between frames, so that nothing is lost for being unlikely for a while.
"""

from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .denominator import DenominatorGraph, GraphTensors

# Stands for a score of minus infinity: far below every other, and differences of two are numbers.
NEG = -1e30


def log_partition(log_probs: torch.Tensor, lengths: Optional[torch.Tensor], graph: DenominatorGraph) -> torch.Tensor:
    """log Z: the log of the summed exponentiated scores of all paths through the graph; (batch,), float64.

    log_probs: (batch, time, symbols) frame scores, normalised or not; lengths: (batch,) frames, None when none is
    padding. The gradient with respect to the scores is each symbol's posterior, 0 in padded frames.
    Raises ValueError for shapes that do not fit and, on the CPU, for bad values.
    """
    return _LogPartition.apply(_scores(log_probs, lengths, graph), _padding(log_probs, lengths), graph)


def posteriors(
    log_probs: torch.Tensor, lengths: Optional[torch.Tensor], graph: DenominatorGraph
) -> Tuple[torch.Tensor, torch.Tensor]:
    """log Z, (batch,) in float64, and the posterior of each symbol in each frame, (batch, time, symbols); no gradient.

    Arguments and errors as for `log_partition`. Posteriors of a frame sum to 1, in padded frames to 0.
    """
    with torch.no_grad():
        scores, padding = _scores(log_probs, lengths, graph), _padding(log_probs, lengths)
        log_z, occupancy = _forward_backward(_relative(scores), padding, graph)
        _check_finite(log_z)
        log_z = log_z + _offsets(scores, padding)
        columns = graph.tensors(scores.device, scores.dtype).columns
        return log_z, scores.new_zeros(log_probs.shape).index_copy_(2, columns, occupancy)


def lfmmi_loss(
    logits: torch.Tensor,
    lengths: Optional[torch.Tensor],
    targets: torch.Tensor,
    target_lengths: torch.Tensor,
    graph: DenominatorGraph,
    zero_infinity: bool = False,
) -> torch.Tensor:
    """Training LF-MMI: minus the log of the transcript's posterior probability among all paths; (batch,), >= 0.

    The numerator sums the transcript's CTC alignments and has the n-gram's probability of the transcript, so that it
    is a part of the denominator. The gradient is the difference of the two occupancies.
    logits: (batch, time, symbols); lengths: (batch,) frames or None; targets: (batch, labels) dictionary indices,
    whatever stands after target_lengths (batch,) is ignored; a transcript may be empty. A transcript that does not fit
    into its frames costs inf, or 0 with zero_infinity, and has no gradient.
    Raises ValueError for shapes that do not fit and, on the CPU, for bad values.
    Source: Povey et al., 2016, eq. 1; with the CTC topology as in Hadian et al., 2018 (end-to-end LF-MMI).
    """
    scores = _scores(logits, lengths, graph)
    labels = _target_labels(targets, target_lengths, logits, graph)
    lengths = _full(logits) if lengths is None else lengths.to(logits.device).long()
    target_lengths = target_lengths.to(logits.device).long()
    # torch's gradient of CTC is right for normalised scores only. In float64, or sums over thousands of frames would
    # be rounded to more than a model that knows the transcript has left to lose.
    log_probs = F.log_softmax(scores, -1)
    numerator = graph.score(labels.clamp_min(0), target_lengths) - F.ctc_loss(
        log_probs.double().transpose(0, 1),
        labels.clamp_min(0),
        lengths,
        target_lengths,
        blank=0,
        reduction="none",
        zero_infinity=True,
    )
    log_z = _LogPartition.apply(log_probs, _padding(logits, lengths), graph)
    loss = log_z - numerator
    inside = torch.arange(labels.size(1), device=labels.device) < target_lengths.unsqueeze(1)
    loss = loss.masked_fill(((labels < 0) & inside).any(1), float("nan"))
    repeats = ((labels[:, 1:] == labels[:, :-1]) & inside[:, 1:]).sum(1)
    impossible = target_lengths + repeats > lengths
    return loss.masked_fill(impossible, 0.0 if zero_infinity else float("inf")).to(scores.dtype)


def distillation_lfmmi(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    lengths: Optional[torch.Tensor],
    graph: DenominatorGraph,
) -> torch.Tensor:
    """Distillation LF-MMI: Kullback-Leibler divergence of paths from teacher to student; (batch,), >= 0.

    KL = sum over paths of p_T (log p_T - log p_S) = sum over frames and symbols of g_T (y_T - y_S) - log Z_T + log Z_S
    with frame scores y and occupancies g of the denominator graph. Its gradient with respect to the student's scores
    is g_S - g_T; none reaches the teacher. Equal logits have loss 0 and gradient 0.
    student_logits, teacher_logits: (batch, time, symbols), logits or log-probabilities; lengths: (batch,) or None.
    Raises ValueError for shapes that do not fit and, on the CPU, for bad values.

    Our reading of DistillW2V2's "modified LF-MMI", whose modification is not public: the transcript's alignments in
    LF-MMI's numerator give way to the teacher's own distribution over the paths of the denominator graph.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"LF-MMI: student logits have shape {tuple(student_logits.shape)}, teacher logits "
            f"{tuple(teacher_logits.shape)}; expected the same (batch, time, symbols)"
        )
    with torch.no_grad():
        teacher = _scores(teacher_logits, lengths, graph)
    student = _scores(student_logits, lengths, graph)
    return _PathDivergence.apply(student, teacher.to(student), _padding(student_logits, lengths), graph)


class _LogPartition(torch.autograd.Function):
    """log Z of scores (batch, time, 1 + L), blank first; keeps the occupancies alone for the gradient."""

    @staticmethod
    def forward(ctx, scores, padding, graph):
        log_z, occupancy = _forward_backward(_relative(scores), padding, graph)
        _check_finite(log_z)
        ctx.save_for_backward(occupancy)
        return log_z + _offsets(scores, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (occupancy,) = ctx.saved_tensors
        return occupancy * gradient.to(occupancy.dtype).view(-1, 1, 1), None, None


class _PathDivergence(torch.autograd.Function):
    """KL from the teacher's paths to the student's; one recursion for both, stacked along the batch."""

    @staticmethod
    def forward(ctx, student, teacher, padding, graph):
        student, teacher = _relative(student), _relative(teacher)
        twice = None if padding is None else torch.cat([padding, padding])
        log_z, occupancy = _forward_backward(torch.cat([student, teacher]), twice, graph)
        student_z, teacher_z = log_z.chunk(2)
        _check_finite(student_z, "the student's scores")
        _check_finite(teacher_z, "the teacher's scores")
        student_occupancy, teacher_occupancy = occupancy.chunk(2)
        # A matrix product rounds by a row's place in it, so that equal rows may differ in the last bit.
        equal = (student == teacher).flatten(1).all(1)
        ctx.save_for_backward((student_occupancy - teacher_occupancy).masked_fill_(equal.view(-1, 1, 1), 0))
        expected = (teacher_occupancy * (teacher - student)).sum(-1).double().sum(-1)
        divergence = (expected - teacher_z + student_z).clamp_min_(0)
        return divergence.masked_fill_(equal, 0).to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (difference,) = ctx.saved_tensors
        return difference * gradient.view(-1, 1, 1), None, None, None


def _forward_backward(
    scores: torch.Tensor, padding: Optional[torch.Tensor], graph: DenominatorGraph
) -> Tuple[torch.Tensor, torch.Tensor]:
    """log Z (batch,), float64, and occupancies like scores: (batch, time, 1 + L), blank first, maximum 0 a frame.

    A state is a history of the n-gram (group, member) and what the last frame was: a blank (kind 0) or the history's
    last label (kind 1); the start is a history that has its blank alone. The lattice is (time, group, batch, kind,
    member), natural logarithms.
    """
    with torch.no_grad(), torch.autocast(device_type=scores.device.type, enabled=False):
        tensors = graph.tensors(scores.device, scores.dtype)
        frames = _emissions(scores, padding, tensors)
        log_z, lattice = _forward(frames, tensors)
        _backward(frames, lattice, tensors)
        occupancy = _occupancies(lattice)
        return log_z, occupancy if padding is None else occupancy.masked_fill_(padding.unsqueeze(-1), 0)


def _emissions(
    scores: torch.Tensor, padding: Optional[torch.Tensor], tensors: GraphTensors
) -> Tuple[torch.Tensor, ...]:
    """Each frame's scores, laid out to be added to the states: (group or 1, batch, kind, member or 1).

    A padded frame is a blank of probability 1: it moves every path into its history's blank at no cost, which changes
    neither log Z nor what the frames before it see.
    """
    blank, labels = scores[..., :1], scores[..., 1:]
    never = float("-inf")
    if padding is not None:
        blank = blank.masked_fill(padding.unsqueeze(-1), 0)
        labels = labels.masked_fill(padding.unsqueeze(-1), never)
    labels = torch.cat([torch.full_like(blank, never), labels], -1)
    emissions = torch.stack([blank.expand_as(labels), labels])  # (kind, batch, time, 1 + L)
    if tensors.log_arcs.size(0) == 1:
        emissions = emissions.permute(2, 1, 0, 3).unsqueeze(1)
    else:
        emissions = emissions.permute(2, 3, 1, 0).unsqueeze(4)
    return emissions.contiguous().unbind(0)


def _forward(frames: Sequence[torch.Tensor], tensors: GraphTensors) -> Tuple[torch.Tensor, torch.Tensor]:
    """log Z and, for each frame and state, the log of the summed paths that reach it, up to a constant per frame."""
    groups, members = tensors.log_arcs.shape[:2]
    batch = frames[0].size(1)
    lattice = frames[0].new_empty(len(frames), groups, batch, 2, members)
    state = frames[0].new_full((groups, batch, 2, members), float("-inf"))
    state[0, :, 0, 0] = 0
    weights = torch.empty_like(state)
    from_blank, from_label = weights.unbind(2)
    scales = []
    for emission, following, blank, label in zip(frames, lattice.unbind(0), *lattice.unbind(3)):
        scale = state.amax((0, 2, 3), keepdim=True)
        scales.append(scale)
        torch.sub(state, scale, out=weights).exp_()
        torch.add(from_blank, from_label, out=blank)
        torch.add(from_label, _regroup(torch.bmm(weights.flatten(2), tensors.arcs)), out=label)
        state = following.log_().add_(emission)
    final = state.double() + tensors.log_final.double().view(groups, 1, 1, members)
    return torch.stack(scales).double().sum((0, 1, 3, 4)) + final.logsumexp((0, 2, 3)), lattice


def _backward(frames: Sequence[torch.Tensor], lattice: torch.Tensor, tensors: GraphTensors) -> None:
    """Adds to each state of the lattice the log of the summed paths that leave it, up to a constant per frame."""
    groups, members = tensors.log_arcs.shape[:2]
    slots = lattice.unbind(0)
    state = tensors.log_final.view(groups, 1, 1, members).expand_as(slots[0])
    slots[-1].add_(state)
    weights = torch.empty_like(slots[0])
    to_blank, to_label = weights.unbind(2)
    for t in range(len(frames) - 2, -1, -1):
        torch.add(state, frames[t + 1], out=weights)
        weights.sub_(weights.amax((0, 2, 3), keepdim=True)).exp_()
        state = torch.bmm(_regroup(to_label), tensors.reverse).view_as(weights)
        to_label.add_(to_blank)
        state.add_(weights).log_()
        slots[t].add_(state)


def _occupancies(lattice: torch.Tensor) -> torch.Tensor:
    """Posteriors (batch, time, 1 + L), blank first, of summed log scores of states; overwrites them."""
    lattice.sub_(lattice.amax((1, 3, 4), keepdim=True)).exp_()
    blank, label = lattice.unbind(3)  # (time, group, batch, member)
    label = label.squeeze(1) if lattice.size(1) == 1 else label.sum(3).transpose(1, 2)
    occupancy = torch.cat([blank.sum((1, 3)).unsqueeze(-1), label[..., 1:]], -1).transpose(0, 1).contiguous()
    return occupancy.div_(occupancy.sum(-1, keepdim=True))


def _regroup(states: torch.Tensor) -> torch.Tensor:
    """(group, batch, next label) to (group of the next history, batch, its member), and back.

    Order 2: the next label is the member of the one group. Order 3: it is the group, and the group becomes the member.
    """
    return states if states.size(0) == 1 else states.transpose(0, 2)


def _scores(logits: torch.Tensor, lengths: Optional[torch.Tensor], graph: DenominatorGraph) -> torch.Tensor:
    """Scores of the blank and of the graph's labels, (batch, time, 1 + L), at least float32; 0 in padded frames."""
    _check_shapes(logits, lengths, graph)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    columns = graph.tensors(logits.device, dtype).columns
    scores = logits.index_select(2, columns).to(dtype)
    padding = _padding(logits, lengths)
    return scores if padding is None else scores.masked_fill(padding.unsqueeze(-1), 0)


def _relative(scores: torch.Tensor) -> torch.Tensor:
    """Scores less their frame's maximum: a large offset would cost the recursion its precision."""
    return (scores - _maximum(scores)).clamp_min(NEG)


def _offsets(scores: torch.Tensor, padding: Optional[torch.Tensor]) -> torch.Tensor:
    """What `_relative` took from log Z: (batch,), float64."""
    offsets = _maximum(scores).double().squeeze(2)
    return (offsets if padding is None else offsets.masked_fill(padding, 0)).sum(1)


def _maximum(scores: torch.Tensor) -> torch.Tensor:
    return scores.amax(-1, keepdim=True).clamp_min(NEG)


def _padding(logits: torch.Tensor, lengths: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    if lengths is None:
        return None
    return torch.arange(logits.size(1), device=logits.device) >= lengths.to(logits.device).unsqueeze(1)


def _full(logits: torch.Tensor) -> torch.Tensor:
    return torch.full((logits.size(0),), logits.size(1), dtype=torch.long, device=logits.device)


def _check_shapes(logits: torch.Tensor, lengths: Optional[torch.Tensor], graph: DenominatorGraph) -> None:
    if logits.dim() != 3 or not logits.is_floating_point() or 0 in logits.shape:
        raise ValueError(
            f"LF-MMI: found {logits.dtype} scores of shape {tuple(logits.shape)}, expected floating-point "
            "(batch, time, symbols), none of them 0"
        )
    if logits.size(2) != len(graph.symbols):
        raise ValueError(
            f"LF-MMI: scores have {logits.size(2)} symbols, the denominator graph's dictionary has "
            f"{len(graph.symbols)}; build the graph from the data of this model's dictionary"
        )
    if lengths is not None:
        _check_counts("lengths", lengths, logits.size(0), 1, logits.size(1), "frames")


def _check_counts(name: str, values: torch.Tensor, batch: int, least: int, most: int, unit: str) -> None:
    if values.dim() != 1 or values.size(0) != batch or values.is_floating_point():
        raise ValueError(
            f"LF-MMI: {name} is {values.dtype} of shape {tuple(values.shape)}, expected integers of shape ({batch},)"
        )
    if values.device.type != "cpu":
        return
    for row, value in enumerate(values.tolist()):
        if not least <= value <= most:
            raise ValueError(f"LF-MMI: {name}[{row}] is {value}, expected {least} to {most} {unit}")


def _check_finite(log_z: torch.Tensor, what: str = "the scores") -> None:
    if log_z.device.type == "cpu" and not torch.isfinite(log_z).all():
        row = int((~torch.isfinite(log_z)).nonzero()[0])
        raise ValueError(
            f"LF-MMI: {what} of row {row} hold NaN or +inf, or a frame of -inf alone; has the model diverged "
            "(lower the learning rate), or is the audio broken?"
        )


def _target_labels(
    targets: torch.Tensor, target_lengths: torch.Tensor, logits: torch.Tensor, graph: DenominatorGraph
) -> torch.Tensor:
    """The transcripts as labels of the graph, 1 to L, -1 for foreign symbols; (batch, labels)."""
    if targets.dim() != 2 or targets.size(0) != logits.size(0) or targets.is_floating_point():
        raise ValueError(
            f"LF-MMI: targets are {targets.dtype} of shape {tuple(targets.shape)}, expected integers of shape "
            f"({logits.size(0)}, labels)"
        )
    _check_counts("target_lengths", target_lengths, logits.size(0), 0, targets.size(1), "labels")
    labels = graph.positions(targets.to(logits.device))
    if targets.device.type == "cpu" and logits.device.type == "cpu":
        inside = torch.arange(targets.size(1)) < target_lengths.cpu().unsqueeze(1)
        foreign = ((labels < 0) & inside).nonzero()
        if len(foreign):
            row, index = foreign[0].tolist()
            symbol = int(targets[row, index])
            name = repr(graph.symbols[symbol]) if 0 <= symbol < len(graph.symbols) else "no symbol of the dictionary"
            raise ValueError(
                f"LF-MMI: targets[{row}, {index}] is {symbol} ({name}), which is no label of the denominator graph; "
                "mend the transcript or build the graph from this data"
            )
    return labels
