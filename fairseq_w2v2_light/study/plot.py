"""The trade-off between cost and accuracy, drawn."""

import logging
from pathlib import Path

from ..files import atomic_path
from .tradeoff import Tradeoff, axes, labels


def load_pyplot():
    """matplotlib's pyplot, for files only; raises ValueError with the install command when matplotlib is missing."""
    # where fairseq's logging shows everything, its search for fonts is pages long
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("the plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_tradeoff(result: Tradeoff, path: Path, title: str = "") -> None:
    """Saves WER against real-time factor, MACs and parameters as a PNG, one point a row, one colour a model.

    The grey steps are the Pareto fronts. Raises ValueError with the install command when matplotlib is missing.
    """
    pyplot = load_pyplot()
    rows = result.rows
    models = list(dict.fromkeys(row.model for row in rows))
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 5.2), sharey=True, layout="constrained")
    for panel, axis in zip(panels, axes(result.about["seconds"])):

        def place(row, axis=axis):
            return getattr(row, axis.key) / axis.scale, row.wer

        front = sorted(place(row) for row in rows if axis.key in row.pareto)
        panel.step(*zip(*front), where="post", color="0.6", linewidth=1, linestyle="--")
        for model in models:
            own = [row for row in rows if row.model == model]
            panel.plot(*zip(*map(place, own)), "o", label=literal(model))
        right, top = (1.2 * max(values) for values in zip(*map(place, rows)))
        panel.set_xlim(0, right)
        panel.set_ylim(0, top + 0.1)
        panel.set_xlabel(axis.unit)
        # those of the front first, and of the others only where there is room: a label has an eighth by a thirtieth
        named, written = {}, []
        for row, label in sorted(zip(rows, labels(rows)), key=lambda pair: axis.key not in pair[0].pareto):
            named.setdefault(place(row), {})[label] = None
        for (x, y), names in named.items():
            if all(abs(x - a) > right / 8 or abs(y - b) > (top + 0.1) / 30 for a, b in written):
                written.append((x, y))
                side, shift = ("right", -5) if x > 0.7 * right else ("left", 5)
                text = literal(", ".join(names))
                panel.annotate(text, (x, y), (shift, 5), textcoords="offset points", ha=side, fontsize=8)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("WER %")
    if len(models) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(models), 4))
    figure.suptitle(literal(title))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)


def literal(text: str) -> str:
    """A text that matplotlib shows as it stands: no mathematics, and in a legend also with `_` before it."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
