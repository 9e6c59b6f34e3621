"""How stable representations are across depth: how much each layer changes its input, and how alike the layers are.

Our reading of an analysis that W2V2-Light's abstract (Kim et al., Interspeech 2022) names: it quantifies the stability
of representations to explain why layers can share weights, and how it does is not public. ALBERT (arXiv 1909.11942),
which shares layers too, looks at the distance and the cosine between the input and the output of each; we add linear
CKA (Kornblith et al., arXiv 1905.00414), which does not see rotations and scales, between any two depths.
"""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..files import atomic_path
from ..nn.backbone import Backbone
from ..nn.counts import SAMPLE_RATE
from ..nn.frontend import receptive_field
from ..nn.operating_point import OperatingPoint
from ..runtime.audio import wav_blocks
from ..runtime.checkpoint import is_checkpoint_file
from ..runtime.ctc import normalized
from ..runtime.folder import is_model_folder, read_folder
from ..runtime.quantized import INT8, dequantize_
from .cost import load_subject, operating_point
from .plot import literal, load_pyplot

READING = "our reading of W2V2-Light's stability analysis, whose measure is not public"
UNDEFINED = "undefined"
# seconds of audio that the network hears at once
LONGEST = 20.0
_NOISES = 5
_NOISE_SECONDS = 10
# bytes of the sums of one pass over the audio
_MEMORY = 1 << 30
# a deviation of this part of the magnitude is the rounding of fp32: the representation is constant
_ROUNDING = 1e-6

Pair = Tuple[int, int]
# sample rate -> waveforms (1, samples), the same ones in each call
Waves = Callable[[int], Iterable[Tensor]]


