"""Losses against NumPy, far from zero too; shapes that don't fit are refused by name."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax.models import MLP, from_linen
from sgd_sparse_jax.train import (
    cross_entropy,
    example_sharpness_aware,
    half_squared,
    init_state,
    logistic,
    make_objective,
    make_step,
    residual_sharpness_aware,
    sharpness_aware,
    squared,
)
from sgd_sparse_jax.types import Batch

B = 6
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("outputs", [(), (3,), (3, 2)])
def test_squared_losses_are_sums_over_outputs(outputs):
    out, y = RNG.normal(size=(2, B, *outputs))
    expected = np.array([np.sum((o - t) ** 2) for o, t in zip(out, y, strict=True)])
    np.testing.assert_allclose(squared(jnp.asarray(out), jnp.asarray(y)), expected, rtol=1e-14)
    half = half_squared(jnp.asarray(out), jnp.asarray(y))
    np.testing.assert_allclose(half, expected / 2, rtol=1e-14)


def test_the_gradient_of_the_half_squared_loss_is_the_residual():
    out, y = map(jnp.asarray, RNG.normal(size=(2, B, 3)))
    slope = jax.grad(lambda out: half_squared(out, y).sum())(out)
    np.testing.assert_allclose(slope, out - y, rtol=1e-14)


def test_the_logistic_loss_and_its_slope_are_those_of_numpy():
    out, y = RNG.normal(size=B) * 3, np.array([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    expected = np.log1p(np.exp(-y * out))
    np.testing.assert_allclose(logistic(jnp.asarray(out), jnp.asarray(y)), expected, rtol=1e-14)
    slope = jax.grad(lambda out: logistic(out, jnp.asarray(y)).sum())(jnp.asarray(out))
    np.testing.assert_allclose(slope, -y / (1 + np.exp(y * out)), rtol=1e-13)


def test_the_labels_of_a_logistic_loss_differ_by_the_output():
    out = jnp.asarray(RNG.normal(size=B) * 3)
    ones = jnp.ones(B)
    np.testing.assert_allclose(logistic(out, -ones) - logistic(out, ones), out, rtol=1e-12)
    np.testing.assert_allclose(logistic(0 * out, ones), np.log(2) * np.ones(B), rtol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_logistic_loss_is_linear_or_flat_at_large_margins(dtype):
    alone = lambda out, y: logistic(out[None], y[None])[0]
    margins = jnp.array([-1e30, -1e4, -1e3, 1e3, 1e4, 1e30], dtype)
    for label in (1.0, -1.0):
        y = jnp.full(6, label, dtype)
        value, slope, curvature = (
            jax.jit(jax.vmap(derivative))(label * margins, y)
            for derivative in (alone, jax.grad(alone), jax.grad(jax.grad(alone)))
        )
        assert value.dtype == slope.dtype == dtype
        np.testing.assert_array_equal(value, jnp.maximum(-margins, 0))
        np.testing.assert_array_equal(slope, -label * np.array([1.0, 1, 1, 0, 0, 0]))
        np.testing.assert_array_equal(curvature, np.zeros(6))


def column_problem():
    """A net that returns [b, 1], fresh parameters, and targets [b]."""
    model = MLP((4,), outputs=1)
    batch = Batch(jnp.ones((B, 2)), jnp.ones(B))
    return model, init_state(jr.key(0), from_linen(model), optax.sgd(0.1), batch.x), batch


REFUSED = {
    "squared": squared,
    "half_squared": half_squared,
    "broadcasts": lambda out, y: jnp.square(out - y),
    "averaged": lambda out, y: jnp.square(out[:, 0] - y).mean(),
}


@pytest.mark.parametrize("loss", REFUSED.values(), ids=REFUSED)
def test_a_loss_that_is_not_one_number_per_example_is_refused_until_shapes_fit(loss):
    model, state, batch = column_problem()
    gradients = [None, sharpness_aware(0.1), example_sharpness_aware(0.1)]
    gradients.append(residual_sharpness_aware(from_linen(model), half_squared, 0.1))
    for gradient in gradients:
        step = make_step(make_objective(from_linen(model), loss), optax.sgd(0.1), gradient=gradient)
        with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError):  # JAX's default
            jax.jit(step)(state, batch)
    fits = make_objective(from_linen(MLP((4,))), lambda out, y: jnp.square(out - y))
    assert jnp.isfinite(fits(state.params, {}, batch)[0])


def test_an_error_inside_a_loss_is_the_user_s_own():
    model, state, batch = column_problem()
    with pytest.raises(KeyError, match="mine") as caught:
        make_objective(from_linen(model), lambda out, y: {}["mine"])(state.params, {}, batch)
    assert "(6, 1)" in caught.value.__notes__[0] and "(6,)" in caught.value.__notes__[0]


def test_what_fits_is_the_mean_over_examples():
    _, _, batch = column_problem()
    model = MLP((4,))
    state = init_state(jr.key(0), from_linen(model), optax.sgd(0.1), batch.x)
    out = np.asarray(model.apply({"params": state.params}, batch.x)[0])
    value, _ = make_objective(from_linen(model), squared)(state.params, {}, batch)
    np.testing.assert_allclose(value, np.mean((out - 1) ** 2), rtol=1e-14)


def test_cross_entropy_is_the_negative_log_of_the_share_of_the_label():
    logits, y = RNG.normal(size=(B, 4)), np.array([0, 3, 1, 2, 2, 0])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(shares[np.arange(B), y])
    value = cross_entropy(jnp.asarray(logits), jnp.asarray(y))
    np.testing.assert_allclose(value, expected, rtol=1e-13)
