"""Phase diagrams in small: what they hold is what single runs give."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import phase_diagram
from experiments.phase_diagram import Config
from experiments.storage import records
from experiments.toy import problems, run as toy_runs
from sgd_sparse_jax import measure

SMALL = Config(
    problem="diagonal-small",
    axis="batch_size",
    values=(1.0, 40.0),
    step_sizes=(0.05, 0.2, 50.0),
    seeds=3,
    num_steps=401,
    trend_records=8,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = replace(SMALL, runs_dir=str(tmp_path_factory.mktemp("runs")))
    return config, phase_diagram.run(config)


def assert_cell(config, cell, seed, decay_time=0.5, **changes):
    """What the diagram has there is what a run alone gives."""
    toy, last = problems.PROBLEMS[config.problem](), np.array([config.num_steps - 1])
    probes = [(toy.measure, last), (toy_runs.snapshot, last)]
    run = toy_runs.make_run(toy, num_steps=config.num_steps, batch_size=1, probes=probes)
    point = {"step_size": 0.2, "warmup_gain": 0.0, "warmup_exponent": 1.0, "init_scale": 1.0}
    point |= {"decay_step": int(decay_time * config.num_steps), "decay_factor": 4.0} | changes
    schedule = toy_runs.Schedule(**{name: np.asarray(value) for name, value in point.items()})
    rows, snapshots = jax.jit(run)(toy_runs.seed_keys(0, 3)[seed], schedule)
    spectra = toy.spectra(toy_runs.parameters(toy, snapshots[0]))
    for name, value in ({name: row[0] for name, row in rows.items()} | spectra).items():
        np.testing.assert_allclose(cell[name], value, rtol=1e-9)


def test_results_are_labelled_by_seed_step_size_and_the_axis(finished):
    config, dataset = finished
    assert dataset["test_loss"].dims == ("seed", "step_size", "batch_size")
    codes = dataset["outcome"].sel(step_size=50.0).values
    assert (codes == measure.OUTCOMES.index("diverged")).all()
    assert np.isnan(dataset["test_loss"].sel(step_size=50.0)).all()
    assert np.isfinite(dataset["rank"].sel(step_size=0.05)).all()
    assert (dataset["noise_level"].sel(step_size=0.05) > 0).all()
    spread = dataset["train_loss"].std("seed") / dataset["train_loss"].mean("seed")
    spread = spread.sel(step_size=[0.05, 0.2])  # gradient descent has no seed but its jitter
    assert (spread.sel(batch_size=40) < 1e-4).all() and (spread.sel(batch_size=1) > 1e-2).all()
    assert_cell(config, dataset.sel(seed=2, step_size=0.2, batch_size=1), seed=2)


def test_the_folder_holds_figures_and_shares_and_is_read_again(finished, capsys):
    config, dataset = finished
    folder = Path(config.runs_dir) / "phase_diagram" / "diagonal-small-batch_size"
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert figures == {"phase_diagram.png", "phase_diagram.pdf"}
    assert sum(records.read_json(folder / "summary.json")["outcomes"].values()) == pytest.approx(1)
    assert phase_diagram.run(config).identical(dataset)
    assert "finished" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "values"), [("decay_time", (0.3, 0.9)), ("init_scale", (0.5, 1.0))]
)
def test_every_axis_varies_what_it_names(axis, values, tmp_path):
    where = {"problem": "two-layer", "axis": axis, "values": values, "runs_dir": str(tmp_path)}
    config = replace(SMALL, **where, step_sizes=(0.1, 0.2))
    dataset, changed = phase_diagram.run(config), {axis: values[0]}
    assert_cell(config, dataset.sel(seed=1, step_size=0.2, **changed), seed=1, **changed)
