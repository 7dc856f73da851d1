"""Heat maps and contour maps, with static or animated curves on them. No JAX."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.figures import style
from experiments.storage import files

# Of Okabe & Ito's palette (see `style`), from blue to red in the order of measure.OUTCOMES.
CLASS_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")
CURVE_COLOURS = (style.COLOURS[0], style.COLOURS[4], style.COLOURS[1])


class Map(NamedTuple):
    """`z` [y, x] over two named axes.

    With `classes`, z is an index into them, and each has its own colour; otherwise `zlabel` is the
    label of the colour bar, which is logarithmic with `log_z`. `overlay[label]` is a curve (x, y)
    on the map, and `points[label]` a point.
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
    filled: bool = False  # contours instead of cells


@style.drawing
def figure(
    stem: Path, panels: Sequence[Map], *, columns: int = 2, title: str | None = None
) -> list[Path]:
    """Draws maps side by side, and writes STEM.png and STEM.pdf."""
    fig, axes = style.sheet(len(panels), columns, (3.6, 2.9), title)
    for panel, ax in zip(panels, axes, strict=True):
        draw(fig, ax, panel)
    curve_legend(fig, [label for panel in panels for label in panel.overlay])
    return style.save(fig, stem)


@style.drawing
def animate(path: Path, frame: Map, lengths: Sequence[int], titles: Sequence[str]) -> list[Path]:
    """Writes a GIF with twelve frames per second; the last frame stays for two seconds.

    Frame i shows the first `lengths[i]` points of the overlay's curves, under `titles[i]`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    fig, (ax,) = style.sheet(1, 1, (4.2, 3.6), None)
    fig.set_dpi(120)
    canvas = FigureCanvasAgg(fig)
    draw(fig, ax, frame)
    curve_legend(fig, list(frame.overlay))
    canvas.draw()
    fig.set_layout_engine("none")  # else the map moves when the title changes
    images = []
    for length, title in zip(lengths, titles, strict=True):
        ax.set_title(style.literal(title))
        for curve, (x, y) in zip(ax.lines, frame.overlay.values(), strict=False):
            curve.set_data(x[:length], y[:length])
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    # Not matplotlib's PillowWriter, which gives all frames one duration.
    duration = [1000 // 12] * (len(images) - 1) + [2000]
    content = io.BytesIO()
    images[0].save(
        content, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0
    )
    files.write_bytes(path, content.getvalue())
    return [path]


def draw(fig: Any, ax: Any, panel: Map) -> None:
    """Draws one map with its colour bar, which names classes if there are any."""
    from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
    from matplotlib.ticker import LogLocator

    z = np.ma.masked_invalid(panel.z)
    look: dict[str, Any] = {"cmap": "Greys" if panel.filled else "viridis"}
    if panel.classes:
        count = len(panel.classes)
        # Bounds between the codes: the colour of a class doesn't depend on which others occur.
        look["cmap"] = ListedColormap(list(CLASS_COLOURS[:count]))
        look["norm"] = BoundaryNorm(np.arange(count + 1) - 0.5, count)
    elif panel.log_z:
        z = np.ma.masked_less_equal(z, 0)
        lighter = 100.0 if panel.filled else 1.0  # curves must stand out from the contours
        look["norm"] = LogNorm(z.min(), lighter * z.max()) if z.count() else None
    if panel.filled:
        levels = LogLocator(base=2, numticks=60) if panel.log_z else None
        drawn = ax.contourf(panel.x, panel.y, z, locator=levels, **look)
    else:
        # Equal cells whatever the spacing of the axis; its values are the tick labels.
        drawn = ax.imshow(z, origin="lower", aspect="auto", interpolation="nearest", **look)
        for set_ticks, values in ((ax.set_xticks, panel.x), (ax.set_yticks, panel.y)):
            places = np.arange(0, len(values), max(1, -(-len(values) // 8)))
            set_ticks(places, labels=[f"{values[i]:.3g}" for i in places])
    for i, (x, y) in enumerate(panel.overlay.values()):
        ax.plot(x, y, **_curve_look(i))
    for label, (x, y) in panel.points.items():
        ax.plot([x], [y], marker="o", color="white", markeredgecolor="black", markersize=4)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
        place = {"xytext": (4, 4), "textcoords": "offset points"}
        ax.annotate(style.literal(label), (x, y), bbox=box, **place)
    ax.set(title=style.literal(panel.title), xlabel=panel.xlabel, ylabel=panel.ylabel)
    ax.grid(False)
    ticks = LogLocator(numticks=6) if panel.log_z else None  # default: one tick per contour
    bar = fig.colorbar(drawn, ax=ax, label=panel.zlabel, shrink=0.9, ticks=ticks)
    if panel.classes:
        bar.set_ticks(range(len(panel.classes)), labels=list(panel.classes))


def curve_legend(fig: Any, labels: Sequence[str]) -> None:
    """Draws the legend of the curves on all maps of a figure, if there are any."""
    if labels:
        style.legend(fig, {label: _curve_look(i) for i, label in enumerate(dict.fromkeys(labels))})


def _curve_look(i: int) -> dict[str, Any]:
    colour = CURVE_COLOURS[i % len(CURVE_COLOURS)]
    return {"color": colour, "marker": ".", "markersize": 2, "linewidth": 0.7}
