"""Figures show what was measured: right percentiles, one colour a label, legends off the data."""

import itertools
import os
import warnings

import matplotlib.figure
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from PIL import Image

from experiments.figures import plots

LABELS = [
    "η = 0.25, constant",
    "η = 0.282, /4.8 at 10 %",
    "η = 0.282, /3.4 at 30 %",
    "η = 0.282, /1.5 at 50 %",
]


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved, laid out but not painted."""
    saved = []

    def savefig(self, target, **kwargs):
        if self not in saved:
            self.draw_without_rendering()
            saved.append(self)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def panel(labels, runs=5, n=40, **more):
    x = np.arange(n)
    rng = np.random.default_rng(len(labels))
    lines = {
        label: (x, np.exp(-x / (10 + 5 * i)) * rng.uniform(0.5, 1.5, (runs, n)))
        for i, label in enumerate(labels)
    }
    return plots.Panel(f"Loss of {len(labels)}", "nats", lines, **more)


def boxes(fig):
    """What the panels and the legend take up on the page, in pixels."""
    axes = [ax.get_tightbbox() for ax in fig.axes if ax.get_visible()]
    return axes, [legend.get_window_extent() for legend in fig.legends]


def colours(ax):
    """The colour of each curve's data, by what it shows: title and order."""
    return [to_hex(line.get_color()) for line in ax.get_lines() if line.get_linestyle() != ":"]


levels = st.lists(st.floats(0, 100), min_size=1, max_size=3)
runs = hnp.arrays(
    float,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=5),
    elements=st.floats(-1e6, 1e6) | st.sampled_from([np.nan, np.inf, -np.inf]),
)


@settings(max_examples=200)
@given(runs, levels)
def test_percentiles_are_those_of_the_finite_runs(y, levels):
    got = plots.percentiles(y, levels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = np.nanpercentile(np.where(np.isfinite(y), y, np.nan), levels, axis=0)
    np.testing.assert_array_equal(got, want)
    for j, column in enumerate(y.T):
        assert np.isnan(got[:, j]).all() == (not np.isfinite(column).any())


def test_percentiles_of_nothing_are_nan():
    np.testing.assert_array_equal(plots.percentiles(np.zeros((0, 4))), np.full((3, 4), np.nan))
    np.testing.assert_array_equal(
        plots.percentiles(np.full((2, 1), np.inf)), np.full((3, 1), np.nan)
    )
    assert plots.percentiles(np.zeros((4, 0))).shape == (3, 0)


def test_percentiles_keep_their_argument():
    y = np.array([[1.0, np.inf], [3.0, 2.0]])
    assert plots.percentiles(y, [50]).tolist() == [[2.0, 2.0]]
    assert y.tolist() == [[1.0, np.inf], [3.0, 2.0]]


ODD = {
    "zeros": np.zeros((3, 8)),
    "negative": -np.ones((3, 8)),
    "all NaN": np.full((3, 8), np.nan),
    "diverges": np.where(np.arange(8) > 3, np.inf, 1.0)[None].repeat(3, 0),
    "some zero": np.arange(24.0).reshape(3, 8),
    "huge": np.geomspace(1e-300, 1e300, 24).reshape(3, 8),
    "one run": np.arange(8.0),
    "one run, NaN": np.full(8, np.nan),
    "no run": np.zeros((0, 8)),
}


@pytest.mark.parametrize(("log_x", "log_y"), [(False, True), (True, False)])
def test_odd_values_draw_without_a_warning(tmp_path, figures, log_x, log_y):
    x = np.arange(8)
    lines = {name: (x, y) for name, y in ODD.items()}
    alone = [{name: curve} for name, curve in lines.items()]
    panels = [
        plots.Panel("Odd", "y", curves, log_x=log_x, log_y=log_y, marks={"zeros": [0, 3]})
        for curves in [*alone, {}]
    ]
    plots.figure(tmp_path / "odd", panels, columns=3)
    for ax, panel in zip(figures[0].axes, panels, strict=False):
        positive = any(((y < plots.LARGEST) & (y > 0)).any() for _, y in panel.lines.values())
        assert ax.get_yscale() == ("log" if log_y and positive else "linear")
        assert ax.get_xscale() == ("symlog" if log_x else "linear")


def test_both_files_are_written_and_not_blank(tmp_path):
    stem = tmp_path / "deep" / "figures" / "a.b"
    paths = plots.figure(stem, [panel(LABELS, log_y=log_y) for log_y in (True, False)])
    assert paths == [stem.parent / "a.b.png", stem.parent / "a.b.pdf"]
    assert sorted(os.listdir(stem.parent)) == ["a.b.pdf", "a.b.png"]
    assert paths[1].read_bytes().startswith(b"%PDF")
    assert paths[1].read_bytes().rstrip().endswith(b"%%EOF")
    pixels = np.asarray(Image.open(paths[0]).convert("RGB")).astype(int)
    assert 0.02 < (pixels != 255).any(-1).mean() < 0.6
    for colour in plots.COLOURS[: len(LABELS)]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(-1) < 3).sum() > 100


