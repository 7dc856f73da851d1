"""Our numbers beside the published ones."""

from pathlib import Path

import numpy as np
import pytest
import xarray

from experiments.figures import tables
from experiments.storage import records

QUANTITIES = {"test_loss": ("test loss", ".2g"), "rank": ("rank", ".0f"), "absent": ("x", ".0f")}


@pytest.fixture
def dataset():
    """Three seeds, two schedules; the last seed of the second diverges in the end."""
    loss = np.arange(18.0).reshape(3, 2, 3) + 1
    train = loss.copy()
    train[2, 1, 2] = np.nan
    return xarray.Dataset(
        {
            "train_loss": (("seed", "schedule", "step"), train),
            "test_loss": (("seed", "schedule", "step"), loss),
            "rank": (("seed", "schedule", "spectra_step"), 10 * loss[..., :2]),
        },
        {"schedule": ["small", "large"], "step": [0, 5, 9], "spectra_step": [0, 9]},
    )


def test_rows_are_the_last_records_of_the_runs_that_are_left(dataset):
    rows = tables.rows(dataset, QUANTITIES, {"test_loss": (3.5, 0.07)})
    assert [(row.schedule, row.name) for row in rows] == [
        ("small", "test_loss"),
        ("small", "rank"),
        ("large", "test_loss"),
        ("large", "rank"),
    ]
    small, _, large, rank = rows
    assert small.values.tolist() == [3, 9, 15] and small.published == 3.5
    assert large.values.tolist() == [6, 12] and large.share_diverged == pytest.approx(1 / 3)
    assert rank.values.tolist() == [50, 110] and rank.published is None
    assert small.percentile(50) == 9


def test_no_survivor_is_shown_as_a_dash(dataset, capsys):
    dataset["train_loss"][:, 1, 2] = np.nan
    rows = tables.rows(dataset, QUANTITIES, {})
    assert np.isnan(rows[2].percentile(50)) and rows[2].show(rows[2].percentile(5)) == "–"
    tables.show(Path("folder"), rows, title="Title")
    assert "– [–, –]" in capsys.readouterr().out


def test_the_terminal_shows_both_numbers(dataset, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    tables.show(
        Path("folder"), tables.rows(dataset, QUANTITIES, {"test_loss": (3.5, 0.07)}), title="Title"
    )
    out = capsys.readouterr().out
    assert "Title" in out and "0.07" in out and "9 [3.6, 14]" in out and "33%" in out


def test_the_summary_is_read_as_it_was_written(dataset, tmp_path):
    tables.write(tmp_path, tables.rows(dataset, QUANTITIES, {"test_loss": (3.5, 0.07)}))
    rows = records.read_json(tmp_path / "summary.json")["rows"]
    assert rows[2]["schedule"] == "large" and rows[2]["values"] == 2 and rows[2]["p50"] == 9
    assert rows[2]["published"] == 0.07


def test_curves_are_by_schedule_and_divergence_is_drawn_where_there_is_some(dataset):
    x, y = tables.lines(dataset["test_loss"])["large"]
    assert x.tolist() == [0, 5, 9] and y[:, 0].tolist() == [4, 10, 16]
    (panel,) = tables.diverged_panel(dataset, {})
    shares = panel.lines["large"][1]
    np.testing.assert_allclose(shares, [[0, 0, 100 / 3]])
    assert tables.diverged_panel(dataset.isel(schedule=[0]), {}) == []
