"""The network's configuration as JSON, and back: each value of the type that its field has, nothing unknown."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Dict

from ..nn.config import EncoderConfig

# no network is as deep, or as wide
_MOST_LAYERS = 1000
_LARGEST = 1_000_000


def network_to_dict(config: EncoderConfig) -> Dict[str, Any]:
    """Every field by its name, tuples as lists; `network_from_dict` gives an equal configuration back."""
    return _plain(dataclasses.asdict(config))


def network_from_dict(values: Any, where: str) -> EncoderConfig:
    """The configuration that `network_to_dict` wrote; fields that are missing have their defaults.

    Raises ValueError that begins with `where` and names the key, for an unknown key, a value of another type, and
    values that describe no network.
    """
    config = _read(values, EncoderConfig, where)
    for key, found, most in (
        ("conv_layers", len(config.conv_layers), _MOST_LAYERS),
        ("heads", max((config.heads, *config.layer_heads)), _LARGEST),
        ("dim", config.dim, _LARGEST),
        ("ffn_dim", max((config.ffn_dim, *config.layer_ffn)), _LARGEST),
        ("conv_pos", config.conv_pos, _LARGEST),
        ("conv_layers", max(max(layer) for layer in config.conv_layers) if config.conv_layers else 0, _LARGEST),
        ("unsqueeze_factor", config.unsqueeze_factor, _MOST_LAYERS),
    ):
        if not 1 <= found <= most:
            raise ValueError(f"{where}.{key}: found {found}, expected 1 to {most:,}")
    if min(min(layer) for layer in config.conv_layers) < 1:
        raise ValueError(f"{where}.conv_layers: found {list(config.conv_layers)}, expected positive numbers")
    depth = values.get("operating_points", {}).get("depth", config.depth)
    if depth != config.depth:
        raise ValueError(f"{where}.operating_points.depth: found {depth}, but layer_map has {config.depth} layers")
    return config


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _read(value: Any, kind: Any, where: str) -> Any:
    """`value` of a JSON file as the type `kind`: a dataclass, a tuple, or a scalar."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: found {_short(value)}, expected an object")
        kinds = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(kinds))
        if unknown:
            raise ValueError(f"{where}.{unknown[0]}: unknown key; expected some of {', '.join(kinds)}")
        required = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
        missing = [name for name in required if name not in value]
        if missing:
            raise ValueError(f"{where}.{missing[0]}: the key is missing")
        fields = {key: _read(item, kinds[key], f"{where}.{key}") for key, item in value.items()}
        try:
            return kind(**fields)
        except (ValueError, ArithmeticError) as error:
            raise ValueError(f"{where}: {error}") from error
    if typing.get_origin(kind) is tuple:
        return _read_tuple(value, typing.get_args(kind), where)
    if kind is float and type(value) is int:
        return float(value)
    # a bool is an int to isinstance
    if type(value) is not kind:
        raise ValueError(f"{where}: found {_short(value)}, expected {kind.__name__}")
    return value


def _read_tuple(value: Any, kinds: Any, where: str) -> tuple:
    variable = kinds[-1] is Ellipsis
    if not isinstance(value, list) or (not variable and len(value) != len(kinds)):
        expected = "a list" if variable else f"a list of {len(kinds)}"
        raise ValueError(f"{where}: found {_short(value)}, expected {expected}")
    if len(value) > _MOST_LAYERS:
        raise ValueError(f"{where}: found {len(value):,} entries, expected at most {_MOST_LAYERS:,}")
    kinds = [kinds[0]] * len(value) if variable else kinds
    return tuple(_read(item, kind, f"{where}[{index}]") for index, (item, kind) in enumerate(zip(value, kinds)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