@pytest.mark.parametrize("count", range(1, 7))
def test_one_to_six_panels_apart_from_each_other_and_the_legend(tmp_path, figures, count):
    panels = [panel(LABELS, log_y=i % 2 == 0) for i in range(count)]
    plots.figure(tmp_path / "f", panels, title="A title")
    fig = figures[0]
    axes, legends = boxes(fig)
    assert len(axes) == count
    assert len(legends) == 1
    everything = [*axes, *legends, fig._suptitle.get_window_extent()]
    for i, box in enumerate(everything):
        assert not any(box.overlaps(other) for other in everything[:i])
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= fig.bbox.width + 1
        assert box.y1 <= fig.bbox.height + 1


def test_the_legend_names_every_label_once(tmp_path, figures):
    plots.figure(tmp_path / "f", [panel(LABELS[:2]), panel(LABELS[1:]), panel(LABELS)])
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == LABELS
    plots.figure(tmp_path / "f", [panel(LABELS[:1])])
    assert figures[-1].legends == []


def test_long_labels_fit_the_page(tmp_path, figures):
    labels = [f"a label that is rather long, number {i}" for i in range(6)]
    plots.figure(tmp_path / "f", [panel(labels)], columns=1)
    axes, (legend,) = boxes(figures[0])
    assert legend.x0 >= 0
    assert legend.x1 <= figures[0].bbox.width
    assert not legend.overlaps(axes[0])


def test_a_label_has_one_colour_in_all_panels(tmp_path, figures):
    order = [LABELS, LABELS[::-1], LABELS[2:]]
    marked = {label: [5.0] for label in LABELS[2:]}
    plots.figure(tmp_path / "f", [panel(labels, marks=marked) for labels in order])
    (legend,) = figures[0].legends
    of = {line.get_label(): to_hex(line.get_color()) for line in legend.get_lines()}
    assert len(set(of.values())) == len(LABELS)
    for ax, labels in zip(figures[0].axes, order, strict=False):
        assert colours(ax) == [of[label] for label in labels]
        bands = [
            to_hex(c.get_facecolor()[0]) for c in ax.collections if isinstance(c, PolyCollection)
        ]
        assert bands == [of[label] for label in labels]
        dotted = [to_hex(li.get_color()) for li in ax.get_lines() if li.get_linestyle() == ":"]
        assert dotted == [of[label] for label in LABELS[2:]]


def test_labels_beyond_the_palette_differ_by_their_dashes(tmp_path, figures):
    labels = [f"run {i}" for i in range(20)]
    plots.figure(tmp_path / "f", [panel(labels)])
    lines = figures[0].legends[0].get_lines()
    assert len({(to_hex(line.get_color()), line.get_linestyle()) for line in lines}) == 20
    drawn = {(to_hex(ln.get_color()), ln.get_linestyle()) for ln in figures[0].axes[0].get_lines()}
    assert len(drawn) == 20


def test_the_median_and_the_band_are_drawn(tmp_path, figures):
    y = np.random.default_rng(0).normal(size=(30, 6))
    y[0] = np.inf
    one = np.arange(6.0)
    lines = {"many": (np.arange(6), y), "one": (np.arange(6), one)}
    plots.figure(tmp_path / "f", [plots.Panel("T", "y", lines, xlabel="x", marks={"one": [2]})])
    (ax,) = figures[0].axes
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("T", "x", "y")
    median, single, mark = ax.get_lines()
    low, middle, high = np.percentile(y[1:], (5, 50, 95), axis=0)
    np.testing.assert_array_equal(median.get_ydata(), middle)
    np.testing.assert_array_equal(single.get_ydata(), one)
    assert list(mark.get_xdata()) == [2, 2]
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert {*low, *high} <= {*heights}
    assert heights.min() == low.min()
    assert heights.max() == high.max()


