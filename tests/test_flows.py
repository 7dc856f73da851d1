"""SGD and its surrogates as noisy labels: identities, covariances, orders of convergence."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from sgd_sparse_jax import models, train
from sgd_sparse_jax.theory import flows
from sgd_sparse_jax.types import Batch

pytestmark = pytest.mark.usefixtures("quick_compilation")
N, ETA = 6, 0.1
EXAMPLES = Batch(jr.normal(jr.key(0), (N, 3)), jr.normal(jr.key(1), (N,)))
NETWORKS = {
    "diagonal": (models.from_linen(models.DiagonalNet(0.7)), train.half_squared, 1.0),
    "relu": (models.from_linen(models.MLP((4,))), train.squared, 2.0),
}


@functools.cache
def problem(name):
    network, loss, scale = NETWORKS[name]
    params, _ = jax.jit(network.init)(jr.key(2), EXAMPLES.x)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    objective = train.make_objective(network, loss)
    return lambda p, x: network.apply(p, {}, x).out, params, objective, scale


@functools.cache
def sgd_gradients(name):
    """The gradients of single examples [n, p]."""
    _, params, objective, _ = problem(name)
    of = lambda x, y: jax.grad(lambda p: objective(p, {}, Batch(x[None], y[None]))[0])(params)
    return rows(jax.jit(jax.vmap(of))(*EXAMPLES))


def rows(tree):
    """Leaves [k, ...] -> [k, p]."""
    return np.asarray(jax.vmap(lambda tree: ravel_pytree(tree)[0])(tree))


def moved(step, z, params):
    """The parameters after a step from `params` with each of z [k, ...]: [k, p]."""
    return rows(jax.jit(jax.vmap(lambda z: step(z, params, 0)))(z))


@pytest.mark.parametrize("name", NETWORKS)
def test_sgd_is_gradient_descent_on_noisy_labels(name):
    predict, params, objective, scale = problem(name)
    step = flows.make_step(predict, EXAMPLES, flows.sampled, step_size=ETA, scale=scale)
    batches, tx = jnp.array([[3, 3, 3], [1, 4, 4]]), optax.sgd(ETA)
    state = train.init_state(jr.key(0), NETWORKS[name][0], tx, EXAMPLES.x, params=params)
    sgd = train.make_step(objective, tx)
    other = jax.jit(jax.vmap(lambda idx: sgd(state, jax.tree.map(lambda a: a[idx], EXAMPLES))[0]))
    np.testing.assert_allclose(
        moved(step, batches, params), rows(other(batches).params), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_gaussian_noises_have_sgds_covariance_or_its_trace(name):
    predict, params, objective, scale = problem(name)
    r = predict(params, EXAMPLES.x) - EXAMPLES.y
    draws = np.asarray(jax.vmap(lambda i: flows.sampled(i[None], r, 0))(jnp.arange(N)))
    covariance, loss = draws.T @ draws / N, float(objective(params, {}, EXAMPLES)[0])
    np.testing.assert_allclose(draws.mean(0), 0, atol=1e-14)
    np.testing.assert_allclose(np.trace(covariance), 2 * N * (N - 1) * loss / scale, rtol=1e-13)
    square = lambda noise: (lambda root: root.T @ root)(
        np.asarray(jax.vmap(lambda z: noise(z, r, 1))(jnp.eye(N)))
    )
    np.testing.assert_allclose(square(flows.exact_gaussian), covariance, atol=1e-13)
    for level in (None, loss, jnp.array([0.0, loss])):  # own, constant, one value per step
        noise = flows.isotropic(level, scale=scale, num_steps=2)
        equal = np.trace(covariance) / N * np.eye(N)
        np.testing.assert_allclose(square(noise), equal, atol=1e-13)


def test_steps_have_the_mean_of_gradient_descent_and_sgds_covariance_or_its_trace():
    predict, params, _, scale = problem("relu")
    dt, grads = 0.02, sgd_gradients("relu")
    options = {"step_size": ETA, "dt": dt, "scale": scale}
    covariance, p = dt * ETA * np.cov(grads.T, bias=True), grads.shape[1]
    exact = flows.make_step(predict, EXAMPLES, flows.exact_gaussian, **options)
    still = rows(jax.tree.map(lambda leaf: leaf[None], params)) - dt * grads.mean(0)
    shift = moved(exact, jnp.concatenate([jnp.zeros((1, N)), jnp.eye(N)]), params) - still
    np.testing.assert_allclose(shift[0], 0, atol=1e-14)
    np.testing.assert_allclose(shift.T @ shift, covariance, atol=1e-14)
    isotropic = flows.make_parameter_noise_step(predict, EXAMPLES, **options)
    # The mean of a quadratic form of z ~ N(0, I) is its sum over unit vectors.
    for direction in np.eye(p)[:2]:
        z = jnp.concatenate([jnp.eye(N), jnp.tile(direction, (N, 1))], axis=1)
        shift = (moved(isotropic, jnp.concatenate([0 * z, z]), params) - still).reshape(2, N, p)
        np.testing.assert_allclose(shift[0], 0, atol=1e-14)
        equal = np.trace(covariance) / p * np.outer(direction, direction)
        np.testing.assert_allclose(shift[1].T @ shift[1], equal, atol=1e-14)


def test_strong_order_one_half_and_weak_order_one_on_geometric_brownian_motion():
    """x = (1, 0), y = 0, eta = 4: the exact covariance gives d theta = -theta/2 dt + theta dW."""
    examples, predict = Batch(jnp.array([[1.0], [0.0]]), jnp.zeros(2)), lambda w, x: x[:, 0] * w
    finest, paths = 128, 5_000
    z = jr.normal(jr.key(0), (finest, paths, 2))
    brownian = ((z[..., 0] - z[..., 1]) / np.sqrt(2 * finest)).sum(0)  # W(1)
    exact = np.exp(-1.0 + brownian)  # exp((mu - sigma^2 / 2) + sigma W), mu = -1/2, sigma = 1

    @jax.jit
    def ends(z, dt):
        step = flows.make_step(predict, examples, flows.exact_gaussian, step_size=4.0, dt=dt)
        walk = lambda w, z: (jax.vmap(step, (0, 0, None))(z, w, 0), None)
        return jax.lax.scan(walk, jnp.ones(z.shape[1]), z)[0]

    steps, strong, weak = np.array([8, 16, 32, 64, 128]), [], []
    for count in steps:
        # The same Brownian paths, and a last one without noise: the mean.
        coarse = z.reshape(count, -1, paths, 2).sum(1) * np.sqrt(count / finest)
        found = np.asarray(ends(jnp.pad(coarse, ((0, 0), (0, 1), (0, 0))), 1 / count))
        found, mean = found[:-1], found[-1]
        assert abs(found.mean() - mean) < 5 * found.std() / np.sqrt(paths)
        strong.append(np.sqrt(((found - exact) ** 2).mean()))
        weak.append(abs(mean - np.exp(-0.5)))
    slope = lambda errors: -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope(strong) - 0.5) < 0.05
    assert abs(slope(weak) - 1.0) < 0.05


def test_gradient_flow_solves_the_linear_equation_and_conserves_the_imbalance():
    _, params, objective, _ = problem("diagonal")
    rates, times = jnp.array([1.0, 30.0]), jnp.array([0.1, 1.0, 3.0])
    loss = lambda p: objective(p["net"], {}, EXAMPLES)[0] + rates @ p["w"] ** 2 / 2
    start = {"net": params, "w": jnp.array([1.0, -2.0])}
    path = jax.jit(lambda start: flows.gradient_flow(loss, start, times))(start)
    expected = np.array([1.0, -2.0]) * np.exp(-np.outer(times, rates))
    np.testing.assert_allclose(path["w"], expected, atol=1e-7)
    imbalance = lambda p: np.asarray(p["u"] ** 2 - p["v"] ** 2)
    np.testing.assert_allclose(imbalance(path["net"]) - imbalance(params)[None], 0, atol=1e-7)


def test_gradient_flow_ends_at_a_singularity_or_a_nan():
    """theta' = 4 theta^3 from 1 is (1 - 8t)^(-1/2), infinite at t = 1/8."""
    times = jnp.array([0.05, 1.0])
    path = jax.jit(lambda start: flows.gradient_flow(lambda p: -(p**4), start, times))
    np.testing.assert_allclose(path(jnp.array(1.0)), [0.6**-0.5, np.inf], rtol=1e-6)
    assert not np.isfinite(path(jnp.array(np.nan))).any()


