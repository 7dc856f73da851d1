"""Figures in one look: colour-blind safe, units on the axes, legends beside the data. No JAX."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.storage import files

# Okabe & Ito's palette, which all common kinds of colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
CLASS_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")
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
MOVES_STYLE: dict[Any, Any] = {**STYLE, "lines.markersize": 3}
MAP_STYLE: dict[Any, Any] = {**STYLE, "axes.grid": False}


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
    points: tuple[np.ndarray, np.ndarray] | None = None  # examples, as black dots
    ylim: tuple[float, float] | None = None


class Moves(NamedTuple):
    """Points [k, 2] that moved, and directions to compare with; NaN where the run diverged."""

    title: str
    before: np.ndarray
    after: np.ndarray
    directions: np.ndarray


class Map(NamedTuple):
    """`z` [y, x] over two named axes; `overlay` are curves on it, each x, y with a label.

    Of `classes`, z is the index: discrete colours with a legend. Else a colour bar labelled
    `zlabel`, logarithmic with `log_z`.
    """

    title: str
    xlabel: str
    ylabel: str
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    zlabel: str = ""
    log_z: bool = False
    classes: Sequence[str] = ()
    overlay: Mapping[str, tuple[np.ndarray, np.ndarray]] = {}
    points: Mapping[str, tuple[float, float]] = {}
    filled: bool = False  # contours in place of cells


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
            fig.suptitle(_as_text(title), fontsize=9)
        if len(labels) > 1:
            _legend(fig, styles)
        return _save_both(fig, stem)


def moves(stem: Path, panels: Sequence[Moves], *, title: str | None = None) -> list[Path]:
    """Arrows from where points were to where they are, directions to compare with in black."""
    import matplotlib
    from matplotlib.figure import Figure

    everything = np.concatenate([np.concatenate(panel[1:]) for panel in panels])
    reach = 1.1 * np.nanmax(np.abs(everything[np.isfinite(everything).all(1)]))
    styles = {
        "at initialization": {"color": COLOURS[4], "marker": "o", "linestyle": ""},
        "after training": {"color": COLOURS[0], "marker": "o", "linestyle": ""},
        "teacher": {"color": COLOURS[6], "linestyle": "-"},
    }
    with matplotlib.rc_context(MOVES_STYLE):
        columns = min(len(panels), 4)
        rows = -(-len(panels) // columns)
        fig = Figure(figsize=(2.3 * columns, 2.5 * rows + 0.4), layout="constrained")
        for panel, ax in zip(panels, fig.subplots(rows, columns, squeeze=False).flat, strict=False):
            ax.set_title(_as_text(panel.title))
            ax.set_xlabel("first weight")
            ax.set_ylabel("second weight")
            for end in panel.directions:
                ax.plot([0, end[0]], [0, end[1]], **styles["teacher"])
            for start, end in zip(panel.before, panel.after, strict=True):
                ax.plot(*np.stack([start, end], 1), color="0.6", linewidth=0.5, zorder=1)
            ax.plot(*panel.before.T, **styles["at initialization"])
            ax.plot(*panel.after.T, **styles["after training"])
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        if title:
            fig.suptitle(_as_text(title), fontsize=9)
        _legend(fig, styles)
        return _save_both(fig, stem)


def maps(
    stem: Path, panels: Sequence[Map], *, columns: int = 2, title: str | None = None
) -> list[Path]:
    """Draws maps beside each other, and writes STEM.png and STEM.pdf."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(MAP_STYLE):
        fig = Figure(figsize=(3.6 * columns, 2.9 * rows), layout="constrained")
        axes = fig.subplots(rows, columns, squeeze=False)
        for panel, ax in zip(panels, axes.flat, strict=False):
            draw_map(fig, ax, panel)
        for ax in axes.flat[len(panels) :]:
            ax.set_visible(False)
        labels = list(dict.fromkeys(label for panel in panels for label in panel.overlay))
        if labels:
            _legend(fig, {label: _overlay_style(i) for i, label in enumerate(labels)})
        if title:
            fig.suptitle(_as_text(title), fontsize=9)
        return _save_both(fig, stem)


