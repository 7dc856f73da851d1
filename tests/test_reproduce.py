"""Verdicts, and the two reports."""

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from experiments import diag_nets, fc_nets, loss_surface, reproduce
from experiments.figures.tables import Row
from experiments.figures.verdicts import AGREES, DIFFERS, ORDERED, evidence, verdict
from experiments.storage import records


def row(values, published, schedule="large", name="test_loss"):
    return Row(schedule, "test loss", name, ".2g", published, np.asarray(values, float), 0.0)


def test_a_value_inside_the_range_agrees():
    rows = [row(np.arange(1, 33), 16.0, "small"), row(np.arange(33, 65), 40.0)]
    found = verdict(rows[1], rows)
    assert found.word == AGREES and found.inside and found.confidence > 0.99
    assert found.reference == "small"


def test_a_value_outside_agrees_in_order_only_where_the_order_is_claimed_and_clear():
    rows = [row(np.arange(1, 33), 16.0, "small"), row(np.arange(33, 65), 100.0)]
    assert verdict(rows[1], rows).word == ORDERED
    against = [rows[0], row(np.arange(33, 65), 0.5)]  # published below, ours above
    assert verdict(against[1], against).word == DIFFERS
    unclear = [rows[0], row(np.arange(1, 33) + 0.5, 100.0)]
    found = verdict(unclear[1], unclear)
    assert found.word == DIFFERS and 0.05 < found.confidence < 0.95


def test_published_digits_stand_for_all_that_rounds_to_them():
    same = np.full(32, 0.168241)
    assert verdict(row(same, 0.16824), [row(same, 0.16824)]).inside
    assert not verdict(row(same, 0.16823), [row(same, 0.16823)]).inside


def test_few_or_no_survivors_are_no_range():
    few = row([0.1, 0.2, 0.3], 0.2)
    assert not verdict(few, [few]).inside
    none = row([], 0.2)
    found = verdict(none, [none])
    assert found.word == DIFFERS
    assert "all of our runs diverged" in evidence(none, found, [none])
    assert verdict(row([1.0], None), []) is None


def test_the_evidence_names_range_share_and_look_alikes():
    loss = row([1e-4, 0.2, 0.3, 1e-5] * 8, 0.27, name="train_loss")
    other = Row(
        "large", "nuclear norm", "nuclear", ".3g", 12.7, np.array([20.0, 14, 13, 21] * 8), 0
    )
    found = verdict(other, [loss, other])
    assert found.word == DIFFERS
    sentence = evidence(other, found, [loss, other])
    assert "0% of them below the published one" in sentence
    assert "nearest to the published test loss (0.27) have 13, 13, 13" in sentence


class Outline(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """All seven settings at a fiftieth of their steps; published numbers as if at all of them."""
    patch = pytest.MonkeyPatch()
    for module in (diag_nets, fc_nets, loss_surface):
        short = {
            name: replace(setting, num_steps=max(setting.num_steps // 50, 300))
            for name, setting in module.SETTINGS.items()
        }
        patch.setattr(module, "SETTINGS", short)
    runs_dir = tmp_path_factory.mktemp("runs")
    config = reproduce.Config(
        seeds=2, spectra_records=2, frames=0, workers=1, exp_name="<b>", runs_dir=str(runs_dir)
    )
    chapters = reproduce.run(config)
    patch.undo()
    return chapters, runs_dir / "reproduce" / "<b>"


@pytest.mark.slow
def test_the_reports_hold_every_row_and_figure_and_nothing_from_outside(reports):
    chapters, folder = reports
    published = [v for chapter in chapters for v in chapter.verdicts if v]
    numbers = sum(
        value is not None
        for table in (*diag_nets.PUBLISHED.values(), *fc_nets.PUBLISHED.values())
        for values in table.values()
        for value in values
    )
    assert len(published) == numbers + len(loss_surface.PUBLISHED["test_loss"])
    text = (folder / "report.html").read_text()
    outline = Outline(text)
    assert outline.tags.count("tr") == len(published) + len(chapters)
    assert all(source.startswith("data:image/") for source in outline.sources)
    figures = [p for c in chapters for p in c.figures if p.suffix in (".png", ".gif")]
    assert len(outline.sources) == len(figures)
    markdown = (folder / "report.md").read_text()
    assert markdown.count("](data:image/") == len(figures) and "http" not in markdown
    verdicts = records.read_json(folder / "verdicts.json")
    assert len(verdicts["rows"]) == len(published)
    words = {v.word for v in published}
    assert words <= {AGREES, ORDERED, DIFFERS}
    differing = sum(v.word == DIFFERS for v in published)
    assert sum(len(chapter.evidence) for chapter in chapters) >= differing


@pytest.mark.slow
def test_side_by_side_in_processes_is_one_after_another(tmp_path):
    def tasks(name):
        settings = replace(
            diag_nets.SETTINGS["d1"],
            seeds=2,
            num_steps=300,
            spectra_records=2,
            runs_dir=str(tmp_path / name),
        )
        three = replace(fc_nets.SETTINGS["three-layer"], seeds=2, num_steps=300, spectra_records=2)
        three = replace(three, runs_dir=str(tmp_path / name))
        return [
            reproduce.Task("D1", diag_nets, settings),
            reproduce.Task("T3", fc_nets, three),
        ]

    here = [reproduce.chapter_of(task) for task in tasks("here")]
    there = reproduce.in_processes(tasks("there"), workers=2)
    assert [chapter.title for chapter in there] == ["D1", "T3"]
    for mine, other in zip(here, there, strict=True):
        assert [row.name for row in mine.rows] == [row.name for row in other.rows]
        for ours, theirs in zip(mine.rows, other.rows, strict=True):
            np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-9)


@pytest.mark.slow
def test_what_a_worker_cannot_run_is_said(tmp_path):
    wrong = replace(diag_nets.SETTINGS["d1"], seeds=0, runs_dir=str(tmp_path))
    with pytest.raises(ValueError, match="--seeds is 0"):
        reproduce.in_processes([reproduce.Task("D1", diag_nets, wrong)], workers=2)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--seeds is 1"):
        reproduce.run(reproduce.Config(seeds=1, runs_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
