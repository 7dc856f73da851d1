"""Ranks, Jacobians, Hessians and features of toy nets, each computed in two ways."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sgd_sparse_jax import measure
from sgd_sparse_jax.models import MLP, DiagonalNet


def matrix_with(values, n: int, p: int, seed: int = 0) -> jax.Array:
    """A random n x p matrix of the given singular values."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(m, len(values))))[0] for m in (n, p))
    return jnp.asarray(left * np.asarray(values) @ right.T)


def test_the_effective_rank_is_the_entropy_of_the_singular_values():
    for k in (1, 2, 7):
        equal = jnp.asarray([3.0] * k + [0.0] * 4)
        np.testing.assert_allclose(measure.effective_rank(equal), np.log(k), atol=1e-15)
    # Half, a quarter and a quarter: 1.5 bits, whatever their scale.
    for scale in (1.0, 1e-12, 1e12):
        bits = measure.effective_rank(scale * jnp.array([2.0, 1.0, 1.0, 0.0])) / np.log(2.0)
        np.testing.assert_allclose(bits, 1.5, rtol=1e-14)
    rng = np.random.default_rng(0)
    outer = jnp.asarray(np.outer(rng.normal(size=6), rng.normal(size=9)))
    assert abs(measure.effective_rank(measure.singular_values(outer))) < 1e-12


def test_schatten_sums_are_the_nuclear_norm_the_frobenius_norm_and_the_rank():
    a = matrix_with([3.0, 1.0, 0.5, 1e-3], 8, 6)
    s = measure.singular_values(a)
    np.testing.assert_allclose(measure.schatten_sum(s), np.linalg.norm(a, "nuc"), rtol=1e-12)
    np.testing.assert_allclose(measure.schatten_sum(s, 2.0), np.linalg.norm(a) ** 2, rtol=1e-12)
    exact = jnp.array([3.0, 1.0, 0.5, 1e-3, 0.0, 0.0])
    assert measure.schatten_sum(exact, 0.0) == 4
    np.testing.assert_allclose(measure.schatten_sum(exact, 1e-9), 4, rtol=1e-8)
    halves = jax.vmap(measure.schatten_sum, (None, 0))(exact, jnp.array([0.5, 1.0]))
    expected = [3**0.5 + 1 + 0.5**0.5 + 1e-3**0.5, 4.501]
    np.testing.assert_allclose(halves, expected, rtol=1e-14)


def test_vanishing_singular_values_have_no_gradient_and_spoil_no_other():
    s = np.array([2.0, 0.5, 0.0])
    slopes = jax.grad(measure.schatten_sum)(jnp.asarray(s), 0.5)
    np.testing.assert_allclose(slopes, [0.5 * 2**-0.5, 0.5 * 0.5**-0.5, 0.0], rtol=1e-14)
    slopes = jax.grad(measure.effective_rank)(jnp.asarray(s))
    p, entropy = s[:2] / 2.5, float(measure.effective_rank(jnp.asarray(s)))
    np.testing.assert_allclose(slopes[:2], (-np.log(p) - entropy) / 2.5, rtol=1e-12)
    assert np.isfinite(slopes[2])


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (1, 5)])
def test_singular_values_are_numpys_and_vmap(shape):
    stack = np.random.default_rng(1).normal(size=(3, *shape))
    expected = np.linalg.svd(stack, compute_uv=False)
    ours = measure.singular_values(jnp.asarray(stack[0]))
    assert ours.shape == (min(shape),)
    np.testing.assert_allclose(ours, expected[0], rtol=1e-12)
    together = jax.jit(jax.vmap(measure.singular_values))(jnp.asarray(stack))
    np.testing.assert_allclose(together, expected, rtol=1e-12)


def test_the_rank_counts_singular_values_above_a_share_of_the_largest():
    values = [10.0, 1.0, 1e-2, 1e-6]
    a = matrix_with(values, 9, 7)
    tolerances = [0.5, 0.05, 2e-3, 5e-4, 2e-7, 5e-8, 1e-12]
    expected = [1, 2, 2, 3, 3, 4, 4]
    assert [int(measure.numerical_rank(a, tol)) for tol in tolerances] == expected
    of = jax.vmap(measure.rank_of, (None, 0))(jnp.asarray(values), jnp.asarray(tolerances))
    assert of.tolist() == expected
    for scale in (1e-10, 1e10):
        assert measure.numerical_rank(scale * a, 5e-4) == 3
    assert measure.rank_of(jnp.array([1.0, 0.5]), 0.5) == 1  # one that equals the tolerance is out
    assert measure.numerical_rank(jnp.zeros((3, 4)), 1e-4) == 0
    assert measure.numerical_rank(jnp.eye(5), 1e-4) == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_has_rank_minus_one_and_spoils_no_other(bad):
    a = np.eye(3)
    a[1, 2] = bad
    assert measure.numerical_rank(jnp.asarray(a), 1e-4) == -1
    assert np.isnan(measure.singular_values(jnp.asarray(a))).all()
    stack = jnp.stack([jnp.asarray(a), jnp.eye(3)])
    assert jax.vmap(partial(measure.numerical_rank, tol=1e-4))(stack).tolist() == [-1, 3]
    assert measure.rank_of(jnp.array([np.nan, np.nan]), 1e-4) == -1


