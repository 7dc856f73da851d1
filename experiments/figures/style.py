"""One look for all figures, whatever the user's settings of matplotlib are. No JAX."""

import functools
import io
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from experiments.storage import files

# Okabe & Ito's palette, which all common kinds of colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
LOOK = Path(__file__).with_name("look.mplstyle")
Draw = TypeVar("Draw", bound=Callable[..., list[Path]])


def drawing(draw: Draw) -> Draw:
    """Runs `draw(path, ...)` in our look; if it fails, warns and returns no files.

    A run's results are saved before its figures are drawn, so a broken installation of fonts or a
    full disk costs the figure alone: the same command draws it again.
    """

    @functools.wraps(draw)
    def drawn(path: Path, *args: Any, **kwargs: Any) -> list[Path]:
        try:
            import matplotlib.style

            # "default" are the settings as released: the user's would change the figure.
            with matplotlib.style.context(["default", LOOK]):
                return draw(path, *args, **kwargs)
        except Exception as error:  # fonts, disk, memory: whatever it is, the results are saved
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            logging.getLogger(__name__).warning("The figure %s is not drawn (%s)", path, reason)
            return []

    return cast(Draw, drawn)


def sheet(
    count: int, columns: int, size: tuple[float, float], title: str | None
) -> tuple[Any, list[Any]]:
    """A figure and its `count` axes in at most `columns` columns; each cell is `size` inches."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    fig = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = list(fig.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.set_visible(False)
    if title:
        fig.suptitle(literal(title))
    return fig, axes[:count]


def legend(fig: Any, styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Below the panels, in as many columns as fit the figure's width."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=literal(label), **style) for label, style in styles.items()]
    for columns in range(min(len(handles), 4), 0, -1):
        drawn = fig.legend(handles=handles, loc="outside lower center", ncols=columns)
        if columns == 1 or drawn.get_window_extent().width <= fig.bbox.width:
            return
        drawn.remove()


def literal(text: str) -> str:
    """Escapes dollars: matplotlib would typeset what is between two of them as a formula."""
    return text.replace("$", r"\$")


def save(fig: Any, stem: Path) -> list[Path]:
    """Writes STEM.png and STEM.pdf; each is drawn in memory, so that no partial file appears."""
    paths = []
    for kind in ("png", "pdf"):
        content = io.BytesIO()
        fig.savefig(content, format=kind, dpi=200)
        fig.set_layout_engine("none")  # keep the layout: computing it takes half of the time
        paths.append(write(stem.with_name(f"{stem.name}.{kind}"), content.getvalue()))
    return paths


def write(path: Path, content: bytes) -> Path:
    """Writes the whole file or none of it, in a folder that is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, content)
    return path
