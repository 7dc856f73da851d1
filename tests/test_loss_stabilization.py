"""The map theta + eta theta (1 - theta^2): closed forms, and the command that checks them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

from experiments import loss_stabilization as command
from sgd_sparse_jax.theory import stabilization

pytestmark = pytest.mark.usefixtures("quick_compilation")
ETAS = jnp.linspace(1.01, 1.23, 12)


def test_the_two_points_follow_each_other_and_have_the_level_and_the_exponent():
    low, high = stabilization.two_cycle(ETAS)
    np.testing.assert_allclose(stabilization.map_step(low, ETAS), high, rtol=1e-14)
    np.testing.assert_allclose(stabilization.map_step(high, ETAS), low, rtol=1e-14)
    loss = lambda theta: (1 - theta**2) ** 2 / 4
    level = (loss(low) + loss(high)) / 2
    np.testing.assert_allclose(stabilization.level(ETAS), level, rtol=1e-12)
    slope = jax.vmap(
        jax.grad(lambda x, eta: stabilization.map_step(stabilization.map_step(x, eta), eta))
    )
    exponent = jnp.log(jnp.abs(slope(low, ETAS))) / 2
    np.testing.assert_allclose(stabilization.lyapunov_exponent(ETAS), exponent, rtol=1e-9)


def test_the_step_is_gradient_descent():
    loss = lambda theta: (1 - theta**2) ** 2 / 4
    for theta in (-1.3, 0.2, 0.9):
        step = theta - 0.7 * jax.grad(loss)(theta)
        np.testing.assert_allclose(stabilization.map_step(theta, 0.7), step, rtol=1e-14)


def test_the_largest_step_size_maps_the_extremum_to_the_bound():
    """With the worst noise: one step from the maximum of the map leads to the unstable cycle."""
    for s in (0.0, 0.03, 0.2):
        eta = stabilization.largest_step_size(s)
        top = np.sqrt((1 + eta * (1 + s)) / (3 * eta))  # where the map with +s has its maximum
        peak = stabilization.map_step(top, eta, s)
        np.testing.assert_allclose(peak, np.sqrt((2 + eta * (1 - s)) / eta), rtol=1e-9)


def test_the_period_is_predicted_in_its_range_only():
    with pytest.raises(ValueError, match="step_size"):
        stabilization.period(1.31)


@pytest.fixture(scope="module")
def finished(unrendered, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    config = command.Config(step_sizes=40, seeds=2, burn_in=100, steps=60, runs_dir=folder)
    return command.run(config)


def test_periods_and_levels_of_map_and_nets_agree_with_the_closed_forms(finished):
    """At step sizes whose cycle attracts within 600 steps."""
    dataset = xarray.load_dataset(finished.folder / "results.nc", engine="scipy")
    fast = dataset.sel(period_step=[0.5, 1.1, 1.2])
    for name in ("period", "net_period"):
        np.testing.assert_array_equal(fast[name], [[1, 1], [2, 2], [2, 2]])
        level = stabilization.level(fast["period_step"].values)
        np.testing.assert_allclose(fast[f"{name}_level"].T, [level, level], atol=1e-13)
    verdicts = {each.claim: each.verdict for each in finished.claims}
    assert verdicts["the period doubles at 1, √5 − 1, 1.2880, ..."] == "holds"


def test_the_folder_has_verdicts_and_their_figures(finished):
    written = json.loads((finished.folder / "verdicts.json").read_text())
    assert [each["verdict"] for each in written] == [each.verdict for each in finished.claims]
    assert {path.name for path in finished.figures} >= {f"{each['figure']}.png" for each in written}


def test_periods_are_found_and_the_lack_of_one_is_seen():
    turn = lambda x: (x + 0.25) % 1
    assert command.period_of(turn, jnp.array([0.0, 0.1])).tolist() == [4, 4]
    assert command.period_of(lambda x: x + 1.0, jnp.array([0.0])).tolist() == [0]
