"""Correlations of curvature with sparsity, and the command at small size."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray
from scipy.stats import spearmanr

from experiments import sparsity_meets_sharpness as command
from experiments.storage import records
from experiments.toy import problems, run as toy_runs
from experiments.toy.curvature import make_curvature

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(0)
GROUPS = RNG.integers(0, 5, 60)
SMALL = command.Config(problems=("diagonal",), seeds=3, resamples=20)


def test_partial_correlations_see_nothing_of_the_groups():
    x, level = RNG.normal(size=60), 100 * RNG.normal(size=5)
    columns = np.stack([x, level[GROUPS] - 3 * x, x**2 + level[GROUPS]], 1)
    found = command.partial_correlations(columns, GROUPS)
    np.testing.assert_allclose(found[0, 1], -1, rtol=1e-12)
    shifted = command.partial_correlations(np.stack([x, x**2], 1), GROUPS)
    np.testing.assert_allclose(found[0, 2], shifted[0, 1], rtol=1e-9)
    only_groups = np.stack([GROUPS, x], 1)  # it is just the step size
    assert np.isnan(command.partial_correlations(only_groups, GROUPS)[0, 1])


def dataset(**columns):
    """Runs of 6 seeds x 10 step sizes x 2 batch sizes, with random predictors and outcomes."""
    rng, n = np.random.default_rng(1), 120
    settings = {
        "problem": np.full(n, "diagonal"),
        "seed": np.repeat(np.arange(6), 20),
        "step_size": np.tile(np.arange(1.0, 11), 12),
        "batch_size": np.tile(np.repeat([1, 4], 10), 6),
        "decay_time": np.ones(n),
    }
    names = [*command.PREDICTORS, *command.OUTCOMES]
    values = settings | {name: rng.normal(size=n) for name in names} | columns
    return xarray.Dataset({name: ("run", value) for name, value in values.items()})


def test_correlations_are_spearmans_and_leave_out_diverged_runs():
    level, rank = RNG.normal(size=(2, 120))
    rank[[3, 50]] = np.nan
    config = replace(SMALL, seeds=6)
    rows = command.correlate(config, dataset(edge_level=level, rank=rank, sparsity=np.exp(level)))
    found = {(row["predictor"], row["outcome"]): row for row in rows}
    assert len(found) == len(command.PREDICTORS) * len(command.OUTCOMES)
    for control in command.CONTROLS:  # a monotone function, whatever the settings
        same = found["edge_level", "sparsity"][control]
        assert same == {key: pytest.approx(1, rel=1e-12) for key in ("value", "low", "high")}
    whole = np.isfinite(rank)
    row = found["edge_level", "rank"]["all runs"]
    assert row["value"] == pytest.approx(spearmanr(level[whole], rank[whole])[0], rel=1e-9)
    assert row["low"] < row["value"] < row["high"]


def test_a_correlation_by_step_size_alone_vanishes_given_the_step_size():
    eta = dataset()["step_size"].values
    by_eta = dataset(
        edge_level=eta + 1e-3 * RNG.normal(size=120), rank=-eta + 0.1 * RNG.random(120)
    )
    rows = command.correlate(replace(SMALL, seeds=6, resamples=200), by_eta)
    (row,) = [r for r in rows if (r["predictor"], r["outcome"]) == ("edge_level", "rank")]
    assert row["all runs"]["high"] < -0.9
    assert row["given η"]["low"] < 0 < row["given η"]["high"]


@pytest.fixture(scope="module")
def finished(unrendered, tmp_path_factory):
    grid = command.Grid({80: (2.0, 50.0)}, 301)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(command.GRIDS, "diagonal", grid)
        patch.setattr(command, "RECORDS", 10)
        config = replace(SMALL, runs_dir=str(tmp_path_factory.mktemp("runs")))
        yield config, command.run(config)


def test_the_folder_has_figure_and_table_and_is_read_again(finished, capsys, monkeypatch):
    config, dataset = finished
    folder = Path(config.runs_dir) / "sparsity_meets_sharpness" / "toys"
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert figures == {"sparsity_meets_sharpness.png", "sparsity_meets_sharpness.pdf"}
    rows = records.read_json(folder / "summary.json")["rows"]
    monkeypatch.setattr(command, "simulate_one", pytest.fail)
    assert command.run(config).identical(dataset)
    assert "finished" in capsys.readouterr().out
    assert str(records.read_json(folder / "summary.json")["rows"]) == str(rows)


def test_a_run_has_the_curvature_and_the_end_of_a_single_run(finished):
    """Of gradient descent, with its decay at half of the run."""
    _, dataset = finished
    assert dataset.sizes["run"] == 2 * len(command.DECAYS) * 3
    toy, at = problems.PROBLEMS["diagonal"](), np.rint(np.linspace(0, 300, 10)).astype(int)
    probes = [(toy.measure, at), (toy_runs.snapshot, at)]
    run = toy_runs.make_run(toy, num_steps=301, batch_size=80, probes=probes)
    point = toy_runs.Schedule(*map(np.asarray, (2.0, 0.0, 1.0, 150, 4.0, 1.0)))
    found, snapshots = jax.jit(run)(toy_runs.seed_keys(0, 1)[0], point)
    gauges = jax.jit(make_curvature(toy, 80))
    before = [gauges(toy_runs.parameters(toy, theta)) for theta in snapshots[:5]]  # steps < 150
    level = lambda name: np.mean([float(each[name]) for each in before])
    settings = (("step_size", 2.0), ("batch_size", 80), ("decay_time", 0.5), ("seed", 2))
    (row,) = np.flatnonzero(np.logical_and.reduce([dataset[k].values == v for k, v in settings]))
    row = dataset.isel(run=row)
    near = partial(pytest.approx, rel=1e-5)  # gradient descent has its jitter
    assert float(row["edge_level"]) == near(level("batch_sharpness"))  # eta / 2 = 1
    assert float(row["sharpness_level"]) == near(level("sharpness"))
    at_edge = [each["batch_sharpness"] >= 0.8 for each in before]
    assert float(row["edge_time"]) == pytest.approx(sum(at_edge) / 10)
    assert float(row["sparsity"]) == pytest.approx(float(found["support"][-1]) / 200)
    assert float(row["test_loss"]) == near(float(found["test_loss"][-1]))
    assert float(row["noise_level"]) == near(float(found["train_loss"][3:5].mean()))
    end = toy.spectra(toy_runs.parameters(toy, snapshots[-1]))
    assert float(row["rank"]) == float(end["rank"])


def test_diverged_runs_have_settings_only(finished):
    _, dataset = finished
    large = dataset["step_size"].values == 50.0
    for name in (*command.PREDICTORS, *command.OUTCOMES):
        np.testing.assert_array_equal(np.isnan(dataset[name]), large)