class CrossCovariances:
    """Sums over frames from which linear CKA follows, in float64, for representations that come piece by piece.

    pairs: which two of the representations given to `add` each sum is of. Memory: channels^2 a pair, however many
    frames there are.
    """

    def __init__(self, pairs: Sequence[Pair]):
        self.pairs = list(pairs)
        self.frames = 0
        self._indices = sorted({index for pair in self.pairs for index in pair})
        self._origins: Dict[int, Tensor] = {}
        self._sums: Dict[int, Tensor] = {}
        self._products: Dict[Pair, Tensor] = {}

    def add(self, states: Sequence[Tensor]) -> None:
        """Takes the next frames of each representation, (frames, channel); raises ValueError for unequal numbers."""
        frames = len(states[0])
        if any(len(state) != frames for state in states):
            raise ValueError(
                f"found {[len(state) for state in states]} frames, expected as many of each representation"
            )
        if not frames:
            return
        moved = {}
        for index in self._indices:
            state = states[index].double()
            # from the first frame: of a mean that is large beside the deviations little would remain
            origin = self._origins.setdefault(index, state[0].clone())
            moved[index] = state - origin
            self._sums[index] = self._sums.get(index, 0) + moved[index].sum(0)
        for one, other in self.pairs:
            product = moved[one].T @ moved[other]
            self._products[one, other] = product.add_(self._products.get((one, other), 0))
        self.frames += frames

    def strengths(self) -> Dict[Pair, float]:
        """HSIC of each pair but for a factor, ||X^T Y||_F^2 of centred X and Y; 0 of a constant one with itself."""
        found = {}
        for one, other in self.pairs:
            covariance = self._products[one, other] - torch.outer(self._sums[one], self._sums[other]) / self.frames
            constant = one == other and self._is_constant(one, covariance)
            found[one, other] = 0.0 if constant else float(covariance.square().sum())
        return found

    def _is_constant(self, index: int, covariance: Tensor) -> bool:
        mean = self._origins[index] + self._sums[index] / self.frames
        return float(covariance.trace()) / self.frames <= _ROUNDING**2 * float(mean.square().sum())


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two representations (frames, channel) of the same frames, 0 to 1; NaN where one is constant.

    ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F) of centred X and Y (Kornblith et al., arXiv 1905.00414, section 3). Of one
    frame nothing is known: NaN.
    """
    sums = CrossCovariances(_pairs(2))
    sums.add([x, y])
    return _cka(sums.strengths(), 0, 1) if sums.frames else math.nan


def _pairs(count: int) -> List[Pair]:
    """All pairs of `count` representations; each with itself first."""
    return [(i, i) for i in range(count)] + [(i, j) for i in range(count) for j in range(i + 1, count)]


def _cka(strengths: Dict[Pair, float], one: int, other: int) -> float:
    scale = math.sqrt(strengths[one, one]) * math.sqrt(strengths[other, other])
    # rounding may lead beyond 1
    return min(1.0, strengths[min(one, other), max(one, other)] / scale) if scale else math.nan


class Changes:
    """Means over frames of what layers do to their input: cosine, relative change and distance."""

    def __init__(self):
        self._sums: Dict[Tuple[str, int], float] = {}
        self._counts: Dict[Tuple[str, int], int] = {}

    def add(self, states: Sequence[Tensor]) -> None:
        """Takes the next frames of the input of the first layer and the outputs of all, (frames, channel) each."""
        for depth, (before, after) in enumerate(zip(states, states[1:])):
            before, after = before.double(), after.double()
            size, new_size = before.norm(dim=1), after.norm(dim=1)
            distance = (after - before).norm(dim=1)
            self._note("distance", depth, distance)
            self._note("relative_change", depth, (distance / size)[size > 0])
            self._note("cosine", depth, ((before * after).sum(1) / (size * new_size))[(size > 0) & (new_size > 0)])

    def _note(self, name: str, depth: int, values: Tensor) -> None:
        self._sums[name, depth] = self._sums.get((name, depth), 0.0) + float(values.sum())
        self._counts[name, depth] = self._counts.get((name, depth), 0) + len(values)

    def mean(self, name: str, depth: int) -> float:
        """The mean of "cosine", "relative_change" or "distance"; frames of zeros, which have no direction, left out.

        NaN where there are no others.
        """
        count = self._counts.get((name, depth), 0)
        return self._sums[name, depth] / count if count else math.nan


@dataclass
class StudiedModel:
    """A model whose layers are compared. trained: False with random weights, of a recipe."""

    name: str
    backbone: Backbone
    point: OperatingPoint
    normalizes: bool = False
    sample_rate: int = SAMPLE_RATE
    trained: bool = True


@dataclass(frozen=True)
class LayerChange:
    """What the layer at a depth (from 0) does to its input, means over frames; NaN: undefined.

    stored: the stored layer that runs there. cosine: between a frame before and after. cka: linear, of all frames.
    relative_change: |after - before| / |before|. distance: |after - before|.
    """

    depth: int
    stored: int
    cosine: float
    cka: float
    relative_change: float
    distance: float


@dataclass(frozen=True)
class Stability:
    """How stable a model's representations are.

    layers: one for each depth. matrix: linear CKA of (the input of the first layer, the output of each depth) with
    themselves, depth + 1 rows; NaN: undefined. frames: that the Transformer ran, at its squeezed rate. norm: where its
    LayerNorms stand.
    """

    name: str
    trained: bool
    operating_point: str
    unique_layers: int
    attention_maps: int
    norm: str
    frames: int
    seconds: float
    layers: List[LayerChange]
    matrix: List[List[float]]

    def mean(self, name: str) -> float:
        """The mean of a number over the depths where it is defined."""
        values = [value for value in (getattr(layer, name) for layer in self.layers) if not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan


def load_model(source: str, overrides: Sequence[str] = (), point: str = "", name: str = "") -> StudiedModel:
    """Reads a pre-trained or fine-tuned checkpoint, a model folder, or a recipe, which gets random weights (seed 0).

    overrides: `model.KEY=VALUE` of a recipe. point: the operating point (empty: the model's own). Raises as
    `load_subject` does, and ValueError for overrides of what is trained and a point that it was not trained for.
    """
    name = name or " ".join([source, *overrides])
    if is_model_folder(source):
        _refuse_overrides(source, overrides)
        model = read_folder(source)
        if model.stored_dtype == INT8:
            dequantize_(model)
        chosen = _point(source, model.backbone, point or str(model.point))
        return StudiedModel(name, model.backbone, chosen, model.normalize, model.sample_rate)
    if is_checkpoint_file(source):
        _refuse_overrides(source, overrides)
        # fairseq's; a folder needs no fairseq
        from ..models.checkpoint import load_encoder
        from ..models.w2v2_light import STOCHASTIC, build_backbone

        checkpoint = load_encoder(source)
        backbone = build_backbone(checkpoint, source).eval().requires_grad_(False)
        own = checkpoint.cfg.model.operating_point
        chosen = _point(source, backbone, point or ("" if own == STOCHASTIC else own))
        return StudiedModel(name, backbone, chosen, checkpoint.normalizes, checkpoint.sample_rate or SAMPLE_RATE)
    subject = load_subject(source, list(overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = Backbone(subject.network).eval().requires_grad_(False)
    try:
        chosen = operating_point(subject, point)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return StudiedModel(name, backbone, chosen, subject.normalizes, trained=False)


def _refuse_overrides(source: str, overrides: Sequence[str]) -> None:
    if overrides:
        raise ValueError(f"'{source}': its weights fit the network that it has; leave out {' '.join(overrides)}")


def _point(source: str, backbone: Backbone, text: str) -> OperatingPoint:
    points = backbone.config.operating_points
    try:
        return points.check(OperatingPoint.parse(text)) if text else points.default
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


@torch.no_grad()
def layer_states(
    backbone: Backbone, wave: Tensor, point: OperatingPoint, lengths: Optional[Tensor] = None
) -> List[Tensor]:
    """The input of the first layer and the output of each, (frames, channel), valid frames only, of all rows in turn.

    wave: (batch, samples), of which `lengths` (batch,) are valid (None: all). Frames are at the squeezed rate.
    """
    entered: List[Tensor] = []
    first = backbone.encoder.layers[backbone.config.layer_map[0]]
    hook = first.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    try:
        encoded, _ = backbone.encode(wave, lengths, point)
    finally:
        hook.remove()
    # copies for a look-ahead stand behind the frames
    time = encoded.layers[0].x.size(1)
    states = [entered[0][:, :time], *(layer.x for layer in encoded.layers)]
    mask = encoded.squeezed_mask
    return [state.flatten(0, 1) if mask is None else state[mask.valid] for state in states]


def stability(model: StudiedModel, waves: Waves, memory: int = _MEMORY) -> Stability:
    """Runs a model over audio and compares its layers.

    memory: bytes that the sums of cross-covariances may take; where all pairs of layers need more, the audio is heard
    as often as it takes. Raises ValueError for audio that is all too short, and for outputs that are not finite.
    """
    config = model.backbone.config
    count = config.depth + 1
    changes, strengths, frames, samples = Changes(), {}, 0, 0
    for number, pairs in enumerate(_passes(_pairs(count), max(1, memory // (8 * config.dim**2)))):
        sums = CrossCovariances(pairs)
        for wave in _long_enough(model, waves):
            states = layer_states(model.backbone, normalized(wave) if model.normalizes else wave, model.point)
            if not bool(torch.isfinite(states[-1]).all()):
                raise ValueError(f"{model.name}: gives NaN or infinite outputs, expected finite ones")
            sums.add(states)
            if number == 0:
                changes.add(states)
                samples += wave.size(1)
        frames = sums.frames
        if not frames:
            raise ValueError(f"{model.name}: none of the audio is long enough for one frame; give longer utterances")
        strengths.update(sums.strengths())
    matrix = [[_cka(strengths, one, other) for other in range(count)] for one in range(count)]
    layers = [
        LayerChange(
            depth,
            stored,
            changes.mean("cosine", depth),
            matrix[depth][depth + 1],
            changes.mean("relative_change", depth),
            changes.mean("distance", depth),
        )
        for depth, stored in enumerate(config.layer_map)
    ]
    return Stability(
        model.name,
        model.trained,
        str(model.point),
        config.unique_layers,
        -(-config.depth // config.attention_map_every),
        "pre-LN" if config.norm_first else "post-LN",
        frames,
        samples / model.sample_rate,
        layers,
        matrix,
    )


def _passes(pairs: List[Pair], most: int) -> Iterator[List[Pair]]:
    for start in range(0, len(pairs), most):
        yield pairs[start : start + most]


def _long_enough(model: StudiedModel, waves: Waves) -> Iterator[Tensor]:
    config = model.backbone.config
    fewest = receptive_field(config.conv_layers)[0] - config.frontend_padding
    return (wave for wave in waves(model.sample_rate) if wave.size(1) >= fewest)


def speech(paths: Sequence[Path]) -> Waves:
    """The audio of files, in pieces of at most 20 s."""

    def waves(sample_rate: int) -> Iterator[Tensor]:
        for path in paths:
            for block in wav_blocks(path, LONGEST, sample_rate):
                yield torch.from_numpy(block).unsqueeze(0)

    return waves


def noise(sample_rate: int) -> Iterator[Tensor]:
    """White noise, 50 s in pieces of 10 s, always the same."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(_NOISES):
        yield 0.1 * torch.randn(1, _NOISE_SECONDS * sample_rate, generator=generator)


_COLUMNS = {"cosine": "cosine", "cka": "CKA", "relative_change": "change"}


def format_stability(results: Sequence[Stability], audio: str) -> str:
    """Two Markdown tables: a row a model, and a row a depth with the models side by side. audio: what was heard."""
    heads = ["model", "layers", "stored", "maps", "norms", "point", "frames", "mean cosine", "mean CKA", "mean change"]
    lines = [
        f"Stability of representations across depth, over {audio}: {READING}.",
        "",
        _row([*heads, "CKA of first input and last output"]),
        _row(["---"] * (len(heads) + 1)),
    ]
    for result in results:
        name = result.name if result.trained else f"{result.name} (random weights)"
        sizes = [len(result.layers), result.unique_layers, result.attention_maps]
        means = [_number(result.mean(column)) for column in _COLUMNS]
        texts = [result.norm, result.operating_point, f"{result.frames:,}", *means, _number(result.matrix[0][-1])]
        lines.append(_row([name, *map(str, sizes), *texts]))
    several = len(results) > 1
    heads = [f"{result.name}: {text}" if several else text for result in results for text in _COLUMNS.values()]
    lines += ["", _row(["depth", *heads]), _row(["---"] * (len(heads) + 1))]
    for depth in range(max(len(result.layers) for result in results)):
        cells = []
        for result in results:
            layer = result.layers[depth] if depth < len(result.layers) else None
            cells += ["" if layer is None else _number(getattr(layer, column)) for column in _COLUMNS]
        lines.append(_row([str(depth), *cells]))
    return "\n".join(
        [
            *lines,
            "",
            "cosine, change: between input and output of the layer at that depth, |output - input| / |input|, mean "
            "over frames; CKA: linear, of the two. Where LayerNorms stand changes what is alike: pre-LN layers add to "
            "a stream that grows, post-LN ones are normalised after each addition.",
        ]
    )


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(value: float) -> str:
    return UNDEFINED if math.isnan(value) else f"{value:.4f}"


def as_record(result: Stability) -> Dict[str, Any]:
    """A result as JSON values; what is undefined is null."""
    return _without_nan(asdict(result))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_csv(results: Sequence[Stability], path: Path) -> None:
    """One row a model and depth."""
    numbers = [field.name for field in fields(LayerChange)]
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "unique_layers", "operating_point", *numbers])
        for result in results:
            for layer in result.layers:
                values = [getattr(layer, name) for name in numbers]
                values = [UNDEFINED if isinstance(value, float) and math.isnan(value) else value for value in values]
                writer.writerow([result.name, result.unique_layers, result.operating_point, *values])


