"""Phase diagrams in small: what they hold is what single runs give."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments import phase_diagram
from experiments.phase_diagram import Config
from experiments.storage import records
from experiments.toy import problems, run as toy_runs
from sgd_sparse_jax import measure

SMALL = Config(
    problem="two-layer",
    axis="init_scale",
    values=(0.5, 1.0),
    step_sizes=(0.05, 0.3, 50.0),
    seeds=3,
    num_steps=301,
    trend_records=16,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = replace(SMALL, runs_dir=str(tmp_path_factory.mktemp("runs")))
    return config, phase_diagram.run(config)


def test_results_are_labelled_by_seed_step_size_and_the_axis(finished):
    _, dataset = finished
    assert dataset["test_loss"].dims == ("seed", "step_size", "init_scale")
    assert dataset["init_scale"].values.tolist() == [0.5, 1.0]
    codes = dataset["outcome"].sel(step_size=50.0).values
    assert (codes == measure.OUTCOMES.index("diverged")).all()
    assert np.isnan(dataset["test_loss"].sel(step_size=50.0)).all()
    assert np.isfinite(dataset["rank"].sel(step_size=0.05)).all()
    for name in ("noise_level", "sparsity_1", "train_loss", "nuclear_norm"):
        assert name in dataset


def test_a_cell_is_the_run_that_its_labels_name(finished):
    config, dataset = finished
    toy = problems.PROBLEMS["two-layer"]()
    last = np.array([config.num_steps - 1])
    run = toy_runs.make_run(
        toy, num_steps=config.num_steps, batch_size=1, at=last, snapshots_at=last
    )
    point = toy_runs.Schedule(0.3, 0.0, 1.0, int(0.5 * 301), config.decay_factor, 0.5)
    key = toy_runs.seed_keys(0, 3)[2]
    rows, snapshots = jax.jit(run)(key, jax.tree.map(np.asarray, point))
    cell = dataset.sel(seed=2, step_size=0.3, init_scale=0.5)
    np.testing.assert_allclose(cell["test_loss"], rows["test_loss"][0], rtol=1e-9)
    spectra = toy.spectra(toy_runs.parameters(toy, snapshots[0]))
    np.testing.assert_allclose(cell["nuclear_norm"], spectra["nuclear_norm"], rtol=1e-9)


def test_the_folder_is_read_again(finished, capsys):
    config, dataset = finished
    name = f"{config.problem}-{config.axis}"
    chunks = records.run_folder(config.runs_dir, "phase_diagram", name) / "chunks"
    chunks.mkdir()  # as a kill between the last two steps leaves it
    assert phase_diagram.run(config).identical(dataset)
    assert not chunks.exists()
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("axis", "values"), [("batch_size", (1.0, 40.0)), ("decay_time", (0.3, 0.9))]
)
def test_axes_that_need_a_program_each(axis, values, tmp_path):
    config = Config(
        problem="diagonal-small",
        axis=axis,
        values=values,
        step_sizes=(0.05, 0.2),
        seeds=2,
        num_steps=401,
        trend_records=8,
        decay_time=0.9,
        runs_dir=str(tmp_path),
    )
    dataset = phase_diagram.run(config)
    assert dataset["support"].dims == ("seed", "step_size", axis)
    if axis == "batch_size":  # full batches know no seed but their jitter
        spread = dataset["train_loss"].std("seed") / dataset["train_loss"].mean("seed")
        assert (spread.sel(batch_size=40) < 1e-4).all() and (spread.sel(batch_size=1) > 1e-2).all()
    folder = tmp_path / "phase_diagram" / f"diagonal-small-{axis}"
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "phase_diagram.png",
        "phase_diagram.pdf",
    }
    assert sum(records.read_json(folder / "summary.json")["outcomes"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"problem": "four-layer"}, "Unknown --problem 'four-layer'; known are diagonal"),
        ({"axis": "colour"}, "Unknown --axis 'colour'; known are batch_size"),
        ({"values": ()}, "--values and --step_sizes need one value"),
        ({"values": (0.5, -1.0)}, "--values of --axis init_scale is -1"),
        ({"axis": "batch_size", "values": (1.5,)}, "--values of --axis batch_size is 1.5"),
        ({"axis": "batch_size", "values": (16.0,)}, "1 to the 15 training examples"),
        ({"step_sizes": (float("nan"),)}, "--step_sizes is nan"),
        ({"decay_time": 1.5}, "--decay_time is 1.5"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"trend_records": 4}, "--trend_records is 4"),
        ({"num_steps": 30}, "--num_steps 30 has 15 steps before its first decay"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(wrong, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        phase_diagram.run(replace(SMALL, runs_dir=str(tmp_path), **wrong))
    assert list(tmp_path.iterdir()) == []
