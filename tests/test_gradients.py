"""Sharpness-aware gradients against loops in NumPy; where they must agree with each other."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax.models import MLP, DiagonalNet, from_linen
from sgd_sparse_jax.train import (
    example_sharpness_aware,
    full_batch,
    half_squared,
    init_state,
    logistic,
    make_objective,
    make_segment,
    make_step,
    residual_sharpness_aware,
    sharpness_aware,
)
from sgd_sparse_jax.types import Batch

N, D, STEPS, ETA, ALPHA = 12, 8, 40, 0.1, 0.5
RNG = np.random.default_rng(4)
X = RNG.normal(size=(N, D))
Y = X @ (np.arange(D) - 3.0) / 4 + 0.2 * RNG.normal(size=N)
DATA = Batch(jnp.asarray(X), jnp.asarray(Y))
MODEL = DiagonalNet(ALPHA)


def descend(gradient=None):
    """(loss before each step, u, v at the end) of full-batch descent."""
    tx = optax.sgd(ETA)
    fetch = lambda key, idx: Batch(DATA.x[idx], DATA.y[idx])
    step = make_step(make_objective(from_linen(MODEL), half_squared), tx, gradient=gradient)
    segment = make_segment(step, fetch, unroll=1)
    state = init_state(jr.key(0), from_linen(MODEL), tx, DATA.x)
    state, losses = segment(jr.key(1), state, full_batch(N)(jr.key(2), 0, STEPS))
    return losses, state.params["u"], state.params["v"]


def loop(gradient):
    """What `descend` should return where a step follows `gradient(u, v)`."""
    u, v, losses = np.full(D, ALPHA), np.zeros(D), []
    for _ in range(STEPS):
        losses.append(np.mean((X @ (u * v) - Y) ** 2) / 2)
        du, dv = gradient(u, v)
        u, v = u - ETA * du, v - ETA * dv
    return np.array(losses), u, v


def plain_gradient(u, v):
    back = X.T @ (X @ (u * v) - Y) / N
    return back * v, back * u


def assert_close(one, other, rtol=1e-10):
    close = partial(np.testing.assert_allclose, rtol=rtol, atol=1e-13)
    jax.tree.map(close, jax.device_get(one), jax.device_get(other))


def assert_far(one, other):
    assert np.abs(np.asarray(one[1]) - np.asarray(other[1])).max() > 1e-3


@pytest.fixture(scope="module")
def plain():
    return descend()


def test_gradient_descent_is_its_numpy_loop(plain):
    expected = loop(plain_gradient)
    assert expected[0][-1] < 0.5 * expected[0][0]  # else the comparison is of runs at rest
    assert_close(plain, expected)


@pytest.mark.parametrize("normalized", [False, True])
def test_sharpness_aware_takes_the_gradient_at_the_ascended_point(plain, normalized):
    def gradient(u, v):
        du, dv = plain_gradient(u, v)
        length = 0.2 / np.sqrt(du @ du + dv @ dv) if normalized else 0.2
        return plain_gradient(u + length * du, v + length * dv)

    ours = descend(sharpness_aware(0.2, normalized=normalized))
    assert_close(ours, loop(gradient))
    assert_far(ours, plain)


def of_examples(half_rho, residual_only=False):
    """The gradient of the paper's loop over examples, which moves each by 2 rho r_k dphi_k."""

    def gradient(u, v):
        du, dv = np.zeros(D), np.zeros(D)
        for x, y in zip(X, Y, strict=True):
            residual = x @ (u * v) - y
            u_k = u + 2 * half_rho * residual * x * v
            v_k = v + 2 * half_rho * residual * x * u
            moved = x @ (u_k * v_k) - y
            du += moved * x * (v if residual_only else v_k) / N
            dv += moved * x * (u if residual_only else u_k) / N
        return du, dv

    return gradient


def test_single_example_ascent_is_the_loop_over_examples_at_twice_its_rho(plain):
    ours = descend(example_sharpness_aware(0.06))
    assert_close(ours, loop(of_examples(0.03)))
    assert_far(ours, plain)
    assert_far(ours, descend(sharpness_aware(0.06)))  # the ascent of a mean is another


def test_residual_ascent_moves_the_residual_alone(plain):
    ours = descend(residual_sharpness_aware(from_linen(MODEL), half_squared, 0.06))
    assert_close(ours, loop(of_examples(0.03, residual_only=True)))
    assert_far(ours, plain)
    assert_far(ours, descend(example_sharpness_aware(0.06)))


