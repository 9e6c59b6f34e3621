"""The trade-off between compute and accuracy, drawn."""

import logging
from pathlib import Path
from typing import Sequence

from ..files import atomic_path
from .experiment import PointResult


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


def plot_tradeoff(rows: Sequence[PointResult], path: Path, title: str = "") -> None:
    """Saves WER against real-time factor and against MACs as a PNG, one point a row, one colour a model.

    Raises ValueError with the install command when matplotlib is missing.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    panels = (
        (axes[0], "seconds of compute per second of audio", lambda row: row.real_time_factor),
        (axes[1], "GMACs for 10 s of audio", lambda row: row.macs / 1e9),
    )
    for axis, label, value in panels:
        for model in dict.fromkeys(row.model for row in rows):
            own = sorted((row for row in rows if row.model == model), key=value)
            axis.plot([value(row) for row in own], [row.wer for row in own], "o--", label=model or None, linewidth=1)
            for row in own:
                axis.annotate(
                    row.operating_point,
                    (value(row), row.wer),
                    textcoords="offset points",
                    xytext=(5, 5),
                    fontsize=8,
                )
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.2 * max(value(row) for row in rows))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("WER %")
    axes[0].set_ylim(0, 1.25 * max(row.wer for row in rows) + 0.1)
    if len({row.model for row in rows}) > 1:
        axes[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
