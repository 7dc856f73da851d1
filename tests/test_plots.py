"""Figures show the data, independent of the user's matplotlib settings."""

import io
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.figure
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from experiments.figures import maps, plots

ROOT = str(Path(__file__).parents[1])
X = np.arange(8)


@pytest.fixture
def figures(monkeypatch):
    """The figures to be saved, laid out but not rendered."""
    saved = []

    def savefig(self, target, **kwargs):
        if self not in saved:
            self.draw_without_rendering()
            saved.append(self)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def panel(labels, **more):
    rng = np.random.default_rng(len(labels))
    lines = {label: (X, rng.uniform(0.5, 1.5, (5, len(X)))) for label in labels}
    return plots.Panel("A panel", "nats", lines, **more)


def cells(z, **look):
    x, y = np.array([0.1, 0.2, 0.5]), np.array([1.0, 10.0])
    return maps.Map("A map", "step size", "batch size", x, y, np.asarray(z), "loss", **look)


def test_curves_are_the_median_and_the_band_of_the_finite_runs(tmp_path, figures):
    y = np.random.default_rng(0).normal(size=(30, 8))
    y[0] = np.inf
    lines, points = {"many": (X, y), "one": (X, X)}, {"data": (X, -X)}
    drawn = plots.Panel("T", "y", lines, xlabel="x", marks={"one": [2]}, points=points)
    plots.figure(tmp_path / "f", [drawn, panel("a", square=3.0)], colours={"data": "black"})
    ax, square = figures[0].axes
    assert square.get_aspect() == 1 and square.get_xlim() == square.get_ylim() == (-3, 3)
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("T", "x", "y")
    median, single, mark, dots = ax.get_lines()
    low, middle, high = np.percentile(y[1:], (5, 50, 95), axis=0)
    np.testing.assert_array_equal(median.get_ydata(), middle)
    np.testing.assert_array_equal(single.get_ydata(), X)
    assert list(mark.get_xdata()) == [2, 2]
    np.testing.assert_array_equal(dots.get_xydata(), np.stack([X, -X], 1))
    assert dots.get_color() == "black" and dots.get_linestyle() == "None"
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert {*low, *high} <= {*heights}
    assert (heights.min(), heights.max()) == (low.min(), high.max())


def test_a_label_has_one_style_and_one_legend_entry(tmp_path, figures):
    labels = [f"a label that is rather long, number {i}" for i in range(20)]
    order = [labels, labels[::-1], labels[2:]]
    plots.figure(tmp_path / "f", [panel(each) for each in order])
    fig = figures[0]
    (legend,) = fig.legends
    look = lambda line: (to_hex(line.get_color()), line.get_linestyle())
    of = {line.get_label(): look(line) for line in legend.get_lines()}
    assert list(of) == labels and len(set(of.values())) == 20
    axes = [ax for ax in fig.axes if ax.get_visible()]
    for ax, each in zip(axes, order, strict=True):
        assert [look(line) for line in ax.get_lines()] == [of[label] for label in each]
    boxes = [*(ax.get_tightbbox() for ax in axes), legend.get_window_extent()]
    for i, box in enumerate(boxes):  # on the page, and apart
        assert min(box.x0, box.y0) >= -1 and box.x1 <= fig.bbox.width + 1
        assert not any(box.overlaps(other) for other in boxes[:i])


ODD = {
    "zeros": np.zeros((3, 8)),
    "all NaN": np.full((3, 8), np.nan),
    "diverges": np.where(X > 3, np.inf, 1.0)[None].repeat(3, 0),
    "huge": np.geomspace(1e-300, 1e300, 24).reshape(3, 8),
    "one run": np.array([1.0, 0, -1, np.inf, 2, np.nan, 1e200, 3]),
}


@pytest.mark.parametrize("log_y", [False, True])
def test_values_that_an_axis_cannot_show_are_gaps(tmp_path, figures, log_y):
    panels = [plots.Panel(n, "y", {n: (X, y)}, log_x=True, log_y=log_y) for n, y in ODD.items()]
    assert plots.figure(tmp_path / "odd", panels, columns=3)
    axes = dict(zip(ODD, figures[0].axes, strict=False))
    want = [1, np.nan, np.nan, np.nan, 2, np.nan, np.nan, 3] if log_y else ODD["one run"].copy()
    want[3] = want[6] = np.nan
    np.testing.assert_array_equal(axes["one run"].get_lines()[0].get_ydata(), want)
    assert {ax.get_yscale() for ax in axes.values()} == {"log" if log_y else "linear"}


def test_a_map_shows_its_values_where_its_axes_say(figures, tmp_path):
    z = [[0.0, 1, 2], [3, np.nan, 5]]
    many = cells(np.zeros((2, 40)))._replace(x=np.geomspace(1e-3, 1e3, 40))
    maps.figure(tmp_path / "f", [cells(z), many], columns=3, title="All")
    ax, other, bar, _ = figures[0].axes
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array().filled(-1), np.nan_to_num(z, nan=-1))
    assert image.origin == "lower" and bar.get_ylabel() == "loss"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.1", "0.2", "0.5"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1", "10"]
    places, texts = other.get_xticks().astype(int), other.get_xticklabels()
    assert 4 <= len(places) <= 8
    np.testing.assert_allclose([float(t.get_text()) for t in texts], many.x[places], rtol=5e-3)


