"""Model folders: what `w2v2-light export` writes, and all that inference needs.

    config.json         the network, how to run it, and what there is to know about it
    model.safetensors   the weights, by the names of CtcModel
    tokens.txt          the label of each logit, one a line; the first is CTC's blank
    README.md           for people
    sentencepiece.model where the labels are sentencepieces

JSON, text and safetensors hold values and no code. The names of the files are fixed: a folder cannot name others.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import torch
from torch import Tensor

from ..files import atomic_folder
from ..nn.config import EncoderConfig
from ..nn.operating_point import OperatingPoint
from .checkpoint import PathLike
from .config_json import network_from_dict, network_to_dict
from .ctc import CtcModel, check_weights, require_finite
from .quantized import INT8, shape_quantized_
from .text import Labels

FORMAT = "fairseq_w2v2_light"
VERSION = 1
CONFIG, WEIGHTS, TOKENS, CARD, SENTENCEPIECE = (
    "config.json",
    "model.safetensors",
    "tokens.txt",
    "README.md",
    "sentencepiece.model",
)
FILES = (CONFIG, WEIGHTS, TOKENS, CARD, SENTENCEPIECE)
# in which the weights may be stored, and that of what remains floats
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, INT8: torch.float32}
_KEYS = ("format", "version", "network", "ctc", "weights", "labels", "about")
# of a configuration or a list of labels; no model needs as much
_LARGEST_TEXT = 64 << 20


def is_model_folder(path: PathLike) -> bool:
    """Whether `path` is a folder with a config.json, as model folders have, ours or another project's."""
    return (Path(path) / CONFIG).is_file()


def read_folder(path: PathLike) -> CtcModel:
    """The model in a folder, for inference: in fp32, or with int8 Linears (runtime/quantized.py) where it has those.

    Raises FileNotFoundError when a file is missing; ValueError that names file and key when the folder is broken, was
    written by something else, or its weights do not fit its configuration or are not finite.
    """
    path = Path(path)
    config = read_config(path)
    where = str(path / CONFIG)
    ctc = _section(config, "ctc", ("normalize", "sample_rate", "operating_point"), where)
    dtype = _section(config, "weights", ("dtype",), where).get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where}: weights.dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    network = network_from_dict(config.get("network"), f"{where}: network")
    symbols = _read_tokens(path / TOKENS)
    try:
        with torch.device("meta"):
            model = CtcModel(
                network,
                symbols,
                normalize=_value(ctc, "normalize", bool, where),
                sample_rate=_sample_rate(_value(ctc, "sample_rate", int, where), where),
                point=OperatingPoint.parse(_value(ctc, "operating_point", str, where)),
            )
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{where}: describes no network that can be built: {error}") from error
    model.stored_dtype = dtype
    if dtype == INT8:
        if network.prune_units:
            raise ValueError(f"{where}: network.prune_units: found gates, which an {INT8} model cannot have")
        shape_quantized_(model)
    weights = _read_weights(model, path / WEIGHTS)
    model.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}, assign=True
    )
    require_finite(model, path / WEIGHTS)
    return model.eval().requires_grad_(False)


def write_folder(
    model: CtcModel,
    path: PathLike,
    about: Optional[Mapping[str, Any]] = None,
    card: str = "",
    sentencepiece: Optional[PathLike] = None,
    dtype: str = "float32",
) -> None:
    """Writes a model as a folder, in one step; `read_folder` gives it back.

    about: what there is to know, JSON values. card: the text of README.md. sentencepiece: the model file of the labels,
    which is copied. dtype: of the stored weights; "int8" for a model that is quantised, and only for that. An earlier
    model folder at `path` is replaced; raises ValueError for a folder that holds anything else, a dtype that is unknown
    or not that of the model, and a model that `prepare_` changed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found '{dtype}', expected one of {', '.join(DTYPES)}")
    if model.prepared:
        raise ValueError("the model is prepared for inference and cannot be saved; load it again")
    if (dtype == INT8) != (model.stored_dtype == INT8):
        raise ValueError(
            f"dtype: found '{dtype}', but the weights are {model.stored_dtype}; "
            + ("quantise them first: w2v2-light quantize" if dtype == INT8 else "export the model they were made of")
        )
    config = {
        "format": FORMAT,
        "version": VERSION,
        "network": network_to_dict(model.config),
        "ctc": {
            "normalize": model.normalize,
            "sample_rate": model.sample_rate,
            "operating_point": str(model.point),
        },
        "weights": {"dtype": dtype},
        "labels": {"kind": Labels(model.symbols, model.blank).kind},
        "about": dict(about or {}),
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    weights = {name: value.to(DTYPES[dtype]) if value.is_floating_point() else value for name, value in weights.items()}
    with atomic_folder(path, FILES) as folder:
        save_weights(weights, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with open(folder / TOKENS, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{symbol}\n" for symbol in model.symbols)
        (folder / CARD).write_text(card, encoding="utf-8")
        if sentencepiece is not None:
            shutil.copyfile(sentencepiece, folder / SENTENCEPIECE)


def save_weights(weights: Mapping[str, Tensor], file: Path, metadata: Optional[Mapping[str, str]] = None) -> None:
    """Writes tensors as safetensors; raises OSError, as other writers do, where the file cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(weights), str(file), metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{file.parent}: {file.name} cannot be written: {error}") from error


