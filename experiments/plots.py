"""Figures in one look: colour-blind safe, units on the axes, legends beside the data. No JAX."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Okabe & Ito's palette, which all common kinds of colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "pdf.fonttype": 42,
}


class Panel(NamedTuple):
    """Curves over a common x. `lines[label]` is (x [t], y [t] or [runs, t]); `marks[label]` are
    places on x to point out, such as the times at which that run's step size decays.
    """

    title: str
    ylabel: str
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]]
    xlabel: str = "SGD step"
    log_y: bool = False
    log_x: bool = False
    marks: Mapping[str, Sequence[float]] = {}


def figure(
    stem: Path, panels: Sequence[Panel], *, columns: int = 2, title: str | None = None
) -> list[Path]:
    """Draws `panels` and writes STEM.png and STEM.pdf; a label has one colour in all panels.

    Of several runs the median is drawn, and the band from the 5th to the 95th percentile; runs
    count where they are finite.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    rows = -(-len(panels) // columns)
    stem.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            rows, columns, figsize=(3.4 * columns, 2.3 * rows), squeeze=False, layout="constrained"
        )
        for panel, ax in zip(panels, axes.flat, strict=False):
            _draw(ax, panel, colours)
        for ax in axes.flat[len(panels) :]:
            ax.set_visible(False)
        handles = [plt.Line2D([], [], color=colours[label], label=label) for label in labels]
        if len(labels) > 1:
            fig.legend(handles=handles, loc="outside lower center", ncols=min(len(labels), 4))
        if title:
            fig.suptitle(title, fontsize=9)
        paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
        for path in paths:
            fig.savefig(path, dpi=200)
        plt.close(fig)
    return paths


def percentiles(y: np.ndarray, levels: Sequence[float] = (5, 50, 95)) -> np.ndarray:
    """`levels` over the finite runs of y [runs, t], shape [levels, t]; NaN where there is none."""
    y = np.where(np.isfinite(y), y, np.nan)
    out = np.full((len(levels), y.shape[1]), np.nan)
    some = ~np.isnan(y).all(0)
    if some.any():
        out[:, some] = np.nanpercentile(y[:, some], levels, axis=0)
    return out


def _draw(ax: Any, panel: Panel, colours: Mapping[str, str]) -> None:
    ax.set_title(panel.title)
    ax.set_xlabel(panel.xlabel)
    ax.set_ylabel(panel.ylabel)
    for label, (x, y) in panel.lines.items():
        x, y = np.asarray(x), np.asarray(y, float)
        if y.ndim == 1:
            ax.plot(x, _drawable(y, panel.log_y), color=colours[label])
            continue
        low, middle, high = (_drawable(row, panel.log_y) for row in percentiles(y))
        ax.fill_between(x, low, high, color=colours[label], alpha=0.18, linewidth=0)
        ax.plot(x, middle, color=colours[label])
    for label, places in panel.marks.items():
        for place in places:
            ax.axvline(place, color=colours[label], linestyle=":", linewidth=0.9)
    if panel.log_x:
        ax.set_xscale("symlog", linthresh=1)
    if panel.log_y:
        ax.set_yscale("log")


def _drawable(y: np.ndarray, log: bool) -> np.ndarray:
    """Gaps where a value can't be drawn: not finite or, on a logarithmic axis, not positive."""
    return np.where(np.isfinite(y) & ((y > 0) | (not log)), y, np.nan)