def test_on_a_log_axis_what_is_not_positive_is_a_gap(tmp_path, figures):
    y = np.array([1.0, 0.0, -1.0, np.inf, 2.0])
    plots.figure(tmp_path / "f", [plots.Panel("T", "y", {"a": (np.arange(5), y)}, log_y=True)])
    drawn = figures[0].axes[0].get_lines()[0].get_ydata()
    np.testing.assert_array_equal(drawn, [1, np.nan, np.nan, np.nan, 2])


def test_no_panels_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="panel"):
        plots.figure(tmp_path / "f", [])
    assert list(tmp_path.iterdir()) == []


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.figure(tmp_path / "f", [panel(LABELS[:1])])
    assert dict(matplotlib.rcParams) == before


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    plots.figure(tmp_path / "f", [panel(LABELS[:1])])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left") as error:
        plots.figure(tmp_path / "f", [panel(LABELS[1:2])])
    assert error.value.filename == str(tmp_path / "f.png")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def cells(z, **look):
    x, y = np.array([0.1, 0.2, 0.5]), np.array([1.0, 10.0])
    return plots.Map("A map", "step size", "batch size", x, y, z, "loss", **look)


def test_a_map_shows_its_values_where_its_axes_say(figures, tmp_path):
    z = np.arange(6.0).reshape(2, 3)
    plots.maps(tmp_path / "map", [cells(z)])
    ax, bar = figures[0].axes
    np.testing.assert_array_equal(ax.images[0].get_array(), z)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.1", "0.2", "0.5"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1", "10"]
    assert ax.images[0].origin == "lower" and bar.get_ylabel() == "loss"


def test_classes_have_a_colour_each_and_their_names_beside_the_map(figures, tmp_path):
    names = ("converged", "stabilized", "diverged")
    plots.maps(tmp_path / "map", [cells(np.array([[0, 1, 2], [2, 2, 0]]), classes=names)])
    ax, bar = figures[0].axes
    assert [t.get_text() for t in bar.get_yticklabels()] == list(names)
    image = ax.images[0]
    colours = {to_hex(image.cmap(image.norm(k))) for k in range(3)}
    assert colours == {colour.lower() for colour in plots.CLASS_COLOURS[:3]}


@pytest.mark.parametrize("z", [np.full((2, 3), np.nan), np.zeros((2, 3)), np.eye(3)[:2]])
def test_a_logarithmic_map_can_lack_positive_values(z, figures, tmp_path):
    plots.maps(tmp_path / "map", [cells(z, log_z=True)])
    assert figures[0].axes


def test_curves_over_a_map_have_their_legend_outside(figures, tmp_path):
    z = np.add.outer(np.arange(1.0, 3), np.arange(3.0))
    over = {"GD": (np.array([0.1, 0.4]), np.array([2.0, 9.0]))}
    panel = cells(z, log_z=True, filled=True, overlay=over, points={"init": (0.2, 3.0)})
    plots.maps(tmp_path / "map", [panel])
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["GD"]
    box = legend.get_window_extent()
    assert all(not box.overlaps(ax.get_window_extent()) for ax in figures[0].axes)
    np.testing.assert_array_equal(figures[0].axes[0].lines[0].get_xdata(), [0.1, 0.4])


def test_moves_go_from_before_to_after_at_equal_scales(figures, tmp_path):
    before, after = np.array([[0.0, 1.0], [2.0, 0.0]]), np.array([[1.0, 1.0], [np.nan, 3.0]])
    plots.moves(tmp_path / "moves", [plots.Moves("units", before, after, np.eye(2))])
    (ax,) = figures[0].axes
    assert ax.get_aspect() == 1 and ax.get_xlim() == ax.get_ylim()
    assert ax.get_xlim()[1] > 2
    arrows = [line.get_xydata().tolist() for line in ax.lines if line.get_color() == "0.6"]
    assert arrows[0] == [[0.0, 1.0], [1.0, 1.0]]


