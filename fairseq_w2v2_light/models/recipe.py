"""Recipes: the hydra YAML files in `config/`, read without hydra."""

import difflib
from pathlib import Path
from typing import Any, Dict, Iterable, List

from fairseq.models import MODEL_DATACLASS_REGISTRY
from omegaconf import DictConfig, OmegaConf

from ..paths import config_dir
from .checkpoint import ENCODER_MODELS, STOCK_ENCODER, complete_model, model_name


def recipe_path(recipe: str) -> Path:
    """The file of a recipe: a YAML path, or a name below `config/` such as pretraining/w2v2_light_tiny.

    Raises FileNotFoundError, which lists the recipes that exist unless it was a checkpoint that was meant.
    """
    named = config_dir() / recipe
    for path in (Path(recipe), named.with_name(named.name + ".yaml"), named):
        if path.is_file():
            return path
    if recipe and Path(recipe).is_dir():
        raise FileNotFoundError(f"{recipe}: a folder, but no model folder; name a checkpoint or a recipe in it")
    if Path(recipe).is_absolute() or Path(recipe).suffix == ".pt":
        raise FileNotFoundError(f"{recipe}: no such file or folder; recipes have names such as pretraining/sew_tiny")
    known = sorted(str(path.relative_to(config_dir()).with_suffix("")) for path in config_dir().rglob("*.yaml"))
    hint = did_you_mean(str(recipe), known)
    raise FileNotFoundError(f"recipe '{recipe}': no such file or name{hint}; the shipped ones are {', '.join(known)}")


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """A hint at the known name that is closest to what was found; empty where none is."""
    close = difflib.get_close_matches(found, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def load_recipe(recipe: str) -> DictConfig:
    """The YAML content of a recipe; raises ValueError unless it has a `model` section with a registered `_name`."""
    path = recipe_path(recipe)
    try:
        cfg = OmegaConf.load(str(path))
    except Exception as error:
        raise ValueError(f"recipe '{path}': not readable as YAML ({error})") from error
    name = model_name(cfg) if OmegaConf.is_dict(cfg) else ""
    if not name:
        raise ValueError(
            f"recipe '{path}': found no model._name in it, expected the YAML of a training; those of infer, for one, "
            "name a checkpoint, which can be given itself"
        )
    if name not in MODEL_DATACLASS_REGISTRY:
        raise ValueError(f"recipe '{path}': model._name is '{name}', which is no registered fairseq model")
    return cfg


def read_recipe(recipe: str, overrides: Dict[str, Any]) -> DictConfig:
    """The `model` and `task` sections of a pre-training recipe, complete with defaults, for one of our encoders.

    Raises ValueError for a recipe of another model and for an override that the model does not have.
    """
    cfg = load_recipe(recipe)
    name = "w2v2_light" if model_name(cfg) == STOCK_ENCODER else model_name(cfg)
    if name not in ENCODER_MODELS:
        raise ValueError(f"recipe '{recipe}': describes a '{name}', expected one of {', '.join(ENCODER_MODELS)}")
    model = complete_model(cfg.model, name)
    for key, value in overrides.items():
        if key not in model:
            raise ValueError(f"recipe_overrides: '{key}' is no key of {name}")
        check_type(name, key, value, "recipe_overrides")
        model[key] = value
    task = {"_name": "audio_pretraining", "data": "", "normalize": False, **_resolved_task(cfg)}
    return OmegaConf.create({"model": model, "task": task})


def check_type(name: str, key: str, value: Any, where: str) -> None:
    """Raises ValueError that names `where`, key and value when `value` is not of the type of a model's key."""
    schema = OmegaConf.structured(MODEL_DATACLASS_REGISTRY[name]())
    try:
        OmegaConf.merge(schema, {key: value})
    except ValueError as error:  # omegaconf's ValidationError; its further lines name its own classes
        reason = str(error).splitlines()[0]
        if OmegaConf.is_list(schema[key]) and isinstance(value, (int, float, str)):
            reason = f"expected a list, like [{str(value).strip('[] ')}]"
        raise ValueError(f"{where}: model.{key}={value}: {reason}; the default is {schema[key]!r}") from error


def parse_overrides(overrides: List[str]) -> Dict[str, str]:
    """Reads `model.KEY=VALUE` arguments of a command line; raises ValueError for a malformed or repeated one."""
    changes: Dict[str, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if key.startswith("model.recipe_overrides."):
            own = key.replace("recipe_overrides.", "")
            raise ValueError(f"override '{text}': write {own}={value}, the recipe's keys are the model's own here")
        if not equals or not key.startswith("model.") or key.count(".") != 1:
            raise ValueError(f"override '{text}': expected model.KEY=VALUE, for example model.unique_layers=12")
        key = key[len("model.") :]
        if key in changes:
            raise ValueError(f"override '{text}': model.{key} is given twice; leave one")
        changes[key] = value
    return changes


def apply_overrides(model: DictConfig, changes: Dict[str, str]) -> DictConfig:
    """A copy of a complete model section with keys set from text: as it stands for a text key, as YAML for the others.

    Quotes around a text or a list, and spaces around those, do not count. Raises ValueError for a key that the model
    does not have and for a value of another type.
    """
    values = {}
    for key, text in changes.items():
        if key not in model:
            hint = did_you_mean(key, map(str, model))
            raise ValueError(f"override 'model.{key}': the model has no such key{hint}")
        if isinstance(model[key], str):
            values[key] = unquoted(text)
        else:
            text = unquoted(text) if OmegaConf.is_list(model[key]) else text
            values[key] = _parse_value(key, text)
            check_type(model._name, key, values[key], "override")
    return OmegaConf.merge(model, OmegaConf.create(values))


def unquoted(text: str) -> str:
    return text.strip(" '\"")


def _parse_value(key: str, text: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except Exception as error:  # YAML's errors have no common base with omegaconf's
        raise ValueError(f"override 'model.{key}={text}': not readable as a YAML value; a list is [24]") from error


def _resolved_task(cfg: DictConfig) -> Dict[str, Any]:
    task = OmegaConf.to_container(cfg.task) if cfg.get("task") is not None else {}
    return {key: value for key, value in task.items() if value not in (None, "???")}
