"""What an update of pre-training costs: ours beside stock fairseq, which has the same recipe without what is ours."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq import utils as fairseq_utils
from fairseq.criterions.wav2vec_criterion import Wav2vecCriterion
from fairseq.data.audio.raw_audio_dataset import RawAudioDataset
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
from omegaconf import OmegaConf
from torch import nn

from ..criterions import LightContrastive
from ..models import W2V2LightModel
from ..models.checkpoint import ENCODER_MODELS, STOCK_ENCODER, model_name
from ..models.recipe import load_recipe
from ..nn.counts import SAMPLE_RATE
from ..runtime.checkpoint import is_checkpoint_file
from ..runtime.folder import is_model_folder
from ..runtime.prepare import require_device
from .bench import timer
from .cost import load_subject
from .resident import added_memory, in_own_process
from .speed import in_turns, torch_threads

# utterances of a batch have such lengths, relative to the shortest: the recipes crop the others to it
LENGTHS = (1.0, 1.3, 1.1, 1.6)
PARTS = ("forward", "backward", "update")


class Side(NamedTuple):
    """A model in training, its criterion and its optimizer."""

    name: str
    model: nn.Module
    criterion: nn.Module
    optimizer: FairseqAdam


def batch(recipe: str, seconds: float, utterances: int, padded: bool = False, device: str = "cpu") -> Dict[str, Any]:
    """Synthetic utterances of different lengths, collated as fairseq does: cropped to the shortest, or padded.

    device: "cpu" or "cuda", where the batch is.
    """
    task = load_recipe(recipe).task
    lengths = [LENGTHS[index % len(LENGTHS)] for index in range(utterances)]
    unit = seconds * SAMPLE_RATE / (max(lengths) if padded else min(lengths)) / utterances
    generator = torch.Generator().manual_seed(0)
    waves = [torch.randn(round(length * unit), generator=generator) for length in lengths]
    dataset = RawAudioDataset(SAMPLE_RATE, pad=padded, normalize=task.normalize)
    samples = [{"id": index, "source": dataset.postprocess(wave, SAMPLE_RATE)} for index, wave in enumerate(waves)]
    return fairseq_utils.apply_to_sample(lambda tensor: tensor.to(device), dataset.collater(samples))


def build(recipe: str, overrides: Sequence[str], stock: bool, device: str = "cpu") -> Side:
    """Model, criterion and optimizer of a recipe: fairseq's own, or ours; the model on a device, "cpu" or "cuda"."""
    subject, settings = load_subject(recipe, list(overrides)), load_recipe(recipe)
    weights = list(settings.criterion.loss_weights)
    torch.manual_seed(0)
    if stock:
        config = Wav2Vec2Config()
        for key, value in subject.model.items():
            if hasattr(config, key) and value is not None:
                setattr(config, key, value)
        model, criterion = Wav2Vec2Model(config), Wav2vecCriterion(None, infonce=True, loss_weights=weights)
    else:
        model = W2V2LightModel(OmegaConf.merge(subject.model, {"operating_point_seed": 1}))
        criterion = LightContrastive(None, loss_weights=weights, collapse_perplexity=0.0)
    options = {key: value for key, value in settings.optimizer.items() if key != "_name"}
    config = OmegaConf.merge(FairseqAdamConfig(), {**options, "tpu": False, "lr": settings.optimization.lr})
    name = "stock fairseq" if stock else "ours"
    model.to(device)
    return Side(name, model.train(), criterion, FairseqAdam(config, list(model.parameters())))


def clip_norm(recipe: str) -> float:
    return float(load_recipe(recipe).optimization.get("clip_norm", 0.0))


