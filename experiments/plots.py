"""Figures in one look: colour-blind safe, units on the axes, legends beside the data. No JAX."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import records

# Okabe & Ito's palette, which all common kinds of colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
DASHES = ("-", "--", "-.")  # of the first eight labels, the next eight, ...
LARGEST = 1e150  # the margins of an axis that reaches further overflow
STYLE: dict[Any, Any] = {
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
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("A figure needs one panel or more.")
    labels = list(
        dict.fromkeys(label for panel in panels for label in (*panel.lines, *panel.marks))
    )
    styles = {
        label: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % 3]}
        for i, label in enumerate(labels)
    }
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(3.4 * columns, 2.3 * rows), layout="constrained")
        axes = fig.subplots(rows, columns, squeeze=False)
        for panel, ax in zip(panels, axes.flat, strict=False):
            _draw(ax, panel, styles)
        for ax in axes.flat[len(panels) :]:
            ax.set_visible(False)
        if title:
            fig.suptitle(title, fontsize=9)
        if len(labels) > 1:
            _legend(fig, styles)
        return [_save(fig, stem.with_name(f"{stem.name}.{kind}"), kind) for kind in ("png", "pdf")]


def _save(fig: Any, path: Path, kind: str) -> Path:
    """Drawn in memory first: on disk there are whole figures only."""
    content = io.BytesIO()
    fig.savefig(content, format=kind, dpi=200)
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write_bytes(path, content.getvalue())
    return path


def _legend(fig: Any, styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Below the panels, in as many columns as the figure is wide enough for."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **style) for label, style in styles.items()]
    for columns in range(min(len(handles), 4), 0, -1):
        legend = fig.legend(handles=handles, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= fig.bbox.width:
            return
        legend.remove()


def percentiles(y: np.ndarray, levels: Sequence[float] = (5, 50, 95)) -> np.ndarray:
    """`levels` over the finite runs of y [runs, t], shape [levels, t]; NaN where there is none."""
    y = np.where(np.isfinite(y), y, np.nan)
    out = np.full((len(levels), y.shape[1]), np.nan)
    some = ~np.isnan(y).all(0)
    if some.any():
        out[:, some] = np.nanpercentile(y[:, some], levels, axis=0)
    return out


def _draw(ax: Any, panel: Panel, styles: Mapping[str, Mapping[str, Any]]) -> None:
    ax.set_title(panel.title)
    ax.set_xlabel(panel.xlabel)
    ax.set_ylabel(panel.ylabel)
    for label, (x, y) in panel.lines.items():
        if np.ndim(y) == 1:
            ax.plot(x, _drawable(y, panel.log_y), **styles[label])
            continue
        low, middle, high = (
            _drawable(row, panel.log_y) for row in percentiles(np.asarray(y, float))
        )
        ax.fill_between(x, low, high, color=styles[label]["color"], alpha=0.18, linewidth=0)
        ax.plot(x, middle, **styles[label])
    for label, places in panel.marks.items():
        for place in places:
            ax.axvline(place, color=styles[label]["color"], linestyle=":", linewidth=0.9)
    if panel.log_x:
        ax.set_xscale("symlog", linthresh=1)
    if panel.log_y and any(np.any(_drawable(y, True) > 0) for _, y in panel.lines.values()):
        ax.set_yscale("log")  # an axis without a positive value can't be


def _drawable(y: Any, log: bool) -> np.ndarray:
    """Gaps where a value can't be drawn: beyond `LARGEST` or, on a log axis, not positive."""
    y = np.asarray(y, float)
    return np.where((np.abs(y) < LARGEST) & ((y > 0) | (not log)), y, np.nan)
