"""The style of all figures, independent of the user's matplotlib settings. No JAX."""

import contextlib
import functools
import io
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from experiments.storage import files

# Okabe & Ito's palette, safe for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
LOOK = Path(__file__).with_name("look.mplstyle")
Draw = TypeVar("Draw", bound=Callable[..., list[Path]])


def drawing(draw: Draw) -> Draw:
    """Decorates `draw(path, ...)` to apply our style, and on failure to warn and return no files.

    Results are saved before figures are drawn: missing fonts or a full disk lose the figure only,
    and the same command draws it again.
    """

    @functools.wraps(draw)
    def drawn(path: Path, *args: Any, **kwargs: Any) -> list[Path]:
        try:
            # `import matplotlib` reads ./matplotlibrc first, and fails if it is not valid.
            moved = contextlib.chdir(LOOK.parent) if os.path.exists("matplotlibrc") else None
            with moved or contextlib.nullcontext():
                import matplotlib.style

            # "default" resets the user's settings.
            with matplotlib.style.context(["default", LOOK]):
                return draw(path, *args, **kwargs)
        except Exception as error:  # fonts, disk, memory, ...
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
    """Draws a legend below the panels, in as many columns as fit the figure's width."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=literal(label), **style) for label, style in styles.items()]
    for columns in range(min(len(handles), 4), 0, -1):
        drawn = fig.legend(handles=handles, loc="outside lower center", ncols=columns)
        if columns == 1 or drawn.get_window_extent().width <= fig.bbox.width:
            return
        drawn.remove()


def literal(text: str) -> str:
    """Escapes dollars, which matplotlib takes as delimiters of formulas."""
    return text.replace("$", r"\$")


def save(fig: Any, stem: Path) -> list[Path]:
    """Writes STEM.png and STEM.pdf atomically."""
    paths = []
    for kind in ("png", "pdf"):
        content = io.BytesIO()
        fig.savefig(content, format=kind, dpi=200)
        fig.set_layout_engine("none")  # keep the layout: computing it takes half of the time
        paths.append(stem.with_name(f"{stem.name}.{kind}"))
        files.write_bytes(paths[-1], content.getvalue())
    return paths
