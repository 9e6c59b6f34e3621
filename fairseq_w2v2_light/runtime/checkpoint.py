"""Reading fairseq's checkpoint files without fairseq, and without running anything that they hold.

A checkpoint is a pickle, and a pickle may call any function. Here it can rebuild tensors, dicts and sets; every other
type that fairseq writes becomes a `StandIn`, which remembers what it was given; anything else is refused.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Union

import torch
from torch import Tensor

PathLike = Union[str, Path]


@dataclass(frozen=True)
class Checkpoint:
    """What inference needs of a fairseq checkpoint.

    model: the state dict; its tensors stay in the file until they are read. cfg: the configuration's `model` and
    `task` sections as plain dicts, whichever way the file holds them. symbols: the target dictionary, in order (None:
    the file has none). training: how it was trained, as far as the file says: criterion, updates, seed,
    learning_rate, best_checkpoint_metric, best.
    """

    model: Dict[str, Tensor]
    cfg: Dict[str, Dict[str, Any]]
    symbols: Optional[List[str]] = None
    training: Dict[str, Any] = field(default_factory=dict)


class StandIn:
    """An object in a checkpoint that is not rebuilt: its class's arguments and its state, and nothing that acts."""

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.args = args
        self.state = None
        return self

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass


class _Dict(dict):
    """Stands in for OrderedDict; attributes (a state dict's `_metadata`) are dropped."""

    def __setstate__(self, state):
        pass


def _tensor(storage, offset, size, stride, *gradient_and_hooks):
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, {})


def _parameter(data, *gradient_and_hooks):
    return data


_REBUILT = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": torch.Size,
    "collections.OrderedDict": _Dict,
    "builtins.set": set,
}
# packages whose types become stand-ins, and single types of others
_INERT_PACKAGES = {"fairseq", "fairseq_w2v2_light", "omegaconf", "numpy", "typing"}
_INERT_TYPES = {
    "argparse.Namespace",
    "collections.defaultdict",
    "collections.Counter",
    "_codecs.encode",
    "torch.device",
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "long", "str", "tuple")),
}
_RENAMED = {"__builtin__": "builtins"}


class _RefusedType(Exception):
    """Names a type that may not be in a checkpoint."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        kind = f"{_RENAMED.get(module, module)}.{name}"
        if kind in _REBUILT:
            return _REBUILT[kind]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if kind in _INERT_TYPES or module.split(".")[0] in _INERT_PACKAGES:
            return type(name, (StandIn,), {})
        raise _RefusedType(kind)


_PICKLE = SimpleNamespace(
    __name__="restricted_pickle",
    Unpickler=_Unpickler,
    load=lambda file, **options: _Unpickler(file, **options).load(),
)
# how files of torch before 1.6 begin
_BEFORE_ZIP = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_INCOMPLETE = "it was copied or downloaded incompletely, or is still being written; get it again"


def read_checkpoint(path: PathLike) -> Checkpoint:
    """Reads a checkpoint of fairseq, configured by hydra or (before that) by an argparse.Namespace.

    Raises FileNotFoundError when the file is missing; ValueError when it is no complete fairseq checkpoint, and when
    it holds a type that could run code.
    """
    path = Path(path)
    state = read_pickle(path)
    try:
        return _checkpoint(state, path)
    except (RecursionError, TypeError) as error:
        raise ValueError(f"{path}: not a fairseq checkpoint: its configuration is malformed ({error})") from error


def _checkpoint(state, path: Path) -> Checkpoint:
    found = [str(key) for key in list(state)[:8]] if isinstance(state, dict) else type(state).__name__
    problem = f"{path}: not a fairseq checkpoint; expected the keys 'model' and 'cfg' (or 'args'), found {found}"
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ValueError(problem)
    cfg = as_plain(state.get("cfg") or state.get("args"))
    if not isinstance(cfg, dict):
        raise ValueError(problem)
    task_state = as_plain(state.get("task_state"))
    dictionary = task_state.get("target_dictionary") if isinstance(task_state, dict) else None
    symbols = dictionary.get("symbols") if isinstance(dictionary, dict) else None
    symbols = None if symbols is None else [str(symbol) for symbol in symbols]
    return Checkpoint(dict(state["model"]), sections(cfg), symbols, _training(state, cfg))


def _training(state: Dict[str, Any], cfg: Dict[str, Any]) -> Dict[str, Any]:
    """What the file says of its training; no path, which would be of interest to nobody else."""

    def setting(section: str, key: str) -> Any:
        values = cfg.get(section, cfg if "arch" in cfg else {})
        return values.get(key) if isinstance(values, dict) else None

    history, extra = as_plain(state.get("optimizer_history")), as_plain(state.get("extra_state"))
    last = history[-1] if isinstance(history, list) and history else None
    criterion = cfg.get("criterion")
    found = {
        "criterion": criterion.get("_name") if isinstance(criterion, dict) else criterion,
        "updates": last.get("num_updates") if isinstance(last, dict) else None,
        "seed": setting("common", "seed"),
        "learning_rate": setting("optimization", "lr"),
        "best_checkpoint_metric": setting("checkpoint", "best_checkpoint_metric"),
        "best": extra.get("best") if isinstance(extra, dict) else None,
    }
    return {key: value for key, value in found.items() if _is_simple(value)}


def _is_simple(value: Any) -> bool:
    """Whether JSON holds the value: a text, a number, a list of those."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_simple, value))
    return isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))