KINDS = {
    "whole batch": sharpness_aware,
    "normalized": partial(sharpness_aware, normalized=True),
    "examples": example_sharpness_aware,
    "residuals": partial(residual_sharpness_aware, from_linen(MODEL), half_squared),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_ascent_is_gradient_descent(plain, kind):
    assert_close(descend(KINDS[kind](0.0)), plain, rtol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vmapped_rho_is_the_loop_over_rhos(kind):
    run = lambda rho: descend(KINDS[kind](rho))
    rhos = jnp.array([0.0, 0.05, 0.1])
    one = jax.jit(run)
    rows = jax.device_get([one(rho) for rho in rhos])
    looped = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    assert np.abs(np.diff(looped[1], axis=0)).max(1).min() > 1e-3  # each rho is a run of its own
    assert_close(jax.jit(jax.vmap(run))(rhos), looped)


def at_start(model, loss, gradient, batch):
    """((loss, stats), gradient) at fresh parameters of `model`."""
    params = init_state(jr.key(3), from_linen(model), optax.sgd(ETA), batch.x).params
    return jax.jit(gradient(make_objective(from_linen(model), loss)))(params, {}, batch)


def test_with_one_example_the_batch_and_its_examples_ascend_alike():
    model = MLP((5,), activation=nn.tanh)
    one = Batch(DATA.x[:1], DATA.y[:1])
    of = partial(at_start, model, half_squared)
    assert_close(of(sharpness_aware(0.3), one), of(example_sharpness_aware(0.3), one), rtol=1e-13)


@pytest.mark.parametrize("loss", [half_squared, logistic])
def test_residual_and_example_ascents_agree_where_the_features_are_fixed(loss):
    batch = Batch(DATA.x, jnp.sign(DATA.y))
    linear = MLP(())  # df does not depend on the parameters: nothing but l' can move
    agree = at_start(linear, loss, residual_sharpness_aware(from_linen(linear), loss, 0.3), batch)
    assert_close(agree, at_start(linear, loss, example_sharpness_aware(0.3), batch), rtol=1e-13)
    still = at_start(linear, loss, sharpness_aware(0.0), batch)
    assert_close(agree[0], still[0], rtol=1e-13)
    assert np.abs(agree[1]["layer1"]["bias"] - still[1]["layer1"]["bias"]) > 1e-3


def test_at_a_minimum_the_normalized_ascent_stays_finite():
    params = {"u": jnp.zeros(D), "v": jnp.zeros(D)}
    gradient = sharpness_aware(0.1, normalized=True)(
        make_objective(from_linen(MODEL), half_squared)
    )
    (value, _), grads = gradient(params, {}, DATA)
    np.testing.assert_allclose(value, np.mean(Y**2) / 2, rtol=1e-14)
    jax.tree.map(np.testing.assert_array_equal, grads, params)


class BatchNormed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        normed = nn.BatchNorm(use_running_average=not train, param_dtype=x.dtype)(x)
        return normed.sum(1) * self.param("scale", nn.initializers.ones, (1,), x.dtype), {}


def test_single_example_ascent_refuses_batch_statistics():
    tx, model = optax.sgd(ETA), BatchNormed()
    state = init_state(jr.key(0), from_linen(model), tx, DATA.x)
    assert state.stats
    step = make_step(
        make_objective(from_linen(model), half_squared), tx, gradient=example_sharpness_aware(0.1)
    )
    with pytest.raises(ValueError, match="no meaning for a net with BatchNorm"):
        step(state, DATA)


def test_statistics_are_those_of_the_parameters_and_not_of_the_ascended_point():
    tx, model = optax.sgd(ETA), BatchNormed()
    state = init_state(jr.key(0), from_linen(model), tx, DATA.x)
    of = lambda gradient: make_step(
        make_objective(from_linen(model), half_squared), tx, gradient=gradient
    )(state, DATA)
    plain, sharp = of(None), of(sharpness_aware(0.5))
    assert_close((sharp[0].stats, sharp[1]), (plain[0].stats, plain[1]), rtol=1e-14)
    moved = plain[0].params["scale"] - sharp[0].params["scale"]
    assert np.abs(moved[0]) > 1e-3
