"""Verdicts and reports."""

import base64
import html
import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt

from experiments import diag_nets, fc_nets, loss_surface, reproduce
from experiments.figures import claims, report
from experiments.figures.claims import FAILS, HOLDS
from experiments.figures.tables import Row
from experiments.figures.verdicts import ORDERED, claim, evidence, verdict
from experiments.launch import cli
from experiments.toy import config as toys


def row(values, published, schedule="large", name="test_loss"):
    return Row(schedule, "test loss", name, ".2g", published, np.asarray(values, float), 0.0)


SMALL = row(np.arange(1, 33), 16.0, "small")


@pytest.mark.parametrize(
    ("values", "published", "word", "clear"),
    [
        (np.arange(33, 65), 40.0, HOLDS, True),
        (np.arange(33, 65), 100.0, ORDERED, True),  # outside, and above the small one as published
        (np.arange(33, 65), 0.5, FAILS, False),  # published below, our runs above
        (np.arange(1, 33) + 0.5, 100.0, FAILS, False),  # the order is not clear
        ([40.0, 41, 42], 41.0, FAILS, None),  # too few runs
        # A published number stands for all that round to it.
        (np.full(32, 0.168241), 0.16824, HOLDS, True),
        (np.full(32, 0.168241), 0.16823, ORDERED, True),
    ],
)
def test_a_number_agrees_inside_our_range_or_else_in_a_clear_order(values, published, word, clear):
    rows = [SMALL, row(values, published)]
    found = verdict(rows[1], rows)
    assert (found.word, found.reference) == (word, "small")
    if clear is None:
        assert np.isnan(found.confidence)
    else:
        assert 0 <= found.confidence <= 1 and (found.confidence >= 0.95) == clear


def test_the_evidence_has_range_share_and_most_similar_runs():
    loss = row([1e-4, 0.2, 0.3, 1e-5] * 8, 0.27, name="train_loss")
    norm = Row("large", "norm", "norm", ".3g", 12.7, np.array([20.0, 14, 13, 21] * 8), 0.0)
    sentence = evidence(norm, verdict(norm, [loss, norm]), [loss, norm])
    for fact in ("published 12.7", "13 to 21", "0% of them", "test loss (0.27) have 13, 13, 13"):
        assert fact in sentence
    none = row([], 0.2)
    assert "diverged" in evidence(none, verdict(none, [none]), [none])


def test_every_published_number_has_a_task_and_is_for_its_setting_only():
    settings = {task.setting: task for task in reproduce.tasks(reproduce.Config(), "runs")}
    for module in (diag_nets, fc_nets, loss_surface):
        published = lambda config, m=module: toys.published(config, m.SETTINGS, m.PUBLISHED)
        for name, setting in module.SETTINGS.items():
            numbers = published(settings.pop(name))
            assert numbers == module.PUBLISHED[name] != {}
            assert {len(each) for each in numbers.values()} == {len(setting.step_sizes)}
            assert published(replace(setting, num_steps=100)) == {}
    assert settings == {}


