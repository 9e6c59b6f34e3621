"""`w2v2-light export --format onnx`: a CTC model as an ONNX graph, compared with the model before it is kept.

Without fairseq. The packages are those of the extra `onnx`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..files import atomic_folder
from ..nn.frontend import receptive_field
from ..nn.operating_point import OperatingPoint
from ..nn.positions import WeightNormConv1d
from ..nn.squeeze import Unsqueeze
from ..runtime.checkpoint import PathLike
from ..runtime.ctc import CtcModel
from ..runtime.text import Labels

FORMAT = "fairseq_w2v2_light.onnx"
VERSION = 1
MODEL, DATA, CONFIG, TOKENS, CARD = "model.onnx", "model.onnx.data", "config.json", "tokens.txt", "README.md"
FILES = (MODEL, DATA, CONFIG, TOKENS, CARD)
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# the first opset with GELU as an operator
OPSET = 20
# largest |difference| between a logit of onnxruntime and of torch
TOLERANCE = 1e-4
# largest error of int8 logits, relative to the logits' own size; a graph that computes something else has 1 or more
INT8_TOLERANCE = 0.3
# of weights, above which they go into a file of their own: one file of protobuf cannot hold more than 2 GiB
_LARGEST_FILE = 1 << 30
# quantised layers; convolutions stay as they are, int8 ones are slower in onnxruntime than what they replace
_QUANTISED = ("MatMul", "Gemm")


@dataclass(frozen=True)
class OnnxExport:
    """What an export wrote and how it compares with the model.

    point: of the graph. bytes: of all files. difference: largest |logit of onnxruntime - logit of torch|;
    relative_error: the norm of all differences by that of the logits; agreement: share of frames with the same best
    label. None when nothing was compared.
    """

    point: OperatingPoint
    bytes: int
    difference: Optional[float] = None
    relative_error: Optional[float] = None
    agreement: Optional[float] = None


def export_onnx(
    model: CtcModel,
    out: PathLike,
    operating_point: str = "",
    int8: bool = False,
    opset: int = OPSET,
    check: bool = True,
) -> OnnxExport:
    """Writes `model` (fp32, on the CPU) as a folder: model.onnx, tokens.txt, config.json, README.md.

    The graph maps `wave` (batch, samples) float32 and `lengths` (batch,) int64, valid samples, to `logits` (batch,
    frames, labels) and `frame_lengths` (batch,); batch and samples are free. A padded batch gives the logits of its
    utterances, and task.normalize is part of the graph. operating_point: the one to fix, in text form; the model's own
    by default. int8: weights of the Linears in int8, activations quantised as they come, with one scale for a whole
    batch, so that padding and the other rows change a row a little. opset: of ONNX. check: compare with the model.
    Weights of 1 GiB and more stand beside the graph in model.onnx.data.

    An earlier export at `out` is replaced. Raises ValueError when a package is missing, the model has gates, is no fp32
    model or not trained for the operating point, a Linear did not become int8, or onnxruntime's logits differ from the
    model's by more than TOLERANCE.
    """
    _require_packages()
    _require_exportable(model)
    points = model.config.operating_points
    point = points.check(OperatingPoint.parse(operating_point)) if operating_point else model.point
    labels = Labels(model.symbols, model.blank)
    model = _at_point(model, point)
    report: Dict[str, Any] = {}
    with atomic_folder(out, FILES) as folder:
        if int8:
            with tempfile.TemporaryDirectory(prefix=".onnx.", dir=folder.parent) as scratch:
                _write_graph(model, Path(scratch) / MODEL, opset)
                _quantise(Path(scratch) / MODEL, folder / MODEL)
        else:
            _write_graph(model, folder / MODEL, opset)
        if check:
            report = _compare(model, folder / MODEL, INT8_TOLERANCE if int8 else None)
        config = _config(model, labels, "int8" if int8 else "float32", opset, report)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with open(folder / TOKENS, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{symbol}\n" for symbol in model.symbols)
        (folder / CARD).write_text(_card(config, Path(out).name), encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
    return OnnxExport(point, size, **report)


def _require_packages() -> None:
    if not hasattr(torch.compiler, "is_exporting"):
        raise ValueError(
            f"export to ONNX: found torch {torch.__version__}, expected 2.7 or later (pip install -U torch)"
        )
    missing = []
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ValueError(f"export to ONNX needs packages that are not installed here: pip install {' '.join(missing)}")


def _require_exportable(model: CtcModel) -> None:
    if model.config.prune_units:
        raise ValueError(
            "the model has gates, which ONNX files cannot have; remove what they closed first: "
            "w2v2-light prune CHECKPOINT OUT"
        )
    for name, value in model.state_dict().items():
        if value.dtype != torch.float32 or value.device.type != "cpu":
            raise ValueError(
                f"parameter '{name}' is {value.dtype} on {value.device}; expected torch.float32 on the CPU: load the "
                "model again, and export it before it is prepared or quantised (an int8 graph: --dtype int8)"
            )
    if getattr(model, "prepared", False) or not isinstance(model.head, torch.nn.Linear):
        raise ValueError("the model was prepared for this machine; load it again and export that")


def _at_point(model: CtcModel, point: OperatingPoint) -> CtcModel:
    """The model at one point, for inference; it has its weights in common with `model`."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared).eval()
    model.point = point
    return model


