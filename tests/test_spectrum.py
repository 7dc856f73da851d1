"""Ranks and Jacobians of toy nets, computed in two ways."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgd_sparse_jax import measure
from sgd_sparse_jax.models import MLP, DiagonalNet


def matrix_with(values, n: int, p: int) -> jax.Array:
    """A random n x p matrix of the given singular values."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(m, len(values))))[0] for m in (n, p))
    return jnp.asarray(left * np.asarray(values) @ right.T)


def test_the_effective_rank_is_the_entropy_of_the_singular_values():
    nats = jax.jit(measure.effective_rank)
    for k in (1, 2, 7):
        equal = jnp.array([3.0] * k + [0.0] * (8 - k))
        np.testing.assert_allclose(nats(equal), np.log(k), atol=1e-15)
    # Half, a quarter and a quarter: 1.5 bits, whatever their scale.
    bits = nats(1e-12 * jnp.array([2.0, 1.0, 1.0, 0, 0, 0, 0, 0])) / np.log(2.0)
    np.testing.assert_allclose(bits, 1.5, rtol=1e-14)


def test_schatten_sums_are_the_nuclear_norm_the_frobenius_norm_and_the_rank():
    a = matrix_with([3.0, 1.0, 0.5, 1e-3], 8, 6)
    total = jax.jit(lambda p: measure.schatten_sum(measure.singular_values(a), p))
    np.testing.assert_allclose(total(1.0), np.linalg.norm(a, "nuc"), rtol=1e-12)
    np.testing.assert_allclose(total(2.0), np.linalg.norm(a) ** 2, rtol=1e-12)
    assert measure.schatten_sum(jnp.array([3.0, 1.0, 0.5, 1e-3, 0.0, 0.0]), 0.0) == 4


def test_the_rank_counts_singular_values_above_a_share_of_the_largest():
    rank = jax.jit(measure.numerical_rank)
    a = matrix_with([10.0, 1.0, 1e-2, 1e-6], 9, 7)
    tolerances = jnp.array([0.5, 0.05, 2e-3, 5e-4, 2e-7, 5e-8, 1e-12])
    assert [int(rank(a, tol)) for tol in tolerances] == [1, 2, 2, 3, 3, 4, 4]
    assert rank(1e-10 * a, 5e-4) == 3
    assert rank(jnp.diag(jnp.array([1.0, 0.5, 0.0])), 0.5) == 1  # the tolerance itself is out
    assert rank(jnp.zeros((3, 3)), 1e-4) == 0


