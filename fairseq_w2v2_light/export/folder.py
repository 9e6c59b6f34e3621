"""`w2v2-light export`: a fine-tuned checkpoint as a model folder, with a card that says what it is. Without fairseq."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional

from .. import __version__
from ..nn.counts import SAMPLE_RATE, count_macs
from ..runtime.checkpoint import PathLike, read_checkpoint
from ..runtime.ctc import CtcModel
from ..runtime.folder import SENTENCEPIECE, is_model_folder, read_config, read_folder, write_folder
from ..runtime.load import ctc_from_checkpoint
from ..runtime.quantized import INT8, quantize_
from ..runtime.text import Labels

# of audio, for which MACs are counted
_SECONDS = 10


def export_folder(
    source: PathLike,
    out: PathLike,
    dictionary: Optional[PathLike] = None,
    sentencepiece: Optional[PathLike] = None,
    dtype: str = "float32",
) -> CtcModel:
    """Writes the model of a fairseq checkpoint, or of another model folder, as a model folder; returns the model.

    dictionary: dict.ltr.txt, for a checkpoint without labels. sentencepiece: the labels' model file, to be kept with
    them (a folder's own is kept). dtype: "float32", "bfloat16" for half the size, or "int8" for about a quarter. What
    another folder's config.json says about the model is kept as far as it still holds: see `kept`. Raises as
    `load_ctc`, `quantize_` and `write_folder` do, and FileNotFoundError when `sentencepiece` is missing.
    """
    source = Path(source)
    if sentencepiece is not None and not Path(sentencepiece).is_file():
        raise FileNotFoundError(f"{sentencepiece}: no such sentencepiece model")
    if is_model_folder(source):
        model, earlier = read_folder(source), read_config(source)["about"]
        training = earlier.get("training", {})
        own = source / SENTENCEPIECE
        sentencepiece = own if sentencepiece is None and own.is_file() else sentencepiece
    else:
        checkpoint = read_checkpoint(source)
        model, training, earlier = ctc_from_checkpoint(checkpoint, source, dictionary), checkpoint.training, {}
    if model.config.prune_units:
        raise ValueError(f"{source}: the model has gates; remove what they closed first: w2v2-light prune {source} OUT")
    if model.stored_dtype == INT8:
        raise ValueError(f"{source}: its weights are int8 already; take the checkpoint, or a float32 folder, instead")
    described = describe(model, training)
    about = kept(earlier, described, model.stored_dtype, dtype)
    if dtype == INT8:
        quantize_(model)
    write_folder(model, out, about, model_card(model, described, Path(out).name, dtype), sentencepiece, dtype)
    return model


def describe(model: CtcModel, training: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """What config.json says about a model: size, cost at each operating point, how it was trained; JSON values."""
    samples = _SECONDS * SAMPLE_RATE
    points = []
    for point in model.config.operating_points.points():
        macs = sum(count_macs(model.config, samples, point, len(model.symbols)).values())
        points.append({"point": str(point), "macs": macs})
    return {
        "made_by": f"fairseq_w2v2_light {__version__}",
        "parameters": sum(value.numel() for value in model.state_dict().values()),
        "seconds": _SECONDS,
        "operating_points": points,
        "training": dict(training or {}),
    }


def kept(earlier: Dict[str, Any], about: Dict[str, Any], stored: str, dtype: str) -> Dict[str, Any]:
    """`about` with what a folder said before of the same model, but for what `about` says anew.

    stored, dtype: of the weights before and now. Where they differ, of what was measured at operating points (WERs)
    only that stays which was measured in the new one.
    """
    found = earlier.get("operating_points")
    entries = {str(entry["point"]): dict(entry) for entry in about["operating_points"]}
    for entry in found if isinstance(found, list) else []:
        if isinstance(entry, dict) and "point" in entry and dtype in (stored, entry.get("dtype")):
            entries[str(entry["point"])] = {**entry, **entries.get(str(entry["point"]), {})}
    return {**earlier, **about, "operating_points": list(entries.values())}


def model_card(model: CtcModel, about: Dict[str, Any], name: str, dtype: str = "float32") -> str:
    """README.md of a model folder: what the model is, what it costs, how it was trained, how to use it."""
    config = model.config
    shared = "" if config.unique_layers == config.depth else f" ({config.unique_layers} stored, used in turn)"
    streams = f"; streams in chunks of {max(config.operating_points.chunk)} frames" if config.streams else ""
    lines = [
        f"# {name}",
        "",
        f"wav2vec 2.0 with a CTC head for speech recognition, {about['parameters'] / 1e6:.2f} M parameters in {dtype}: "
        f"{config.depth} Transformer layers{shared} of {config.dim} channels{streams}. "
        f"{model.sample_rate} Hz audio, {len(model.symbols)} labels ({Labels(model.symbols, model.blank).kind}s).",
        "",
        "    pip install torch numpy soundfile safetensors && pip install --no-deps fairseq-w2v2-light",
        f"    w2v2-light transcribe speech.wav --model {name}",
        "",
        "```python",
        "from fairseq_w2v2_light.runtime.recognizer import Recognizer",
        "",
        f'recognizer = Recognizer.from_pretrained("{name}")',
        'for transcript in recognizer.transcribe(["speech.wav"]):',
        "    print(transcript.text)",
        "```",
        "",
        "## Operating points",
        "",
        f"What one call may choose; GMACs are those of {about['seconds']} s of audio. Default: {model.point}.",
        "",
        "| operating point | GMACs |",
        "|---|---|",
        *(f"| {point['point']} | {point['macs'] / 1e9:.2f} |" for point in about["operating_points"]),
        "",
        "## Training",
        "",
    ]
    training = about["training"]
    lines += [f"- {key.replace('_', ' ')}: {_text(value)}" for key, value in training.items()] or ["Not recorded."]
    return "\n".join([*lines, "", f"Written by {about['made_by']}.", ""])


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
