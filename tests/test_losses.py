"""Losses against NumPy; losses that broadcast or average are refused."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax import train
from sgd_sparse_jax.models import MLP, from_linen
from sgd_sparse_jax.types import Batch

B = 6
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("outputs", [(), (3,), (3, 2)])
def test_squared_losses_are_sums_over_outputs_and_their_gradient_is_the_residual(outputs):
    out, y = map(jnp.asarray, RNG.normal(size=(2, B, *outputs)))
    expected = ((np.asarray(out) - np.asarray(y)) ** 2).reshape(B, -1).sum(1)
    np.testing.assert_allclose(train.squared(out, y), expected, rtol=1e-14)
    half, pull = jax.vjp(lambda out: train.half_squared(out, y), out)
    np.testing.assert_allclose(half, expected / 2, rtol=1e-14)
    np.testing.assert_allclose(pull(jnp.ones(B))[0], out - y, rtol=1e-14)


BATCH = Batch(jnp.asarray(RNG.normal(size=(B, 2))), jnp.ones(B))
ROW, COLUMN = from_linen(MLP((4,))), from_linen(MLP((4,), outputs=1))  # outputs [b] and [b, 1]


def step(network, loss, gradient):
    """Shapes of a step from initial parameters."""
    tx = optax.sgd(0.1)
    state = jax.eval_shape(lambda key: train.init_state(key, network, tx, BATCH.x), jr.key(0))
    step = train.make_step(train.make_objective(network, loss), tx, gradient=gradient)
    return jax.eval_shape(step, state, BATCH)


@pytest.mark.parametrize(
    "gradient", [None, train.sharpness_aware(0.1), train.example_sharpness_aware(0.1)]
)
def test_a_loss_that_is_not_one_number_per_example_is_refused(gradient):
    broadcasts = lambda out, y: jnp.square(out - y)
    with jax.numpy_rank_promotion("allow"):  # JAX's default
        for loss in (train.squared, broadcasts, lambda out, y: broadcasts(out, y).mean()):
            with pytest.raises(ValueError):
                step(COLUMN, loss, gradient)
    assert step(ROW, broadcasts, gradient)[1].shape == ()
