"""Planes through points, along paths and at random, the loss on them, the valley below a point."""

import jax
import jax.numpy as jnp
import jax.random as jr
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
    actual = jax.jit(lambda: measure.loss_map(loss, plane, alphas, betas))()
    expected = [[loss(at(plane, jnp.stack([a, b]))) for a in alphas] for b in betas]
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    chunked = jax.jit(lambda: measure.loss_map(loss, plane, alphas, betas, chunk=3))()
    np.testing.assert_allclose(chunked, actual, rtol=1e-13)


def test_principal_planes_contain_planar_paths_and_explain_the_variance_of_others(plane):
    rng = np.random.default_rng(0)
    places = jnp.asarray(rng.normal(size=(9, 2)) * np.array([3.0, 1.0]))
    path = jax.vmap(lambda place: measure.at(plane, place))(places)
    found, shares = jax.jit(measure.principal_plane)(path)
    np.testing.assert_allclose(shares.sum(), 1, rtol=1e-12)
    back = jax.vmap(lambda params: measure.at(found, measure.coordinates(found, params)))(path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), back, path)
    noisy = jax.tree.map(lambda leaf: leaf + 0.5 * rng.normal(size=leaf.shape), path)
    found, shares = jax.jit(measure.principal_plane)(noisy)
    rows = np.stack([flat(jax.tree.map(lambda leaf, i=i: leaf[i], noisy)) for i in range(9)])
    away = rows - rows.mean(0)
    values = np.linalg.svd(away, compute_uv=False) ** 2
    np.testing.assert_allclose(shares, values[:2] / values.sum(), rtol=1e-10)
    directions = np.stack([flat(found.first), flat(found.second)])
    np.testing.assert_allclose(directions @ directions.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(
        (away @ directions.T) ** 2 @ np.ones(2),
        ((away @ np.linalg.svd(away)[2][:2].T) ** 2).sum(1),
        rtol=1e-9,
    )


def test_random_directions_have_the_norms_of_the_filters_and_do_not_see_their_scale():
    origin = {"conv": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 2, 4)))}
    origin |= {"scale": jnp.ones(4)}
    draw = jax.jit(measure.random_plane)
    found = draw(jr.key(0), origin)
    norms = lambda kernel: np.sqrt((np.asarray(kernel) ** 2).sum((0, 1, 2)))
    for direction in (found.first, found.second):
        np.testing.assert_allclose(norms(direction["conv"]), norms(origin["conv"]), rtol=1e-12)
        assert not direction["scale"].any()
    assert (
        abs(np.vdot(found.first["conv"], found.second["conv"]))
        < 0.5 * (norms(origin["conv"]) ** 2).sum()
    )
    # A network with BatchNorm is the same if a filter is scaled: so is the map around it.
    larger = draw(jr.key(0), origin | {"conv": 7 * origin["conv"]})
    np.testing.assert_allclose(larger.first["conv"], 7 * found.first["conv"], rtol=1e-12)


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