def test_an_animation_has_a_frame_for_each_length_and_stays_on_the_last(tmp_path):
    z = np.add.outer(np.arange(1.0, 3), np.arange(3.0))
    over = {"GD": (np.linspace(0.1, 0.5, 6), np.linspace(1, 10, 6))}
    frame = cells(z, filled=True, overlay=over)
    path = plots.animation(tmp_path / "a.gif", frame, [2, 4, 6], ["one", "two", "three"])
    with Image.open(path) as image:
        assert image.n_frames == 3
        shown, pixels = [], []
        for k in range(3):
            image.seek(k)
            shown.append(image.info["duration"])
            pixels.append(np.asarray(image.convert("RGB")).copy())
    assert shown[-1] > 10 * shown[0]
    assert (pixels[0] != pixels[1]).any() and (pixels[1] != pixels[2]).any()


def test_examples_are_dots_and_the_axis_keeps_its_limits(figures, tmp_path):
    x = np.arange(4.0)
    dots = plots.Panel("f", "f(x)", {"f": (x, 100 * x)}, points=(x, x), ylim=(-1, 5))
    plots.figure(tmp_path / "f", [dots])
    ax = figures[0].axes[0]
    assert ax.get_ylim() == (-1, 5)
    assert any(line.get_marker() == "." and len(line.get_xdata()) == 4 for line in ax.lines)


def test_maps_and_moves_are_written_as_both_files(tmp_path):
    rising = cells(np.arange(6.0).reshape(2, 3))
    moved = plots.Moves("units", np.eye(2), 2 * np.eye(2), np.eye(2))
    for draw, panel in ((plots.maps, rising), (plots.moves, moved)):
        stem = tmp_path / "deep" / f"{draw.__name__}.b"
        paths = draw(stem, [panel])
        assert paths == [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
        assert paths[1].read_bytes().startswith(b"%PDF")
        with Image.open(paths[0]) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert 0.02 < (pixels != 255).any(-1).mean() < 0.9


def test_maps_stand_in_columns_under_a_title_and_fill_the_page(figures, tmp_path):
    panels = [cells(np.full((2, 3), float(i)))._replace(title=str(i)) for i in range(5)]
    plots.maps(tmp_path / "f", panels, columns=3, title="All")
    fig = figures[0]
    assert fig._suptitle.get_text() == "All"
    drawn = [ax for ax in fig.axes if ax.images]
    assert [ax.get_title() for ax in drawn] == [str(i) for i in range(5)]
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in drawn] == [("step size", "batch size")] * 5
    assert len({round(ax.get_position().x0, 6) for ax in drawn}) == 3
    shown = [ax for ax in fig.axes if ax.get_visible()]
    assert len(shown) == 10  # five maps, each with its bar, and nothing at the sixth place
    one = plots.maps(tmp_path / "g", panels[:1], columns=3)
    assert one and figures[1].get_figwidth() == pytest.approx(fig.get_figwidth() / 3)


@pytest.mark.parametrize(("count", "step"), [(1, 1), (8, 1), (9, 2), (17, 3), (40, 5)])
def test_at_most_eight_cells_of_an_axis_are_labelled_each_with_its_own_value(
    count, step, figures, tmp_path
):
    x = np.geomspace(1e-3, 7e4, count)
    z = np.arange(2.0 * count).reshape(2, count)
    plots.maps(tmp_path / "f", [cells(z)._replace(x=x)])
    ax = figures[0].axes[0]
    assert ax.get_xticks().tolist() == list(range(0, count, step))
    texts = [t.get_text() for t in ax.get_xticklabels()]
    assert 1 <= len(texts) <= 8
    for place, text in zip(ax.get_xticks(), texts, strict=True):
        assert float(text) == pytest.approx(x[int(place)], rel=5e-3)


def test_a_class_keeps_its_colour_where_others_are_absent_and_gaps_are_blank(figures, tmp_path):
    names = ("converged", "stabilized", "diverged")
    all_of_them = cells(np.array([[0, 1, 2], [2, 1, 0]]), classes=names)
    some = cells(np.array([[1, 2, 2], [1, np.nan, 2]]), classes=names)
    plots.maps(tmp_path / "f", [all_of_them, some])
    for ax in figures[0].axes[:2]:
        (image,) = ax.images
        z = image.get_array()
        rgba = image.cmap(image.norm(z))
        for place, code in np.ndenumerate(z.filled(-1)):
            if code < 0:
                assert rgba[place][3] == 0
            else:
                assert to_hex(rgba[place]) == plots.CLASS_COLOURS[int(code)].lower()
    for bar in figures[0].axes[2:]:
        assert bar.get_yticks().tolist() == [0, 1, 2]
        assert [t.get_text() for t in bar.get_yticklabels()] == list(names)


