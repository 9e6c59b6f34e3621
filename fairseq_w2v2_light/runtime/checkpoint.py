"""Reading fairseq's checkpoint files without fairseq, and without running anything that they hold.

A checkpoint is a pickle, and a pickle may call any function. Here it can rebuild tensors, numbers and containers, and
nothing else: torch loads it with weights_only=True where it takes an allow-list (2.5 and later), and with a restricted
unpickler of the same list where it does not. The types on the list that fairseq writes become a `StandIn`, which
remembers what it was given; a type that is not on it is refused by name, unless the user trusts the file.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import threading
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Mapping, Optional, Union

import torch
from torch import Tensor

from ..trust import TRUST, TRUST_OPTION, trusts_checkpoints

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


class _StateDict(OrderedDict):
    """Stands in for OrderedDict; of its attributes only a state dict's versions (`_metadata`) are kept."""

    def __setstate__(self, state):
        if isinstance(state, dict) and isinstance(state.get("_metadata"), dict):
            self._metadata = state["_metadata"]

    def __reduce__(self):
        # saved again, it is what it stands for
        return OrderedDict, (), vars(self) or None, None, iter(self.items())


def _tensor(storage, offset, size, stride, *gradient_and_hooks):
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, {})


def _parameter(data, *gradient_and_hooks):
    return data


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes are written as latin1, found {encoding!r}")
    return text.encode("latin1")


# numpy's types of numbers, as the struct module names them
_NUMBERS = dict(zip("b1 i1 u1 i2 u2 i4 u4 i8 u8 f2 f4 f8".split(), "?bBhHiIqQefd"))


def _number(dtype: StandIn, data: bytes) -> Union[bool, int, float]:
    """A number that numpy wrote. numpy itself would believe a dtype that lies about objects and sizes."""
    kind = dtype.args[0] if isinstance(dtype, StandIn) and dtype.args else None
    if kind not in _NUMBERS:
        raise pickle.UnpicklingError(f"expected a number of numpy, found one of dtype {kind!r}")
    is_big = isinstance(dtype.state, tuple) and dtype.state[1:2] == (">",)
    return struct.unpack((">" if is_big else "<") + _NUMBERS[kind], data)[0]


# What checkpoints of fairseq hold besides tensors and containers, from 2020 (a Namespace; then configurations of
# omegaconf as such) to today (the dictionary alone).
_INERT = (
    "argparse.Namespace",
    "fairseq.data.dictionary.Dictionary",
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("Metadata", "ContainerMetadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Enum")),
    *(f"typing.{name}" for name in ("Any", "Dict", "List", "Optional", "Tuple", "Union")),
    "collections.defaultdict",
    "numpy.dtype",
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple")),
)


def _named(name: str, value: Any) -> Any:
    """`value` under another name: torch's list of what is allowed goes by the names that things have."""
    value.__module__, _, value.__name__ = name.rpartition(".")
    value.__qualname__ = value.__name__
    return value


def _stand_in(name: str) -> type:
    return _named(name, type("StandIn", (StandIn,), {}))


def _number_function(name: str) -> Callable:
    return _named(name, lambda dtype, data: _number(dtype, data))


# The allow-list, by the name that a pickle gives. What torch's own list has is not on it.
ALLOWED: Dict[str, Any] = {
    **{name: _stand_in(name) for name in _INERT},
    **{name: _number_function(name) for name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")},
}
# of torch's own list, what the restricted unpickler needs
_TENSORS = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "collections.OrderedDict": _StateDict,
    "collections.Counter": _stand_in("collections.Counter"),
    "builtins.set": set,
    "_codecs.encode": _encode,
}


class _RefusedType(Exception):
    """Names a type that may not be in a checkpoint."""


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler, the one written in Python: the other one takes a file's word for how much memory to
    reserve for its memo.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        if self.proto < 3:  # which names things as Python 2 did
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        kind = f"{module}.{name}"
        for known in (ALLOWED, _TENSORS):
            if kind in known:
                return known[kind]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        return self.find_unknown(module, name, kind)

    def find_unknown(self, module, name, kind):
        raise _RefusedType(kind)

    def load_build(self):
        if not isinstance(self.stack[-2], (StandIn, _StateDict)):
            raise pickle.UnpicklingError(f"found a state for a {type(self.stack[-2]).__name__}, which has none")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


