"""The interactive page: what it reads from run folders, and how it answers in a browser."""

import json
import shutil

import numpy as np
import pytest

from experiments import report
from experiments.storage import arrays, records, series


def deep_run(root, name, lr, losses):
    folder = root / name
    folder.mkdir(parents=True)
    records.write_json(folder / "config.json", {"lr_init": lr, "exp_name": name, "seed": 0})
    for step, loss in enumerate(losses):
        row = {"step": 10 * step, "epoch": step / 2, "train/loss": loss, "step_seconds": 0.5}
        records.append_record(folder, row)
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three deep runs, of which the last diverged, and an ensemble of 2 seeds x 3 schedules."""
    for i in range(3):
        losses = [2.0 / (1 + k * (i + 1)) for k in range(8)]
        deep_run(tmp_path / "deep", f"run{i}", 0.1 * (i + 1), losses[:-1] + [np.nan] * (i == 2))
    import xarray

    folder = tmp_path / "toys"
    folder.mkdir()
    records.write_json(folder / "config.json", {"seeds": 2})
    loss = np.arange(24.0).reshape(2, 3, 4) + 1
    rank = loss[..., ::2]
    dims = ("seed", "schedule")
    dataset = xarray.Dataset(
        {
            "train_loss": ((*dims, "step"), loss),
            "rank": ((*dims, "spectra_step"), rank),
            "theta": ((*dims, "end", "parameter"), np.zeros((2, 3, 2, 5))),
        },
        {
            "seed": [0, 1],
            "schedule": ["a", "b", "c"],
            "step": [0, 5, 10, 20],
            "spectra_step": [0, 10],
        },
    )
    arrays.save_dataset(folder, dataset)
    return tmp_path


def test_runs_have_the_recorded_values_and_settings(runs):
    deep = series.read([str(runs / "deep" / "*")])
    assert [run.settings["lr_init"] for run in deep] == pytest.approx([0.1, 0.2, 0.3])
    steps, losses = deep[1].curves["train/loss"]
    assert steps.tolist() == [10 * k for k in range(7)] and losses[3] == pytest.approx(2 / 7)
    assert deep[1].axes["seconds of training"].tolist() == [5.0 * k for k in range(7)]
    toys = series.read([str(runs / "toys")])
    assert len(toys) == 6 and series.different(toys) == ["seed", "schedule"]
    last = next(r for r in toys if (r.settings["seed"], r.settings["schedule"]) == (1, "b"))
    assert last.curves["train_loss"][1].tolist() == [17, 18, 19, 20]
    assert last.curves["rank"][0].tolist() == [0, 10] and last.curves["rank"][1].tolist() == [
        17,
        19,
    ]
    assert "theta" not in last.curves


def test_other_parts_of_a_study_and_words_make_no_runs(runs):
    folder = runs / "toys"
    plain = series.read([str(folder)])
    whole = arrays.load_dataset(folder)
    whole["regime"] = ("schedule", ["clean", "clean", "clipped"])
    whole["other"] = (("share", "record"), np.zeros((4, 9)))
    arrays.save_dataset(folder, whole)
    found = series.read([str(folder)])
    assert [run.name for run in found] == [run.name for run in plain]
    assert found[0].curves.keys() == plain[0].curves.keys()


def test_the_table_has_one_row_per_run_quantity_and_step(runs, tmp_path):
    import pandas as pd

    out = tmp_path / "page.html"
    table = tmp_path / "all.csv"
    report.main([str(runs / "deep"), f"--out={out}", f"--csv={table}"])
    rows = pd.read_csv(table)
    chosen = rows[(rows["run"] == "run1") & (rows["quantity"] == "train/loss")]
    assert chosen["value"].tolist() == pytest.approx([2.0 / (1 + 2 * k) for k in range(7)])
    assert set(chosen["lr_init"]) == {0.2} and out.exists()


def test_a_place_without_runs_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "none*")])
    assert "none*" in capsys.readouterr().err


@pytest.fixture
def browser():
    """A headless Chromium without a network."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1300,1200",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_network_conditions(offline=True, latency=0, throughput=0)
    yield driver
    driver.quit()


# Lists the figures in the page, and the view of one with its place on the screen.
FIGURES = """
const figures = [...Bokeh.documents[0]._all_models.values()].filter(
  (m) => m.type === "Figure" && m.renderers.length === 2 && Bokeh.index.find_one(m));
figures.sort((a, b) => b.height - a.height);
const curves = (k) => figures[k].renderers[1].data_source.data;
const screen = (k, x, y) => {
  const { frame, el } = Bokeh.index.find_one(figures[k]), at = el.getBoundingClientRect();
  return [at.x + frame.x_scale.compute(x), at.y + frame.y_scale.compute(y)];
};
// Everything that is written on the page, in the roots of its widgets too.
const text = (node) => node.tagName === "STYLE" ? "" : node.data ?? written(node);
const written = (node) => [...(node.shadowRoot ?? node).childNodes].map(text).join(" ");
"""


