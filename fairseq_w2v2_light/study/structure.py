"""What pruning left of a network, layer by layer: as a table and as a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from ..files import atomic_path
from ..nn.config import EncoderConfig
from ..nn.counts import widths_of
from .cost import Subject, cost
from .plot import load_pyplot

# name, and the parts that cost() counts parameters and MACs of under it
_PARTS = (
    ("frontend", ("frontend",), ("frontend",)),
    ("projection", ("projection",), ("projection",)),
    ("positions", ("positions",), ("positions",)),
    ("layers", ("layers",), ("attention", "ffn")),
    ("of them attention", (), ("attention",)),
    ("of them FFN", (), ("ffn",)),
    ("unsqueeze", ("unsqueeze",), ("unsqueeze",)),
    ("norms, mask vector", ("norms",), ()),
    ("heads", ("heads",), ("head",)),
)
_TOTALS = (("parameters", "parameters"), ("macs", "MACs"))


@dataclass(frozen=True)
class Structure:
    """A network before and after pruning.

    widths: (kept, of how many) of each frontend layer ("conv"), of each stored layer ("heads", "ffn"), and of the
    channels between the layers ("hidden", one pair). before, after: what `cost` says of them, on 10 s of audio.
    """

    widths: Dict[str, List[Tuple[int, int]]]
    before: Dict[str, Any]
    after: Dict[str, Any]


def compare(before: Subject, after: Subject) -> Structure:
    """The structure and the cost of a model before and after pruning."""
    return Structure(kept_of(before.network, after.network), cost(before), cost(after))


def kept_of(before: EncoderConfig, after: EncoderConfig) -> Dict[str, List[Tuple[int, int]]]:
    """`Structure.widths` of two networks of the same depth."""
    old, new = widths_of(before), widths_of(after)
    return {
        "conv": list(zip(new.conv, old.conv)),
        "heads": list(zip(new.heads, old.heads)),
        "ffn": list(zip(new.ffn, old.ffn)),
        "hidden": [(new.dim, old.dim)],
    }


def format_summary(structure: Structure) -> str:
    """Two lines: what was kept, and what it costs."""
    kept = {unit: [sum(column) for column in zip(*pairs)] for unit, pairs in structure.widths.items()}
    counts = [
        f"{kept[unit][0]:,} of {kept[unit][1]:,} {name}"
        for unit, name in (
            ("conv", "frontend channels"),
            ("heads", "heads"),
            ("ffn", "FFN channels"),
            ("hidden", "hidden channels"),
        )
    ]
    before, after = structure.before, structure.after
    return (
        f"kept {', '.join(counts)}\n"
        f"parameters {before['parameters']:,} -> {after['parameters']:,} "
        f"({_percent(after['parameters'], before['parameters'])}); MACs of {before['seconds']:g} s at "
        f"{before['operating_point']} {_giga(before['macs'])} G -> {_giga(after['macs'])} G "
        f"({_percent(after['macs'], before['macs'])})"
    )


def format_structure(structure: Structure) -> str:
    """What each layer keeps, parameters and GMACs by part, before and after, as Markdown tables."""
    frontend = [[str(layer), *_kept_cells(*pair)] for layer, pair in enumerate(structure.widths["conv"])]
    layers = [
        [str(layer), *_kept_cells(*heads), *_kept_cells(*ffn)]
        for layer, (heads, ffn) in enumerate(zip(structure.widths["heads"], structure.widths["ffn"]))
    ]
    (hidden,) = structure.widths["hidden"]
    seconds, point = structure.before["seconds"], structure.before["operating_point"]
    return "\n\n".join(
        (
            _table(["frontend layer", "channels", ""], frontend),
            _table(["stored layer", "heads", "", "FFN channels", ""], layers),
            _table(["between the layers", "channels", ""], [["hidden", *_kept_cells(*hidden)]]),
            f"MACs are of {seconds:g} s of audio at operating point {point}.",
            _table(["part", "parameters", "pruned", "", "GMACs", "pruned", ""], _cost_rows(structure)),
        )
    )


def _cost_rows(structure: Structure) -> List[List[str]]:
    before, after = structure.before, structure.after

    def row(name, parameters, macs):
        cells = [name]
        for key, parts, text in (("parameters", parameters, "{:,}".format), ("macs", macs, _giga)):
            counts = [sum(result[f"{key}_by_part"][part] for part in parts) for result in (before, after)]
            cells += [*map(text, counts), _percent(*reversed(counts))] if parts else ["", "", ""]
        return cells

    rows = [row(*part) for part in _PARTS]
    return rows + [row("total", tuple(before["parameters_by_part"]), tuple(before["macs_by_part"]))]


def _kept_cells(kept: int, size: int) -> List[str]:
    return [f"{kept:,} of {size:,}", _percent(kept, size)]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def _giga(macs: float) -> str:
    return f"{macs / 1e9:,.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of equal width, all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]

    def line(cells):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *padded[1:]])} |"

    rule = ["-" * (width + 1) + ":" for width in widths]
    return "\n".join([line(head), f"|{'|'.join(['-' * (widths[0] + 2), *rule[1:]])}|", *map(line, rows)])


def draw_structure(structure: Structure, path: Path, title: str = "") -> None:
    """Saves a PNG: for each layer how much is kept (colour) of what there was (grey).

    Raises ValueError with the install command when matplotlib is missing.
    """
    pyplot = load_pyplot()
    panels = (
        ("conv", "frontend channels", "frontend layer"),
        ("heads", "attention heads", "stored layer"),
        ("ffn", "FFN channels", "stored layer"),
        ("hidden", "hidden channels", ""),
    )
    columns = [max(len(structure.widths[unit]), 3) + 2 for unit, _, _ in panels]
    figure, axes = pyplot.subplots(1, 4, figsize=(14, 4), gridspec_kw={"width_ratios": columns})
    for axis, (unit, name, label) in zip(axes, panels):
        kept, sizes = zip(*structure.widths[unit])
        layers = range(len(sizes))
        axis.bar(layers, sizes, color="0.88")
        axis.bar(layers, kept)
        axis.set_title(f"{name}\n{_percent(sum(kept), sum(sizes))}", fontsize=10)
        axis.set_xlabel(label)
        axis.set_xticks(range(0, len(sizes), 1 + len(sizes) // 13) if label else [])
        axis.set_xlim(-0.7, len(sizes) - 0.3)
        axis.set_ylim(0, 1.05 * max(*sizes, 1))
        axis.yaxis.get_major_locator().set_params(integer=True)
    before, after = structure.before, structure.after
    left = " and ".join(f"{_percent(after[key], before[key])} of the {name}" for key, name in _TOTALS)
    figure.suptitle(f"{title}: {left}" if title else left)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