def test_the_colours_of_a_logarithmic_map_are_even_in_powers_and_blank_below_zero(
    figures, tmp_path
):
    z = np.array([[1.0, 100.0, 1e4], [0.0, -3.0, np.nan]])
    plots.maps(tmp_path / "f", [cells(z, log_z=True), cells(z)])
    ax, even, bar, _ = figures[0].axes
    (image,) = ax.images
    np.testing.assert_allclose(image.norm(z[0]), [0, 0.5, 1], atol=1e-12)
    assert np.ma.getmaskarray(image.get_array()).tolist() == [[False] * 3, [True] * 3]
    assert bar.get_yticks().tolist() == [10.0**k for k in range(5)]
    assert bar.get_ylabel() == "loss"
    linear = even.images[0]
    np.testing.assert_allclose(linear.norm([-3.0, 1e4]), [0, 1], atol=1e-12)
    assert np.ma.getmaskarray(linear.get_array()).sum() == 1


@pytest.mark.parametrize("powers", [1, 3, 13, 60])
def test_the_bar_of_many_powers_has_few_ticks_all_of_them_powers_of_ten(powers, figures, tmp_path):
    z = np.geomspace(1.0, 10.0**powers, 6).reshape(2, 3)
    plots.maps(tmp_path / "f", [cells(z, log_z=True)])
    ticks = figures[0].axes[1].get_yticks()
    inside = ticks[(ticks >= 1) & (ticks <= 10.0**powers)]
    assert 2 <= len(inside) <= 6
    np.testing.assert_allclose(np.log10(inside), np.rint(np.log10(inside)), atol=1e-9)


def test_maps_with_the_same_curves_share_one_legend_in_the_colours_of_the_curves(figures, tmp_path):
    z = np.add.outer(np.arange(1.0, 3), np.arange(3.0))
    curve = (np.array([0.1, 0.4]), np.array([2.0, 9.0]))
    over = {"flow": curve, "GD": curve, "SGD": curve}
    panel = cells(z, filled=True, overlay=over, points={"init": (0.2, 3.0)})
    plots.maps(tmp_path / "f", [panel, panel])
    (legend,) = figures[0].legends
    named = {line.get_label(): to_hex(line.get_color()) for line in legend.get_lines()}
    assert list(named) == list(over) and len(set(named.values())) == 3
    for ax in figures[0].axes[:2]:
        assert [to_hex(line.get_color()) for line in ax.lines[:3]] == list(named.values())
        (place,) = ax.lines[3:]
        assert place.get_xydata().tolist() == [[0.2, 3.0]]
        assert [(t.get_text(), tuple(t.xy)) for t in ax.texts] == [("init", (0.2, 3.0))]


def test_a_filled_map_has_its_axes_in_their_own_units(figures, tmp_path):
    z = np.add.outer(np.arange(1.0, 3), np.arange(3.0))
    plots.maps(tmp_path / "f", [cells(z, filled=True)])
    ax = figures[0].axes[0]
    assert not ax.images and ax.collections
    assert (ax.get_xlim(), ax.get_ylim()) == ((0.1, 0.5), (1.0, 10.0))
    assert figures[0].legends == []


def test_all_moves_are_on_one_scale_that_runs_which_diverged_do_not_set(figures, tmp_path):
    rng = np.random.default_rng(0)
    before, after = rng.uniform(-1, 1, (2, 4, 2))
    after[1], after[2, 1] = np.nan, np.nan
    after[2, 0], after[3] = 900.0, (-7.0, 0.0)
    near = plots.Moves("near", before, before, np.eye(2))
    far = plots.Moves("far", before, after, np.array([[0.0, 2.0]]))
    lost = plots.Moves("lost", before, np.full((4, 2), np.nan), np.eye(2))
    plots.moves(tmp_path / "f", [near, far, lost], title="Weights")
    fig = figures[0]
    assert fig._suptitle.get_text() == "Weights"
    assert [ax.get_title() for ax in fig.axes] == ["near", "far", "lost"]
    for ax in fig.axes:
        low, high = ax.get_xlim()
        assert ax.get_ylim() == (low, high) and low == -high and 7 < high < 8
        assert ax.get_aspect() == 1
        box = ax.get_window_extent()
        assert box.width == pytest.approx(box.height, rel=1e-6)
    (legend,) = fig.legends
    assert not any(legend.get_window_extent().overlaps(ax.get_tightbbox()) for ax in fig.axes)


