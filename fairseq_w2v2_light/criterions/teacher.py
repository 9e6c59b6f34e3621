"""The teacher of distillation: any wav2vec 2.0 checkpoint or model folder, frozen, outside the student's checkpoint."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.manifest import first_difference
from ..models.checkpoint import load_encoder, require_finite_weights
from ..models.w2v2_light import STOCHASTIC, build_backbone
from ..nn.backbone import Backbone
from ..nn.frontend import receptive_field
from ..nn.masks import pooled_length
from ..nn.operating_point import OperatingPoint, OperatingPointSpace
from ..runtime.folder import CONFIG, TOKENS, WEIGHTS, is_model_folder, read_folder
from ..runtime.quantized import INT8, dequantize_

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_READ_BYTES = 1 << 22


class TeacherOutput(NamedTuple):
    """What a teacher says about one batch; everything is fp32 and 0 on padded frames.

    logits: (batch, time, symbols), or None when not asked for.
    hidden: depth (from 0) -> that layer's output (batch, squeezed time, channel).
    lengths, hidden_lengths: (batch,) valid frames of the logits and of the hidden layers.
    hop: samples from one frame of the logits to the next. squeeze: a hidden frame is `hop * squeeze` samples.
    dim: channels of the hidden layers.
    """

    logits: Optional[Tensor]
    hidden: Dict[int, Tensor]
    lengths: Tensor
    hidden_lengths: Tensor
    hop: int
    squeeze: int
    dim: int


class Teacher:
    """A frozen wav2vec 2.0 model, with its CTC projection where logits are needed.

    No nn.Module, so that whoever holds it has neither its weights in a state dict nor its parameters wrapped by DDP.
    It runs without masking, dropout and gradient, with the decided gates if it has any, in its own dtype (autocast does
    not reach it), and moves to the device of the first batch. `layers` may be set later, among 0 to `depth` - 1.

    depth, dim: layers and channels of its Transformer. hop, squeeze: see TeacherOutput. symbols: its dictionary,
    None for a checkpoint without. point: the operating point at which it runs. dtype: its name.
    """

    def __init__(
        self,
        path,
        backbone: Backbone,
        point: OperatingPoint,
        *,
        layers: Sequence[int] = (),
        head: Optional[Dict[str, Tensor]] = None,
        symbols: Optional[List[str]] = None,
        dtype: str = "float32",
        normalizes: bool = False,
        key: str = "criterion.teacher",
    ):
        self.path = str(path)
        self.key = key
        self.point = point
        self.dtype = dtype
        self.symbols = symbols
        self.needs_logits = head is not None
        self.labels = len(head["weight"]) if self.needs_logits else 0
        self.config = backbone.config
        self.depth = self.config.depth
        self.dim = self.config.dim
        self.hop = receptive_field(self.config.conv_layers)[1]
        self.squeeze = point.squeeze
        self.layers = layers
        self._normalizes = normalizes
        parts = {"backbone": backbone}
        if self.needs_logits:
            parts["head"] = nn.Linear(self.dim, self.labels)
            parts["head"].load_state_dict(head)
        self._network = nn.ModuleDict(parts).to(DTYPES[dtype]).eval().requires_grad_(False)
        self._device = torch.device("cpu")

    @classmethod
    def load(
        cls,
        path,
        *,
        layers: Sequence[int] = (),
        needs_logits: bool = False,
        dtype: str = "float32",
        operating_point: str = "",
        symbols: Optional[List[str]] = None,
        normalize: bool = False,
        sample_rate: Optional[int] = None,
        key: str = "criterion.teacher",
    ) -> Teacher:
        """Reads a fairseq checkpoint, stock `wav2vec2` and `wav2vec_ctc` or ours, or a model folder, as a teacher.

        layers: depths, from 0, whose outputs are needed. operating_point: where a stochastic teacher runs; empty: its
        own fixed point, else its least reduction. symbols (None: unlabelled), normalize and sample_rate are the
        student task's. key: the setting that messages name. int8 weights of a folder teach as the floats that they
        stand for. Raises FileNotFoundError, and ValueError for a file that is no such checkpoint, NaN weights, and a
        teacher that does not fit: no CTC head where logits are needed, another dictionary, too few layers, other audio,
        an operating point that it was not trained for.
        """
        if dtype not in DTYPES:
            raise ValueError(f"{key}_dtype: found '{dtype}', expected one of {', '.join(DTYPES)}")
        where = f"{key}: {path}"
        stored = _read_folder(path, key) if Path(path).is_dir() else _read_checkpoint(path, key)
        if needs_logits:
            _check_head(stored, symbols, where)
        return cls(
            path,
            stored.backbone,
            _operating_point(stored.backbone.config.operating_points, operating_point or stored.point, where),
            layers=layers,
            head=stored.head if needs_logits else None,
            symbols=stored.symbols,
            dtype=dtype,
            normalizes=_check_audio(stored, normalize, sample_rate, where),
            key=key,
        )

    @property
    def layers(self) -> Tuple[int, ...]:
        """Depths, from 0, whose outputs are returned; setting raises ValueError for one that there is not."""
        return self._layers

    @layers.setter
    def layers(self, layers: Sequence[int]) -> None:
        for layer in layers:
            if not 0 <= layer < self.depth:
                raise ValueError(
                    f"{self.key}: {self.path} has {self.depth} layers, numbered from 0; found layer {layer}, expected "
                    f"0 to {self.depth - 1}; choose another layer map or a deeper teacher"
                )
        self._layers = tuple(sorted(set(layers)))

    @cached_property
    def content(self) -> str:
        """sha256 of the checkpoint file, or of a folder's files, as hexadecimal digits."""
        digest = hashlib.sha256()
        path = Path(self.path)
        for part in [path / name for name in (CONFIG, TOKENS, WEIGHTS)] if path.is_dir() else [path]:
            with open(part, "rb") as file:
                while block := file.read(_READ_BYTES):
                    digest.update(block)
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """sha256 of all that its outputs depend on besides the audio: checkpoint file, dtype and operating point."""
        # caches of gated teachers were once made without the gates
        gated = " gated" if self.config.prune_units else ""
        return hashlib.sha256(f"{self.content} {self.dtype} {self.point}{gated}".encode()).hexdigest()

    def frames(self, samples):
        """Frames of the logits for `samples` (int or Tensor) of audio."""
        return self.config.frames(samples)

    def hidden_frames(self, frames):
        """Frames of the hidden layers for `frames` (int or Tensor) of the logits."""
        return pooled_length(frames, self.squeeze, self.config.squeeze_tail == "drop")

    @torch.no_grad()
    def __call__(self, source: Tensor, padding_mask: Optional[Tensor] = None) -> TeacherOutput:
        """Listens to `source` (batch, samples); `padding_mask` (batch, samples) bool, True on padding at the end.

        Raises ValueError for audio shorter than a frame, for NaN or infinite results, and for float16 on a CPU.
        """
        self._move_to(source.device)
        lengths = None
        if padding_mask is not None and bool(padding_mask.any()):
            lengths = (~padding_mask.bool()).sum(-1)
        source = source.float()
        if self._normalizes:
            source = _normalized(source, lengths)
        with torch.autocast(source.device.type, enabled=False):
            logits, hidden = self._run(source.to(DTYPES[self.dtype]), lengths)
        if lengths is None:
            lengths = torch.full((len(source),), source.size(1), device=source.device)
        return self._output(logits, hidden, self.frames(lengths))

    def _run(self, source, lengths):
        last_layer = None if self.needs_logits else max(self.layers, default=None)
        encoded, _ = self._network["backbone"].encode(source, lengths, self.point, last_layer=last_layer)
        logits = self._network["head"](encoded.x).float() if self.needs_logits else None
        return logits, {depth: encoded.layers[depth].x.float() for depth in self.layers}

    def _output(self, logits, hidden, lengths: Tensor) -> TeacherOutput:
        hidden_lengths = self.hidden_frames(lengths)
        logits = None if logits is None else self._without_padding(logits, lengths)
        hidden = {depth: self._without_padding(x, hidden_lengths) for depth, x in hidden.items()}
        return TeacherOutput(logits, hidden, lengths, hidden_lengths, self.hop, self.squeeze, self.dim)

    def _without_padding(self, x: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(x.size(1), device=x.device) >= lengths.unsqueeze(1)
        x = x.masked_fill(padding.unsqueeze(-1), 0)
        if not bool(torch.isfinite(x).all()):
            advice = "look for NaN in the audio with `w2v2-light prepare check DATA --deep`"
            if self.dtype == "float16":
                advice = f"float16 overflows here; set {self.key}_dtype to bfloat16 or float32"
            raise ValueError(f"{self.key}: {self.path}: gives NaN or infinite outputs, expected finite ones; {advice}")
        return x

    def _move_to(self, device) -> None:
        if device.type == "cpu" and self.dtype == "float16":
            raise ValueError(f"{self.key}_dtype: found float16 on a CPU, expected float32 or bfloat16 there")
        if device != self._device:
            self._network.to(device)
            self._device = device


class _Stored(NamedTuple):
    """A model as it was stored.

    head: weights of the CTC projection, None for a pre-trained encoder. symbols: its dictionary, None where none is
    stored. normalize, sample_rate: of the audio it was trained on, None: not known. point: its fixed one, or empty.
    """

    backbone: Backbone
    head: Optional[Dict[str, Tensor]]
    symbols: Optional[List[str]]
    normalize: bool
    sample_rate: Optional[int]
    point: str


def _read_checkpoint(path, key: str) -> _Stored:
    checkpoint = load_encoder(path, key)
    where = f"{key}: {path}"
    require_finite_weights(checkpoint.head or {}, where)
    point = checkpoint.cfg.model.operating_point
    return _Stored(
        build_backbone(checkpoint, where),
        checkpoint.head,
        checkpoint.symbols,
        checkpoint.normalizes,
        checkpoint.sample_rate,
        "" if point == STOCHASTIC else point,
    )


def _read_folder(path, key: str) -> _Stored:
    if not is_model_folder(path):
        raise ValueError(
            f"{key}: '{path}' is a folder; expected a fairseq checkpoint file, such as {Path(path) / 'x.pt'}, or a "
            "model folder, as `w2v2-light export` writes it"
        )
    try:
        model = read_folder(path)
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{key}: {error}") from error
    if model.stored_dtype == INT8:
        dequantize_(model)
    head = model.head.state_dict()
    return _Stored(model.backbone, head, model.symbols, model.normalize, model.sample_rate, str(model.point))


def _check_head(stored: _Stored, symbols: Optional[List[str]], where: str) -> None:
    """Raises ValueError unless the model has a CTC head over `symbols` (None: any)."""
    if stored.head is None:
        raise ValueError(
            f"{where} is a pre-trained encoder without labels, and this criterion needs the teacher's logits: expected "
            "a fine-tuned wav2vec_ctc or light_ctc checkpoint; fine-tune the teacher first, or use hidden layers only"
        )
    if symbols is None:
        return
    labels = len(stored.head["weight"])
    found = stored.symbols
    if found is None and labels == len(symbols):
        return
    if found is None:
        raise ValueError(
            f"{where}: has {labels} labels (and no dictionary), the student's dictionary {len(symbols)}; expected the "
            "same; train the student with the dictionary of the teacher's training data"
        )
    if found != symbols:
        index, *differing = first_difference(found, symbols)
        teacher, student = ("nothing" if symbol is None else repr(symbol) for symbol in differing)
        raise ValueError(
            f"{where}: its dictionary ({len(found)} symbols) is not the student's ({len(symbols)} symbols): symbol "
            f"number {index} is {teacher} in the teacher's and {student} in the student's; expected the same; put the "
            "dictionary of the teacher's training data into task.data"
        )


def _check_audio(stored: _Stored, normalize: bool, sample_rate: Optional[int], where: str) -> bool:
    """Whether the teacher has to normalise the student's audio itself; raises ValueError when it cannot be undone."""
    rate = stored.sample_rate
    if None not in (rate, sample_rate) and rate != int(sample_rate):
        raise ValueError(
            f"{where}: was trained on audio of {rate} Hz, but task.sample_rate is {sample_rate}; expected the same; "
            f"set task.sample_rate={rate} and give it such audio, or take another teacher"
        )
    if normalize and not stored.normalize:
        raise ValueError(
            f"{where}: was trained with task.normalize=false, but the student's task.normalize is true, after which "
            "the audio that the teacher needs is gone; set task.normalize=false"
        )
    return stored.normalize and not normalize


def _operating_point(space: OperatingPointSpace, text: str, where: str) -> OperatingPoint:
    """The point that was asked for or is the model's fixed one, else its least reduction."""
    try:
        return space.check(OperatingPoint.parse(text)) if text else space.default
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _normalized(source: Tensor, lengths: Optional[Tensor]) -> Tensor:
    """Zero mean and unit variance of every utterance, as fairseq's task.normalize does; padding stays 0."""
    result = torch.zeros_like(source)
    counts = [source.size(1)] * len(source) if lengths is None else lengths.tolist()
    for row, count in enumerate(counts):
        result[row, :count] = F.layer_norm(source[row, :count], (count,))
    return result