def plot_stability(results: Sequence[Stability], path: Path, audio: str) -> None:
    """Saves a PNG: cosine, CKA and relative change by depth, a line a model, and a heat map of CKA for each model.

    Raises ValueError with the install command when matplotlib is missing.
    """
    pyplot = load_pyplot()
    columns = 6 * max(3, len(results))
    figure = pyplot.figure(figsize=(4.5 * max(3, len(results)), 8.5))
    grid = figure.add_gridspec(2, columns)
    labels = [
        f"{literal(result.name)} ({result.unique_layers} of {len(result.layers)} stored"
        + (")" if result.trained else ", random weights)")
        for result in results
    ]
    titles = ["cosine of input and output", "linear CKA of input and output", "|output - input| / |input|"]
    for number, (column, title) in enumerate(zip(_COLUMNS, titles)):
        width = columns // 3
        axis = figure.add_subplot(grid[0, number * width + 1 : (number + 1) * width])
        for result, label in zip(results, labels):
            axis.plot([getattr(layer, column) for layer in result.layers], "o-", markersize=4, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("depth")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if number == 0:
            axis.legend(fontsize=7)
    image, maps = None, []
    for number, (result, label) in enumerate(zip(results, labels)):
        width = columns // len(results)
        axis = figure.add_subplot(grid[1, number * width + 1 : (number + 1) * width])
        image = axis.imshow(result.matrix, vmin=0, vmax=1, origin="lower", cmap="viridis")
        axis.set_title(f"CKA, {label}", fontsize=9)
        axis.set_xlabel("0: input of the first layer, n: output of the n-th", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
        maps.append(axis)
    figure.colorbar(image, ax=maps, fraction=0.02)
    figure.suptitle(f"Stability across depth, over {literal(audio)}\n({READING})", fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