def test_symmetric_eigenvalues_are_those_of_the_symmetric_part():
    stack = np.random.default_rng(2).normal(size=(3, 6, 6))
    expected = np.linalg.eigvalsh((stack + stack.transpose(0, 2, 1)) / 2)
    np.testing.assert_allclose(
        measure.symmetric_eigenvalues(jnp.asarray(stack[0])), expected[0], rtol=1e-12
    )
    together = jax.vmap(measure.symmetric_eigenvalues)(jnp.asarray(stack))
    np.testing.assert_allclose(together, expected, rtol=1e-12)
    known = measure.symmetric_eigenvalues(jnp.diag(jnp.array([3.0, -1.0, 2.0])))
    np.testing.assert_allclose(known, [-1, 2, 3], rtol=1e-14)


def two_layer_net(d: int, units: int, bias: bool, seed: int = 0):
    """A net with dead units, units that vanish and zero outgoing weights; its inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(9, d))
    x[:, 0] = np.abs(x[:, 0])
    kernel, outgoing, b = (
        rng.normal(size=(d, units)),
        rng.normal(size=units),
        rng.normal(size=units),
    )
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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_the_two_layer_jacobian_has_the_singular_values_of_the_whole_one(d, bias):
    units = 8
    params, x = two_layer_net(d, units, bias)
    model = MLP((units,), biases=(bias, False))
    whole = measure.jacobian(lambda p, x: model.apply({"params": p}, x)[0], params, x)
    first, outgoing = params["layer1"], params["layer2"]["kernel"][:, 0]
    small = measure.two_layer_jacobian(x, first["kernel"], outgoing, first.get("bias"))
    assert small.shape == (9, units * (d + bias)) and whole.shape == (9, units * (d + 1 + bias))
    gram = np.asarray(whole @ whole.T)
    np.testing.assert_allclose(small @ small.T, gram, rtol=1e-11, atol=1e-14 * gram.max())
    of = lambda rows: np.pad(np.asarray(measure.singular_values(rows)), (0, 9))[:9]
    values = of(whole)
    np.testing.assert_allclose(of(small), values, rtol=1e-9, atol=1e-13 * values[0])
    blocks = np.asarray(small).reshape(9, d + bias, units)
    assert not blocks[:, :, :2].any()  # units 0 and 1 are off everywhere
    assert blocks[:, :, 2].any()  # a zero outgoing weight still moves itself


def test_the_jacobian_has_a_row_of_gradients_per_example():
    params, x = two_layer_net(3, 8, bias=True)
    predict = lambda p, x: MLP((8,)).apply({"params": p}, x)[0]
    params["layer2"]["bias"] = jnp.array([0.3])
    rows = measure.jacobian(predict, params, x)
    direction = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size) + 1.0), params)
    direction = jax.tree.map(lambda d, p: d.reshape(p.shape), direction, params)
    _, moved = jax.jvp(lambda p: predict(p, x), (params,), (direction,))
    np.testing.assert_allclose(rows @ ravel_pytree(direction)[0], moved, rtol=1e-11, atol=1e-11)


def test_the_diagonal_nets_jacobian_has_the_singular_values_of_the_whole_one():
    rng = np.random.default_rng(3)
    x, u, v = rng.normal(size=(9, 6)), rng.normal(size=6), rng.normal(size=6)
    u[:2], v[1:3] = 0.0, 0.0
    params = {"u": jnp.asarray(u), "v": jnp.asarray(v)}
    predict = lambda p, x: DiagonalNet().apply({"params": p}, x)[0]
    whole = measure.jacobian(predict, params, jnp.asarray(x))
    small = measure.diagonal_net_jacobian(jnp.asarray(x), params["u"], params["v"])
    values = np.asarray(measure.singular_values(small))
    assert (values[:5] > 0.1).all() and values[5] < 1e-15
    np.testing.assert_allclose(values, measure.singular_values(whole)[:6], atol=1e-13)


def counted(columns: np.ndarray, threshold: float) -> int:
    """Units left when those that move as another does are struck off, one at a time."""
    moves = [
        [sum(entry**2 for entry in group[:, j]) for group in columns.transpose(1, 0, 2)]
        for j in range(columns.shape[2])
    ]
    left = [unit for unit in moves if max(unit) > 0]
    at = 0
    while at < len(left):
        others = left[:at] + left[at + 1 :]
        if any(abs(np.corrcoef(left[at], other)[0, 1]) > threshold for other in others):
            left.pop(at)
        else:
            at += 1
    return len(left)


def test_the_gradient_dimension_counts_units_whose_gradients_have_distinct_norms():
    count = partial(
        measure.gradient_dimension, partial(measure.distinct_units, corr_threshold=0.999)
    )
    seen = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        columns = rng.normal(size=(12, 3, 5)) * rng.uniform(0.1, 2.0, size=(3, 5))
        # Norms know nothing of signs, of the order of examples, nor of a unit's scale.
        twin = 1.7 * columns[rng.permutation(12)] * rng.choice([-1.0, 1.0], size=(12, 3, 5))
        columns = np.concatenate([columns, twin[:, :, :4], np.zeros((12, 3, 2))], axis=2)
        columns = columns[:, :, rng.permutation(11)]
        ours = int(count(jnp.asarray(columns)))
        assert ours == counted(columns, 0.999)
        assert 1 <= ours <= 5
        seen.add(ours)
    assert len(seen) > 1


def diagonal_point(n: int, d: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(n, d)), rng.normal(size=n), rng.normal(size=d), rng.normal(size=d)
    return tuple(map(jnp.asarray, drawn))


@jax.jit
def differentiated(x, y, u, v) -> jax.Array:
    d = len(u)
    loss = lambda theta: 0.5 * jnp.mean((x @ (theta[:d] * theta[d:]) - y) ** 2)
    return jax.hessian(loss)(jnp.concatenate([u, v]))


@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 2), (5, 8), (10, 4)])
def test_the_diagonal_nets_hessian_is_the_second_derivative(n, d):
    x, y, u, v = diagonal_point(n, d)
    ours = measure.diagonal_net_hessian(x, y, u, v)
    np.testing.assert_allclose(ours, differentiated(x, y, u, v), rtol=1e-11, atol=1e-12)


def test_the_balanced_hessian_is_that_of_the_same_predictor_with_equal_layers():
    x, y, u, v = diagonal_point(5, 8)
    u = u.at[2].set(0.0)  # a dead coordinate stays dead
    assert (np.asarray(u) < 0).any() and (np.asarray(v) < 0).any()
    size = np.sqrt(np.abs(u * v))
    first, second = size * np.sign(u), size * np.sign(v)
    np.testing.assert_allclose(first * second, u * v, rtol=1e-14)
    ours = measure.diagonal_net_hessian(x, y, u, v, balanced=True)
    expected = differentiated(x, y, jnp.asarray(first), jnp.asarray(second))
    np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-12)
    again = measure.diagonal_net_hessian(x, y, 4.0 * u, v / 4.0, balanced=True)
    np.testing.assert_allclose(again, ours, rtol=1e-11, atol=1e-12)
    other = measure.diagonal_net_hessian(x, y, u, v)
    assert np.abs(other - ours).max() > 0.1


def test_the_released_hessian_exchanges_the_layers_in_its_outer_blocks():
    n, d = 5, 8
    x, y, u, v = (np.asarray(leaf) for leaf in diagonal_point(n, d))
    gram, big_u, big_v = x.T @ x, np.diag(u), np.diag(v)
    r = np.diag(x.T @ (x @ (u * v) - y))
    upper, lower = big_u @ gram @ big_v + r, big_v @ gram @ big_u + r
    expected = np.block([[big_v @ gram @ big_v, upper], [lower, big_u @ gram @ big_u]]) / n
    at = tuple(map(jnp.asarray, (x, y, u, v)))
    ours = measure.diagonal_net_hessian(*at, as_released=True)
    np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-12)
    assert np.abs(ours - differentiated(*at)).max() > 0.1


@pytest.mark.parametrize("factor", [1.0, -0.4, 3.0])
def test_the_released_hessian_is_the_hessian_where_one_layer_is_a_multiple_of_the_other(factor):
    x, y, _, v = diagonal_point(5, 8)
    ours = measure.diagonal_net_hessian(x, y, factor * v, v, as_released=True)
    np.testing.assert_allclose(ours, differentiated(x, y, factor * v, v), rtol=1e-11, atol=1e-12)


def test_unit_rows_have_norm_one_or_zero():
    phi = np.random.default_rng(4).normal(size=(6, 5))
    phi[2] = 0.0
    phi[4, 3] = np.nan
    ours = np.asarray(measure.unit_rows(jnp.asarray(phi)))
    finite = [0, 1, 3, 5]
    np.testing.assert_allclose(np.linalg.norm(ours[finite], axis=1), 1.0, rtol=1e-14)
    np.testing.assert_allclose(
        (ours * phi)[finite].sum(1), np.linalg.norm(phi[finite], axis=1), rtol=1e-13
    )
    np.testing.assert_array_equal(ours[2], 0.0)
    assert np.isnan(ours[4, 3])
    larger = phi * np.array([1e-9, 3.0, 1.0, 1e9, 1.0, 7.0])[:, None]
    again = np.asarray(measure.unit_rows(jnp.asarray(larger)))
    np.testing.assert_allclose(again[finite], ours[finite], rtol=1e-13)


def test_flips_are_the_share_of_relus_that_changed():
    before = jnp.array([[1.0, 0.0, -2.0], [0.5, 3.0, 0.0]])
    after = jnp.array([[2.0, 1.0, 5.0], [-1.0, 0.0, 0.0]])
    assert measure.relu_flips(before, after) == pytest.approx(4 / 6)
    assert measure.relu_flips(after, before) == pytest.approx(4 / 6)
    assert measure.relu_flips(before, before) == 0
    assert measure.relu_flips(before, 7.0 * before) == 0
    z = jnp.asarray(np.random.default_rng(5).normal(size=(4, 6)))
    assert measure.relu_flips(z, -z) == 1
    assert measure.relu_flips(jnp.zeros((2, 2)), -jnp.ones((2, 2))) == 0


def test_signed_sparsity_counts_negative_features_too():
    rng = np.random.default_rng(6)
    phi = np.abs(rng.normal(size=(30, 6))) * rng.choice([-1.0, 0.0, 1.0], size=(30, 6))
    phi[3, 2] = np.nan
    positive, nonzero = np.nansum(phi > 0) / phi.size, (np.abs(phi) > 0).sum() / phi.size
    assert positive < nonzero < 1
    share = jax.jit(measure.feature_sparsity, static_argnames="signed")
    np.testing.assert_allclose(share(jnp.asarray(phi)), (positive, positive), rtol=1e-13)
    np.testing.assert_allclose(share(jnp.asarray(phi), signed=True), (nonzero, nonzero), rtol=1e-13)
    # A unit that is nowhere positive is dead, signed or not; the mirror of a unit is a duplicate.
    dead = jnp.asarray(-np.abs(rng.normal(size=(30, 1))))
    np.testing.assert_allclose(share(dead, signed=True), (1.0, 0.0))
    signs = rng.choice([-1.0, 1.0], size=(30, 1)) * rng.uniform(1, 2, size=(30, 1))
    pair = jnp.asarray(np.concatenate([signs, -signs], axis=1))
    np.testing.assert_allclose(share(pair, signed=True), (1.0, 0.5))


def test_of_several_copies_of_a_unit_the_last_one_is_distinct():
    a, b = np.random.default_rng(7).uniform(0.1, 1.0, size=(2, 40))
    phi = np.stack([a, b, 2 * a, np.zeros(40), 3 - a, -a], axis=1)
    assert measure.distinct_units(jnp.asarray(phi)).tolist() == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]
    # Correlation at the level of the threshold decides.
    noisy = np.stack([a, a + 0.2 * (b - b.mean())], axis=1)
    level = np.corrcoef(noisy.T)[0, 1]
    at = lambda threshold: measure.distinct_units(jnp.asarray(noisy), threshold).tolist()
    assert at(level - 1e-6) == [False, True]
    assert at(level + 1e-6) == [True, True]


@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
def test_the_tangent_kernel_is_the_gram_matrix_of_the_jacobian(chunk):
    model = MLP((5, 4), outputs=3)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(7, 2)))
    params = model.init(jax.random.key(0), x)["params"]
    predict = lambda params, x: model.apply({"params": params}, x)[0]
    flat, shape = ravel_pytree(params)
    jac = jax.jacobian(lambda p: predict(shape(p), x).reshape(-1))(flat)
    gram = measure.tangent_kernel(predict, params, x, chunk=chunk)
    np.testing.assert_allclose(gram, jac @ jac.T, rtol=1e-12, atol=1e-12)
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None))
    np.testing.assert_allclose(values[:5], measure.singular_values(jac)[:5], rtol=1e-6)
