"""Tables of our numbers and published ones, on any terminal."""

import numpy as np
import pytest
import xarray

from experiments.figures import plots, tables

NAMES, PUBLISHED = ("test_loss", "rank"), {"test_loss": (3.5, 0.07)}


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
            "flips_1": (("seed", "schedule", "step"), loss / 100),
        },
        {"schedule": ["small", "large"], "step": [0, 5, 9], "spectra_step": [0, 9]},
    )


def test_rows_are_the_last_records_of_the_runs_that_did_not_diverge(dataset):
    rows = tables.rows(dataset, NAMES, PUBLISHED)
    found = [(row.schedule, row.name, row.published, row.values.tolist()) for row in rows]
    assert found == [
        ("small", "test_loss", 3.5, [3, 9, 15]),
        ("small", "rank", None, [20, 80, 140]),
        ("large", "test_loss", 0.07, [6, 12]),
        ("large", "rank", None, [50, 110]),
    ]
    assert [row.share_diverged for row in rows] == pytest.approx([0, 0, 1 / 3, 1 / 3])
    entry = rows[2].entry()
    assert (entry["schedule"], entry["published"], entry["values"]) == ("large", 0.07, 2)
    assert [entry[f"p{level}"] for level in (1, 50, 99)] == pytest.approx([6.06, 9, 11.94])


def test_curves_are_by_schedule_and_divergence_is_drawn_if_there_is_any(dataset, monkeypatch):
    drawn, titles = [], []
    save = lambda stem, panels, title: (drawn.append(panels), titles.append(title))
    monkeypatch.setattr(plots, "figure", save)
    tables.draw("f", dataset, ("rank", "flips_1"), {}, "title")
    rank, flips, diverged = drawn[0]
    assert titles == ["title"]
    x, y = rank.lines["large"]
    assert x.tolist() == [0, 9] and y.tolist() == [[40, 50], [100, 110], [160, 170]]
    np.testing.assert_allclose(flips.lines["small"][1][0], [1, 2, 3])  # in percent
    np.testing.assert_allclose(diverged.lines["large"][1], [[0, 0, 100 / 3]])
    tables.draw("f", dataset.isel(schedule=[0]), ("rank",), {}, "title")
    assert len(drawn[1]) == 1


def test_recorded_sharpness_is_shown_with_the_edge_of_its_schedule(dataset, monkeypatch):
    drawn, edge = [], [[20.0, 20.0], [5.0, 10.0]]
    monkeypatch.setattr(plots, "figure", lambda stem, panels, **more: drawn.extend(panels))
    found = {"sharpness": dataset["rank"], "edge": (("schedule", "spectra_step"), edge)}
    tables.draw("f", dataset.assign(found).isel(seed=[0]), ("rank",), {}, "title")
    rank, sharpness = drawn
    assert not rank.levels and sharpness.lines["large"][1].tolist() == [[40, 50]]
    assert [y.tolist() for _, y in sharpness.levels.values()] == edge
    assert [row.name for row in tables.rows(dataset.assign(found), (), {})] == ["sharpness"] * 2


def test_the_table_has_both_numbers_at_any_width(dataset, tmp_path, capsys, monkeypatch):
    dataset["train_loss"][:, 0, 2] = np.nan
    for columns in ("1", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        tables.show(tmp_path, tables.rows(dataset, NAMES, PUBLISHED), title="Title")
        out = capsys.readouterr().out
        for text in ("Title", "0.07", "9 [6.3, 12]", "33%", "100%", "– [–, –]", str(tmp_path)):
            assert text in out
