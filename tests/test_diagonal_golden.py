"""The stable run of D1 (step size .25) against the paper's NumPy code."""

from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax import measure
from sgd_sparse_jax.data import sparse_regression
from sgd_sparse_jax.models import DiagonalNet, from_linen
from sgd_sparse_jax.train import (
    Probe,
    half_squared,
    init_state,
    make_objective,
    make_segment,
    make_step,
    record_run,
    recorded,
)
from sgd_sparse_jax.types import Batch

GOLDEN = np.load(Path(__file__).parent / "golden" / "diag_sgd.npz", allow_pickle=False)
MOVED = (
    "The diagonal-net run no longer matches the NumPy original. If the dynamics were meant to "
    "change, say in the pull request which equation changed, and record tests/golden again."
)
NUM_STEPS = 100_001


def golden_run(step_size: float, num_steps: int, at):
    problem = jax.tree.map(jnp.asarray, sparse_regression(0))
    model, tx = DiagonalNet(0.1), optax.sgd(step_size)
    # The reference draws its single-example batches from NumPy's legacy generator with seed 1.
    indices = jnp.asarray(np.random.RandomState(1).randint(0, 80, size=num_steps)[:, None])

    def fetch(key, idx):
        return Batch(problem.train.x[idx], problem.train.y[idx])

    def losses(state):
        loss = lambda batch: half_squared(
            model.apply({"params": state.params}, batch.x)[0], batch.y
        ).mean()
        return loss(problem.train), loss(problem.test)

    @jax.jit
    def run(key):
        segment = make_segment(
            make_step(make_objective(from_linen(model), half_squared), tx), fetch
        )
        state = init_state(key, from_linen(model), tx, problem.train.x)
        gauges = [Probe(losses, at), Probe(lambda state: state.params, at[-1:])]
        return record_run(key, recorded(indices), segment, state, gauges, num_steps)

    _, ((train, test), params) = run(jr.key(0))
    last = jax.tree.map(lambda leaf: leaf[0], params)  # the golden's "final": before its last row
    return last, np.asarray(train), np.asarray(test)


@pytest.fixture(scope="module")
def stable_run():
    return golden_run(0.25, NUM_STEPS, GOLDEN["record_steps"])


def test_every_recorded_loss(stable_run):
    _, train, test = stable_run
    np.testing.assert_allclose(train, GOLDEN["train_loss"], rtol=1e-9, err_msg=MOVED)
    np.testing.assert_allclose(test, GOLDEN["test_loss"], rtol=1e-9, err_msg=MOVED)
    np.testing.assert_allclose(train[-1], 1.42161628740e-6, rtol=1e-9)
    np.testing.assert_allclose(test[-1], 3.528621943604e-3, rtol=1e-9)


def test_final_parameters_and_what_is_measured_on_them(stable_run):
    params, _, _ = stable_run
    u, v = params["u"], params["v"]
    np.testing.assert_allclose(u, GOLDEN["u_final"], rtol=1e-8, atol=1e-12, err_msg=MOVED)
    np.testing.assert_allclose(v, GOLDEN["v_final"], rtol=1e-8, atol=1e-12, err_msg=MOVED)
    assert measure.support_size(u, v) == 200
    x_test = jnp.asarray(sparse_regression(0).test.x[:400])
    assert measure.numerical_rank(measure.diagonal_net_jacobian(x_test, u, v), 1e-15) == 200
    assert measure.numerical_rank(measure.diagonal_net_jacobian(x_test, u, v), 1e-4) == 147


def test_another_step_size_is_another_run():
    at = GOLDEN["record_steps"][:100]
    _, train, _ = golden_run(0.25, 100, at)
    np.testing.assert_allclose(train, GOLDEN["train_loss"][:100], rtol=1e-11, err_msg=MOVED)
    _, other, _ = golden_run(0.2501, 100, at)
    assert np.abs(other[50:] / GOLDEN["train_loss"][50:100] - 1).max() > 1e-5
