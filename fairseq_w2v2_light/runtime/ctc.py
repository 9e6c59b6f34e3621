"""wav2vec 2.0 with a CTC head, for inference: what checkpoints and model folders are loaded into."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Callable, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.backbone import Backbone
from ..nn.config import EncoderConfig
from ..nn.exporting import is_exporting
from ..nn.frontend import receptive_field
from ..nn.operating_point import OperatingPoint


class CtcModel(nn.Module):
    """wav2vec 2.0 with a CTC head: waveform in, logits out.

    config: the network. symbols: the label of each logit; index 0 is the blank. normalize: whether the model expects
    utterances of zero mean and unit variance, which `forward` then makes of them. sample_rate: of the audio, in Hz.
    point: the operating point to run at; the one with the least reduction by default. Raises ValueError for a point
    that the model was not trained for.

    stored_dtype: of the weights in the file that the model was read from. prepared: whether it was laid out for fast
    inference (runtime/prepare.py), and has not the weights any more that it was loaded with. input_dtype: of the audio
    that the network hears, after it was normalised; None: as it is given.
    """

    blank = 0
    stored_dtype = "float32"
    prepared = False
    input_dtype: Optional[torch.dtype] = None

    def __init__(
        self,
        config: EncoderConfig,
        symbols: Sequence[str],
        normalize: bool = False,
        sample_rate: int = 16000,
        point: Optional[OperatingPoint] = None,
    ):
        super().__init__()
        self.backbone = Backbone(config)
        self.head = nn.Linear(config.dim, len(symbols))
        self.symbols: List[str] = list(symbols)
        self.normalize = normalize
        self.sample_rate = sample_rate
        self.point = config.operating_points.default if point is None else config.operating_points.check(point)

    @property
    def config(self) -> EncoderConfig:
        """The network."""
        return self.backbone.config

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return receptive_field(self.config.conv_layers)[1]

    def forward(
        self, wave: Tensor, lengths: Optional[Tensor] = None, point: Optional[OperatingPoint] = None
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Logits (batch, time, labels) of `wave` (batch, samples), and the valid frames of each row (batch,).

        lengths: (batch,) valid samples of each row; None: all, and then the second result is None, too. What stands
        after the valid samples and frames has no meaning. point: None is the model's own. Raises ValueError for audio
        that is not finite or too short for one frame, and for a point that the model was not trained for.
        """
        lengths = _check_lengths(wave, lengths)
        heard = normalized(wave, lengths) if self.normalize else wave
        if not is_exporting():
            # what is not finite makes all of a row NaN when it is normalised
            _check_finite(wave, heard[:, :1] if self.normalize else heard)
        wave = heard if self.input_dtype is None else heard.to(self.input_dtype)
        point = self.point if point is None else point
        encoded, mask = self.backbone.encode(wave, lengths, point, keep_layers=False)
        logits = self.head(encoded.x)
        if lengths is None:
            return logits, None
        if mask is None:
            return logits, torch.full_like(lengths, logits.size(1))
        return logits, mask.valid.sum(1)


def normalized(wave: Tensor, lengths: Optional[Tensor] = None) -> Tensor:
    """`wave` (batch, samples) with mean 0 and variance 1 over the valid samples of each row, 0 after them.

    fairseq's task.normalize: F.layer_norm of the utterance, its eps of 1e-5 included.
    """
    if lengths is None:
        return F.layer_norm(wave, wave.shape[-1:])
    valid = torch.arange(wave.size(1), device=wave.device) < lengths.unsqueeze(1)
    count = lengths.unsqueeze(1)
    centred = (wave - (wave * valid).sum(1, keepdim=True) / count) * valid
    return centred * (centred.square().sum(1, keepdim=True) / count + 1e-5).rsqrt()


def _check_finite(wave: Tensor, sample: Tensor) -> None:
    """Raises ValueError where `wave` (batch, samples) is not finite; `sample`: values that it would have spoilt."""
    # the sum of finite samples is finite, unless they are huge: looking at each takes ten times as long
    if math.isfinite(float(sample.sum())):
        return
    rows = (~torch.isfinite(wave).all(dim=1)).nonzero().flatten().tolist()
    if rows:
        raise ValueError(f"audio: NaN or infinite samples in row(s) {rows} of the batch, expected finite samples")


def _check_lengths(wave: Tensor, lengths: Optional[Tensor]) -> Optional[Tensor]:
    """`lengths` on the device of `wave`; raises ValueError unless both have shapes that can be run."""
    if wave.dim() != 2 or wave.size(0) == 0 or not wave.is_floating_point():
        raise ValueError(f"audio: found {wave.dtype} of shape {tuple(wave.shape)}, expected floats (batch, samples)")
    if is_exporting():
        return lengths
    if lengths is None:
        return None
    if lengths.shape != wave.shape[:1] or int(lengths.max()) > wave.size(1):
        raise ValueError(
            f"lengths: found {lengths.tolist()}, expected one number of samples for each of {wave.size(0)} rows, at "
            f"most {wave.size(1)}"
        )
    return lengths.to(wave.device)


_CHANGED = "the file was changed, or made by code that has another network under this name"


def check_weights(model: CtcModel, weights: Mapping[str, Any], path: Path, name_of: Callable[[str], str] = str) -> None:
    """Raises ValueError that names the first parameter which is missing, too many, or of another shape or kind.

    weights: by the names of the file `path`, which `name_of` gives for the model's own; tensors.
    """
    expected = {name_of(name): value for name, value in model.state_dict().items()}
    missing = [name for name in expected if name not in weights]
    if missing:
        raise ValueError(f"{path}: parameter '{missing[0]}' is missing ({len(missing)} in all); {_CHANGED}")
    unexpected = [name for name in weights if name not in expected]
    if unexpected:
        raise ValueError(
            f"{path}: parameter '{unexpected[0]}' has no place in the network that the configuration describes "
            f"({len(unexpected)} in all); {_CHANGED}"
        )
    for name, parameter in expected.items():
        value = weights[name]
        found = value.dtype if torch.is_tensor(value) else type(value).__name__
        fits = torch.is_tensor(value) and value.is_floating_point()
        if not (fits if parameter.is_floating_point() else found == parameter.dtype):
            kind = "floats" if parameter.is_floating_point() else str(parameter.dtype)
            raise ValueError(f"{path}: parameter '{name}': found {found}, expected a tensor of {kind}; {_CHANGED}")
        if value.shape != parameter.shape:
            raise ValueError(
                f"{path}: parameter '{name}': found shape {tuple(value.shape)}, but the configuration asks for "
                f"{tuple(parameter.shape)}; {_CHANGED}"
            )


def require_finite(model: CtcModel, path: Path, name_of: Callable[[str], str] = str) -> None:
    """Raises ValueError that names the first parameter with NaN or infinite values, as the file `path` names it."""
    for name, value in model.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{path}: parameter '{name_of(name)}' has NaN or infinite values, expected finite ones: "
                "training diverged; take an earlier checkpoint, or train again with a lower learning rate"
            )