def flow_to(times):
    return flows.gradient_flow(jnp.square, jnp.array(1.0), jnp.array(times))


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda: flows.isotropic(-0.1), "finite and not negative"),
        (lambda: flows.isotropic(np.nan), "finite and not negative"),
        (lambda: flows.isotropic(np.ones(7), num_steps=8), "num_steps, which is 8"),
        (lambda: flows.isotropic(np.ones(7)), "num_steps, which is None"),
        (lambda: flows.isotropic(np.array([1.0, -1.0]), num_steps=2), "finite and not negative"),
        (lambda: flow_to([2.0, 1.0]), "increasing"),
        (lambda: flow_to([0.0, 1.0]), "positive"),
        (lambda: flow_to([np.nan]), "finite"),
        (lambda: flow_to([]), "at least one"),
        (lambda: flows.check_dt(lambda w, x: x @ w, jnp.ones(3), EXAMPLES.x, np.nan), "dt is nan"),
        (
            lambda: flows.check_dt(lambda w, x: x @ w**2, jnp.full(3, np.nan), EXAMPLES.x, 0.1),
            "not finite",
        ),
        (lambda: flows.gradient_flow(lambda p: 0.0, {}, jnp.ones(1)), "no parameters"),
        (
            lambda: flows.make_step(lambda p, x: x[:, 0], EXAMPLES, flows.no_noise, step_size=1.0)(
                jnp.ones(N), {}, 0
            ),
            "no parameters",
        ),
    ],
)
def test_bad_input_is_named(call, advice):
    with pytest.raises(ValueError, match=advice):
        call()


def test_the_largest_dt_is_the_one_beyond_which_gradient_descent_leaves_the_minimum():
    x, predict = EXAMPLES.x, lambda w, x: x @ w
    w = jnp.array([1.0, -1.0, 2.0])
    with pytest.raises(ValueError, match="lambda_max") as error:
        flows.check_dt(predict, w, x, 100.0, scale=2.0)
    bound = float(str(error.value).split("= ")[1].split()[0])
    for dt, stays in ((0.99 * bound, True), (1.01 * bound, False)):
        step = flows.make_step(predict, Batch(x, x @ w), flows.no_noise, step_size=dt, scale=2.0)
        end = jax.lax.fori_loop(0, 3000, lambda i, w, step=step: step(jnp.ones(N), w, i), w + 1e-6)
        assert (np.abs(np.asarray(end - w)).max() < 1e-5) == stays
    flows.check_dt(predict, w, x, 0.99 * bound, scale=2.0)
