"""Planes through three points, the loss on them, and the valley below a point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgd_sparse_jax import measure
from sgd_sparse_jax.data import sparse_regression

pytestmark = pytest.mark.usefixtures("quick_compilation")


def some_params(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (4, 3), "bias": (3,)}
    return {name: jnp.asarray(scale * rng.normal(size=shape)) for name, shape in shapes.items()}


def flat(params) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


POINTS = tuple(some_params(seed) for seed in range(3))
coordinates, at = (jax.jit(function) for function in (measure.coordinates, measure.at))


@pytest.fixture(scope="module")
def plane():
    return jax.jit(measure.plane_through)(*POINTS)


def test_a_plane_contains_its_three_points_and_has_orthonormal_directions(plane):
    directions = np.stack([flat(plane.first), flat(plane.second)])
    np.testing.assert_allclose(directions @ directions.T, np.eye(2), atol=1e-14)
    alpha, beta = coordinates(plane, POINTS[1])
    np.testing.assert_allclose(alpha, np.linalg.norm(flat(POINTS[1]) - flat(POINTS[0])), rtol=1e-13)
    assert abs(beta) < 1e-13 and coordinates(plane, POINTS[2])[1] > 0
    for point in POINTS:
        there = at(plane, coordinates(plane, point))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), there, point)
    for point in ([1.0, 0.0], [-0.3, 2.5]):
        there = at(plane, jnp.array(point))
        np.testing.assert_allclose(coordinates(plane, there), point, atol=1e-13)


def test_rows_of_a_loss_map_are_betas_and_its_columns_alphas(plane):
    loss = lambda params: jnp.tanh(params["kernel"]).sum() + (params["bias"] ** 2).sum()
    alphas, betas = jnp.linspace(-1.0, 2.0, 5), jnp.linspace(-0.5, 3.0, 4)
    ours = jax.jit(lambda: measure.loss_map(loss, plane, alphas, betas))()
    expected = [[loss(at(plane, jnp.stack([a, b]))) for a in alphas] for b in betas]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


X, Y = map(np.asarray, sparse_regression(0, n=20, d=30, support=3).train)


def diagonal_loss(params):
    return 0.5 * jnp.mean((X @ (params["u"] * params["v"]) - Y) ** 2)


def test_the_valley_floor_is_a_plain_loop_whose_step_sizes_may_be_traced():
    rng, sizes = np.random.default_rng(1), np.array([0.0, 0.05, 0.5])
    start = {name: jnp.asarray(0.3 * rng.normal(size=30)) for name in ("u", "v")}
    below = lambda size: measure.valley_floor(diagonal_loss, start, step_size=size, num_steps=7)
    together, slope = jax.jit(jax.vmap(below))(sizes), jax.jit(jax.grad(diagonal_loss))
    for i, size in enumerate(sizes):
        params = start
        for _ in range(7):
            params = jax.tree.map(lambda p, g: p - size * g, params, slope(params))  # noqa: B023
        for name, expected in params.items():
            np.testing.assert_allclose(together[name][i], expected, rtol=1e-12, atol=1e-14)
    assert diagonal_loss(measure.valley_floor(diagonal_loss, start)) < 1e-9 * diagonal_loss(start)
