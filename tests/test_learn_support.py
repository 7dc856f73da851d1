"""The law eta / b: gradients of deep linear nets, rates and fits of known decays."""

import jax
import jax.random as jr
import numpy as np
import pytest
import xarray

from experiments import learn_support as command
from experiments.theory import decay_rates
from sgd_sparse_jax import train
from sgd_sparse_jax.types import Batch

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("b", [1, 7])
def test_the_collapsed_gradient_is_that_of_the_network(b):
    batch = Batch(jr.normal(jr.key(1), (b, command.INPUTS)), jr.normal(jr.key(2), (b,)))
    network = command.network(relu=False)
    params, _ = jax.jit(network.init)(jr.key(0), batch.x)
    objective = train.make_objective(network, train.squared)
    expected = jax.jit(jax.grad(lambda p: objective(p, {}, batch)[0]))(params)
    found = jax.jit(command.linear_gradient)(params, batch)
    for layer in expected:
        np.testing.assert_allclose(
            found[layer]["kernel"], expected[layer]["kernel"], rtol=1e-11, atol=1e-12
        )


def decays(rate, sigma=1.0):
    """Norms exp(-rate(eta, b, seed) t) for all step sizes, batch sizes and 3 seeds."""
    kappa, b, seed = (a.ravel() for a in np.meshgrid([1e-6, 2e-6, 5e-6], [1, 4, 16], range(3)))
    eta, t = np.sqrt(kappa * b), np.arange(401) * 2500.0
    norms = np.exp(-rate(eta, b, seed)[:, None] * t)
    columns = {"step_size": eta, "batch_size": b, "seed": seed, "stride": np.full(27, 2500.0)}
    columns |= {"sigma": np.full(27, sigma), "regime": np.full(27, "clean")}
    found = {name: ("run", values) for name, values in columns.items()}
    return xarray.Dataset(found | {"norm": (("run", "record"), norms)})


def test_known_exponents_are_recovered_whatever_the_constants_of_the_seeds():
    runs = decays(lambda eta, b, seed: (1 + seed) * eta**2.2 / b**0.9)
    expected = (1 + runs["seed"]) * runs["step_size"] ** 2.2 / runs["batch_size"] ** 0.9
    np.testing.assert_allclose(decay_rates.rates(runs, 0.9, 0.8), expected, rtol=2e-3)
    one, two = decay_rates.law(runs, (0.9, 0.8))
    np.testing.assert_allclose(two.slopes, [2.2, -0.9], atol=0.01)
    assert two.r2 > 0.9999 and (two.halves < 0.01).all() and two.runs == 27
    one, _ = decay_rates.law(decays(lambda eta, b, seed: (1 + seed) * eta**2 / b), (0.9, 0.8))
    assert abs(one.slopes[0] - 1) < 0.01 and one.halves[0] < 0.01


def test_curves_collapse_if_the_rate_is_a_function_of_eta_squared_over_b():
    rate = lambda eta, b, seed: (1 + seed) * eta**2 / b
    assert decay_rates.collapse(decays(rate), 2e-6) < 1e-12
    assert (
        decay_rates.collapse(decays(lambda eta, b, seed: rate(eta, b, seed) * b**0.1), 2e-6) > 0.05
    )


def test_runs_that_diverged_or_did_not_reach_the_levels_have_no_rate():
    runs = decays(lambda eta, b, seed: eta**2 / b / 2)
    runs["norm"][0, 200:] = np.nan
    found = decay_rates.rates(runs, 0.9, 0.5)
    assert np.isnan(found[0]) and np.isnan(decay_rates.ends(runs)[0])
    reached = runs["norm"].values[:, -1] < 0.5
    assert reached.any() and not reached.all()
    np.testing.assert_array_equal(np.isfinite(found[1:]), reached[1:])
    none, _ = decay_rates.law(runs, (0.01, 0.001))  # too few runs for a fit
    assert np.isnan(none.slopes).all()


def test_a_run_clips_decays_and_adds_label_noise():
    run = jax.jit(command.make_run(2, 2, 4))
    key, point = jr.key(3), command.Point(1e-2, 0.0, np.inf, 0.0)
    norms = run(key, point)
    start = float(norms[0])
    assert abs(norms[1] - start) > 1e-6
    # With no gradient left, only weight decay moves the weights.
    frozen = run(key, point._replace(clip=0.0, decay=0.1))
    np.testing.assert_allclose(frozen, start * (1 - 1e-3) ** np.arange(3), rtol=1e-12)
    clipped = run(key, point._replace(clip=1e-3))
    assert 0 < abs(clipped[1] - start) <= 1e-5 + 1e-15
    assert abs(run(key, point._replace(sigma=1.0))[1] - norms[1]) > 1e-6
