"""Planes through three points, the loss on them, and the valley below a point."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sgd_sparse_jax import measure
from sgd_sparse_jax.data import sparse_regression
from sgd_sparse_jax.models import MLP

MODEL = MLP((4, 3))
INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))


def some_params(seed: int):
    return MODEL.init(jr.key(seed), INPUTS)["params"]


def flat(params) -> np.ndarray:
    return np.asarray(ravel_pytree(params)[0])


def flat_dot(one, other) -> jax.Array:
    return ravel_pytree(one)[0] @ ravel_pytree(other)[0]


@pytest.fixture(scope="module")
def points():
    return tuple(some_params(seed) for seed in range(3))


@pytest.fixture(scope="module")
def plane(points):
    return measure.plane_through(*points)


def test_the_directions_of_a_plane_are_orthonormal(plane):
    directions = np.stack([flat(plane.first), flat(plane.second)])
    np.testing.assert_allclose(directions @ directions.T, np.eye(2), atol=1e-14)


def test_a_plane_contains_its_three_points(plane, points):
    origin, first, second = map(flat, points)
    alpha, beta = measure.coordinates(plane, points[1])
    np.testing.assert_allclose(alpha, np.linalg.norm(first - origin), rtol=1e-13)
    assert alpha > 0 and abs(beta) < 1e-13  # on the first axis, in its positive direction
    assert measure.coordinates(plane, points[2])[1] > 0
    np.testing.assert_array_equal(measure.coordinates(plane, points[0]), [0.0, 0.0])
    for point in points:
        there = measure.at(plane, measure.coordinates(plane, point))
        assert jax.tree.structure(there) == jax.tree.structure(point)
        np.testing.assert_allclose(flat(there), flat(point), atol=1e-14)
    between = second - origin
    np.testing.assert_allclose(
        np.linalg.norm(measure.coordinates(plane, points[2])), np.linalg.norm(between), rtol=1e-13
    )


def test_coordinates_and_points_of_the_plane_are_each_others_inverse(plane):
    for point in ([0.0, 0.0], [1.0, 0.0], [-0.3, 2.5]):
        there = measure.at(plane, jnp.array(point))
        np.testing.assert_allclose(measure.coordinates(plane, there), point, atol=1e-13)


def test_coordinates_are_those_of_the_nearest_point_of_the_plane(plane):
    away = some_params(7)
    nearest = measure.coordinates(plane, away)
    rest = flat(away) - flat(measure.at(plane, nearest))
    assert np.linalg.norm(rest) > 0.1
    for direction in (plane.first, plane.second):
        assert abs(rest @ flat(direction)) < 1e-13
    for shift in np.random.default_rng(1).normal(size=(20, 2)):
        other = flat(away) - flat(measure.at(plane, nearest + shift))
        assert np.linalg.norm(other) > np.linalg.norm(rest)


def test_rows_of_a_loss_map_are_betas_and_its_columns_alphas(plane):
    def loss(params):
        out = MODEL.apply({"params": params}, INPUTS)[0]
        return jnp.mean((out - 1.0) ** 2)

    alphas, betas = jnp.linspace(-1.0, 2.0, 5), jnp.linspace(-0.5, 3.0, 4)
    ours = jax.jit(lambda: measure.loss_map(loss, plane, alphas, betas))()
    assert ours.shape == (4, 5)
    direct = jax.jit(lambda point: loss(measure.at(plane, point)))
    for i, beta in enumerate(betas):
        for j, alpha in enumerate(alphas):
            np.testing.assert_allclose(ours[i, j], direct(jnp.stack([alpha, beta])), rtol=1e-12)
    # Along the first axis only, at its own coordinates.
    tilt = lambda params: flat_dot(params, plane.first) - flat_dot(plane.origin, plane.first)
    mapped = measure.loss_map(tilt, plane, alphas, betas)
    np.testing.assert_allclose(mapped, np.tile(alphas, (4, 1)), atol=1e-13)


PROBLEM = sparse_regression(0, n=20, d=30, support=3).train
X, Y = jnp.asarray(PROBLEM.x), jnp.asarray(PROBLEM.y)


def diagonal_loss(params):
    return 0.5 * jnp.mean((X @ (params["u"] * params["v"]) - Y) ** 2)


def somewhere(seed: int = 0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(0.3 * rng.normal(size=30)) for name in ("u", "v")}


def test_the_valley_floor_lies_far_below_and_is_flat():
    start = somewhere()
    floor = jax.jit(lambda p: measure.valley_floor(diagonal_loss, p))(start)
    assert diagonal_loss(floor) < 1e-9 * diagonal_loss(start)
    slope = lambda params: np.abs(flat(jax.grad(diagonal_loss)(params))).max()
    assert slope(floor) < 1e-5 * slope(start)
    # Fifty steps from there go nowhere, and the way there went somewhere.
    again = measure.valley_floor(diagonal_loss, floor, num_steps=50)
    np.testing.assert_allclose(flat(again), flat(floor), atol=1e-4)
    assert np.abs(flat(floor) - flat(start)).max() > 0.1


def test_the_valley_floor_is_a_numpy_loop():
    start = somewhere(1)
    x, y = np.asarray(X), np.asarray(Y)
    for step_size, num_steps in ((0.5, 3), (0.05, 7), (0.1, 0)):
        u, v = np.asarray(start["u"]), np.asarray(start["v"])
        for _ in range(num_steps):
            back = x.T @ (x @ (u * v) - y) / 20
            u, v = u - step_size * back * v, v - step_size * back * u
        ours = measure.valley_floor(diagonal_loss, start, step_size=step_size, num_steps=num_steps)
        np.testing.assert_allclose(ours["u"], u, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(ours["v"], v, rtol=1e-12, atol=1e-14)


def test_the_default_valley_floor_is_2000_steps_of_a_half():
    start = somewhere(2)
    curvature = jnp.array(1e-3)
    bowl = lambda params: 0.5 * curvature * (params["u"] @ params["u"])
    floor = measure.valley_floor(bowl, start)
    np.testing.assert_allclose(floor["u"], (1 - 0.5e-3) ** 2000 * start["u"], rtol=1e-10)
    np.testing.assert_array_equal(floor["v"], start["v"])


def test_step_sizes_of_the_descent_may_be_traced():
    start = somewhere(3)
    below = lambda size: measure.valley_floor(diagonal_loss, start, step_size=size, num_steps=20)
    sizes = jnp.array([0.0, 0.1, 0.3])
    together = jax.jit(jax.vmap(below))(sizes)
    for i, size in enumerate(sizes):
        np.testing.assert_allclose(together["u"][i], below(float(size))["u"], rtol=1e-11)
    np.testing.assert_array_equal(together["u"][0], start["u"])