def read_pickle(path: Path, writer: str = "fairseq") -> Any:
    """What torch saved in a file, types other than tensors and containers as stand-ins; runs nothing of it.

    writer: who is expected to have written it, for messages. Raises as `read_checkpoint` does.
    """
    is_zip = _check_file(path, writer)
    try:
        # mapped: the optimizer's state, two thirds of a training checkpoint, is never read
        return torch.load(str(path), map_location="cpu", pickle_module=_PICKLE, weights_only=False, mmap=is_zip)
    except _RefusedType as error:
        raise ValueError(
            f"{path}: not a checkpoint that {writer} wrote: it holds a '{error}', which could run code; nothing of it "
            "was run"
        ) from error
    except Exception as error:  # torch and pickle raise nearly any type on bytes they do not know
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{path}: not a checkpoint that torch can read ({type(error).__name__}: {first_line}); {_INCOMPLETE}"
        ) from error


def _check_file(path: Path, writer: str) -> bool:
    """Whether the checkpoint is a zip file; raises unless it is one of torch's files."""
    if path.is_dir():
        raise ValueError(f"{path}: a folder; give the checkpoint file in it, e.g. {path / 'checkpoint_best.pt'}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        with open(path, "rb") as file:
            start = file.read(len(_BEFORE_ZIP))
        is_zip = zipfile.is_zipfile(path)
        entries = zipfile.ZipFile(path).namelist() if is_zip else []
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not start:
        raise ValueError(f"{path}: the file is empty; {_INCOMPLETE}")
    if start.startswith(b"PK") and not is_zip:
        raise ValueError(f"{path}: the end of the checkpoint is missing; {_INCOMPLETE}")
    if any(entry.endswith("/constants.pkl") for entry in entries):
        raise ValueError(f"{path}: a TorchScript program; expected a checkpoint that {writer} wrote")
    if not any(entry.endswith("/data.pkl") for entry in entries) and start != _BEFORE_ZIP:
        raise ValueError(f"{path}: not a checkpoint file of torch, expected one that {writer} wrote")
    return is_zip


def as_plain(value: Any) -> Any:
    """`value` with every stand-in in it replaced by dicts, lists and scalars.

    A stand-in of an omegaconf container or node becomes its content, one with another state (a Namespace, a
    dataclass) a dict of its attributes, one without (an enum) its first argument.
    """
    if isinstance(value, StandIn):
        state = value.state
        if not isinstance(state, dict):
            return as_plain(value.args[0]) if value.args else None
        for content in ("_content", "_val"):
            if content in state:
                return as_plain(state[content])
        return as_plain(state)
    if isinstance(value, dict):
        return {str(as_plain(key)) if isinstance(key, StandIn) else key: as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    return value


def sections(cfg: Dict[str, Any]) -> Dict[str, Dict[str, Any]]:
    """The `model` and `task` sections of a configuration, each with its `_name`.

    Before hydra there were none: one flat dict held everything, the name of the model as `arch`.
    """
    if "model" in cfg or "arch" not in cfg:
        return {name: cfg[name] if isinstance(cfg.get(name), dict) else {} for name in ("model", "task")}
    return {"model": {**cfg, "_name": cfg["arch"]}, "task": {**cfg, "_name": cfg.get("task")}}
