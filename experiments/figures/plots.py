"""Curves over a common x, as medians and bands over runs; and points that moved. No JAX."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.figures import style

DASHES = ("-", "--", "-.")  # of the first eight labels, the next eight, ...
LARGEST = 1e150  # matplotlib's axis margins overflow beyond


class Panel(NamedTuple):
    """Curves over a common x.

    `lines[label]` is (x [t], y [t] or [runs, t]). `marks[label]` are places on x to point out with
    dotted lines, such as the times at which that label's step size decays.
    """

    title: str
    ylabel: str
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]]
    xlabel: str = "SGD step"
    log_y: bool = False
    log_x: bool = False
    marks: Mapping[str, Sequence[float]] = {}
    points: tuple[np.ndarray, np.ndarray] | None = None  # training examples, as black dots
    ylim: tuple[float, float] | None = None


class Moves(NamedTuple):
    """Points [k, 2] before and after training (NaN: diverged), and directions to compare with."""

    title: str
    before: np.ndarray
    after: np.ndarray
    directions: np.ndarray


@style.drawing
def figure(
    stem: Path, panels: Sequence[Panel], *, columns: int = 2, title: str | None = None
) -> list[Path]:
    """Draws curves and writes STEM.png and STEM.pdf; a label has one colour in all panels.

    Of several runs, draws the median and the band from the 5th to the 95th percentile over those
    that are finite.
    """
    labels = dict.fromkeys(label for panel in panels for label in (*panel.lines, *panel.marks))
    count = len(style.COLOURS)
    looks = {
        label: {"color": style.COLOURS[i % count], "linestyle": DASHES[i // count % len(DASHES)]}
        for i, label in enumerate(labels)
    }
    fig, axes = style.sheet(len(panels), columns, (3.4, 2.3), title)
    for panel, ax in zip(panels, axes, strict=True):
        _draw(ax, panel, looks)
    if len(labels) > 1:
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
    if panel.points:
        ax.plot(*panel.points, "k.", zorder=3)
    if panel.ylim:
        ax.set_ylim(panel.ylim)
    if panel.log_x:
        ax.set_xscale("symlog", linthresh=1)
    if panel.log_y:
        ax.set_yscale("log")


def _drawable(y: Any, log: bool) -> np.ndarray:
    """NaN, drawn as a gap, where |y| exceeds `LARGEST` or, on a log axis, y is not positive."""
    y = np.asarray(y, float)
    return np.where((np.abs(y) < LARGEST) & ((y > 0) | (not log)), y, np.nan)


def percentiles(y: np.ndarray, levels: Sequence[float] = (5, 50, 95)) -> np.ndarray:
    """Percentiles [levels, t] over the finite entries of each column of y [runs, t], else NaN."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of empty columns
        return np.nanpercentile(np.where(np.isfinite(y), y, np.nan), levels, axis=0)


@style.drawing
def moves(stem: Path, panels: Sequence[Moves], *, title: str | None = None) -> list[Path]:
    """Draws a line from each point's old place to its new one, and the directions in black."""
    points = np.concatenate([np.concatenate(panel[1:]) for panel in panels])
    reach = 1.1 * np.abs(points[np.isfinite(points).all(1)]).max()
    dot = {"marker": "o", "markersize": 3, "linestyle": ""}
    looks = {
        "at initialization": {"color": style.COLOURS[4], **dot},
        "after training": {"color": style.COLOURS[0], **dot},
        "teacher": {"color": "black", "linestyle": "-"},
    }
    fig, axes = style.sheet(len(panels), 4, (2.3, 2.7), title)
    for panel, ax in zip(panels, axes, strict=True):
        for end in panel.directions:
            ax.plot([0, end[0]], [0, end[1]], **looks["teacher"])
        for path in np.stack([panel.before, panel.after], 1):
            ax.plot(*path.T, color="0.6", linewidth=0.5, zorder=1)
        ax.plot(*panel.before.T, **looks["at initialization"])
        ax.plot(*panel.after.T, **looks["after training"])
        ax.set(title=style.literal(panel.title), xlabel="first weight", ylabel="second weight")
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    style.legend(fig, looks)
    return style.save(fig, stem)