class _FrozenPositions(WeightNormConv1d):
    """WeightNormConv1d whose weight is normalised once: a graph need not do it in every run."""

    def __init__(self, conv: WeightNormConv1d):
        torch.nn.Module.__init__(self)
        self.groups, self.kernel, self.causal = conv.groups, conv.kernel, conv.causal
        self.register_buffer("frozen", conv.weight().detach().contiguous(), persistent=False)
        self.register_buffer("bias", conv.bias.detach(), persistent=False)
        self.register_buffer("places", conv.places, persistent=False)

    def weight(self) -> Tensor:
        return self.frozen


class _FrozenLinear(nn.Module):
    """A Linear whose weight is laid out as MatMul takes it, (in, out).

    A graph need not transpose it then. The exporter folds the Transpose only of weights that are used once, and the
    quantiser passes over those of shared layers.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("frozen", linear.weight.detach().t().contiguous(), persistent=False)
        self.register_buffer("bias", linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.frozen + self.bias


def _frozen(model: CtcModel) -> CtcModel:
    """What the graph is made of: the model at its point, with weights that the graph need not compute."""
    model = _at_point(model, model.point)
    encoder = model.backbone.encoder
    encoder.pos_conv[0] = _FrozenPositions(encoder.pos_conv[0])
    if encoder.upsample is not None and model.point.squeeze > 1:
        encoder.upsample = _unsqueeze_of_one_factor(encoder.upsample, model.point.squeeze)
    _freeze_linears(model)
    return model


def _unsqueeze_of_one_factor(unsqueeze: Unsqueeze, factor: int) -> Unsqueeze:
    """With the weights of `factor` alone."""
    with torch.device("meta"):
        frozen = Unsqueeze(unsqueeze.dim, factor, unsqueeze.residual)
    weight, bias = unsqueeze.weights(factor)
    frozen[0].weight, frozen[0].bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return frozen


def _freeze_linears(module: nn.Module) -> None:
    """Puts a _FrozenLinear in the place of every Linear, however deep."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, _FrozenLinear(child))
        else:
            _freeze_linears(child)


# ---- writing


def _write_graph(model: CtcModel, path: Path, opset: int) -> None:
    """Writes the fp32 graph, and its weights beside it where they are large."""
    import onnx_ir
    from onnx_ir.passes import common

    model = _frozen(model)
    # a ragged batch; no step of the model depends on the sizes of the example
    wave, lengths = _batch([_samples(model, 71) + 3, _samples(model, 22), _samples(model, 37)])
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (wave, lengths),
            dynamo=True,
            input_names=["wave", "lengths"],
            output_names=["logits", "frame_lengths"],
            dynamic_shapes={"wave": {0: "batch", 1: "samples"}, "lengths": {0: "batch"}},
            opset_version=opset,
            verbose=False,
        )
        graph = program.model
        # where each node stood in our source, and on whose disk
        common.ClearMetadataAndDocStringPass()(graph)
        # equal weights are stored once
        common.DeduplicateInitializersPass(size_limit=1 << 40)(graph)
        logits, frame_lengths = graph.graph.outputs
        logits.shape = onnx_ir.Shape(["batch", "frames", len(model.symbols)])
        frame_lengths.shape = onnx_ir.Shape(["batch"])
        graph.producer_name, graph.producer_version = "fairseq_w2v2_light", __version__
        weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
        program.save(str(path), external_data=weights >= _LARGEST_FILE)