def test_moved_points_look_as_the_legend_says(figures, tmp_path):
    before, after = np.array([[0.0, 1.0], [2.0, 0.0]]), np.array([[1.0, 1.0], [np.nan, 3.0]])
    plots.moves(tmp_path / "f", [plots.Moves("units", before, after, np.array([[3.0, 4.0]]))])
    (legend,) = figures[0].legends
    look = lambda line: (to_hex(line.get_color()), line.get_marker(), line.get_linestyle())
    named = {line.get_label(): look(line) for line in legend.get_lines()}
    assert len(set(named.values())) == 3
    drawn = [
        (look(line), line.get_xydata().tolist())
        for line in figures[0].axes[0].lines
        if look(line) in named.values()
    ]
    assert len(drawn) == 3
    shown = {name: {key: repr(data) for key, data in drawn}[named[name]] for name in named}
    assert shown["teacher"] == "[[0.0, 0.0], [3.0, 4.0]]"
    assert shown["at initialization"] == repr(before.tolist())
    assert shown["after training"] == repr(after.tolist())


def frames_of(path):
    """(pixels, milliseconds) of every frame of a GIF, and how often it is shown."""
    with Image.open(path) as image:
        frames = []
        for k in range(image.n_frames):
            image.seek(k)
            frames.append((np.asarray(image.convert("RGB")).astype(int), image.info["duration"]))
        return frames, image.info["loop"]


def test_the_curve_of_an_animation_grows_and_nothing_else_moves(tmp_path):
    z = np.add.outer(np.arange(1.0, 3), np.arange(3.0))
    over = {"GD": (np.linspace(0.12, 0.48, 40), np.linspace(1.5, 9.5, 40))}
    frame = cells(z, filled=True, overlay=over, points={"init": (0.12, 1.5)})
    path = tmp_path / "new" / "a.gif"
    assert plots.animation(path, frame, [1, 10, 25, 40], ["Same"] * 4, per_second=10) == path
    frames, loop = frames_of(path)
    assert [duration for _, duration in frames] == [100, 100, 100, 2000] and loop == 0
    rgb = [int(plots.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    painted = [np.abs(pixels - rgb).max(-1) < 40 for pixels, _ in frames]
    counts = [mask.sum() for mask in painted]
    assert counts == sorted(set(counts)) and counts[-1] > 3 * counts[0]
    # The curve goes up and to the right: what two frames differ in lies ever further there.
    first = [np.argwhere(after & ~before) for before, after in itertools.pairwise(painted)]
    rows, columns = zip(*[places.mean(0) for places in first], strict=True)
    assert list(rows) == sorted(rows, reverse=True) and list(columns) == sorted(columns)
    moved = (np.abs(frames[-1][0] - frames[0][0]).max(-1) > 60).mean()
    assert moved < 0.05
    assert list(path.parent.iterdir()) == [path]


def test_an_animation_without_a_title_for_each_frame_is_refused(tmp_path):
    z = np.add.outer(np.arange(1.0, 3), np.arange(3.0))
    over = {"GD": (np.linspace(0.1, 0.5, 6), np.linspace(1, 10, 6))}
    with pytest.raises(ValueError, match="zip"):
        plots.animation(tmp_path / "a.gif", cells(z, overlay=over), [1, 2], ["one"])
    assert list(tmp_path.iterdir()) == []


def test_examples_lie_over_the_curves_and_out_of_the_legend(figures, tmp_path):
    x = np.arange(4.0)
    curves = {"f": (x, 100 * x), "g": (x, -x)}
    plain = plots.Panel("f", "f(x)", curves)
    plots.figure(tmp_path / "f", [plain._replace(points=(x, x**2)), plain])
    dotted, bare = figures[0].axes
    (dots,) = [line for line in dotted.lines if line.get_marker() == "."]
    assert dots.get_xydata().tolist() == [[0, 0], [1, 1], [2, 4], [3, 9]]
    assert to_hex(dots.get_color()) == "#000000" and dots.get_linestyle() == "None"
    assert dots.get_zorder() > max(line.get_zorder() for line in dotted.lines if line is not dots)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["f", "g"]
    assert len(bare.lines) == 2 and bare.get_ylim()[1] > 300