def test_a_matrix_that_is_not_finite_has_rank_minus_one():
    good = np.random.default_rng(1).normal(size=(4, 3))
    stack = jnp.stack([jnp.asarray(good)] * 3).at[0, 1, 2].set(jnp.nan).at[1, 1, 2].set(jnp.inf)
    ranks, values = jax.jit(
        jax.vmap(lambda a: (measure.numerical_rank(a, 1e-4), measure.singular_values(a)))
    )(stack)
    assert ranks.tolist() == [-1, -1, 3]
    expected = [[np.nan] * 3, [np.nan] * 3, np.linalg.svd(good, compute_uv=False)]
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def two_layer_net(d: int, units: int, bias: bool):
    """A net with dead units, units that vanish and zero outgoing weights; its inputs."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(9, d)), rng.normal(size=(d, units))
    outgoing, b = rng.normal(size=(2, units))
    x[:, 0] = np.abs(x[:, 0])
    kernel[:, 0], b[0] = -np.eye(d)[0], -1.0  # dead on all inputs
    kernel[:, 1], b[1] = 0.0, 0.0
    kernel[:, 2], b[2] = np.eye(d)[0], 0.1  # live on all inputs
    kernel[:, 3], b[3] = 0.0, 0.5  # a constant with its bias, zero without
    outgoing[1:3] = 0.0
    outgoing[4:6] *= 1e3
    params = {"layer1": {"kernel": kernel}, "layer2": {"kernel": outgoing[:, None]}}
    if bias:
        params["layer1"]["bias"] = b
    return jax.tree.map(jnp.asarray, params), jnp.asarray(x)


@pytest.mark.parametrize(("d", "bias"), [(1, True), (5, True), (5, False)])
def test_the_two_layer_jacobian_has_the_singular_values_of_the_whole_one(d, bias):
    units = 8
    params, x = two_layer_net(d, units, bias)
    predict = lambda p, x: MLP((units,), biases=(bias, False)).apply({"params": p}, x)[0]
    whole, reverse = jax.jit(
        lambda p, x: (measure.jacobian(predict, p, x), jax.jacrev(predict)(p, x))
    )(params, x)
    rows = [leaf.reshape(9, -1) for leaf in jax.tree.leaves(reverse)]
    np.testing.assert_allclose(whole, np.concatenate(rows, 1), rtol=1e-12, atol=1e-12)
    first, outgoing = params["layer1"], params["layer2"]["kernel"][:, 0]
    small = jax.jit(measure.two_layer_jacobian)(x, first["kernel"], outgoing, first.get("bias"))
    assert small.shape == (9, units * (d + bias)) and whole.shape == (9, units * (d + 1 + bias))
    of = lambda rows: np.pad(np.linalg.svd(rows, compute_uv=False), (0, 9))[:9]
    np.testing.assert_allclose(of(small), of(whole), rtol=1e-9, atol=1e-13 * of(whole)[0])


def test_the_diagonal_nets_jacobian_has_the_singular_values_of_the_whole_one():
    rng = np.random.default_rng(3)
    x, u, v = map(jnp.asarray, (rng.normal(size=(9, 6)), *rng.normal(size=(2, 6))))
    u, v = u.at[:2].set(0), v.at[1:3].set(0)
    predict = lambda p, x: DiagonalNet().apply({"params": p}, x)[0]
    whole = jax.jit(partial(measure.jacobian, predict))({"u": u, "v": v}, x)
    of = lambda rows: np.linalg.svd(rows, compute_uv=False)[:6]
    values = of(measure.diagonal_net_jacobian(x, u, v))
    assert (values[:5] > 0.1).all() and values[5] < 1e-15
    np.testing.assert_allclose(values, of(whole), atol=1e-13)


def test_the_gradient_dimension_counts_units_whose_gradients_have_distinct_norms():
    distinct = partial(measure.distinct_units, corr_threshold=0.999)
    stack = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        columns = rng.normal(size=(12, 8, 5)) * rng.uniform(0.1, 2.0, size=(8, 5))
        # Norms are invariant to signs, to the order of examples and to the scale of a unit.
        twin = 1.7 * columns[rng.permutation(12)] * rng.choice([-1.0, 1.0], size=(12, 8, 5))
        columns = np.concatenate([columns, twin[:, :, :4], np.zeros((12, 8, 2))], axis=2)
        stack.append(columns[:, :, rng.permutation(11)])
    count = jax.jit(jax.vmap(partial(measure.gradient_dimension, distinct)))
    assert count(jnp.asarray(stack)).tolist() == [5] * 10


def test_diagonal_layers_have_a_support_and_a_balance():
    u, v = np.array([2.0, -1e-30, 0.0, 3.0]), np.array([0.5, 1e-30, 7.0, -3.0])
    on = tuple(map(jnp.asarray, (u, v)))
    assert [int(measure.support_size(*on, t)) for t in (1e-50, 1e-70, 2.0)] == [2, 3, 1]
    single = tuple(jnp.array([1.0, 1e-9, 1e-30], jnp.float32) for _ in (u, v))
    assert [int(measure.support_size(*single, t)) for t in (1e-50, 1e-70, 0.0)] == [2, 3, 3]
    np.testing.assert_allclose(measure.balancedness(*on), np.abs(u**2 - v**2).sum())


def test_the_tangent_kernel_is_the_gram_matrix_of_the_jacobian():
    rng = np.random.default_rng(0)
    x, params = jnp.asarray(rng.normal(size=(7, 2))), jnp.asarray(rng.normal(size=5 * (2 + 3)))
    predict = lambda p, x: jnp.tanh(x @ p[:10].reshape(2, 5)) @ p[10:].reshape(5, 3)
    jac = np.asarray(jax.jit(jax.jacobian(predict))(params, x)).reshape(21, 25)
    for chunk in (3, 20):
        gram = measure.tangent_kernel(predict, params, x, chunk=chunk)
        np.testing.assert_allclose(gram, jac @ jac.T, rtol=1e-12, atol=1e-12)