def _quantise(source: Path, target: Path) -> None:
    """Writes the graph `source` with int8 weights in its Linears.

    Raises ValueError when the quantiser left one as it was.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=list(_QUANTISED),
            per_channel=True,
            # weights from -64 to 64: CPUs without VNNI add two products in 16 bits, which larger ones would overflow
            reduce_range=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    left = _float_weights(onnx.load(str(target), load_external_data=False).graph)
    if left:
        raise ValueError(
            f"{target.name}: {len(left)} weights of Linears are still float32, {left[0]} among them; expected all in "
            "int8: this version of onnxruntime does not quantise them; pip install -U onnxruntime, or export in float32"
        )


def _float_weights(graph: Any) -> List[str]:
    """Names of the initializers of an onnx.GraphProto that its float products take, directly or computed from them."""
    sources = {value.name: value.name for value in graph.initializer}  # of all that depends on no input of the graph
    found = set()
    for node in graph.node:
        if node.op_type in _QUANTISED:
            found.update(sources[operand] for operand in node.input[:2] if operand in sources)
        operands = [operand for operand in node.input if operand]
        if all(operand in sources for operand in operands):
            source = sources[operands[0]] if operands else node.name
            sources.update(dict.fromkeys(node.output, source))
    return sorted(found)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporter and quantiser say about packages that are not needed here."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ---- comparing


def _compare(model: CtcModel, path: Path, relative_tolerance: Optional[float]) -> Dict[str, float]:
    """Runs batches of several sizes in onnxruntime, each utterance alone in torch; the fields of OnnxExport.

    Raises ValueError when the valid frames differ in number, or their logits by too much.
    """
    session = open_session(path)
    differences, sizes, largest, agreeing, frames = 0.0, 0.0, 0.0, 0, 0
    for case, padding in _cases(model):
        wave, lengths = _batch(case, padding)
        logits, frame_lengths = session.run(None, {"wave": wave.numpy(), "lengths": lengths.numpy()})
        for row, samples in enumerate(case):
            with torch.no_grad():
                expected = model(wave[row : row + 1, :samples])[0][0].numpy()
            if frame_lengths[row] != len(expected):
                raise ValueError(
                    f"{path.name}: {frame_lengths[row]} frames of {samples} samples in a batch of {case}, but the "
                    f"model makes {len(expected)}; the graph is wrong: please report it with the model's config.json"
                )
            found = logits[row, : len(expected)]
            if not np.isfinite(found).all():
                raise ValueError(f"{path.name}: logits of {samples} samples in a batch of {case} are not finite")
            difference = float(np.abs(found - expected).max())
            if relative_tolerance is None and not difference <= TOLERANCE:
                raise ValueError(
                    f"{path.name}: logits of {samples} samples in a batch of {case} differ from the model's by up to "
                    f"{difference:.2g} (they reach {np.abs(expected).max():.3g}); expected at most {TOLERANCE:.0e}"
                )
            largest = max(largest, difference)
            differences += float(np.square(found - expected, dtype=np.float64).sum())
            sizes += float(np.square(expected, dtype=np.float64).sum())
            agreeing += int((found.argmax(-1) == expected.argmax(-1)).sum())
            frames += len(expected)
    error = (differences / max(sizes, 1e-30)) ** 0.5
    if relative_tolerance is not None and not error <= relative_tolerance:
        raise ValueError(
            f"{path.name}: the error of the int8 logits is {error:.2g} of their size; expected at most "
            f"{relative_tolerance}: this model's activations do not fit into 8 bits; export it in float32"
        )
    return {"difference": largest, "relative_error": error, "agreement": agreeing / frames}


def open_session(path: PathLike, threads: int = 0):
    """An onnxruntime session on the CPU; `threads` 0: onnxruntime's choice."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _cases(model: CtcModel) -> List[Tuple[List[int], int]]:
    """Batches, by the samples of their utterances, and samples of padding behind the longest one.

    One frame; a second, or two chunks; one with padding; four of different lengths.
    """
    _, hop = receptive_field(model.config.conv_layers)
    many = max(50, 2 * model.point.chunk + 9)
    four = [_samples(model, 37) + 3 % hop, _samples(model, 1) + hop // 2, _samples(model, 22), _samples(model, 9)]
    return [
        ([_samples(model, 1)], 0),
        ([_samples(model, many) + 7 % hop], 0),
        ([_samples(model, 5)], 2 * hop),
        (four, 0),
    ]


def _samples(model: CtcModel, frames: int) -> int:
    """The fewest samples that make so many frames."""
    field, hop = receptive_field(model.config.conv_layers)
    return max(1, field - model.config.frontend_padding + (frames - 1) * hop)


def _batch(samples: Sequence[int], padding: int = 0) -> Tuple[Tensor, Tensor]:
    """Noise (batch, samples) with a constant part, in the padding as well, and the valid samples (batch,) of each row.

    padding: samples more than the longest row has.
    """
    generator = torch.Generator().manual_seed(0)
    wave = torch.randn(len(samples), max(samples) + padding, generator=generator) * 0.1 + 0.02
    return wave, torch.tensor(samples)


# ---- what a client needs to know


def _config(model: CtcModel, labels: Labels, dtype: str, opset: int, report: Dict[str, float]) -> Dict[str, Any]:
    field, hop = receptive_field(model.config.conv_layers)
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_by": f"fairseq_w2v2_light {__version__}",
        "sample_rate": model.sample_rate,
        "normalize": model.normalize,
        "hop": hop,
        "fewest_samples": _samples(model, 1),
        "operating_point": str(model.point),
        "blank": model.blank,
        "labels": {"kind": labels.kind, "count": len(labels), "never": list(labels.never)},
        "dtype": dtype,
        "opset": opset,
        "inputs": {
            "wave": {"dtype": "float32", "shape": ["batch", "samples"]},
            "lengths": {"dtype": "int64", "shape": ["batch"]},
        },
        "outputs": {
            "logits": {"dtype": "float32", "shape": ["batch", "frames", len(labels)]},
            "frame_lengths": {"dtype": "int64", "shape": ["batch"]},
        },
        "compared_with_torch": report,
    }