class _TrustingUnpickler(_Unpickler):
    """Finds every type there is; those on the list, and those that are not installed, still become stand-ins."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_unknown(self, module, name, kind):
        try:
            return pickle._Unpickler.find_class(self, module, name)
        except (ImportError, AttributeError):
            return _stand_in(kind)


def _pickle_module(unpickler: type) -> SimpleNamespace:
    """The part of the module pickle that torch.load uses, with another unpickler."""
    return SimpleNamespace(
        __name__="restricted_pickle",
        Unpickler=unpickler,
        UnpicklingError=pickle.UnpicklingError,
        load=lambda file, **options: unpickler(file, **options).load(),
        loads=lambda data, **options: unpickler(io.BytesIO(data), **options).load(),
    )


# how files of torch before 1.6 begin
_BEFORE_ZIP = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_INCOMPLETE = "it was copied or downloaded incompletely, or is still being written; get it again"


# configurations, dictionaries and histories have far fewer; a small file can repeat its parts without end
_MOST_VALUES = 1_000_000


def is_checkpoint_file(source: PathLike) -> bool:
    """Whether what a user names as a model is a file, and no recipe's YAML."""
    return Path(source).is_file() and Path(source).suffix not in (".yaml", ".yml")


def read_checkpoint(path: PathLike) -> Checkpoint:
    """Reads a checkpoint of fairseq, configured by hydra or (before that) by an argparse.Namespace.

    Raises FileNotFoundError when the file is missing; ValueError when it is no complete fairseq checkpoint, and when
    it holds a type that could run code.
    """
    path = Path(path)
    state = read_pickle(path)
    try:
        return _checkpoint(state, path)
    except (RecursionError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a fairseq checkpoint: its configuration is malformed ({error})") from error


def _checkpoint(state, path: Path) -> Checkpoint:
    found = [str(key) for key in list(state)[:8]] if isinstance(state, dict) else type(state).__name__
    problem = f"{path}: not a fairseq checkpoint; expected the keys 'model' and 'cfg' (or 'args'), found {found}"
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ValueError(problem)
    require_stored(state["model"], path)
    try:
        cfg = as_plain(state.get("cfg") or state.get("args"))
        task_state = as_plain(state.get("task_state"))
    except ValueError as error:
        raise ValueError(f"{path}: not a fairseq checkpoint: {error}") from error
    if not isinstance(cfg, dict):
        raise ValueError(problem)
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


def read_pickle(path: PathLike, writer: str = "fairseq", mapped: bool = True) -> Any:
    """What torch saved in a file, types other than tensors and containers as stand-ins; runs nothing of it.

    writer: who is expected to have written it, for messages. mapped: leave the tensors on disk until they are read,
    where the file's format allows. Raises FileNotFoundError when the file is missing; ValueError when it is none of
    torch's, incomplete, or holds a type that could run code (which W2V2_LIGHT_TRUST_CHECKPOINTS=1 allows).
    """
    path = Path(path)
    # mapped: the optimizer's state, two thirds of a training checkpoint, is never read
    options = {"map_location": "cpu", "mmap": _check_file(path, writer) and mapped}
    try:
        if trusts_checkpoints():
            return _load_restricted(path, _TrustingUnpickler, **options)
        if _TAKES_LIST:
            return _load_weights_only(path, **options)
        return _load_restricted(path, _Unpickler, **options)
    except _RefusedType as error:
        raise _refusal(path, writer, str(error)) from error
    except Exception as error:  # torch and pickle raise nearly any type on bytes they do not know
        refused = _refused_type(path, options)
        if refused:
            raise _refusal(path, writer, refused) from error
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{path}: not a checkpoint that torch can read ({type(error).__name__}: {first_line}); {_INCOMPLETE}"
        ) from error


# torch's list of safe globals can be set for a block since 2.5
_TAKES_LIST = hasattr(torch.serialization, "safe_globals")
# the list is one for all threads
_LIST_LOCK = threading.RLock()


def _load_weights_only(path: Path, **options) -> Any:
    with _LIST_LOCK, warnings.catch_warnings():
        # of a pickle protocol that torch does not know: an error follows, which says it better
        warnings.simplefilter("ignore")
        names = {_name_of(known) for known in torch.serialization.get_safe_globals()}
        ours = [value for name, value in ALLOWED.items() if name not in names]
        with torch.serialization.safe_globals(ours):
            return torch.load(str(path), weights_only=True, **options)


def _name_of(known: Any) -> str:
    return known[1] if isinstance(known, tuple) else f"{known.__module__}.{known.__qualname__}"


def _load_restricted(path: Path, unpickler: type, **options) -> Any:
    # not weights_only, which takes no unpickler: ours rebuilds no more than that does
    return torch.load(str(path), pickle_module=_pickle_module(unpickler), weights_only=False, **options)


def _refused_type(path: Path, options: Mapping[str, Any]) -> str:
    """The type that is not on the list, of a file that torch did not load; empty: that was not the reason.

    torch tells it only for some of the instructions that a pickle has.
    """
    try:
        _load_restricted(path, _Unpickler, **options)
    except _RefusedType as error:
        return str(error)
    except Exception:
        pass
    return ""


def _refusal(path: Path, writer: str, kind: str) -> ValueError:
    return ValueError(
        f"{path}: not a checkpoint that {writer} wrote: it holds a '{kind}', which could run code; nothing of it was "
        f"run. If you know and trust who made the file, allow it: {TRUST}=1 (or {TRUST_OPTION})"
    )


