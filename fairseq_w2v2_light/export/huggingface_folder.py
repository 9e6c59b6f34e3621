"""Reading Hugging Face's model folders without transformers, and without running or trusting anything in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, Optional

from torch import Tensor

from ..runtime.checkpoint import read_pickle
from .huggingface_format import PICKLED, PICKLED_INDEX, WEIGHTS, WEIGHTS_INDEX

# of a JSON file; no vocabulary is as large
_LARGEST_TEXT = 64 << 20
_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_INCOMPLETE = "it was copied or downloaded incompletely, or changed: get it again"


def read_json(folder: Path, name: str, default: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """The object in a JSON file of the folder; `default` where there is no such file.

    Raises FileNotFoundError for a missing file without default, ValueError that names it where it is no JSON object.
    """
    if default is not None and not (folder / name).exists():
        return default
    file = _file(folder, name)
    if file.stat().st_size > _LARGEST_TEXT:
        raise ValueError(f"{file}: {file.stat().st_size:,} bytes, expected at most {_LARGEST_TEXT:,}")
    try:
        values = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: found a {type(values).__name__}, expected an object")
    return values


def read_weights(folder: Path) -> Dict[str, Tensor]:
    """The tensors of a folder by name: model.safetensors, pytorch_model.bin, or the shards that an index lists.

    Pickles are read without running anything. Raises FileNotFoundError when there are none; ValueError that names the
    file where one is broken, holds anything but tensors, or an index names a file outside the folder.
    """
    for name, read in ((WEIGHTS, _read_safetensors), (PICKLED, _read_pickled)):
        if (folder / name).exists():
            return read(_file(folder, name))
    for name, read in ((WEIGHTS_INDEX, _read_safetensors), (PICKLED_INDEX, _read_pickled)):
        if (folder / name).exists():
            return _read_shards(folder, name, read)
    others = sorted(file.name for pattern in ("*.h5", "*.msgpack") for file in folder.glob(pattern))
    found = f"; {others[0]} is of another framework: save it again with transformers' PyTorch class" if others else ""
    raise FileNotFoundError(f"{folder}: no weights; expected {WEIGHTS} or {PICKLED}{found}")


def _file(folder: Path, name: str) -> Path:
    """The file `name` of a folder; raises unless it is a file that lies there, or in the hub's cache beside it."""
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a folder that transformers' save_pretrained wrote")
    if file.is_symlink():
        # the hub's cache: snapshots/REVISION/FILE leads to ../../blobs/HASH
        blobs = folder.resolve().parent.parent / "blobs"
        if not {folder.resolve(), blobs} & set(file.resolve().parents):
            raise ValueError(f"{file}: a link that leads out of the folder; copy the folder with its files (`cp -rL`)")
    return file


def _read_shards(folder: Path, index: str, read) -> Dict[str, Tensor]:
    owners = read_json(folder, index).get("weight_map")
    if not isinstance(owners, dict) or not owners:
        raise ValueError(f"{folder / index}: weight_map: found {_short(owners)}, expected an object of files by tensor")
    for tensor, name in owners.items():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise ValueError(
                f"{folder / index}: weight_map: tensor '{tensor}' is in {_short(name)}; expected the name of a file in "
                "the folder, without a path"
            )
    weights: Dict[str, Tensor] = {}
    files = {name: _file(folder, name) for name in sorted(set(owners.values()))}
    for name, file in files.items():
        for tensor, value in read(file).items():
            if owners.get(tensor) != name:
                raise ValueError(f"{file}: holds '{tensor}', which {index} has in {owners.get(tensor)}")
            weights[tensor] = value
    missing = sorted(set(owners) - set(weights))
    if missing:
        raise ValueError(f"{folder / owners[missing[0]]}: '{missing[0]}' is missing, which {index} has there")
    return weights


def _read_safetensors(file: Path) -> Dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"{file}: `pip install safetensors` to read it") from None
    try:
        weights = load_file(str(file))
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error}); {_INCOMPLETE}") from error
    return _require_floats(weights, file)


def _read_pickled(file: Path) -> Dict[str, Tensor]:
    return _require_floats(read_pickle(file, "transformers"), file)


def _require_floats(weights: Any, file: Path) -> Dict[str, Tensor]:
    if not isinstance(weights, dict):
        raise ValueError(f"{file}: found a {type(weights).__name__}, expected tensors by name")
    for name, value in weights.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{file}: parameter '{name}': found {kind}, expected floats; a quantised model cannot be converted"
            )
    return dict(weights)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
