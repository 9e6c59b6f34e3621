"""The one file that knows which fairseq, hydra, omegaconf or torch this is.

Served: fairseq 0.12.2 (Python 3.9 and 3.10, hydra 1.0, omegaconf 2.0, torch 2.1) and fairseq-fixed 0.12.3.1
(Python 3.11 and later, hydra 1.3, omegaconf 2.3, torch up to 2.13).
"""

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import itertools
import math
import os
import re
import runpy
import shutil
import sys
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Union

import fairseq
import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.data.data_utils import compute_mask_indices
from fairseq.dataclass import configs
from fairseq.file_io import PathManager
from hydra._internal import utils as hydra_utils
from omegaconf import OmegaConf, open_dict

from .files import atomic_path
from .runtime.checkpoint import as_plain, read_pickle, require_stored
from .trust import TRUST, trusts_checkpoints


def allow_checkpoint_types() -> None:
    """Lets a program's own torch.load read what fairseq checkpoints hold besides tensors and plain Python values.

    torch >= 2.6 loads with weights_only=True and refuses other types; torch 2.1 has no such list. Fine-tuned
    checkpoints hold the target Dictionary in their task state, those from before hydra an argparse.Namespace. Both are
    values without behaviour.
    """
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([Dictionary, argparse.Namespace])


def make_checkpoint_copies_atomic() -> None:
    """Lets a run that is killed at any moment leave a `checkpoint_last.pt` that loads.

    Both versions write a new checkpoint under a temporary name, but then copy it over `checkpoint_last.pt` and
    `checkpoint_best.pt` byte by byte (`PathManager.copy`).
    """
    stock = PathManager.copy

    def copy(src_path: str, dst_path: str, overwrite: bool = False):
        if PathManager.path_requires_pathmanager(dst_path):
            return stock(src_path, dst_path, overwrite)
        with atomic_path(dst_path) as temporary:
            shutil.copyfile(src_path, temporary)
        return dst_path

    PathManager.copy = staticmethod(copy)


