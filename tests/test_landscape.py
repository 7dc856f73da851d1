"""Planes through three points, the loss on them, and the valley below a point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgd_sparse_jax import measure
from sgd_sparse_jax.data import sparse_regression


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
    origin, first, second = map(flat, POINTS)
    alpha, beta = coordinates(plane, POINTS[1])
    np.testing.assert_allclose(alpha, np.linalg.norm(first - origin), rtol=1e-13)
    assert abs(beta) < 1e-13  # on the first axis, in its positive direction
    last = coordinates(plane, POINTS[2])
    assert last[1] > 0
    np.testing.assert_allclose(np.linalg.norm(last), np.linalg.norm(second - origin), rtol=1e-13)
    np.testing.assert_array_equal(coordinates(plane, POINTS[0]), [0.0, 0.0])
    for point in POINTS:
        there = at(plane, coordinates(plane, point))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), there, point)
    for point in ([1.0, 0.0], [-0.3, 2.5]):
        there = at(plane, jnp.array(point))
        np.testing.assert_allclose(coordinates(plane, there), point, atol=1e-13)


def test_coordinates_are_those_of_the_nearest_point_of_the_plane(plane):
    away = some_params(7)
    rest = flat(away) - flat(at(plane, coordinates(plane, away)))
    assert np.linalg.norm(rest) > 0.1
    for direction in (plane.first, plane.second):
        assert abs(rest @ flat(direction)) < 1e-13


def test_rows_of_a_loss_map_are_betas_and_its_columns_alphas(plane):
    loss = lambda params: jnp.tanh(params["kernel"]).sum() + (params["bias"] ** 2).sum()
    alphas, betas = jnp.linspace(-1.0, 2.0, 5), jnp.linspace(-0.5, 3.0, 4)
    ours = jax.jit(lambda: measure.loss_map(loss, plane, alphas, betas))()
    assert ours.shape == (4, 5)
    for i, beta in enumerate(betas):
        for j, alpha in enumerate(alphas):
            there = at(plane, jnp.stack([alpha, beta]))
            direct = np.tanh(there["kernel"]).sum() + (np.asarray(there["bias"]) ** 2).sum()
            np.testing.assert_allclose(ours[i, j], direct, rtol=1e-12)


PROBLEM = sparse_regression(0, n=20, d=30, support=3).train
X, Y = np.asarray(PROBLEM.x), np.asarray(PROBLEM.y)


def diagonal_loss(params):
    return 0.5 * jnp.mean((X @ (params["u"] * params["v"]) - Y) ** 2)


def numpy_gradient(params):
    u, v = np.asarray(params["u"]), np.asarray(params["v"])
    back = X.T @ (X @ (u * v) - Y) / 20
    return {"u": back * v, "v": back * u}


def somewhere(seed: int = 0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(0.3 * rng.normal(size=30)) for name in ("u", "v")}


def test_the_valley_floor_lies_far_below_and_is_flat():
    start = somewhere()
    floor = jax.jit(lambda p: measure.valley_floor(diagonal_loss, p))(start)
    assert diagonal_loss(floor) < 1e-9 * diagonal_loss(start)
    slope = lambda params: np.abs(flat(numpy_gradient(params))).max()
    assert slope(floor) < 1e-5 * slope(start)
    assert np.abs(flat(floor) - flat(start)).max() > 0.1


def test_the_valley_floor_is_a_numpy_loop_whose_step_sizes_may_be_traced():
    start, sizes = somewhere(1), np.array([0.0, 0.05, 0.5])
    below = lambda size: measure.valley_floor(diagonal_loss, start, step_size=size, num_steps=7)
    together = jax.jit(jax.vmap(below))(sizes)
    for i, size in enumerate(sizes):
        params = start
        for _ in range(7):
            params = jax.tree.map(lambda p, g: p - size * g, params, numpy_gradient(params))  # noqa: B023
        for name, expected in params.items():
            np.testing.assert_allclose(together[name][i], expected, rtol=1e-12, atol=1e-14)


def test_the_default_valley_floor_is_2000_steps_of_a_half():
    bowl = lambda p: 0.5e-3 * p**2
    floor = jax.jit(lambda p: measure.valley_floor(bowl, p))(jnp.array(3.0))
    assert floor == pytest.approx(3.0 * (1 - 0.5e-3) ** 2000, rel=1e-10)