def update(
    side: Side, sample: Dict[str, Any], clip: float, clock=time.perf_counter, number: int = 0
) -> Dict[str, float]:
    """One update as fairseq's trainer makes it, of one batch; returns the seconds of its parts (on the CPU).

    number: of the update, from which a stochastic model draws its operating point.
    """
    side.model.set_num_updates(number)
    times = [clock()]
    loss, size, _ = side.criterion(side.model, sample)
    times.append(clock())
    side.optimizer.backward(loss)
    times.append(clock())
    side.optimizer.multiply_grads(1 / size)
    side.optimizer.clip_grad_norm(clip)
    side.optimizer.step()
    side.optimizer.zero_grad()
    times.append(clock())
    return {part: end - start for part, start, end in zip(PARTS, times, times[1:])}


def fixed_loss(side: Side, sample: Dict[str, Any]) -> float:
    """The loss per masked frame without dropout, with every third span of ten frames masked, the same for all."""
    inputs = dict(sample["net_input"])
    side.model.eval()
    with torch.no_grad():
        x = side.model(**inputs, mask=False, features_only=True)["x"]
        inputs["mask_indices"] = (torch.arange(x.size(1), device=x.device) // 10 % 3 == 0).repeat(x.size(0), 1)
        torch.manual_seed(0)
        loss, size, _ = side.criterion(side.model, {**sample, "net_input": inputs})
    side.model.train()
    return float(loss) / float(size)


def peak_memory(
    recipe: str,
    overrides: Sequence[str],
    seconds: float,
    utterances: int,
    threads: int,
    stock: bool = False,
    device: str = "cpu",
) -> Tuple[int, Optional[int]]:
    """The number of parameters, and bytes that a model and two updates of it add at most to a process of their own.

    seconds: of the whole batch. A stochastic model runs at its least reduced point, which takes the most. device: "cpu"
    or "cuda", whose memory is counted; None where the system does not say (anything but Linux).
    """
    return in_own_process(_peak_of_updates, recipe, overrides, seconds, utterances, threads, stock, device)


def _peak_of_updates(recipe, overrides, seconds, utterances, threads, stock, device) -> Tuple[int, Optional[int]]:
    torch.set_num_threads(threads)
    sample = batch(recipe, seconds, utterances, device=device)
    parameters: List[int] = []

    def updates() -> None:
        side = build(recipe, overrides, stock, device)
        if not stock:
            side.model.operating_point = side.model.operating_point or side.model.config.operating_points.default
        for number in range(2):
            update(side, sample, clip_norm(recipe), number=number)
        parameters.append(_parameters(side))

    if device == "cpu":
        added = added_memory(updates)
    else:
        before = torch.cuda.memory_allocated()
        updates()
        added = torch.cuda.max_memory_allocated() - before
    return parameters[0], added


def _parameters(side: Side) -> int:
    return sum(parameter.numel() for parameter in side.model.parameters())


@dataclass(frozen=True)
class UpdateRow:
    """Updates of one side: seconds (median and least), memory, and how it compares with the first row.

    peak_bytes: see `peak_memory`. difference: of the loss without dropout, relative to the first row's; None where the
    weights are not the same.
    """

    name: str
    parameters: int
    median: float
    least: float
    updates_per_second: float
    peak_bytes: Optional[int]
    speed_up: float
    difference: Optional[float]


def compare_updates(
    recipe: str,
    overrides: Sequence[str] = (),
    seconds: float = 10.0,
    utterances: int = 1,
    threads: int = 1,
    updates: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    memory: bool = True,
    device: str = "cpu",
) -> List[UpdateRow]:
    """Complete updates of stock fairseq and of ours in turns (forward, backward, gradient norm, Adam); their memory.

    Both have the recipe's shape, hear the same noise, `utterances` of `seconds`, and run every layer in every update.
    Where ours shares or squeezes nothing, they have the same weights, too; where it is stochastic, every update draws
    an operating point. device: "cpu" or "cuda". Raises ValueError for anything but a recipe of one of our pre-training
    models, and for a GPU that is not there.
    """
    require_device(device)
    if seconds <= 0 or updates < 1 or utterances < 1:
        raise ValueError(
            f"training: found {updates} updates of {utterances} utterances of {seconds:g} s, expected more than 0"
        )
    _require_pretraining(recipe)
    with torch_threads(threads):
        return _compare_updates(recipe, overrides, seconds, utterances, threads, updates, clock, memory, device)


def _compare_updates(
    recipe, overrides, seconds, utterances, threads, updates, clock, memory, device
) -> List[UpdateRow]:
    overrides = ("model.encoder_layerdrop=0.0", *overrides) if not _sets_layerdrop(overrides) else tuple(overrides)
    sample, clip = batch(recipe, seconds * utterances, utterances, device=device), clip_norm(recipe)
    _require_frames(recipe, overrides, sample)
    sides = [build(recipe, overrides, stock, device) for stock in (True, False)]
    states = [side.model.state_dict() for side in sides]
    same = {name: value.shape for name, value in states[0].items()} == {
        name: value.shape for name, value in states[1].items()
    }
    losses: List[Optional[float]] = [None, None]
    if same and not sides[1].model.config.operating_points.is_stochastic:
        sides[1].model.load_state_dict(states[0])
        losses = [fixed_loss(side, sample) for side in sides]

    numbers = {side.name: itertools.count() for side in sides}
    calls = {side.name: lambda side=side: update(side, sample, clip, number=next(numbers[side.name])) for side in sides}
    times = in_turns({name: timer(call, clock) for name, call in calls.items()}, updates)
    counts = [_parameters(side) for side in sides]
    names = [side.name for side in sides]
    del sides, states, calls  # before other processes need memory
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
    peaks: List[Optional[int]] = [None, None]
    if memory:
        arguments = (recipe, overrides, seconds * utterances, utterances, threads)
        peaks = [peak_memory(*arguments, stock=stock, device=device)[1] for stock in (True, False)]
    medians = [statistics.median(times[name]) for name in names]
    return [
        UpdateRow(
            name=name,
            parameters=count,
            median=median,
            least=min(times[name]),
            updates_per_second=1 / median,
            peak_bytes=peak,
            speed_up=medians[0] / median,
            difference=None if loss is None else abs(loss / losses[0] - 1),
        )
        for name, count, median, peak, loss in zip(names, counts, medians, peaks, losses)
    ]


def _sets_layerdrop(overrides: Sequence[str]) -> bool:
    return any(override.startswith("model.encoder_layerdrop=") for override in overrides)


def _require_pretraining(recipe: str) -> None:
    if is_model_folder(recipe) or is_checkpoint_file(recipe):
        raise ValueError(
            f"'{recipe}': a trained model; updates are timed from random weights, expected a pre-training recipe"
        )
    settings = load_recipe(recipe)
    if model_name(settings) not in (STOCK_ENCODER, *ENCODER_MODELS):
        raise ValueError(
            f"'{recipe}': a recipe of model '{model_name(settings)}', expected pre-training, one of "
            f"{', '.join(ENCODER_MODELS)}"
        )


def _require_frames(recipe: str, overrides: Sequence[str], sample: Dict[str, Any]) -> None:
    """Masks need room."""
    subject = load_subject(recipe, list(overrides))
    frames, span = subject.network.frames(sample["net_input"]["source"].size(1)), subject.model.mask_length
    if frames <= span:
        raise ValueError(
            f"training: the shortest utterance has {frames} frames, expected more than a mask, {span}; choose more "
            "seconds"
        )


def format_updates(rows: Sequence[UpdateRow]) -> str:
    """A Markdown table."""
    lines = [
        "| update | s, median | s, min | updates / s | M parameters | peak MiB | speed-up | loss, difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        difference = "" if row.difference is None else f"{row.difference:.1e}"
        lines.append(
            f"| {row.name} | {row.median:.3f} | {row.least:.3f} | {row.updates_per_second:.3f} "
            f"| {row.parameters / 1e6:.2f} | {peak} | {row.speed_up:.2f} | {difference} |"
        )
    return "\n".join(lines)
