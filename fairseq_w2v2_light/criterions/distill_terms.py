"""The terms of a distillation loss: plain torch functions of what student and teacher computed.

Every term is a mean over the valid frames; padding never enters. The teacher's tensors are brought to the student's
frame rate first (`align`).
"""

from __future__ import annotations

import re
from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.masks import FrameMask, pooled_length
from ..nn.pooling import mean_pool, repeat_frames


class Frames(NamedTuple):
    """A padded batch of frame sequences.

    x: (batch, time, channel). lengths: (batch,) valid frames. hop: samples from one frame to the next.
    """

    x: Tensor
    lengths: Tensor
    hop: int

    @property
    def valid(self) -> Tensor:
        """(batch, time) bool, True on valid frames."""
        return torch.arange(self.x.size(1), device=self.x.device) < self.lengths.unsqueeze(1)


def parse_hidden_map(text: str, student_layers: int, teacher_layers: int) -> List[Tuple[int, int]]:
    """Which teacher layer each student layer imitates, as pairs (student, teacher), both 0-based.

    `every:n`: student layer i (1-based) learns from teacher layer n i, DistillW2V2's g(i) = 2i for n = 2.
    `last`: the last from the last. `0:0,1:3`: as listed. Example: every:2 with 2 and 4 layers is [(0, 1), (1, 3)].
    Raises ValueError that names hidden_map for malformed text and for layers that do not exist.
    """
    text = text.strip()
    every = re.fullmatch(r"every:(\d+)", text)
    if text == "last":
        pairs = [(student_layers - 1, teacher_layers - 1)]
    elif every and int(every.group(1)) > 0:
        pairs = [(layer, int(every.group(1)) * (layer + 1) - 1) for layer in range(student_layers)]
    elif re.fullmatch(r"\d+:\d+(\s*,\s*\d+:\d+)*", text):
        pairs = [tuple(int(number) for number in pair.split(":")) for pair in text.split(",")]
    else:
        raise ValueError(
            f"criterion.hidden_map: found '{text}', expected 'every:2', 'last', or student:teacher pairs such as "
            "'0:1,1:3' (0-based)"
        )
    for name, index, layers in (("student", 0, student_layers), ("teacher", 1, teacher_layers)):
        worst = max(pair[index] for pair in pairs)
        if worst >= layers:
            raise ValueError(
                f"criterion.hidden_map: '{text}' asks for layer {worst} of the {name}, which has {layers} layers "
                f"(0 to {layers - 1}); choose a map within them"
            )
    if len({student for student, _ in pairs}) != len(pairs):
        raise ValueError(f"criterion.hidden_map: '{text}' lists a student layer twice; expected one teacher layer each")
    return pairs


def align(teacher: Frames, student: Frames) -> Tuple[Tensor, Tensor, Tensor]:
    """Brings the teacher to the student's frame rate: (teacher x, student x, valid (batch, time) bool).

    Slower students see means of the teacher's frames, faster ones repetitions; where neither rate is a multiple of
    the other, the teacher is interpolated linearly at the centres of the student's frames. Both are cut to the shorter
    one, since frontends of the same rate may differ by a frame or two at the end.
    """
    x, lengths = teacher.x, teacher.lengths
    if student.hop % teacher.hop == 0:
        factor = student.hop // teacher.hop
        x = mean_pool(x, factor, FrameMask.from_lengths(lengths, x.size(1)))
        lengths = pooled_length(lengths, factor)
    elif teacher.hop % student.hop == 0:
        factor = teacher.hop // student.hop
        x = repeat_frames(x, factor, x.size(1) * factor)
        lengths = lengths * factor
    else:
        x = _interpolate(teacher, student)
        lengths = student.lengths
    time = min(x.size(1), student.x.size(1))
    aligned = Frames(student.x[:, :time], torch.minimum(lengths, student.lengths), student.hop)
    return x[:, :time], aligned.x, aligned.valid


def _interpolate(teacher: Frames, student: Frames) -> Tensor:
    """The teacher's frames (batch, student time, channel) at the student's frame centres."""
    centres = (torch.arange(student.x.size(1), device=teacher.x.device) + 0.5) * student.hop
    place = (centres / teacher.hop - 0.5).clamp(min=0)
    last = (teacher.lengths - 1).unsqueeze(1)
    left = torch.minimum(place.long().unsqueeze(0), last)
    right = torch.minimum(left + 1, last)
    weight = (place.unsqueeze(0) - left).clamp(0, 1).unsqueeze(-1).to(teacher.x.dtype)

    def gather(index):
        return teacher.x.gather(1, index.unsqueeze(-1).expand(-1, -1, teacher.x.size(-1)))

    return torch.lerp(gather(left), gather(right), weight)


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of `values` (batch, time) over the frames that are `valid` (batch, time) bool."""
    return torch.where(valid, values, values.new_zeros(())).sum() / valid.sum()


def mean_squared_error(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Mean over valid frames and channels of (student - teacher)^2; (batch, time, channel) both.

    Of hidden states: DistillW2V2's MSE(H^S W, H^T) (arXiv 2303.09278, second-hand). Of logits: its MSE(O^S, O^T).
    """
    return masked_mean((student.float() - teacher.float()).square().mean(-1), valid)


def kl_divergence(student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over valid frames; logits (batch, time, labels).

    Hinton et al. (arXiv 1503.02531); with T = 1 the loss of Shrinking Bigfoot (arXiv 2103.15760), whose code also
    takes the mean over frames and the sum over labels.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    frames = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * masked_mean(frames, valid)


def cosine_distance(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """1 - cosine similarity of the logits (batch, time, labels), mean over valid frames (Shrinking Bigfoot's code)."""
    return masked_mean(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1), valid)


def lengths_of(padding_mask: Optional[Tensor], x: Tensor) -> Tensor:
    """Valid frames (batch,) of `x` (batch, time, channel) under `padding_mask` (batch, time), None: all."""
    if padding_mask is None:
        return torch.full((x.size(0),), x.size(1), dtype=torch.long, device=x.device)
    return (~padding_mask).sum(-1)
