"""Phase diagrams at small size, compared with single runs."""

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

pytestmark = pytest.mark.usefixtures("quick_compilation")
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
def finished(unrendered, tmp_path_factory):
    config = replace(SMALL, runs_dir=str(tmp_path_factory.mktemp("runs")))
    return config, phase_diagram.run(config)


def test_results_are_labelled_by_seed_step_size_and_the_axis(finished):
    _, dataset = finished
    assert dataset["test_loss"].dims == ("seed", "step_size", "batch_size")
    codes = dataset["outcome"].sel(step_size=50.0).values
    assert (codes == measure.OUTCOMES.index("diverged")).all()
    assert np.isnan(dataset["test_loss"].sel(step_size=50.0)).all()
    assert np.isfinite(dataset["rank"].sel(step_size=0.05)).all()
    assert (dataset["noise_level"].sel(step_size=0.05) > 0).all()
    spread = dataset["train_loss"].std("seed") / dataset["train_loss"].mean("seed")
    spread = spread.sel(step_size=[0.05, 0.2])  # gradient descent has its jitter only
    assert (spread.sel(batch_size=40) < 1e-4).all() and (spread.sel(batch_size=1) > 1e-2).all()


def test_the_folder_has_figures_and_shares_and_is_read_again(finished, capsys):
    config, dataset = finished
    folder = Path(config.runs_dir) / "phase_diagram" / "diagonal-small-batch_size"
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert figures == {"phase_diagram.png", "phase_diagram.pdf"}
    assert sum(records.read_json(folder / "summary.json")["outcomes"].values()) == pytest.approx(1)
    assert phase_diagram.run(config).identical(dataset)
    assert "finished" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "values"),
    [("batch_size", (1.0, 5.0)), ("decay_time", (0.3, 0.9)), ("init_scale", (0.5, 1.0))],
)
def test_a_cell_equals_a_single_run(axis, values, tmp_path, unrendered):
    where = {"problem": "two-layer", "axis": axis, "values": values, "runs_dir": str(tmp_path)}
    config = replace(SMALL, **where, step_sizes=(0.1, 0.2))
    cell = phase_diagram.run(config).sel({"seed": 1, "step_size": 0.2, axis: values[0]})
    toy, last = problems.PROBLEMS["two-layer"](), np.array([config.num_steps - 1])
    probes = [(toy.measure, last), (toy_runs.snapshot, last)]
    run = toy_runs.make_run(toy, num_steps=config.num_steps, batch_size=1, probes=probes)
    changed = {"decay_time": 0.5, "init_scale": 1.0} | {axis: values[0]}
    decay_step = int(changed["decay_time"] * config.num_steps)
    point = map(np.asarray, (0.2, 0.0, 1.0, decay_step, 4.0, changed["init_scale"]))
    found, (end,) = jax.jit(run)(toy_runs.seed_keys(0, 3)[1], toy_runs.Schedule(*point))
    spectra = toy.spectra(toy_runs.parameters(toy, end))
    for name, value in ({name: row[0] for name, row in found.items()} | spectra).items():
        np.testing.assert_allclose(cell[name], value, rtol=1e-9)