def test_a_class_keeps_its_colour_if_others_are_absent(figures, tmp_path):
    names = ("converged", "stabilized", "diverged")
    some = [[[0, 1, 2], [2, 1, 0]], [[1, 2, 2], [1, np.nan, 2]]]
    maps.figure(tmp_path / "f", [cells(z, classes=names) for z in some])
    for ax, bar, z in zip(figures[0].axes[:2], figures[0].axes[2:], some, strict=True):
        (image,) = ax.images
        rgba = image.cmap(image.norm(image.get_array()))
        for place, code in np.ndenumerate(z):
            shown = to_hex(rgba[place], keep_alpha=True)[:7].upper()
            assert rgba[place][3] == 0 if np.isnan(code) else shown == maps.CLASS_COLOURS[int(code)]
        assert [t.get_text() for t in bar.get_yticklabels()] == list(names)


@pytest.mark.parametrize("powers", [1, 60])
def test_a_logarithmic_map_is_even_in_powers_and_blank_below_zero(figures, tmp_path, powers):
    z = [[1.0, 10.0 ** (powers / 2), 10.0**powers], [0.0, -3.0, np.nan]]
    without_range = [cells(np.full((2, 3), value), log_z=True) for value in (np.nan, 7.0)]
    assert maps.figure(tmp_path / "f", [cells(z, log_z=True), *without_range])
    ax, _, _, _, bar, *_ = figures[0].axes  # one of four cells is empty
    (image,) = ax.images
    np.testing.assert_allclose(image.norm(z[0]), [0, 0.5, 1], atol=1e-12)
    assert np.ma.getmaskarray(image.get_array()).tolist() == [[False] * 3, [True] * 3]
    ticks = np.log10([tick for tick in bar.get_yticks() if 1 <= tick <= 10.0**powers])
    assert 2 <= len(ticks) <= 7
    np.testing.assert_allclose(ticks, np.rint(ticks), atol=1e-9)


def test_curves_and_points_are_drawn_on_filled_maps(figures, tmp_path):
    curve = (np.array([0.1, 0.4]), np.array([2.0, 9.0]))
    z = np.add.outer(np.arange(1.0, 3), np.arange(3.0))
    over = {"overlay": {"flow": curve, "SGD": curve}, "points": {"init": (0.2, 3.0)}}
    maps.figure(tmp_path / "f", [cells(z, filled=True, log_z=True, **over)])
    (legend,), (*curves, point) = figures[0].legends, figures[0].axes[0].lines
    look = lambda lines: [(line.get_label(), line.get_color()) for line in lines]
    assert [colour for _, colour in look(curves)] == [c for _, c in look(legend.get_lines())]
    assert [label for label, _ in look(legend.get_lines())] == ["flow", "SGD"]
    np.testing.assert_array_equal(curves[0].get_xydata(), np.stack(curve, 1))
    assert point.get_xydata().tolist() == [[0.2, 3.0]]


def draw_all(folder):
    """Draws a figure of each kind; returns {path: content}."""
    z = np.add.outer(np.arange(1.0, 3), np.arange(3.0))
    over = {"GD": (np.linspace(0.1, 0.5, 6), np.linspace(1, 10, 6))}
    paths = [
        *plots.figure(folder / "new" / "a.b", [panel("ηθ", log_y=True)], title="cost: 5 $"),
        *maps.figure(folder / "maps", [cells(z, log_z=True), cells(z, classes="abcde")]),
        *maps.animate(folder / "a.gif", cells(z, overlay=over), [2, 4, 6], ["Same"] * 3),
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_figures_are_complete_files_whatever_the_users_settings(tmp_path):
    """PDFs contain the time."""
    files = draw_all(tmp_path / "a")
    assert [*files] == ["new/a.b.png", "new/a.b.pdf", "maps.png", "maps.pdf", "a.gif"]
    with Image.open(io.BytesIO(files["a.gif"])) as image:
        durations, frames = [], set()
        for k in range(image.n_frames):
            image.seek(k)
            durations.append(image.info["duration"])
            frames.add(image.convert("RGB").tobytes())
        assert durations == [80, 80, 2000] and len(frames) == 3 and image.info["loop"] == 0
    hostile = {"text.usetex": True, "font.family": ["No such font"], "image.origin": "upper"}
    hostile |= {"savefig.transparent": True, "axes.facecolor": "red", "figure.dpi": 31}
    with matplotlib.rc_context(hostile):
        before = dict(matplotlib.rcParams)
        again = draw_all(tmp_path / "b")
        assert dict(matplotlib.rcParams) == before
    for name in files:
        if name.endswith(".pdf"):
            assert files[name].rstrip().endswith(b"%%EOF")
        else:
            assert again[name] == files[name]


def test_a_command_draws_with_any_backend_and_matplotlibrc(tmp_path):
    """A backend that is not installed; matplotlibrc in two places, neither of which is text."""
    for folder in (tmp_path, tmp_path / "here"):
        folder.mkdir(exist_ok=True)
        (folder / "matplotlibrc").write_bytes(b"text.usetex: True\n\xff")
    flags = ["--n=10", "--d=12", "--support=3", "--seeds=1", "--num_steps=9", "--exp_name=x"]
    env = {"MPLBACKEND": "module://missing", "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.diag_nets", *flags, f"--runs_dir={tmp_path}"],
        cwd=tmp_path / "here",
        env=os.environ | {**env, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "diag_nets" / "x" / "figures" / "diag_nets_d1.png").stat().st_size > 5000


def test_a_figure_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "f.png").mkdir()
    assert plots.figure(tmp_path / "f", [panel("a")]) == []
    unequal = panel("a")._replace(lines={"a": (X, X[:3])})
    assert plots.figure(tmp_path / "g", [panel("a"), unequal]) == []
    warned = [record.getMessage() for record in caplog.records]
    assert [str(tmp_path / name) in text for name, text in zip("fg", warned, strict=True)]
    assert os.listdir(tmp_path) == ["f.png"]
