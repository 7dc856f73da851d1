"""Verdicts, and the two reports."""

import base64
import itertools
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from markdown_it import MarkdownIt

from experiments import diag_nets, fc_nets, loss_surface, reproduce
from experiments.figures import report
from experiments.figures.tables import Row
from experiments.figures.verdicts import AGREES, DIFFERS, ORDERED, evidence, verdict
from experiments.storage import records


def row(values, published, schedule="large", name="test_loss"):
    return Row(schedule, "test loss", name, ".2g", published, np.asarray(values, float), 0.0)


SMALL = row(np.arange(1, 33), 16.0, "small")


@pytest.mark.parametrize(
    ("values", "published", "word"),
    [
        (np.arange(33, 65), 40.0, AGREES),
        (np.arange(33, 65), 100.0, ORDERED),  # outside, and above the small one as published
        (np.arange(33, 65), 0.5, DIFFERS),  # published below, our runs above
        (np.arange(1, 33) + 0.5, 100.0, DIFFERS),  # the order is not clear
    ],
)
def test_a_number_agrees_inside_our_range_or_else_in_a_clear_order(values, published, word):
    rows = [SMALL, row(values, published)]
    found = verdict(rows[1], rows)
    assert (found.word, found.inside, found.reference) == (word, word == AGREES, "small")
    assert 0 <= found.confidence <= 1 and (found.confidence >= 0.95) == (word in (AGREES, ORDERED))


def test_published_digits_stand_for_all_that_rounds_to_them():
    for published, inside in ((0.16824, True), (0.16823, False)):
        alone = row(np.full(32, 0.168241), published)
        found = verdict(alone, [alone])
        assert found.inside == inside and np.isnan(found.confidence)
    few = row([0.1, 0.2, 0.3], 0.2)
    assert not verdict(few, [few]).inside and verdict(row([1.0], None), []) is None


def test_the_evidence_names_the_range_the_share_and_the_runs_most_alike():
    loss = row([1e-4, 0.2, 0.3, 1e-5] * 8, 0.27, name="train_loss")
    norm = Row("large", "norm", "norm", ".3g", 12.7, np.array([20.0, 14, 13, 21] * 8), 0.0)
    found = verdict(norm, [loss, norm])
    assert found.word == DIFFERS
    sentence = evidence(norm, found, [loss, norm])
    assert "published 12.7" in sentence and "13 to 21" in sentence and "0% of them" in sentence
    assert "test loss (0.27) have 13, 13, 13" in sentence
    none = row([], 0.2)
    assert "diverged" in evidence(none, verdict(none, [none]), [none])


def test_every_published_number_has_a_task():
    tasks = reproduce.tasks(reproduce.Config(), "runs")
    settings = {task.settings.setting: task.settings for task in tasks}
    for module in (diag_nets, fc_nets, loss_surface):
        for name in module.SETTINGS:
            tables = module.PUBLISHED if module is loss_surface else module.PUBLISHED[name]
            assert module.published(settings.pop(name)) == tables != {}
    assert settings == {}


class Page(HTMLParser):
    """Table rows as lists of cells, list items, sources of images."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.items, self.sources, self.inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        if tag == "tr":
            self.rows.append([])
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        if self.inside in ("th", "td"):
            self.rows[-1].append(data)
        elif self.inside == "li":
            self.items.append(data)

    def handle_endtag(self, tag):
        self.inside = ""


def test_the_reports_hold_all_rows_sentences_and_figures(tmp_path):
    (tmp_path / "a|b.png").write_bytes(b"\x89PNG, more or less")
    rows = [SMALL, row(np.arange(33, 65), 0.5, "η = 1 | <2>"), row([1.0], None)]
    found = [verdict(each, rows) for each in rows]
    chapter = report.Chapter(
        "D1", "python -m x", rows, found, [tmp_path / "a|b.png", tmp_path / "a.pdf"], ["a * b", "c"]
    )
    report.write(tmp_path, 32, [chapter, chapter], 12.3)
    cells = [
        list(report.HEADINGS),
        ["small", "test loss", "16", "16 [2.5, 30]", "0%", found[0].word],
        ["η = 1 | <2>", "test loss", "0.5", "48 [35, 62]", "0%", DIFFERS],
    ]
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert page.rows == 2 * cells and page.items == 2 * ["a * b", "c"]
    uri = "data:image/png;base64," + base64.b64encode(b"\x89PNG, more or less").decode()
    assert page.sources == [uri, uri]
    tokens = MarkdownIt().enable("table").parse((tmp_path / "report.md").read_text("utf-8"))
    texts = {kind: [] for kind in ("th", "td", "p")}
    images = []
    for before, token in itertools.pairwise(tokens):
        if token.type == "inline" and before.tag in texts:
            texts[before.tag].append("".join(part.content for part in token.children))
            images += [part.attrs["src"] for part in token.children if part.type == "image"]
    assert texts["th"] == 2 * cells[0] and texts["td"] == 2 * (cells[1] + cells[2])
    assert texts["p"].count("a * b") == 2 and images == [uri, uri]
    verdicts = records.read_json(tmp_path / "verdicts.json")
    assert verdicts["score"] == report.score([chapter, chapter])
    assert [each["word"] for each in verdicts["rows"]] == 2 * [found[0].word, DIFFERS]
    assert verdicts["rows"][1]["p50"] == 48.5 and verdicts["rows"][1]["published"] == 0.5


@pytest.mark.slow
def test_in_processes_or_one_after_another_the_chapters_are_the_same(tmp_path):
    def tasks(name):
        short = {
            "seeds": 2,
            "num_steps": 300,
            "spectra_records": 2,
            "runs_dir": str(tmp_path / name),
        }
        settings = diag_nets.SETTINGS["d1"], fc_nets.SETTINGS["three-layer"]
        return [reproduce.Task(each.setting, replace(each, **short)) for each in settings]

    here = [reproduce.chapter_of(task) for task in tasks("here")]
    there = reproduce.in_processes(tasks("there"), workers=2)
    for mine, other in zip(here, there, strict=True):
        assert (mine.title, len(mine.figures)) == (other.title, len(other.figures))
        for row, same in zip(mine.rows, other.rows, strict=True):
            np.testing.assert_allclose(row.values, same.values, rtol=1e-9)
    wrong = reproduce.Task("D1", replace(diag_nets.SETTINGS["d1"], seeds=0, runs_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="--seeds"):
        reproduce.in_processes([wrong], workers=2)
