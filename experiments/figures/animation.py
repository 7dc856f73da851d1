"""A map whose curves grow, as a GIF. No JAX."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.figures import maps, style


@style.drawing
def write(path: Path, frame: maps.Map, lengths: Sequence[int], titles: Sequence[str]) -> list[Path]:
    """Writes a GIF of twelve frames a second that holds its last frame for two seconds.

    Frame i shows the first `lengths[i]` points of the overlay's curves, under `titles[i]`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    fig, (ax,) = style.sheet(1, 1, (4.2, 3.6), None)
    fig.set_dpi(120)
    canvas = FigureCanvasAgg(fig)
    maps.draw(fig, ax, frame)
    maps.curve_legend(fig, list(frame.overlay))
    canvas.draw()
    fig.set_layout_engine("none")  # or the map would move as the title changes
    images = []
    for length, title in zip(lengths, titles, strict=True):
        ax.set_title(style.literal(title))
        for curve, (x, y) in zip(ax.lines, frame.overlay.values(), strict=False):
            curve.set_data(x[:length], y[:length])
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    # Pillow itself, not matplotlib's PillowWriter: that gives all frames one duration.
    duration = [1000 // 12] * (len(images) - 1) + [2000]
    content = io.BytesIO()
    images[0].save(
        content, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0
    )
    return [style.write(path, content.getvalue())]