def test_the_reports_hold_all_claims_sentences_and_figures(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG, more or less")
    rows = [SMALL, row(np.arange(33, 65), 0.5, "η = 1, /2 at 50%")]
    figures = [tmp_path / "a.png", tmp_path / "a.pdf"]
    compared = [claim(each, verdict(each, rows), figures) for each in rows]
    theory = claims.judged(
        "|ε| falls",
        value=0.5,
        expected=claims.at_most(1),
        source="x",
        setting="y",
        statistic="z",
        under="η < 1",
    )
    chapters = [
        report.Chapter("D1", "python -m x", compared, figures, ["a; b", "c"], "d1/runs.html"),
        report.Chapter("Theory", "python -m x", [theory], figures, []),
    ]
    report.write(tmp_path, 32, chapters, 12.3)
    uri = "data:image/png;base64," + base64.b64encode(b"\x89PNG, more or less").decode()
    markdown = MarkdownIt().enable("table").render((tmp_path / "report.md").read_text("utf-8"))
    cells = [cell for each in (*compared, theory) for cell in each.cells()]
    assert "48 [33, 64]" in cells and {FAILS, "holds", "holds under η < 1"} < set(cells)
    for page in ((tmp_path / "report.html").read_text("utf-8"), markdown):
        assert page.count(f'src="{uri}"') == 2 and page.count('href="d1/runs.html"') == 1
        for text in (*claims.HEADINGS, *cells, "a; b", "python -m x"):
            assert page.count(f">{html.escape(text)}<") >= 1, text
        assert "1 of 2 published numbers" in page and "Of 1 claims 0 hold, 1 hold under" in page
    found = json.loads((tmp_path / "verdicts.json").read_text())
    assert [each["verdict"] for each in found] == [HOLDS, FAILS, "holds under η < 1"]
    assert found[1] == {
        "claim": "test loss",
        "source": "printed by the paper's code",
        "setting": "η = 1, /2 at 50%",
        "statistic": "median and 1-99 % range of 32 runs, 0% diverged",
        "value": 48.5,
        "interval": [pytest.approx(33.31), pytest.approx(63.69)],
        "prediction": "0.5",
        "verdict": FAILS,
        "figure": "a",
    }


@pytest.mark.parametrize(
    ("expected", "inside", "outside"),
    [
        (claims.near(-2, relative=0.1), (-2.19, -1.81), (-2.21, -1.79, 2)),
        (claims.near(0, absolute=1e-3), (-9e-4, 9e-4), (-2e-3, 2e-3)),
        (claims.at_least(1), (1, 9), (0.99,)),
        (claims.at_most(1), (1, -9), (1.01,)),
    ],
)
def test_a_claim_holds_within_its_tolerance_and_nan_never_does(expected, inside, outside):
    words = {"source": "", "setting": "", "statistic": ""}
    of = lambda value: claims.judged("", value=value, expected=expected, **words).verdict
    assert {of(value) for value in inside} == {HOLDS}
    assert {of(value) for value in (*outside, float("nan"))} == {FAILS}


def test_only_chooses_settings_and_an_unknown_name_is_refused():
    (task,) = reproduce.tasks(reproduce.Config(only=("d2",)), "runs")
    assert task.setting == "d2"
    with pytest.raises(ValueError, match="--only is d4"):
        reproduce.tasks(reproduce.Config(only=("d4",)), "runs")


def test_chapters_of_theory_have_their_titles_and_commands_that_repeat_them(monkeypatch):
    monkeypatch.setattr(reproduce, "page_of", lambda folder, start: None)
    tasks = reproduce.tasks(reproduce.Config(only=tuple(reproduce.THEORY)), "there")
    titles = [title for _, title in reproduce.THEORY.values()]
    for task, title in zip(tasks, titles, strict=True):
        module = importlib.import_module(type(task).__module__)
        monkeypatch.setattr(module, "run", lambda config: claims.Finding(Path("there"), [], []))
        chapter = reproduce.chapter_of(task)
        flags = [*chapter.command.split()[3:], "--runs_dir=there"]
        settings = getattr(module, "SETTINGS", None)
        assert chapter.title == title
        assert cli.parse(module.Config, flags, settings=settings) == task


@pytest.mark.slow
def test_settings_run_in_processes_and_errors_propagate(tmp_path):
    short = {"seeds": 2, "num_steps": 300, "spectra_records": 2, "runs_dir": str(tmp_path)}
    settings = diag_nets.SETTINGS["d1"], fc_nets.SETTINGS["three-layer"]
    tasks = [replace(each, **short) for each in settings]
    there = reproduce.in_processes(tasks, workers=2)
    assert [chapter.title[:2] for chapter in there] == ["D1", "T3"]
    for task, chapter in zip(tasks, there, strict=True):  # finished: loaded
        again = reproduce.chapter_of(task)
        assert again.figures == chapter.figures and all(p.exists() for p in again.figures)
        assert again.page and (tmp_path / again.page).exists()
    with pytest.raises(ValueError, match="--seeds"):
        reproduce.in_processes([replace(tasks[0], seeds=0)], workers=2)