def read_config(path: PathLike) -> Dict[str, Any]:
    """config.json of a model folder, its format and version checked; raises as `read_folder` does."""
    file = _inside(Path(path), CONFIG)
    try:
        config = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: found a {type(config).__name__}, expected an object")
    if config.get("format") != FORMAT:
        hint = ""
        if "architectures" in config or "model_type" in config:
            hint = "; a Hugging Face model becomes a checkpoint of ours by `w2v2-light convert FOLDER OUT.pt`"
        raise ValueError(f"{file}: format: found {config.get('format')!r}, expected '{FORMAT}'{hint}")
    version = config.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(
            f"{file}: version: found {version!r}, expected 1 to {VERSION}; a newer fairseq_w2v2_light wrote it: "
            "upgrade, or export the checkpoint again"
        )
    unknown = sorted(set(config) - set(_KEYS))
    if unknown:
        raise ValueError(f"{file}: '{unknown[0]}': unknown key; expected some of {', '.join(_KEYS)}")
    if not isinstance(config.setdefault("about", {}), dict):
        raise ValueError(f"{file}: about: found {config['about']!r}, expected an object")
    return config


def _read_tokens(file: Path) -> List[str]:
    lines = _text(_inside(file.parent, file.name)).split("\n")
    if lines[-1] == "":
        lines.pop()
    empty = next((number for number, line in enumerate(lines, start=1) if not line), None)
    if empty is not None or not lines:
        raise ValueError(f"{file}:{empty or 1}: found an empty line, expected the label of a logit in each line")
    return lines


def _read_weights(model: CtcModel, file: Path) -> Dict[str, torch.Tensor]:
    """The tensors of a file, after their names and shapes were compared with the model's."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(f"{file}: `pip install safetensors` to read it") from None
    _inside(file.parent, file.name)
    try:
        with safe_open(str(file), framework="pt") as opened:
            shapes = {name: _Stored(opened.get_slice(name)).meta() for name in opened.keys()}
            check_weights(model, shapes, file)
            return {name: opened.get_tensor(name).clone() for name in shapes}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{file}: not a complete safetensors file ({error}); it was copied or downloaded incompletely, or changed: "
            "get it again"
        ) from error


class _Stored:
    """A tensor in a file, of which only the header was read."""

    _DTYPES = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I8": torch.int8,
    }

    def __init__(self, opened):
        self.shape = opened.get_shape()
        self.dtype = self._DTYPES.get(opened.get_dtype(), torch.int64)

    def meta(self) -> torch.Tensor:
        """A tensor of that shape and dtype, without values; other dtypes than those of weights are int64."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder; raises unless it is a file, and one that lies in the folder."""
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a model folder, as `w2v2-light export` writes it")
    if file.is_symlink() and folder.resolve() not in file.resolve().parents:
        raise ValueError(f"{file}: a link that leads out of the folder; copy the folder with its files (`cp -rL`)")
    return file


def _text(file: Path) -> str:
    if file.stat().st_size > _LARGEST_TEXT:
        raise ValueError(f"{file}: {file.stat().st_size:,} bytes, expected at most {_LARGEST_TEXT:,}")
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{file}: no UTF-8 text ({error})") from error


def _section(config: Mapping[str, Any], name: str, keys, where: str) -> Dict[str, Any]:
    section = config.get(name)
    if not isinstance(section, dict):
        raise ValueError(f"{where}: {name}: found {section!r}, expected an object with {', '.join(keys)}")
    unknown = sorted(set(section) - set(keys))
    if unknown:
        raise ValueError(f"{where}: {name}.{unknown[0]}: unknown key; expected {', '.join(keys)}")
    return section


def _value(section: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = section.get(key)
    if type(value) is not kind:
        raise ValueError(f"{where}: ctc.{key}: found {value!r}, expected {kind.__name__}")
    return value


def _sample_rate(rate: int, where: str) -> int:
    if not 1 <= rate <= 1_000_000:
        raise ValueError(f"{where}: ctc.sample_rate: found {rate}, expected a number of Hz such as 16000")
    return rate


def bytes_by_dtype(config: EncoderConfig, vocabulary: int) -> Dict[str, int]:
    """Bytes of the weights of a model folder in each dtype that `export` and `quantize` write.

    Network and CTC head of `vocabulary` labels (0: the network alone), without gates; of int8 ones the scales, and what
    stays in fp32, are part. The file's header, some 100 bytes a tensor, is not.
    """
    with torch.device("meta"):
        model = CtcModel(replace(config, prune_units=()), [""] * max(1, vocabulary))
    stored = model if vocabulary else model.backbone
    sizes = {name: _bytes(stored.state_dict(), dtype) for name, dtype in DTYPES.items() if name != INT8}
    shape_quantized_(model)
    return {**sizes, INT8: _bytes(stored.state_dict(), DTYPES[INT8])}


def _bytes(weights: Mapping[str, Tensor], floats: torch.dtype) -> int:
    """Bytes of weights whose floats are stored in the dtype `floats`."""
    return sum(
        value.numel() * (floats.itemsize if value.is_floating_point() else value.element_size())
        for value in weights.values()
    )
