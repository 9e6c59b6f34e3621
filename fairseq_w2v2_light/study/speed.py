"""How fast CTC models transcribe on this machine. Without fairseq."""

import contextlib
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..data.references import read_references
from ..nn.operating_point import OperatingPoint
from ..runtime.audio import wav_blocks
from ..runtime.ctc import CtcModel
from ..runtime.load import load_ctc
from ..runtime.pack import pack_

Result = TypeVar("Result")
# frames of a typical utterance, 10 s, for which weights are laid out
_ROWS = 500


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes with `count` threads inside, and with as many as before after that."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_packed(checkpoint) -> CtcModel:
    """The CTC model of a checkpoint or model folder as the runtime runs it, its weights laid out for this CPU."""
    model = load_ctc(checkpoint)
    pack_(model, _ROWS)
    return model


def interleaved_factors(
    runs: Mapping[Any, Tuple[CtcModel, Optional[OperatingPoint]]],
    paths: Sequence[Path],
    seconds: float = 10.0,
    pieces: int = 3,
    repeats: int = 7,
) -> Dict[Any, float]:
    """Seconds of compute per second of audio of models (prepared or packed) at operating points (None: their own).

    On the same `pieces` of `seconds` of the audio files `paths`, one by one, from waveform to CTC logits, on the CPU
    with torch's current number of threads; median of `repeats` in turns.
    """
    rates = {model.sample_rate for model, _ in runs.values()}
    waves = {rate: read_pieces(paths, seconds, pieces, rate) for rate in rates}
    return _interleaved(
        {name: _transcriber(model, waves[model.sample_rate], point) for name, (model, point) in runs.items()}, repeats
    )


def read_pieces(paths: Sequence[Path], seconds: float, pieces: int, sample_rate: int) -> List[Tensor]:
    """`pieces` of audio files joined, each (1, samples) and exactly `seconds` long; where the audio ends, from its
    beginning again. Reads no more files than it needs."""
    length = round(seconds * sample_rate)
    blocks: List[np.ndarray] = []
    for path in paths:
        blocks.extend(wav_blocks(path, 1.0, sample_rate))
        if sum(map(len, blocks)) >= pieces * length:
            break
    if not blocks:
        raise ValueError(f"{paths[0]}: no samples in it, nor in the other files; the speed is measured on speech")
    return list(torch.from_numpy(np.resize(np.concatenate(blocks), (pieces, 1, length))))


def compare_real_time_factors(
    checkpoints: Mapping[str, Any], data, split: str, seconds: float = 10.0, pieces: int = 20, repeats: int = 9
) -> Dict[str, float]:
    """As `interleaved_factors`, of checkpoints or model folders by name on a split of a manifest folder.

    MACs, to compare with, are those of 10 s: attention has more of them the longer the audio is.
    """
    runs = {name: (load_packed(checkpoint), None) for name, checkpoint in checkpoints.items()}
    paths = [reference.path for reference in read_references(Path(data), split)]
    return interleaved_factors(runs, paths, seconds, pieces, repeats)


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


def in_turns(measure: Mapping[Any, Callable[[], Result]], repeats: int) -> Dict[Any, List[Result]]:
    """Each function's `repeats` results, after one that does not count; in turns, so that noise is shared."""
    measured: Dict[Any, List[Result]] = {name: [] for name in measure}
    for repeat in range(repeats + 1):
        for name, run in measure.items():
            result = run()
            if repeat:
                measured[name].append(result)
    return measured
