"""How fast a CTC checkpoint transcribes on this machine."""

import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import soundfile
import torch
import torch.nn.functional as F
from fairseq import checkpoint_utils

from ..data.manifest import read_manifest
from ..nn.operating_point import OperatingPoint


def load_ctc(checkpoint):
    """The CTC model of a checkpoint, ready for inference, and whether it wants normalised audio."""
    models, cfg, _ = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    return models[0].eval(), bool(cfg.task.get("normalize", False))


def read_utterances(data, split: str, limit: int, normalize: bool) -> List[torch.Tensor]:
    """The first `limit` utterances of a split, each (1, samples)."""
    manifest = read_manifest(Path(data) / f"{split}.tsv")
    waves = []
    for entry in manifest.entries[:limit]:
        samples, _ = soundfile.read(str(Path(manifest.root) / entry.path), dtype="float32")
        wave = torch.from_numpy(samples)
        waves.append((F.layer_norm(wave, wave.shape) if normalize else wave).unsqueeze(0))
    return waves


def real_time_factors(
    checkpoint, data, split: str, points: Sequence[str], utterances: int = 20, repeats: int = 5
) -> Dict[str, float]:
    """Seconds of compute per second of audio at each operating point: median of interleaved repeats, batch size 1.

    From waveform to CTC logits, on the CPU with torch's current number of threads.
    """
    model, normalize = load_ctc(checkpoint)
    waves = read_utterances(data, split, utterances, normalize)
    return _interleaved({point: _transcriber(model, waves, OperatingPoint.parse(point)) for point in points}, repeats)


def compare_real_time_factors(
    checkpoints: Mapping[str, Any], data, split: str, utterances: int = 20, repeats: int = 5
) -> Dict[str, float]:
    """As `real_time_factors`, of several models by name, each at its own operating point."""
    transcribers = {}
    for name, checkpoint in checkpoints.items():
        model, normalize = load_ctc(checkpoint)
        transcribers[name] = _transcriber(model, read_utterances(data, split, utterances, normalize))
    return _interleaved(transcribers, repeats)


def _transcriber(model, waves: List[torch.Tensor], point: Optional[OperatingPoint] = None) -> Callable[[], float]:
    """A function that transcribes all of `waves` and returns its real-time factor."""
    encoder = model.w2v_encoder
    audio = sum(wave.size(1) for wave in waves) / 16000

    def transcribe() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for wave in waves:
                encoder.proj(encoder.w2v_model.extract_features(wave, None, operating_point=point)["x"])
        return (time.perf_counter() - start) / audio

    return transcribe


def _interleaved(measure: Mapping[str, Callable[[], float]], repeats: int) -> Dict[str, float]:
    """The median of each function's results, after one that does not count; in turns, so that noise is shared."""
    for run in measure.values():
        run()
    measured = {name: [] for name in measure}
    for _ in range(repeats):
        for name, run in measure.items():
            measured[name].append(run())
    return {name: statistics.median(values) for name, values in measured.items()}
