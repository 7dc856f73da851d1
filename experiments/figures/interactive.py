"""An HTML page that shows curves of many runs, and opens from disk without a network. No JAX."""

import base64
import gzip
import itertools
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.figures import style
from experiments.figures.report import data_uri
from experiments.storage import files, records, series

if TYPE_CHECKING:
    from bokeh.document import Document

SCRIPT = Path(__file__).with_name("interactive.js")
TEMPLATE = """
{% block preamble %}<script>window.report = {{ payload | safe }}</script>{% endblock %}
{% block postamble %}
<style>body {font-family: sans-serif; margin: 1em} pre {font-size: 12px; overflow: auto}
td, th {text-align: left; padding: 2px 8px; border-bottom: 1px solid #ddd}</style>
{% endblock %}"""
SINGLE = "single runs"
NONE = "nothing"
MOST_VALUES = 200  # of a setting with a slider
MOST_SLIDERS = 6
MOST_IMAGES = 3_000_000  # bytes
MAP = ("map", "map_source", "map_x", "map_y", "colors")


def write(path: Path, runs: Sequence[series.Run], *, points: int = 500) -> None:
    """Writes the page to `path`; each curve has at most `points` of its points."""
    try:
        from bokeh.embed import file_html
        from bokeh.resources import INLINE
    except ImportError:
        raise ValueError("The page needs bokeh: pip install 'bokeh>=3.6'.") from None

    content = payload(runs, points)
    text = json.dumps(content).replace("</", "<\\/")  # a name can't close the script
    html = file_html(
        page(content, runs),
        INLINE,
        title=f"{len(runs)} runs",
        template=TEMPLATE,
        template_variables={"payload": text},
    )
    files.write_bytes(path, html.encode())


def payload(runs: Sequence[series.Run], points: int) -> dict[str, Any]:
    """Settings of the runs, and their curves as places in one compressed array."""
    pool: list[np.ndarray] = []
    places: dict[bytes, int] = {}
    total = 0

    def place(values: np.ndarray) -> int:
        nonlocal total
        values = rounded(values)
        key = values.tobytes()
        if key not in places:  # most curves share their steps
            places[key] = total
            pool.append(values)
            total += len(values)
        return places[key]

    def described(index: int, run: series.Run) -> dict[str, Any]:
        curves, axes = {}, {}
        for name, (steps, values) in run.curves.items():
            keep = thinned(len(values), points)
            curves[name] = (place(steps[keep]), place(values[keep]), len(keep))
        for name, values in run.axes.items():
            keep = thinned(len(values), points)
            axes[name] = (place(values[keep]), len(keep))
        losses = [v for name, (_, v) in run.curves.items() if name.endswith("loss")]
        return {
            "index": index,
            "name": run.name,
            "settings": {name: plain(run.settings.get(name)) for name in differing},
            "curves": curves,
            "axes": axes,
            "finished": run.finished,
            "diverged": any(len(v) and not math.isfinite(v[-1]) for v in losses),
        }

    differing = series.different(runs)
    described_runs = [described(index, run) for index, run in enumerate(runs)]
    values = {
        name: sorted({each["settings"][name] for each in described_runs}, key=by_size)
        for name in differing
    }
    data = np.concatenate(pool) if pool else np.zeros(0, np.float32)
    return {
        "runs": described_runs,
        "values": values,
        "palette": style.COLOURS,
        "single": SINGLE,
        "none": NONE,
        "data": base64.b64encode(gzip.compress(data.tobytes(), mtime=0)).decode(),
    }


def rounded(values: np.ndarray) -> np.ndarray:
    """Float32 with 16 bits of precision, which compresses well; NaN and infinities as NaN."""
    single = np.asarray(values, np.float64)
    with np.errstate(over="ignore"):
        single = single.astype(np.float32)
    bits = (single.view(np.uint32) + np.uint32(128)) & np.uint32(0xFFFFFF00)
    return np.where(np.isfinite(single), bits.view(np.float32), np.float32(np.nan))


def thinned(length: int, points: int) -> np.ndarray:
    """At most `points` indices into `length` records, the first and the last included."""
    return np.unique(np.rint(np.linspace(0, length - 1, min(length, points))).astype(int))


