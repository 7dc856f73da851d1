"""Named axes in, labelled arrays out."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sgd_sparse_jax.train import grid, labelled, sweep


def test_every_combination_once_the_last_axis_fastest():
    points = grid(step_size=[0.1, 0.2], scale=[1.0, 2.0, 3.0])
    assert points["step_size"].tolist() == [0.1, 0.1, 0.1, 0.2, 0.2, 0.2]
    assert points["scale"].tolist() == [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]


def test_a_label_names_the_run_it_came_from():
    def run(key, point):
        shift = jr.uniform(key)
        curve = shift + point["step_size"] * jnp.arange(4) + 100 * point["scale"]
        return {"final": curve[-1], "loss": curve}

    axes = {"step_size": np.array([0.1, 0.2]), "scale": np.array([1.0, 2.0, 3.0])}
    keys = jr.split(jr.key(0), 3)
    results = sweep(run, keys, grid(**axes))
    data = labelled(
        results, axes=axes, records={"loss": ["step"]}, coords={"step": [0, 10, 20, 30]}
    )
    assert data["loss"].dims == ("seed", "step_size", "scale", "step")
    assert data["final"].dims == ("seed", "step_size", "scale")
    for seed in range(3):
        one = data.sel(seed=seed, step_size=0.2, scale=3.0)
        expected = run(keys[seed], {"step_size": 0.2, "scale": 3.0})
        np.testing.assert_allclose(one["final"], expected["final"], rtol=1e-12)
        np.testing.assert_allclose(one["loss"].sel(step=20), expected["loss"][2], rtol=1e-12)


@pytest.mark.parametrize("axis", [[], 0.1, np.array([[0.1, 0.2]])])
def test_an_axis_that_is_no_list_is_named(axis):
    with pytest.raises(ValueError, match=r"The axis step_size has shape .*give a list"):
        grid(step_size=axis, scale=[1.0])


@pytest.mark.parametrize(
    ("array", "records"),
    [(np.zeros((2, 5)), {}), (np.zeros((2, 6, 7)), {}), (np.zeros((2, 6)), {"loss": ["step"]})],
)
def test_results_that_do_not_fit_their_names_are_refused(array, records):
    axes = {"step_size": [0.1, 0.2], "scale": [1.0, 2.0, 3.0]}
    with pytest.raises(ValueError, match=r"'loss' has shape .* step_size \(2\) x scale \(3\)"):
        labelled({"loss": array}, axes=axes, records=records)