def evaluate(browser, expression):
    return json.loads(browser.execute_script(f"{FIGURES} return JSON.stringify({expression})"))


def drawn(browser):
    """The lines that the page shows, after its last callback."""
    from selenium.webdriver.support.ui import WebDriverWait

    ready = "return Boolean(window.report && window.report.milliseconds)"
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(ready))
    return evaluate(browser, "curves(0)")


def change(browser, name, field, value):
    """Sets a property of a widget, as the user's hand would, and waits for the callback."""
    browser.execute_script(
        "window.report.milliseconds = 0;"
        f"Bokeh.documents[0].get_model_by_name({name!r}).{field} = {json.dumps(value)}"
    )
    return drawn(browser)


def move(browser, *places, drag=False):
    """Moves the mouse over places of the screen; with its button pressed, for `drag`."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    actions = ActionBuilder(browser)
    for k, (x, y) in enumerate(places):
        actions.pointer_action.move_to_location(int(x), int(y))
        if drag and k == 0:
            actions.pointer_action.pointer_down()
    if drag:
        actions.pointer_action.pointer_up()
    actions.perform()


def until(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(lambda _: condition())


@pytest.mark.browser
def test_the_page_answers_in_a_browser_without_network(runs, tmp_path, browser):
    out = tmp_path / "page.html"
    report.main([str(runs / "toys"), f"--out={out}"])
    browser.get(f"file://{out}")
    lines = drawn(browser)
    assert len(lines["name"]) == 6 and lines["ys"][4] == [17, 18, 19, 20]
    lines = change(browser, "quantity", "value", "rank")
    assert lines["xs"][4] == [0, 10] and lines["ys"][4] == [17, 19]
    lines = change(browser, "seed", "value", 2)  # the second seed
    assert lines["ys"] == [[13, 15], [17, 19], [21, 23]]
    lines = change(browser, "group", "value", "schedule")
    assert len(lines["name"]) == 3 and lines["ys"][0] == [13, 15]
    change(browser, "seed", "value", 0)
    lines = change(browser, "smoothing", "value", 2)
    assert lines["ys"][0] == [13, 14]
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe


@pytest.mark.browser
def test_the_mouse_reads_zooms_and_marks_runs(runs, tmp_path, browser):
    out = tmp_path / "page.html"
    report.main([str(runs / "toys"), f"--out={out}"])
    browser.get(f"file://{out}")
    drawn(browser)
    change(browser, "below", "value", "rank")
    until(browser, lambda: evaluate(browser, "figures.length") == 2)
    assert evaluate(browser, "curves(1)")["ys"][4] == [17, 19]
    # The pointer reads the curve under it.
    x, y = evaluate(browser, "screen(0, 10, 15)")
    move(browser, (x - 5, y), (x, y))
    name = "toys: seed 1, schedule a"
    until(browser, lambda: evaluate(browser, "written(document.body)").count(name) > 1)
    # A rectangle zooms into both figures.
    move(
        browser,
        evaluate(browser, "screen(0, 6, 20)"),
        evaluate(browser, "screen(0, 12, 5)"),
        drag=True,
    )
    until(browser, lambda: evaluate(browser, "figures[0].x_range.end") < 14)
    start, end = evaluate(browser, "[figures[1].x_range.start, figures[1].x_range.end]")
    assert start == pytest.approx(6, abs=0.5) and end == pytest.approx(12, abs=0.5)
    # A cell of the map marks its run in both.
    cell = """(() => { const map = [...Bokeh.documents[0]._all_models.values()].find((m) =>
        m.type === "Figure" && m.renderers.length === 1), view = Bokeh.index.find_one(map);
        const at = view.el.getBoundingClientRect(), { frame } = view;
        return [at.x + frame.x_scale.compute("1"), at.y + frame.y_scale.compute("b")]; })()"""
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    x, y = evaluate(browser, cell)
    move(browser, (x - 5, y), (x, y))
    marked = [False, False, False, False, True, False]
    black = lambda k: [color == "black" for color in evaluate(browser, f"curves({k})")["color"]]
    until(browser, lambda: black(0) == marked and black(1) == marked)


@pytest.mark.browser
def test_a_diverged_run_is_shown_as_such(runs, tmp_path, browser):
    out = tmp_path / "page.html"
    report.main([str(runs / "deep"), f"--out={out}"])
    browser.get(f"file://{out}")
    names = drawn(browser)["name"]
    assert len(names) == 3 and ["diverged" in name for name in names] == [False, False, True]