def _check_file(path: Path, writer: str) -> bool:
    """Whether the checkpoint is a zip file; raises unless it is one of torch's files."""
    if path.is_dir():
        raise ValueError(f"{path}: a folder; give the checkpoint file in it, e.g. {path / 'checkpoint_best.pt'}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    if not path.is_file():
        raise ValueError(f"{path}: neither a file nor a folder; expected a checkpoint file that {writer} wrote")
    try:
        with open(path, "rb") as file:
            start = file.read(len(_BEFORE_ZIP))
        is_zip = zipfile.is_zipfile(path)
        entries = zipfile.ZipFile(path).infolist() if is_zip else []
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not start:
        raise ValueError(f"{path}: the file is empty; expected a checkpoint: {_INCOMPLETE}")
    if start.startswith(b"PK") and not is_zip:
        raise ValueError(f"{path}: the end of the checkpoint is missing; {_INCOMPLETE}")
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(f"{path}: a TorchScript program; expected a checkpoint that {writer} wrote")
    if not any(name.endswith("/data.pkl") for name in names) and start != _BEFORE_ZIP:
        raise ValueError(f"{path}: not a checkpoint file of torch, expected one that {writer} wrote")
    packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise ValueError(
            f"{path}: '{packed}' in it is compressed, as torch writes none; unpack the file, or save the model again"
        )
    size = path.stat().st_size
    liar = next((entry for entry in entries if entry.file_size > size), None)
    if liar is not None:
        raise ValueError(
            f"{path}: '{liar.filename}' in it is to have {liar.file_size:,} bytes, but the file has {size:,}; "
            f"{_INCOMPLETE}"
        )
    return is_zip


def require_stored(weights: Mapping[str, Any], path: PathLike) -> None:
    """Raises ValueError for tensors that the file `path` does not hold: repeated values, sparse ones, none at all."""
    for name, value in weights.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            raise ValueError(f"{path}: parameter '{name}': found {type(value).__name__}, expected a tensor of floats")
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError(
                f"{path}: parameter '{name}': found a {value.layout} tensor on {value.device}, expected numbers"
            )
        asked, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        if asked > held:
            raise ValueError(
                f"{path}: parameter '{name}': its shape {tuple(value.shape)} asks for {asked:,} bytes, but the file "
                f"holds {held:,} of it"
            )


def as_plain(value: Any, rebuild: Optional[Mapping[str, Callable[[Dict[str, Any]], Any]]] = None) -> Any:
    """`value` with every stand-in in it replaced by dicts, lists and scalars.

    A stand-in of an omegaconf container or node becomes its content, one with another state (a Namespace, a
    dataclass) a dict of its attributes, one without (an enum) its first argument. rebuild: makes something else of
    the attributes, by the name of the type; tuples then stay tuples. Raises ValueError for a value without end.
    """
    return _Plain(rebuild)(value)


class _Plain:
    """One call of `as_plain`, which counts."""

    def __init__(self, rebuild):
        self._rebuild, self._count = rebuild or {}, 0
        self._tuple = list if rebuild is None else tuple

    def __call__(self, value: Any) -> Any:
        self._count += 1
        if self._count > _MOST_VALUES:
            raise ValueError(f"found more than {_MOST_VALUES:,} values in it: its parts are repeated without end")
        state = _state_of(value)
        if isinstance(value, StandIn) and not isinstance(state, dict):
            return self(value.args[0]) if value.args else None
        if state is not None:
            for content in ("_content", "_val"):
                if content in state:
                    return self(state[content])
            state = self(state)
            made = self._rebuild.get(f"{type(value).__module__}.{type(value).__qualname__}")
            return state if made is None else made(state)
        if isinstance(value, dict):
            return {self(key) if isinstance(key, StandIn) else key: self(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return (self._tuple if isinstance(value, tuple) else list)(self(item) for item in value)
        return value


# packages whose types may be on torch's list already, put there by others in this process
_BY_OTHERS = {"argparse", "fairseq", "omegaconf"}


def _state_of(value: Any) -> Optional[Any]:
    """The attributes of a stand-in, or of the object that it would stand for; None for other values."""
    if isinstance(value, StandIn):
        return value.state
    is_other = type(value).__module__.split(".")[0] in _BY_OTHERS and hasattr(value, "__dict__")
    return vars(value) if is_other else None


def sections(cfg: Dict[str, Any]) -> Dict[str, Dict[str, Any]]:
    """The `model` and `task` sections of a configuration, each with its `_name`.

    Before hydra there were none: one flat dict held everything, the name of the model as `arch`.
    """
    if "model" in cfg or "arch" not in cfg:
        return {name: cfg[name] if isinstance(cfg.get(name), dict) else {} for name in ("model", "task")}
    return {"model": {**cfg, "_name": cfg["arch"]}, "task": {**cfg, "_name": cfg.get("task")}}