def plain(value: Any) -> Any:
    """A setting as a number or as text."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def by_size(value: Any) -> tuple:
    """A key that sorts numbers before text."""
    return (isinstance(value, str), value if isinstance(value, str) else float(value))


def page(content: dict[str, Any], runs: Sequence[series.Run]) -> "Document":
    """The widgets, figures and tables, all of whose changes are made by interactive.js."""
    from bokeh import models
    from bokeh.document import Document
    from bokeh.layouts import column, row

    quantities = list(dict.fromkeys(name for run in runs for name in run.curves))
    preferred = [name for name in quantities if name in ("train_loss", "train/loss", "loss")]
    axes = ["step", *dict.fromkeys(name for run in runs for name in run.axes)]
    several = {n: v for n, v in content["values"].items() if 1 < len(v) <= MOST_VALUES}
    first = (preferred or quantities)[0]
    select = lambda name, title, options, value: models.Select(
        name=name, title=title, options=options, value=value, width=190
    )
    shown = [
        select("quantity", "Quantity", quantities, first),
        select("below", "Below it", [NONE, *quantities], NONE),
    ]
    axis = select("axis", "Against", axes, "step")
    default = "schedule" if "schedule" in several and len(runs) > 12 else SINGLE
    group = select("group", "Show", [SINGLE, *several], default)
    smoothing = models.Slider(
        name="smoothing", title="Mean of the last records", start=1, end=50, value=1, width=190
    )
    logs = models.CheckboxButtonGroup(
        labels=["log x", "log y", "log y below"], active=[1] if first in preferred else []
    )
    status = models.Div(text="", sizing_mode="stretch_width")
    sliders = [slider(name, values) for name, values in list(several.items())[:MOST_SLIDERS]]
    figures = panels()
    initial = figures[0][2 if logs.active else 0]  # linear x; y as in `logs`
    plots = column(initial, sizing_mode="stretch_width")

    table_source, table = runs_table(content)
    names: dict[str, Any] = {"axis": axis, "smoothing": smoothing, "sliders": sliders}
    names |= {"shown": shown, "group": group, "logs": logs, "status": status}
    names |= {"figures": figures, "plots": plots}
    names |= {"table_source": table_source}
    tabs = [models.TabPanel(title="Runs and final values", child=table)]
    parts: dict[str, Any] = final_map(list(several)) if len(several) > 1 else dict.fromkeys(MAP)
    names |= parts
    on_map = [parts["map_x"], parts["map_y"]] if parts["map"] else []
    if on_map:
        below = column(row(*on_map), parts["map"], sizing_mode="stretch_width")
        tabs.insert(0, models.TabPanel(title="Map of final values", child=below))
    for title, html in (("Figures", images(runs)), ("Verdicts", claims(runs))):
        if html:
            child = models.Div(text=html, sizing_mode="stretch_width")
            tabs.append(models.TabPanel(title=title, child=child))
    text = models.Div(text=manifests(runs), sizing_mode="stretch_width")
    tabs.append(models.TabPanel(title="Manifests", child=text))

    code = SCRIPT.read_text(encoding="utf-8")
    callback = models.CustomJS(args={**names, "source": "widget"}, code=code)
    for widget in (*shown, axis, group, smoothing, *sliders, *on_map):
        widget.js_on_change("value", callback)
    logs.js_on_change("active", callback)
    table_source.selected.js_on_change("indices", callback)
    if on_map:
        hover = models.CustomJS(args={**names, "source": "map"}, code=code)
        tips = [("final value", "@value"), ("runs", "@count"), ("diverged", "@diverged")]
        parts["map"].add_tools(models.HoverTool(callback=hover, tooltips=tips))
    document = Document(title="Runs")
    document.js_on_event("document_ready", callback)
    controls = row(*shown, axis, group, smoothing, column(models.Div(text="Scale"), logs))
    document.add_root(
        column(
            controls,
            *([row(*sliders)] if sliders else []),
            status,
            plots,
            models.Tabs(tabs=tabs, sizing_mode="stretch_width"),
            sizing_mode="stretch_width",
        )
    )
    return document


def panels() -> list[list[Any]]:
    """Figures of bands and curves of two quantities, four of each: one for each pair of scales.

    They share the zoom along x. interactive.js puts the chosen ones into the page, and fills them.
    """
    from bokeh import models
    from bokeh.plotting import figure

    shared = {scale: models.DataRange1d() for scale in ("linear", "log")}

    def panel(height: int, y_type: Any, x_type: Any) -> Any:
        plot = figure(
            x_axis_type=x_type,
            y_axis_type=y_type,
            height=height,
            sizing_mode="stretch_width",
            tools="pan,box_zoom,wheel_zoom,reset,save",
            active_drag="box_zoom",
            x_range=shared[x_type],
        )
        empty: Any = {key: [] for key in ("xs", "ys", "name", "color", "width")}
        bands, lines = models.ColumnDataSource(empty), models.ColumnDataSource(empty)
        plot.patches("xs", "ys", source=bands, color="color", alpha=0.15, line_width=0)
        drawn = plot.multi_line(
            "xs", "ys", source=lines, color="color", line_width="width", hover_line_alpha=0.4
        )
        tips = [("run", "@name"), ("x", "$data_x"), ("y", "$data_y")]
        plot.add_tools(models.HoverTool(renderers=[drawn], tooltips=tips))
        return plot

    scales = list(itertools.product(("linear", "log"), repeat=2))
    return [[panel(height, *each) for each in scales] for height in (430, 300)]


def slider(name: str, values: Sequence[Any]) -> Any:
    """Chooses one value of a setting; position 0 is all of them."""
    from bokeh import models

    formatter = models.CustomJSTickFormatter(
        args={"shown": [f"{v:.6g}" if isinstance(v, float) else str(v) for v in values]},
        code="return tick === 0 ? 'all' : shown[tick - 1]",
    )
    return models.Slider(
        title=name, name=name, start=0, end=len(values), value=0, width=190, format=formatter
    )


def runs_table(content: dict[str, Any]) -> tuple[Any, Any]:
    """One row per run: settings that differ, whether it finished, the final value; sortable."""
    from bokeh import models

    runs = content["runs"]
    columns: dict[str, Any] = {"run": [each["name"] for each in runs]}
    for name in content["values"]:
        columns[name] = [each["settings"][name] for each in runs]
    ended = lambda each: "finished" if each["finished"] else "running"
    columns["state"] = ["diverged" if each["diverged"] else ended(each) for each in runs]
    columns["last"] = [math.nan] * len(runs)
    source = models.ColumnDataSource(columns)
    shown = [models.TableColumn(field=name, title=name) for name in columns if name != "last"]
    number = models.ScientificFormatter(precision=4)
    shown.append(models.TableColumn(field="last", title="final value", formatter=number))
    table = models.DataTable(
        source=source,
        columns=shown,
        height=320,
        reorderable=False,
        sizing_mode="stretch_width",
        index_position=None,
    )
    return source, table


def final_map(names: Sequence[str]) -> dict[str, Any]:
    """Medians of final values over two settings; runs under the pointer are drawn black above."""
    from bokeh import models
    from bokeh.plotting import figure
    from bokeh.transform import transform

    preferred = [name for name in names if name not in ("seed", "schedule")]
    x, y = ([*preferred, *names])[:2] if len(preferred) != 1 else (preferred[0], names[0])
    if x == y:
        x, y = names[:2]
    colors = models.LinearColorMapper(palette="Viridis256", nan_color="lightgrey")
    empty: Any = {name: [] for name in ("x", "y", "value", "count", "runs", "diverged")}
    source = models.ColumnDataSource(empty)
    plot = figure(
        x_range=models.FactorRange(),
        y_range=models.FactorRange(),
        height=360,
        sizing_mode="stretch_width",
        tools="save,tap",
    )
    plot.rect("x", "y", 1, 1, source=source, fill_color=transform("value", colors), line_color=None)
    plot.add_layout(models.ColorBar(color_mapper=colors), "right")
    select = lambda title, value: models.Select(
        title=title, options=list(names), value=value, width=190
    )
    where = {"map_x": select("Columns", x), "map_y": select("Rows", y)}
    return {"map": plot, "map_source": source, "colors": colors, **where}


def images(runs: Sequence[series.Run]) -> str:
    """The figures of the runs' folders as HTML, up to `MOST_IMAGES` bytes."""
    found, total = [], 0
    for folder in dict.fromkeys(run.folder for run in runs):
        for path in sorted((folder / "figures").glob("*.png")):
            total += path.stat().st_size
            if total > MOST_IMAGES:
                found.append(f"<p>More figures are in {escape(str(path.parent))}.</p>")
                return "".join(found)
            caption = escape(f"{folder.name}, {path.stem}")
            found.append(
                f"<h4>{caption}</h4><img style='max-width: 100%' alt='{caption}' "
                f"src='{data_uri(path)}'>"
            )
    return "".join(found)


def claims(runs: Sequence[series.Run]) -> str:
    """The verdicts.json of the runs' folders as one HTML table."""
    rows: list[dict[str, Any]] = []
    for folder in dict.fromkeys(run.folder for run in runs):
        if (folder / "verdicts.json").exists():
            rows += records.read_json(folder / "verdicts.json")
    names = (
        "claim",
        "setting",
        "statistic",
        "value",
        "interval",
        "prediction",
        "verdict",
        "source",
    )
    line = lambda tag, cells: "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells)
    body = "".join(f"<tr>{line('td', [row.get(name, '') for name in names])}</tr>" for row in rows)
    return f"<table><tr>{line('th', names)}</tr>{body}</table>" if rows else ""


def manifests(runs: Sequence[series.Run]) -> str:
    """The manifest of each folder as HTML, closed until it is clicked."""
    texts = []
    for folder in dict.fromkeys(run.folder for run in runs):
        starts = escape(json.dumps(records.read_starts(folder), indent=1))
        name = escape(folder.name)
        texts.append(f"<details><summary>{name}</summary><pre>{starts}</pre></details>")
    return "".join(texts)