def animation(
    path: Path, frame: Map, lengths: Sequence[int], titles: Sequence[str], *, per_second: int = 12
) -> Path:
    """A map whose overlay grows to `lengths` points, as a GIF that stays on its last frame."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    images = []
    with matplotlib.rc_context(MAP_STYLE):
        fig = Figure(figsize=(4.2, 3.6), dpi=120, layout="constrained")
        canvas, ax = FigureCanvasAgg(fig), fig.subplots()
        draw_map(fig, ax, frame)
        _legend(fig, {label: _overlay_style(i) for i, label in enumerate(frame.overlay)})
        curves = ax.lines[: len(frame.overlay)]
        for moving in (*curves, ax.title):  # drawn anew on the same background for each frame
            moving.set_animated(True)
        canvas.draw()
        background = canvas.copy_from_bbox(fig.bbox)
        for length, title in zip(lengths, titles, strict=True):
            canvas.restore_region(background)
            ax.set_title(_as_text(title))
            for curve, (x, y) in zip(curves, frame.overlay.values(), strict=True):
                curve.set_data(x[:length], y[:length])
            for moving in (*curves, ax.title, *ax.lines[len(curves) :], *ax.texts):
                fig.draw_artist(moving)
            image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
            images.append(image.convert("P", palette=Image.Palette.ADAPTIVE))
    content = io.BytesIO()
    duration = [1000 // per_second] * (len(images) - 1) + [2000]
    images[0].save(
        content, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, content.getvalue())
    return path


def draw_map(fig: Any, ax: Any, panel: Map) -> None:
    """One map with its colour bar, or the names of its classes, outside the data."""
    from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
    from matplotlib.ticker import LogLocator

    z = np.ma.masked_invalid(panel.z)
    look: dict[str, Any] = {"cmap": "Greys" if panel.filled else "viridis"}
    if panel.classes:
        count = len(panel.classes)
        look["cmap"] = ListedColormap(list(CLASS_COLOURS[:count]))
        look["norm"] = BoundaryNorm(np.arange(count + 1) - 0.5, count)
    elif panel.log_z:
        z = np.ma.masked_less_equal(z, 0)
        lighter = 100.0 if panel.filled else 1.0
        look["norm"] = LogNorm(z.min(), lighter * z.max()) if z.count() else None
    if panel.filled:
        levels = LogLocator(base=2, numticks=60) if panel.log_z else None
        drawn = ax.contourf(panel.x, panel.y, z, locator=levels, **look)
    else:
        # Equal cells whatever the axis's spacing; its values are the tick labels.
        drawn = ax.imshow(z, origin="lower", aspect="auto", interpolation="nearest", **look)
        _cell_ticks(ax.set_xticks, panel.x)
        _cell_ticks(ax.set_yticks, panel.y)
    for i, (x, y) in enumerate(panel.overlay.values()):
        ax.plot(x, y, **_overlay_style(i))
    for label, (x, y) in panel.points.items():
        ax.plot([x], [y], marker="o", color="white", markeredgecolor="black", markersize=4)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
        ax.annotate(_as_text(label), (x, y), xytext=(4, 4), textcoords="offset points", bbox=box)
    ax.set(title=_as_text(panel.title), xlabel=panel.xlabel, ylabel=panel.ylabel)
    bar = fig.colorbar(drawn, ax=ax, label=panel.zlabel, shrink=0.9)
    if panel.classes:
        bar.set_ticks(range(len(panel.classes)), labels=list(panel.classes))
    elif panel.log_z and z.count():
        low, high = np.log10(z.min()), np.log10(z.max())
        powers = np.arange(np.ceil(low), np.floor(high) + 1)
        if len(powers) > 1:
            bar.set_ticks(10.0 ** powers[:: -(-len(powers) // 6)])
            bar.minorticks_off()


def _overlay_style(i: int) -> dict[str, Any]:
    colour = (COLOURS[0], COLOURS[4], COLOURS[1])[i % 3]
    return {"color": colour, "marker": ".", "markersize": 2, "linewidth": 0.7}


def _cell_ticks(set_ticks: Any, values: np.ndarray) -> None:
    """At most eight labelled cells of an axis."""
    step = max(1, -(-len(values) // 8))
    places = np.arange(0, len(values), step)
    set_ticks(places, labels=[f"{values[i]:.3g}" for i in places])


def _save_both(fig: Any, stem: Path) -> list[Path]:
    png = _save(fig, stem.with_name(f"{stem.name}.png"), "png")
    fig.set_layout_engine("none")  # everything has its place: finding it takes half the time
    return [png, _save(fig, stem.with_name(f"{stem.name}.pdf"), "pdf")]


def _save(fig: Any, path: Path, kind: str) -> Path:
    """Drawn in memory first: on disk there are whole figures only."""
    content = io.BytesIO()
    fig.savefig(content, format=kind, dpi=200)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, content.getvalue())
    return path


def _legend(fig: Any, styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Below the panels, in as many columns as the figure is wide enough for."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=_as_text(label), **style) for label, style in styles.items()]
    for columns in range(min(len(handles), 4), 0, -1):
        legend = fig.legend(handles=handles, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= fig.bbox.width:
            return
        legend.remove()


def _as_text(words: str) -> str:
    """Dollars as such: matplotlib would read formulas between them, and stop at bad ones."""
    return words.replace("$", r"\$")


def percentiles(y: np.ndarray, levels: Sequence[float] = (5, 50, 95)) -> np.ndarray:
    """`levels` over the finite runs of y [runs, t], shape [levels, t]; NaN where there is none."""
    y = np.where(np.isfinite(y), y, np.nan)
    out = np.full((len(levels), y.shape[1]), np.nan)
    some = ~np.isnan(y).all(0)
    if some.any():
        out[:, some] = np.nanpercentile(y[:, some], levels, axis=0)
    return out


def _draw(ax: Any, panel: Panel, styles: Mapping[str, Mapping[str, Any]]) -> None:
    ax.set_title(_as_text(panel.title))
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
    if panel.points:
        ax.plot(*panel.points, "k.", zorder=3)
    if panel.ylim:
        ax.set_ylim(panel.ylim)
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