_SPELLING = {
    "letter": '"".join(labels).replace(" ", "").replace("|", " ")',
    "sentencepiece": '"".join(labels).replace(" ", "").replace("\\u2581", " ")',
    "word": '" ".join(labels)',
}


def _card(config: Dict[str, Any], name: str) -> str:
    """README.md: what goes in and out, and a program that transcribes a file."""
    normalised = "The graph normalises utterances itself. " if config["normalize"] else ""
    padding = "What stands after the valid samples of a row changes nothing in it."
    if config["dtype"] == "int8":
        padding = (
            "Activations are quantised with one scale for the whole batch, so that padding and the other rows change "
            "the logits of a row a little: for the same ones every time, run each utterance alone, without padding."
        )
    lines = [
        f"# {name}",
        "",
        f"wav2vec 2.0 with a CTC head for onnxruntime: {config['dtype']}, operating point {config['operating_point']}, "
        f"ONNX opset {config['opset']}.",
        "",
        f"`wave` (batch, samples) is {config['sample_rate']} Hz mono float32 from -1 to 1, `lengths` (batch,) int64 "
        f"the valid samples of each row, {config['fewest_samples']} or more. {normalised}`logits` (batch, frames, "
        f"{config['labels']['count']}) have one frame for every {config['hop']} samples; the first `frame_lengths` "
        f"(batch,) of a row are valid. {padding}",
        "",
        "```python",
        "import json, numpy, onnxruntime, soundfile",
        "",
        'config = json.load(open("config.json", encoding="utf-8"))',
        'symbols = open("tokens.txt", encoding="utf-8").read().split("\\n")',
        f'session = onnxruntime.InferenceSession("{MODEL}")',
        'wave, rate = soundfile.read("speech.wav", dtype="float32", always_2d=True)',
        'assert rate == config["sample_rate"], f"resample the audio, which is at {rate} Hz"',
        "wave = wave.mean(axis=1)[numpy.newaxis]",
        "lengths = numpy.array([wave.shape[1]], dtype=numpy.int64)",
        'logits, frames = session.run(None, {"wave": wave, "lengths": lengths})',
        'logits[..., config["labels"]["never"]] = -numpy.inf',
        "best = logits[0, : frames[0]].argmax(axis=-1).tolist()",
        "changes = [index for index, before in zip(best, [None, *best]) if index != before]",
        'labels = [symbols[index] for index in changes if index != config["blank"] and symbols[index] != "<s>"]',
        f"text = {_SPELLING[config['labels']['kind']]}",
        'print(" ".join(text.split()))',
        "```",
        "",
    ]
    if config["compared_with_torch"]:
        report = config["compared_with_torch"]
        lines += [
            f"Compared with the torch model in batches of 1 and 4: logits differ by at most {report['difference']:.1e} "
            f"(relative error {report['relative_error']:.1e}), the best label is the same in {report['agreement']:.1%} "
            "of frames of noise.",
            "",
        ]
    return "\n".join([*lines, f"Written by {config['made_by']}.", ""])