class _CarefulTorch:
    """Stands in for the module torch where fairseq reads checkpoints; all but torch.load is the module's own."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def load(file, *args, **options):
        name = getattr(file, "name", file)
        if not isinstance(name, (str, os.PathLike)):
            return torch.load(file, *args, **{**options, "weights_only": not trusts_checkpoints()})
        # not mapped: a training reads its own checkpoints, and writes them anew
        return read_checkpoint(name, mapped=False)


def make_checkpoint_reading_safe() -> None:
    """Lets fairseq read checkpoints (resume, infer, fairseq-generate) as we do: nothing in them is run.

    torch 2.1 would run whatever a file holds; later ones still let stock code evaluate its configuration. Messages name
    the file, which pickle's own do not.
    """
    checkpoint_utils.torch = _CarefulTorch()
    stock = checkpoint_utils.load_checkpoint_to_cpu

    @functools.wraps(stock)
    def load(path, *args, **options):
        # stock opens what it is given, and waits for ever at a named pipe
        if Path(path).exists() and not Path(path).is_file():
            read_pickle(path)
        return stock(path, *args, **options)

    checkpoint_utils.load_checkpoint_to_cpu = load


class _InspectWithModules:
    """Stands in for the module inspect where hydra reports errors: every frame is of some module."""

    def __getattr__(self, name):
        return getattr(inspect, name)

    @staticmethod
    def getmodule(frame):
        return inspect.getmodule(frame) or fairseq


def make_hydra_print_errors() -> None:
    """Lets a failing fairseq-hydra-train end with its own error on Python 3.9 and 3.10.

    hydra 1.0 dies of two things instead, while it prints a traceback. It asserts that every frame is of a module, which
    the __init__ of a dataclass, made from text, is not: what our configurations refuse passes one. And it calls
    traceback.print_exception(etype=...), a name that Python 3.10 took away.
    """
    hydra_utils.inspect = _InspectWithModules()
    if "etype" not in inspect.signature(traceback.print_exception).parameters:
        hydra_utils.print_exception = lambda etype, value, tb: traceback.print_exception(type(value), value, tb)


def mask_seeds(rows: int) -> Dict[str, Any]:
    """Arguments that make fairseq's compute_mask_indices a function of numpy's global state, as 0.12.2's is.

    fairseq-fixed (and fairseq's HEAD) draws from fresh entropy unless it is told seed, epoch and indices.
    """
    if "indices" not in inspect.signature(compute_mask_indices).parameters:
        return {}
    return {"seed": int(np.random.randint(2**31 - 1)), "epoch": 0, "indices": torch.arange(rows)}


def make_examples_importable() -> Path:
    """Makes `import examples.speech_recognition...` find the examples that ship inside fairseq; returns their folder.

    pip installs them as `fairseq.examples`, yet their code says `from examples`. Only the package name is added:
    with site-packages/fairseq itself on the path, its `logging` would shadow Python's. A folder of that name which
    happens to be importable (this repository's `examples`, say) yields to fairseq's.
    """
    package = Path(fairseq.__file__).resolve().parent
    folder = next(
        (f for f in (package / "examples", package.parent / "examples") if (f / "__init__.py").is_file()), None
    )
    if folder is None:
        raise FileNotFoundError(f"{package / 'examples'}: fairseq's examples are missing; install fairseq again")
    if list(getattr(sys.modules.get("examples"), "__path__", [])) == [str(folder)]:
        return folder
    for name in [name for name in sys.modules if name.split(".")[0] == "examples"]:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        "examples", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["examples"] = module
    spec.loader.exec_module(module)
    return folder


class _HashableSubclasses:
    """Gives every dataclass that derives from it a hash.

    Python >= 3.11 refuses unhashable dataclass instances as field defaults, and infer.py has six of them.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.__hash__ = object.__hash__


def _infer_configs() -> Dict[str, type]:
    """Stand-ins for the config classes that infer.py imports: hashable, and with our fields and defaults."""
    make_examples_importable()
    decoder_config = importlib.import_module("examples.speech_recognition.new.decoders.decoder_config")

    @dataclass
    class DecoderConfig(_HashableSubclasses, decoder_config.DecoderConfig):
        operating_point: Optional[str] = field(
            default=None,
            metadata={"help": "operating point to decode at, e.g. s2q1k2; the checkpoint's own by default"},
        )

    @dataclass
    class DatasetConfig(_HashableSubclasses, configs.DatasetConfig):
        # fairseq-fixed drops what is left after the last full multiple (8 by default), test sets included.
        required_batch_size_multiple: int = 1

    hashable = {"DecoderConfig": DecoderConfig, "DatasetConfig": DatasetConfig}
    for name in ("CommonConfig", "CommonEvalConfig", "CheckpointConfig", "DistributedTrainingConfig"):
        hashable[name] = dataclass(type(name, (_HashableSubclasses, getattr(configs, name)), {}))
    return hashable


@contextlib.contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Sets attributes of `owner` and puts the former values back."""
    former = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in former.items():
            setattr(owner, name, value)


def _adapting_main(adapt_task: Callable) -> Callable:
    """Stands in for hydra.main: passes the decorated function through `adapt_task` first."""
    import hydra

    stock = hydra.main
    # hydra >= 1.2 asks which version's behaviour is meant; infer.py was written for 1.0's, which 1.1 still has.
    options = {"version_base": "1.1"} if "version_base" in inspect.signature(stock).parameters else {}

    def main(config_path=None, config_name=None):
        def decorate(function):
            adapted = functools.wraps(function)(adapt_task(function))
            return stock(config_path=str(config_path), config_name=config_name, **options)(adapted)

        return decorate

    return main


def _self_first() -> Any:
    """Context in which hydra composes a config before the groups of its defaults list, where it does not say.

    That was hydra 1.0's order, which infer.yaml relies on. Since 1.1 the config comes last, and its `task: null`
    erases the task that the command line chose.
    """
    try:
        from hydra._internal import defaults_list
    except ImportError:
        return contextlib.nullcontext()
    stock = defaults_list._validate_self

    def validate_self(containing_node, defaults, has_config_content):
        added = stock(containing_node, defaults, has_config_content)
        if added and containing_node.primary:
            defaults.insert(0, defaults.pop())
        return added

    return _replaced(defaults_list, _validate_self=validate_self)


def run_infer(argv: List[str], adapt_task: Callable[[Callable], Callable]) -> None:
    """Runs fairseq's own examples/speech_recognition/new/infer.py as a program with the hydra overrides `argv`.

    `adapt_task(function)` returns a function of the composed config that calls `function`, infer's hydra entry.
    The config gains `decoding.operating_point`, and `dataset.required_batch_size_multiple` defaults to 1.
    infer.py is run as a file because hydra 1.0 fails on it as an imported module.
    """
    import hydra

    folder = make_examples_importable()
    script = folder / "speech_recognition" / "new" / "infer.py"
    stand_ins = _infer_configs()
    decoder_config = sys.modules["examples.speech_recognition.new.decoders.decoder_config"]
    decoder = {"DecoderConfig": stand_ins.pop("DecoderConfig")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(decoder_config, **decoder))
        stack.enter_context(_replaced(configs, **stand_ins))
        stack.enter_context(_replaced(hydra, main=_adapting_main(adapt_task)))
        stack.enter_context(_self_first())
        stack.enter_context(_replaced(sys, argv=[str(script), *argv]))
        stack.enter_context(warnings.catch_warnings())
        # infer.yaml is written for hydra 1.0; later ones say so at length at every start.
        warnings.filterwarnings("ignore", message=r"(?s).*hydra\.cc/docs/.*/upgrades/")
        runpy.run_path(str(script), run_name="__main__")


@contextlib.contextmanager
def mended_kenlm_decoder() -> Iterator[None]:
    """Within it fairseq's KenLMDecoder decodes without a lexicon, too (decoding.unitlm=true).

    Both versions give such hypotheses an empty list of words, which infer takes for their text. 0.12.2 also numbers the
    labels for the language model as a hash table has them, not as the dictionary does.
    """
    make_examples_importable()
    decoders = importlib.import_module("examples.speech_recognition.new.decoders.flashlight_decoder")
    from flashlight.lib.text.dictionary import Dictionary as WordDictionary

    class KenLMDecoder(decoders.KenLMDecoder):
        def decode(self, emissions):
            hypotheses = super().decode(emissions)
            if not hasattr(self, "trie"):
                for hypothesis in itertools.chain.from_iterable(hypotheses):
                    del hypothesis["words"]
            return hypotheses

    def create_word_dict(lexicon):
        words = WordDictionary()
        for word in [*lexicon, *([] if "<unk>" in lexicon else ["<unk>"])]:
            words.add_entry(word)
        words.set_default_index(words.get_index("<unk>"))
        return words

    with _replaced(decoders, KenLMDecoder=KenLMDecoder, create_word_dict=create_word_dict):
        yield


def hydra_arguments(argv: List[str]) -> argparse.Namespace:
    """Parses a hydra command line; `overrides` holds its key=value arguments, wherever among the flags they stood."""
    from hydra._internal.utils import get_args_parser

    return get_args_parser().parse_intermixed_args(argv)


def job_overrides(name: str) -> List[str]:
    """Makes hydra name a job `name`, and run it in a folder of its own.

    hydra 1.0 would name it after the file that holds the wrapper of the entry function. It always changes the
    directory; since 1.2 that is a choice which must be stated.
    """
    import hydra

    version = tuple(int(part) for part in hydra.__version__.split(".")[:2])
    return [f"hydra.job.name={name}"] + (["hydra.job.chdir=true"] if version >= (1, 2) else [])


def read_checkpoint(path: Union[str, Path], mapped: bool = True) -> Dict[str, Any]:
    """Reads a fairseq checkpoint as it is stored; mapped: its tensors stay on disk where the file's format allows.

    The result has "model" and, under "cfg" or (before hydra) "args", the configuration: dicts and Namespaces. Raises
    FileNotFoundError when the file is missing and ValueError when it is no fairseq checkpoint, or holds what could run
    code.
    """
    state = _restored(read_pickle(path, mapped=mapped), path)
    keys = list(state)[:8] if isinstance(state, dict) else type(state).__name__
    known = isinstance(state, dict) and isinstance(state.get("model"), dict)
    if not known or not isinstance(state.get("cfg") or state.get("args"), (dict, argparse.Namespace)):
        raise ValueError(f"{path}: not a fairseq checkpoint; expected the keys 'model' and 'cfg', found {keys}")
    return state


def _restored(state: Any, path: Union[str, Path]) -> Any:
    """A checkpoint with the types that fairseq expects in place of stand-ins; raises ValueError for what is none."""
    if not isinstance(state, dict):
        return state
    try:
        if isinstance(state.get("model"), dict):
            require_stored(state["model"], path)
        restored = {key: value if key == "model" else as_plain(value, _TYPES) for key, value in state.items()}
        if not trusts_checkpoints():
            for key in ("cfg", "args"):
                _require_literals(restored.get(key), f"{path}: {key}")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        where = "" if str(error).startswith(str(path)) else f"{path}: not a fairseq checkpoint: "
        raise ValueError(f"{where}{error}") from error
    return restored


def _dictionary(state: Dict[str, Any]) -> Dictionary:
    symbols, counts, indices = (state.get(key) for key in ("symbols", "count", "indices"))
    if not isinstance(symbols, list) or not all(isinstance(symbol, str) for symbol in symbols):
        raise ValueError("its dictionary is damaged: expected a list of symbols")
    if not isinstance(counts, list) or not isinstance(indices, dict):
        raise ValueError("its dictionary is damaged: expected counts and indices of its symbols")
    dictionary = Dictionary.__new__(Dictionary)
    vars(dictionary).update(state)
    return dictionary


_TYPES = {
    "argparse.Namespace": lambda state: argparse.Namespace(**state),
    "fairseq.data.dictionary.Dictionary": _dictionary,
}

# Texts of a configuration that fairseq gives to eval() when it builds a model or a task from a checkpoint.
_EVALUATED = {
    *("conv_feature_layers", "conv_aggregator_layers", "wer_args", "xformers_att_config"),
    *("encoder_layers", "decoder_layers", "encoder_attention", "decoder_attention", "character_filters"),
    *("pretrained", "self_attention", "project_input", "gated_attention", "downsample"),
    *("adaptive_softmax_cutoff", "adaptive_input_cutoff", "left_pad_source", "left_pad_target"),
    *("pipeline_balance", "pipeline_devices", "pipeline_encoder_balance", "pipeline_encoder_devices"),
    *("pipeline_decoder_balance", "pipeline_decoder_devices"),
    *("adam_betas", "adamax_betas", "adafactor_eps", "lamb_betas"),
}
_LITERALS = (
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Load),
    *(ast.UnaryOp, ast.USub, ast.UAdd, ast.BinOp, ast.Add, ast.Mult),
)
_REFERENCE = re.compile(r"\$\{[\w.]*?(\w+)\}")
# of a text that is evaluated: no real one is as long, or repeats as often
_LONGEST_LITERAL, _LARGEST_LITERAL = 10_000, 100_000


def _require_literals(value: Any, where: str) -> None:
    """Raises ValueError where a configuration has code, where fairseq would evaluate it."""
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key in _EVALUATED and isinstance(item, (str, bytes)) and not _is_literal(item):
            shown = repr(item) if len(item) <= 80 else repr(item[:77])[:-1] + "..."
            raise ValueError(
                f"{where}.{key}: found {shown}, which fairseq would run as code; expected numbers, lists and tuples, "
                f"like [(512, 10, 5)] * 2. If you know and trust who made the file, allow it: {TRUST}=1"
            )
        _require_literals(item, f"{where}.{key}")


def _is_literal(text: Union[str, bytes]) -> bool:
    """Whether a text is made of numbers, texts, lists, tuples, dicts, and sums and (few) repetitions of them.

    A reference to another key that is evaluated is one too, as that is looked at by itself.
    """
    if isinstance(text, bytes):
        return False
    reference = _REFERENCE.fullmatch(text.strip())
    if reference:
        return reference.group(1) in _EVALUATED
    if not text.strip() or len(text) > _LONGEST_LITERAL:
        return not text.strip()
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    repeats = math.prod(
        node.value
        for product in nodes
        if isinstance(product, ast.BinOp) and isinstance(product.op, ast.Mult)
        for node in (product.left, product.right)
        if isinstance(node, ast.Constant) and isinstance(node.value, int)
    )
    return all(isinstance(node, _LITERALS) for node in nodes) and repeats <= _LARGEST_LITERAL


def checkpoint_section(state: Dict[str, Any], name: str) -> Dict[str, Any]:
    """The `task` or `model` configuration of a checkpoint that `read_checkpoint` returned.

    Checkpoints from before hydra keep one flat namespace for everything, and the name under another key.
    """
    if state.get("cfg"):
        return dict(state["cfg"].get(name) or {})
    flat = vars(state["args"])
    return {**flat, "_name": flat.get("arch" if name == "model" else name)}


def is_registered_model(name: str) -> bool:
    """Whether this process knows how to build the model `name`."""
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY

    return name in MODEL_REGISTRY or name in ARCH_MODEL_REGISTRY


def complete_task_config(saved: Any, current: Any) -> None:
    """Gives a checkpoint's task configuration, in place, the keys of the running task's that it lacks.

    fairseq-fixed reads keys from it that a checkpoint of 0.12.2 does not have (`multi_corpus_keys`).
    """
    if not OmegaConf.is_config(saved):
        return
    with open_dict(saved):
        for key in current:
            if key not in saved and not OmegaConf.is_missing(current, key):
                saved[key] = current[key]


# Here and not in `registration`, which may run while this module is half imported (its `import fairseq` starts it).
allow_checkpoint_types()
make_checkpoint_copies_atomic()
make_checkpoint_reading_safe()
make_hydra_print_errors()
