"""Which stored layer serves each depth: W2V2-Light's cross-layer sharing."""

from __future__ import annotations

from typing import Tuple

_EXPECTED = "expected 'groups', 'cycle', or one stored layer per depth like '0,0,1,1' or '0x6,1x6'"
_MOST_LAYERS = 1000


def parse_layer_map(text: str, depth: int, unique_layers: int = 0) -> Tuple[int, ...]:
    """Reads a layer map: element i is the stored layer that runs at depth i.

    `unique_layers` is the number of stored layers, 0 meaning `depth` (no sharing) or, for an explicit map, whatever
    the map needs. `groups` (also the empty text) shares runs of neighbouring layers, `cycle` repeats the stack.
    Examples for depth 4 and 2 stored layers: groups 0,0,1,1; cycle 0,1,0,1. One stored layer for all depths is
    W2V2-Light's "91 % fewer parameters" (our reading of its abstract, from arithmetic: 317.4 M to 27.7 M).
    """
    text = (text or "").replace(" ", "")
    if depth < 1:
        raise ValueError(f"encoder_layers: found {depth}, expected 1 or more")
    if unique_layers < 0 or unique_layers > depth:
        raise ValueError(f"unique_layers: found {unique_layers}, expected 0 (no sharing) to encoder_layers={depth}")

    stored = unique_layers or depth
    if text in ("", "groups"):
        return tuple(i * stored // depth for i in range(depth))
    if text == "cycle":
        return tuple(i % stored for i in range(depth))

    layer_map = tuple(index for item in text.split(",") for index in _parse_item(item, text))
    if len(layer_map) != depth:
        raise ValueError(f"layer_map '{text}': {len(layer_map)} entries for encoder_layers={depth}; {_EXPECTED}")
    used = sorted(set(layer_map))
    if used != list(range(len(used))):
        raise ValueError(f"layer_map '{text}': uses stored layers {used}; they must be numbered from 0 without gaps")
    if unique_layers and len(used) != unique_layers:
        raise ValueError(f"layer_map '{text}': uses {len(used)} stored layers, but unique_layers={unique_layers}")
    return layer_map


def _parse_item(item: str, text: str) -> Tuple[int, ...]:
    index, times, count = item.partition("x")
    if not index.isdecimal() or (times and not count.isdecimal()):
        raise ValueError(f"layer_map '{text}': '{item}' is no layer number; {_EXPECTED}")
    if times and int(count) > _MOST_LAYERS:
        raise ValueError(f"layer_map '{text}': '{item}' repeats a layer more than {_MOST_LAYERS} times; {_EXPECTED}")
    return (int(index),) * (int(count) if times else 1)


def format_layer_map(layer_map: Tuple[int, ...]) -> str:
    """The explicit text form of a layer map, as `parse_layer_map` reads it."""
    return ",".join(str(index) for index in layer_map)
