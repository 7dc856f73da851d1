"""(S)GD over diagonal nets: runs against NumPy, edges, and the command at small size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray

from experiments import diag_implicit_bias as command
from experiments.storage import records
from sgd_sparse_jax import data

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = command.Config(data_sets=2, step_sizes=4, gd_steps=6400, sgd_steps=12_800)


@pytest.fixture(scope="module")
def finished(unrendered, tmp_path_factory):
    config = replace(SMALL, runs_dir=str(tmp_path_factory.mktemp("runs")))
    found = command.run(config)
    yield config, found, xarray.load_dataset(found.folder / "results.nc", engine="scipy")


def test_gradient_descent_with_small_steps_is_that_of_numpy(finished):
    _, _, dataset = finished
    of = dataset.sel(descent="GD")
    for i in range(2):
        drawn, eta = (
            data.sparse_regression(i, n_test=1, **command.SIZES),
            command.Config.gd_smallest,
        )
        (x, y), u, v = drawn.train, np.full(30, 0.1), np.zeros(30)
        for _ in range(SMALL.gd_steps):
            g = x.T @ (x @ (u * v) - y) / 20
            u, v = u - eta * g * v, v - eta * g * u
        error = ((u * v - drawn.target) ** 2).sum()
        np.testing.assert_allclose(of["error"].values[i, 0], error, rtol=1e-9)
    assert (of["steps"].values[:, 0] == SMALL.gd_steps).all()  # too few to converge
    assert set(of["outcome"].values[:, 0]) == {1}


def test_runs_end_where_they_converge_or_diverge(finished):
    _, _, dataset = finished
    outcome, steps = dataset["outcome"].values, dataset["steps"].values
    assert set(outcome.ravel()) == {0, 1, 2}
    most = np.broadcast_to(np.array([6400, 12_800])[:, None, None], steps.shape)
    assert (steps[outcome != 1] < most[outcome != 1]).all()
    assert (steps[outcome == 1] == most[outcome == 1]).all()
    converged = xarray.where(dataset["outcome"] == 0, dataset["error"], 0.0)
    assert (converged < 1).all()


def test_ratios_are_taken_at_shares_of_each_data_sets_own_edge():
    sizes = np.linspace(0.01, 1, 100)
    outcome = np.zeros((2, 3, 100))
    outcome[:, 0, 50:] = 2  # edges .5, 1 and none
    outcome[:, 2] = 2
    error = np.broadcast_to(sizes, outcome.shape)
    dims = ("descent", "data", "step")
    found = xarray.Dataset(
        {
            "error": (dims, error),
            "outcome": (dims, outcome),
            "step_size": (("descent", "step"), np.tile(sizes, (2, 1))),
        },
        {"descent": list(command.METHODS)},
    )
    ratios = command.at_shares(found, "GD")
    shares = np.array(command.SHARES)
    np.testing.assert_allclose(ratios[1], shares / 0.01, rtol=1e-9)
    np.testing.assert_allclose(ratios[0], 0.5 * shares / 0.01, atol=0.51)  # half a grid step
    assert np.isnan(ratios[2]).all()
    assert command.rises(found, "GD").all() and len(command.rises(found, "GD")) == 49 + 99


def test_the_folder_has_figure_and_verdicts_and_is_read_again(finished, monkeypatch):
    config, found, _ = finished
    assert {path.suffix for path in found.figures} == {".png", ".pdf"}
    written = records.read_json(Path(found.folder) / "verdicts.json")
    assert [each["claim"] for each in written] == [each.claim for each in found.claims]
    monkeypatch.setattr(command, "simulate", pytest.fail)
    assert str(command.run(config).claims) == str(found.claims)


def test_an_empty_range_of_step_sizes_is_named():
    with pytest.raises(ValueError, match=r"--sgd_smallest is 0.7; .* --sgd_largest, 0.6"):
        command.run(replace(SMALL, sgd_smallest=0.7))
