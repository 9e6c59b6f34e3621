"""How fast a CTC checkpoint transcribes on this machine."""

import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import numpy as np
import soundfile
import torch
from torch import Tensor

from ..data.manifest import read_manifest
from ..nn.operating_point import OperatingPoint
from ..runtime.ctc import CtcModel
from ..runtime.load import load_ctc
from ..runtime.pack import pack_

# frames of a typical utterance, 10 s, for which weights are laid out
_ROWS = 500


def load_packed(checkpoint) -> CtcModel:
    """The CTC model of a checkpoint or model folder as the runtime runs it, its weights laid out for this CPU."""
    model = load_ctc(checkpoint)
    pack_(model, _ROWS)
    return model


def read_audio(data, split: str, utterances: int, seconds: float = 0.0) -> List[Tensor]:
    """The first utterances of a split, each (1, samples); with `seconds`, joined and cut into pieces of that length.

    Of joined ones the last piece is left out where it is shorter, unless it is the only one.
    """
    manifest = read_manifest(Path(data) / f"{split}.tsv")
    waves = []
    for entry in manifest.entries[:utterances]:
        samples, rate = soundfile.read(str(Path(manifest.root) / entry.path), dtype="float32")
        waves.append(samples)
    if seconds:
        length = round(seconds * rate)
        joined = np.concatenate(waves)
        waves = [joined[start : start + length] for start in range(0, max(len(joined) - length, 0) + 1, length)]
    return [torch.from_numpy(wave).unsqueeze(0) for wave in waves]


def real_time_factors(
    checkpoint, data, split: str, points: Sequence[str], utterances: int = 20, repeats: int = 5
) -> Dict[str, float]:
    """Seconds of compute per second of audio at each operating point: median of interleaved repeats, batch size 1.

    From waveform to CTC logits, on the CPU with torch's current number of threads.
    """
    model = load_packed(checkpoint)
    waves = read_audio(data, split, utterances)
    return _interleaved({point: _transcriber(model, waves, OperatingPoint.parse(point)) for point in points}, repeats)


def compare_real_time_factors(
    checkpoints: Mapping[str, Any], data, split: str, utterances: int = 100, repeats: int = 9, seconds: float = 10.0
) -> Dict[str, float]:
    """As `real_time_factors`, of several models by name, each at its own operating point, on pieces of `seconds`.

    MACs, to compare with, are those of 10 s: attention has more of them the longer the audio is.
    """
    waves = read_audio(data, split, utterances, seconds)
    models = {name: load_packed(checkpoint) for name, checkpoint in checkpoints.items()}
    return _interleaved({name: _transcriber(model, waves) for name, model in models.items()}, repeats)


def _transcriber(model: CtcModel, waves: List[Tensor], point: Optional[OperatingPoint] = None) -> Callable[[], float]:
    """A function that transcribes all of `waves` and returns its real-time factor."""
    audio = sum(wave.size(1) for wave in waves) / model.sample_rate

    def transcribe() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for wave in waves:
                model(wave, point=point)
        return (time.perf_counter() - start) / audio

    return transcribe


def _interleaved(measure: Mapping[str, Callable[[], float]], repeats: int) -> Dict[str, float]:
    """The median of each function's results, in turns."""
    return {name: statistics.median(values) for name, values in in_turns(measure, repeats).items()}


def in_turns(measure: Mapping[Any, Callable[[], float]], repeats: int) -> Dict[Any, List[float]]:
    """Each function's `repeats` results, after one that does not count; in turns, so that noise is shared."""
    measured: Dict[Any, List[float]] = {name: [] for name in measure}
    for repeat in range(repeats + 1):
        for name, run in measure.items():
            result = run()
            if repeat:
                measured[name].append(result)
    return measured
