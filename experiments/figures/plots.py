"""Line plots, with medians and percentile bands over runs. No JAX."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.figures import style

DASHES = ("-", "--", "-.")  # of the first eight labels, the next eight, ...
LARGEST = 1e150  # matplotlib's axis margins overflow beyond


class Panel(NamedTuple):
    """Curves and points over a common x.

    `lines[label]` is (x [t], y [t] or [runs, t]), `points[label]` is (x [k], y [k]). `marks[label]`
    are the x of dotted vertical lines, such as the steps at which that label's step size decays;
    `levels[label]` is (x [t], y [t]) of a thin dashed line, such as a bound on the curve. With
    `square`, both axes are [-square, square] with equal scales.
    """

    title: str
    ylabel: str
    lines: Mapping[str, Any]
    xlabel: str = "SGD step"
    log_y: bool = False
    log_x: bool = False
    marks: Mapping[str, Sequence[float]] = {}
    points: Mapping[str, Any] = {}
    levels: Mapping[str, Any] = {}
    ylim: tuple[float, float] | None = None
    square: float | None = None


@style.drawing
def figure(
    stem: Path,
    panels: Sequence[Panel],
    *,
    columns: int = 2,
    title: str | None = None,
    colours: Mapping[str, str] = {},
) -> list[Path]:
    """Draws the panels and writes STEM.png and STEM.pdf; a label has the same style in all panels.

    With several runs, draws the median and the band from the 5th to the 95th percentile of the
    finite ones. `colours[label]` overrides the palette.
    """
    dots = {label for panel in panels for label in panel.points}
    every = [label for panel in panels for label in (*panel.lines, *panel.marks, *panel.points)]
    looks = {}
    for i, label in enumerate(dict.fromkeys(every)):
        turn, place = divmod(i, len(style.COLOURS))
        dash = {"linestyle": DASHES[turn % len(DASHES)]}
        looks[label] = {"marker": ".", "linestyle": ""} if label in dots else dash
        looks[label]["color"] = colours.get(label, style.COLOURS[place])
    fig, axes = style.sheet(len(panels), columns, (3.4, 2.3), title)
    for panel, ax in zip(panels, axes, strict=True):
        _draw(ax, panel, looks)
    if len(looks) > 1:
        style.legend(fig, looks)
    return style.save(fig, stem)


def _draw(ax: Any, panel: Panel, looks: Mapping[str, Mapping[str, Any]]) -> None:
    ax.set(title=style.literal(panel.title), xlabel=panel.xlabel, ylabel=panel.ylabel)
    for label, (x, y) in panel.lines.items():
        low, middle, high = percentiles(np.atleast_2d(np.asarray(y, float)))
        if np.ndim(y) == 2:
            band = _drawable(low, panel.log_y), _drawable(high, panel.log_y)
            ax.fill_between(x, *band, color=looks[label]["color"], alpha=0.18, linewidth=0)
        ax.plot(x, _drawable(middle, panel.log_y), **looks[label])
    for label, places in panel.marks.items():
        for place in places:
            ax.axvline(place, color=looks[label]["color"], linestyle=":", linewidth=0.9)
    for label, (x, y) in panel.levels.items():
        steps = {"drawstyle": "steps-post", "linestyle": "--", "linewidth": 0.9}
        ax.plot(x, y, color=looks[label]["color"], **steps)
    for label, (x, y) in panel.points.items():
        ax.plot(x, y, **looks[label], zorder=3)
    if panel.ylim:
        ax.set_ylim(panel.ylim)
    if panel.square:
        reach = (-panel.square, panel.square)
        ax.set(xlim=reach, ylim=reach, aspect="equal")
    if panel.log_x:
        ax.set_xscale("symlog", linthresh=1)  # includes step 0
    if panel.log_y:
        ax.set_yscale("log")


def _drawable(y: Any, log: bool) -> np.ndarray:
    """NaN, drawn as a gap, where |y| exceeds `LARGEST` or, on a log axis, y is not positive."""
    y = np.asarray(y, float)
    return np.where((np.abs(y) < LARGEST) & ((y > 0) | (not log)), y, np.nan)


def percentiles(y: np.ndarray, levels: Sequence[float] = (5, 50, 95)) -> np.ndarray:
    """Percentiles [levels, t] over the finite entries of each column of y [runs, t], else NaN."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # for empty columns
        return np.nanpercentile(np.where(np.isfinite(y), y, np.nan), levels, axis=0)
