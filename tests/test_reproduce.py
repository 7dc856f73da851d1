"""Verdicts and reports."""

import base64
import html
from dataclasses import replace

import numpy as np
import pytest
from markdown_it import MarkdownIt

from experiments import diag_nets, fc_nets, loss_surface, reproduce
from experiments.figures import report
from experiments.figures.tables import Row
from experiments.figures.verdicts import AGREES, DIFFERS, ORDERED, evidence, verdict
from experiments.storage import records
from experiments.toy import config as toys


def row(values, published, schedule="large", name="test_loss"):
    return Row(schedule, "test loss", name, ".2g", published, np.asarray(values, float), 0.0)


SMALL = row(np.arange(1, 33), 16.0, "small")


@pytest.mark.parametrize(
    ("values", "published", "word", "clear"),
    [
        (np.arange(33, 65), 40.0, AGREES, True),
        (np.arange(33, 65), 100.0, ORDERED, True),  # outside, and above the small one as published
        (np.arange(33, 65), 0.5, DIFFERS, False),  # published below, our runs above
        (np.arange(1, 33) + 0.5, 100.0, DIFFERS, False),  # the order is not clear
        ([40.0, 41, 42], 41.0, DIFFERS, None),  # too few runs
        # A published number stands for all that round to it.
        (np.full(32, 0.168241), 0.16824, AGREES, True),
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


def test_the_reports_hold_all_rows_sentences_and_figures(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG, more or less")
    rows = [SMALL, row(np.arange(33, 65), 0.5, "η = 1, /2 at 50%")]
    compared = [(each, verdict(each, rows)) for each in rows]
    figures = [tmp_path / "a.png", tmp_path / "a.pdf"]
    chapter = report.Chapter("D1", "python -m x", compared, figures, ["a; b", "c"])
    report.write(tmp_path, 32, [chapter, chapter], 12.3)
    cells = [
        ["small", "test loss", "16", "16 [2.5, 30]", "0%", compared[0][1].word],
        ["η = 1, /2 at 50%", "test loss", "0.5", "48 [35, 62]", "0%", DIFFERS],
    ]
    assert [list(line) for line in report.table(chapter)] == cells
    uri = "data:image/png;base64," + base64.b64encode(b"\x89PNG, more or less").decode()
    markdown = MarkdownIt().enable("table").render((tmp_path / "report.md").read_text("utf-8"))
    for page in ((tmp_path / "report.html").read_text("utf-8"), markdown):
        assert page.count(f'src="{uri}"') == 2
        for text in (*report.HEADINGS, *cells[1], "a; b", "python -m x"):
            assert page.count(f">{html.escape(text)}<") >= 2, text
    found = records.read_json(tmp_path / "verdicts.json")
    assert found["score"] == report.score([chapter, chapter])
    assert [each["word"] for each in found["rows"]] == 2 * [compared[0][1].word, DIFFERS]
    assert found["rows"][1]["p50"] == 48.5 and found["rows"][1]["published"] == 0.5


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
    with pytest.raises(ValueError, match="--seeds"):
        reproduce.in_processes([replace(tasks[0], seeds=0)], workers=2)
