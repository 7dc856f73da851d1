"""Outcomes of real runs: gradient descent in one dimension, SGD on a diagonal net."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax import measure, train
from sgd_sparse_jax.data import sparse_regression
from sgd_sparse_jax.models import DiagonalNet, from_linen
from sgd_sparse_jax.types import Batch

outcome, level = jax.jit(measure.outcome), jax.jit(measure.noise_level)


def named(trend, tail, **options) -> str:
    code = outcome(jnp.asarray(trend, float), jnp.asarray(tail, float), **options)
    return measure.OUTCOMES[int(code)]


def double_well(eta: float, steps: int = 2000, theta: float = 0.3) -> np.ndarray:
    """Losses of gradient descent on (1 - theta^2)^2 / 4, before each step."""
    theta, losses = np.float64(theta), []
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(steps):
            well = 1 - theta * theta
            losses.append(well * well / 4)
            theta = theta + eta * (theta * well)
    return np.array(losses)


# A chaotic loss varies by orders of magnitude: with fewer records, a quarter of a run may be below
# the one before it by chance.
def outcome_of(losses: np.ndarray, records: int = 500, tail: int = 16) -> str:
    at = np.linspace(0, len(losses) - 1, records).astype(int)
    return named(losses[at], losses[-tail:])


# The minimum at 1 has curvature 2 and loses its stability at eta = 1; the orbit of period 2
# around it does so at sqrt(5) - 1 = 1.236, and all orbits are unbounded beyond eta = 2.
@pytest.mark.parametrize(
    ("etas", "expected"),
    [
        ((0.02, 0.95), "converged"),
        ((1.02, 1.23), "period-2"),
        ((1.27, 1.6, 1.95), "stabilized"),  # the first has period 4
        ((2.1, 10.0), "diverged"),
    ],
)
def test_outcomes_of_gradient_descent_in_a_double_well(etas, expected):
    for eta in etas:
        for theta in (0.3, -0.71):
            assert outcome_of(double_well(eta, 6000, theta)) == expected, (eta, theta)


def test_outcomes_of_sgd_on_a_diagonal_net():
    data = sparse_regression(0).train
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    steps, network = 5000, from_linen(DiagonalNet(0.1))
    trend, tail = np.linspace(0, steps - 1, 64).astype(int), np.arange(steps - 16, steps)
    objective = train.make_objective(network, train.half_squared)

    def run(key, step_size):
        tx = optax.sgd(step_size)
        segment = train.make_segment(
            train.make_step(objective, tx), lambda key, idx: Batch(x[idx], y[idx])
        )
        state = train.init_state(jr.key(0), network, tx, x)
        loss = lambda state: objective(state.params, {}, Batch(x, y))[0]
        probes = [train.Probe(loss, at) for at in (trend, tail)]
        sampler = train.with_replacement(80, 1)
        _, losses = train.record_run(key, sampler, segment, state, probes, steps)
        return measure.outcome(*losses), measure.noise_level(losses[0][32:])

    codes, levels = train.sweep(run, jr.split(jr.key(1), 8), jnp.array([0.1, 0.282, 0.6]))
    small, large, huge = np.asarray(measure.OUTCOMES)[codes].T
    assert set(small) == {"converged"} and set(huge) == {"diverged"}
    # Large steps stabilize the loss, but some of their runs diverge.
    held = large == "stabilized"
    assert held.sum() >= 5 and set(large) <= {"stabilized", "diverged"}
    at = levels[held, 1]
    assert at.max() < 4 * at.min() and at.min() > 100 * levels[:, 0].max()


def test_a_run_converges_by_its_level_or_by_its_decrease():
    rng = np.random.default_rng(0)
    flat, tail = (np.exp(0.05 * rng.normal(size=size)) for size in (16, 8))
    assert named(flat, tail) == "stabilized"
    assert named(flat, 1e-7 * tail) == "stabilized"
    assert named(flat, 1e-9 * tail) == "converged"
    assert named(flat, 1e-7 * tail, converged_below=1e-6) == "converged"
    assert named(1e6 * flat, 1e-3 * tail) == "converged"  # against the first loss, not against 1
    assert named(flat * np.repeat([1.0, 1.0, 1.0, 0.4], 4), 0.4 * tail) == "converged"
    assert named(flat * np.repeat([1.0, 0.3, 0.1, 0.06], 4), 0.06 * tail) == "stabilized"
    flat[5] = np.nan
    assert named(flat, tail) == "diverged"


def test_the_noise_level_is_the_arithmetic_mean_and_hides_no_divergence():
    assert level(jnp.array([0.0, 3.0])) == 1.5
    assert np.isnan(level(jnp.array([1.0, np.nan]))) and np.isinf(level(jnp.array([0.0, np.inf])))
