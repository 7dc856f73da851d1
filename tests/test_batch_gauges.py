"""Gauges of mini-batches against recorded ones, and critical step sizes against their laws.

tests/golden/curvature.npz: see tests/test_curvature.py.
"""

import inspect
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax import measure
from sgd_sparse_jax.measure import batch_gauges, mean_estimate, ratio_estimate
from sgd_sparse_jax.types import Batch

pytestmark = pytest.mark.usefixtures("quick_compilation")
GOLDEN = {
    name.removeprefix("mlp_tanh/"): value
    for name, value in np.load(
        Path(__file__).parent / "golden" / "curvature.npz", allow_pickle=False
    ).items()
}
KEY = jr.key(0)
PARAMS = [jnp.asarray(GOLDEN[name]) for name in sorted(GOLDEN) if name.startswith("params/")]
DATA = Batch(jnp.asarray(GOLDEN["x"]), jnp.asarray(GOLDEN["y"]))


def objective(params, stats, batch):
    x = batch.x
    for layer in range(0, 6, 2):
        x = (jnp.tanh(x) if layer else x) @ params[layer] + params[layer + 1][None]
    return 0.5 * ((x - batch.y) ** 2).sum(1).mean(), stats


def take(idx) -> Batch:
    return Batch(DATA.x[idx], DATA.y[idx])


def shaped(vector):
    parts = np.split(vector, np.cumsum([leaf.size for leaf in PARAMS])[:-1])
    return [jnp.asarray(part).reshape(leaf.shape) for part, leaf in zip(parts, PARAMS, strict=True)]


BATCHES = take(GOLDEN["batches"])
HESSIAN = measure.hessian(objective, PARAMS, {}, DATA)
FULL = {"gradient": jax.jit(jax.grad(objective, has_aux=True))(PARAMS, {}, DATA)[0]}
RECORDED = {
    "batch_sharpness": "batch_sharpness",
    "ratio_of_means": "batch_sharpness_ratio_of_means",
    "gradient_noise_trace": "gradient_noise_trace",
    "gni": "gni",
    "minibatch_sharpness": "minibs",
    "generalized_sharpness": "generalized_batch_sharpness",
}


def with_momentum():
    tx = optax.sgd(0.1, momentum=0.9)
    return {
        "tx": tx,
        "opt_state": optax.tree.set(tx.init(PARAMS), trace=shaped(GOLDEN["velocity"])),
    }


def test_gauges_are_the_recorded_ones():
    options = {"hessian": HESSIAN, "lanczos_steps": 40, "key": KEY, **FULL, **with_momentum()}
    top = shaped(GOLDEN["hessian_top_vector"])
    found = batch_gauges(objective, PARAMS, {}, BATCHES, direction=top, **options)
    for name, recorded in RECORDED.items():
        np.testing.assert_allclose(found[name].value, GOLDEN[recorded], rtol=1e-10, err_msg=name)
        assert found[name].samples == 8 and not found[name].converged
    ratios = found["generalized_mean_of_ratios"]
    np.testing.assert_allclose(ratios.value / 0.1, GOLDEN["momentum_batch_sharpness"], rtol=1e-10)
    error = GOLDEN["batch_rayleigh"].std(ddof=1) / np.sqrt(8)
    np.testing.assert_allclose(found["batch_sharpness"].standard_error, error, rtol=1e-10)
    assert 0 < found["gradient_noise_along"].value < found["gradient_noise_trace"].value
    assert found["minibatch_residual"].value < 1e-6
    assert found["batch_sharpness"].value <= found["minibatch_sharpness"].value


def test_the_chunk_changes_nothing():
    """At 1 batch in a program, loops over batches and Lanczos steps run on the host."""
    options = {"hessian": HESSIAN, "lanczos_steps": 6, "key": KEY, **FULL}
    one = batch_gauges(objective, PARAMS, {}, BATCHES, chunk=1, **options)
    on_host = jax.tree.map(np.asarray, BATCHES)
    for data, how in ((BATCHES, {}), (BATCHES, {"vectorized": 1}), (on_host, {"vectorized": 2})):
        three = batch_gauges(objective, PARAMS, {}, data, chunk=3, **how, **options)
        for name, estimate in three.items():
            np.testing.assert_allclose(one[name], estimate, rtol=1e-7, err_msg=name)
    assert 0.5 * GOLDEN["minibs"] < one["minibatch_sharpness"].value < GOLDEN["minibs"]
    assert 0.01 < one["minibatch_residual"].value < 1


def test_single_precision_reaches_its_digits():
    single = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    found = batch_gauges(
        objective, single(PARAMS), {}, single(BATCHES), gradient=single(FULL["gradient"])
    )
    for name in ("batch_sharpness", "ratio_of_means", "gradient_noise_trace"):
        np.testing.assert_allclose(found[name].value, GOLDEN[RECORDED[name]], rtol=1e-5)


def test_the_second_moment_contraction_is_the_recorded_one():
    contraction = measure.second_moment_contraction
    found = contraction(objective, PARAMS, {}, BATCHES, 0.1, KEY, tol=1e-6)
    np.testing.assert_allclose(found.value, GOLDEN["second_moment_contraction"], rtol=1e-10)
    assert found.converged and found.samples == 8 and found.standard_error > 0
    short = contraction(objective, PARAMS, {}, BATCHES, 0.1, KEY, tol=1e-6, max_matvecs=3)
    assert not short.converged


@pytest.mark.parametrize("size", [1, 2])
def test_95_percent_intervals_cover_exact_expectations_in_92_to_98_percent(size):
    """Of 500 repetitions, for the mean of ratios and for the ratio of means."""
    every = np.array(list(itertools.combinations(range(40), size)))
    of_batch = lambda batch: measure.step_sharpness(objective, PARAMS, {}, batch)
    ratio, g2 = map(np.asarray, jax.jit(jax.vmap(of_batch))(take(every)))
    exact = [GOLDEN[f"exact_b{size}/{name}"] for name in ("batch_sharpness", "ratio_of_means")]
    np.testing.assert_allclose([ratio.mean(), (ratio * g2).sum() / g2.sum()], exact, rtol=1e-10)
    rng, covered = np.random.default_rng(0), []
    for _ in range(500):
        drawn = rng.integers(len(every), size=64)
        found = mean_estimate(ratio[drawn]), ratio_estimate((ratio * g2)[drawn], g2[drawn])
        covered.append(
            [abs(e.value - x) < 1.96 * e.standard_error for e, x in zip(found, exact, strict=True)]
        )
    share = np.mean(covered, axis=0)
    assert ((share >= 0.92) & (share <= 0.98)).all(), share


def test_sampling_stops_at_the_tolerance_or_after_all_batches_and_reports_which():
    idx = np.random.default_rng(0).integers(40, size=(200, 8))
    early = batch_gauges(objective, PARAMS, {}, take(idx), tol=0.1)
    samples = early["batch_sharpness"].samples
    assert 16 <= samples < 200 and all(e.samples == samples for e in early.values())
    assert all(e.converged and e.standard_error <= 0.1 * e.value for e in early.values())
    late = batch_gauges(objective, PARAMS, {}, take(idx[:20]), tol=1e-3)
    assert not any(e.converged for e in late.values()) and late["ratio_of_means"].samples == 20
    one = batch_gauges(objective, PARAMS, {}, take(idx[:1]), tol=1.0)["batch_sharpness"]
    assert np.isnan(one.standard_error) and not one.converged


def test_zero_gradients_are_flagged_and_infinite_ones_named():
    valley = lambda params, stats, batch: (batch.x.mean() * (params**2).sum() / 2, stats)
    batches = Batch(jnp.array([[0.0], [2.0]] * 10), jnp.zeros((20, 1)))
    found = batch_gauges(valley, jnp.ones(3), {}, batches, tol=1.0)
    assert np.isnan(found["batch_sharpness"].value) and not found["batch_sharpness"].converged
    np.testing.assert_allclose(found["ratio_of_means"].value, 2.0)
    with pytest.raises(FloatingPointError, match="gradient of a batch"):
        batch_gauges(valley, jnp.array([np.inf]), {}, batches)
    flat = lambda params, stats, batch: (jnp.sign(params).sum() + batch.x.mean(), stats)
    tiny = lambda params, stats, batch: valley(1e-25 * params, stats, batch)
    for objective, start in ((valley, jnp.zeros(3)), (flat, jnp.ones(3)), (tiny, jnp.ones(3))):
        start, ones = start.astype(jnp.float32), Batch(*(jnp.ones((20, 1), jnp.float32),) * 2)
        tx = {"tx": optax.sgd(0.1), "opt_state": optax.sgd(0.1).init(start)}
        found = batch_gauges(objective, start, {}, ones, tol=1.0, **tx)
        for name in set(found) - {"gradient_norm2"}:
            assert np.isnan(found[name].value) and not found[name].converged, name


BY_X = Batch(jnp.linspace(1.0, 2.0, 12).reshape(4, 3), jnp.zeros((4, 3)))


def test_losses_with_reverse_rules_of_their_own_have_gauges():
    @jax.custom_vjp
    def cubes(x):
        return (x**3).sum()

    cubes.defvjp(lambda x: ((x**3).sum(), x), lambda x, g: (3 * g * x**2,))
    plain, own = (
        batch_gauges(lambda p, s, batch, f=f: (f(p * batch.x), s), jnp.arange(1.0, 4.0), {}, BY_X)
        for f in (lambda x: (x**3).sum(), cubes)
    )
    for name in plain:
        np.testing.assert_allclose(own[name][:2], plain[name][:2], rtol=1e-12)


@pytest.mark.parametrize(
    ("batches", "options", "error", "words"),
    [
        ([BY_X], {}, TypeError, "Stack the batches"),
        (Batch(BY_X.x[:0], BY_X.y[:0]), {}, ValueError, "1 or more"),
        (Batch(BY_X.x, BY_X.y[:2]), {}, ValueError, "same m"),
        (BY_X, {"chunk": 0}, ValueError, "chunk"),
        (BY_X, {"direction": jnp.ones(3)}, ValueError, "`gradient`"),
        (BY_X, {"tx": optax.adam(0.1)}, ValueError, "`opt_state`"),
    ],
)
def test_bad_input_is_named_before_anything_is_computed(batches, options, error, words):
    never = lambda params, stats, batch: pytest.fail("computed")
    with pytest.raises(error, match=words):
        inspect.unwrap(batch_gauges)(never, jnp.ones(3), {}, batches, **options)


def random_quadratic(seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(6, 6))
    return jnp.asarray(root @ root.T), *jnp.asarray(rng.normal(size=(2, 6)))


def quadratic(p, A, b):
    return 0.5 * p @ A @ p + b @ p + 7.0


@pytest.mark.parametrize("guess", [1e-4, 0.1, 30.0])
def test_critical_sharpness_is_exact_on_quadratics(guess):
    for seed in range(5):
        A, b, params = random_quadratic(seed)
        g = A @ params + b
        curvature = g @ A @ g / (g @ g)
        found = measure.critical_sharpness(quadratic, params, -g, A, b, guess=guess)
        np.testing.assert_allclose(found.sharpness, curvature, rtol=1e-6)
        assert found.converged


def test_at_the_critical_step_size_the_loss_returns_to_its_value():
    calls = []

    def loss(p):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.log(jnp.cosh(3 * p[0])) + p[1] ** 4 + 0.2 * p[1]

    params, direction = jnp.array([1.0, 0.5]), jnp.array([-3.0, -0.7])
    found = measure.critical_sharpness(loss, params, direction, guess=0.3, tol=0.05)
    at = lambda eta: float(loss(params + eta * direction))
    assert found.converged and len(calls) <= 6
    assert at(0.9 * found.step_size) < at(0.0) < at(1.1 * found.step_size)


def test_a_search_without_a_descent_or_a_rise_is_flagged():
    loss, start = lambda p: (p**2).sum(), jnp.ones(2)
    assert not measure.critical_sharpness(loss, start, start).converged  # ascends
    assert not measure.critical_sharpness(lambda p: p.sum(), start, -start).converged  # never rises
    with pytest.raises(ValueError, match="positive"):
        measure.critical_sharpness(loss, start, -start, guess=0.0)
    with pytest.raises(FloatingPointError, match="parameters is nan"):
        measure.critical_sharpness(loss, start * np.nan, -start)
    steep = lambda p: jnp.where(p[0] < -1, jnp.inf, (p**2).sum())
    assert measure.critical_sharpness(steep, start, -2 * start, guess=1.5).converged


def spectral_radius(eta, mean, variance, beta):
    """Of the map of (E x^2, E x y, E y^2) for x <- (1 + beta - eta h) x - beta y, y <- x."""
    m = 1 + beta - eta * mean
    rows = [[m**2 + eta**2 * variance, -2 * beta * m, beta**2], [m, -beta, 0.0], [1.0, 0.0, 0.0]]
    return np.abs(np.linalg.eigvals(np.array(rows))).max()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(("mean", "variance"), [(2.0, 0.0), (2.0, 1.5), (0.5, 40.0)])
def test_the_momentum_law_is_the_edge_of_the_second_moments(beta, mean, variance):
    low, high = 0.0, 10.0
    for _ in range(60):
        eta = (low + high) / 2
        # From a little above 1: at small eta the radius is 1 to rounding.
        stable = spectral_radius(eta, mean, variance, beta) <= 1 + 1e-12
        low, high = (eta, high) if stable else (low, eta)
    actual = measure.critical_step_size(mean, variance, beta)
    np.testing.assert_allclose(actual, low, rtol=1e-6)


def test_plateaus_are_found_whatever_comes_before_and_after():
    rng = np.random.default_rng(0)
    found = jax.jit(lambda series, width=0.1: measure.plateau(series, width=width))
    level = 10 + 0.2 * rng.normal(size=60)
    at = found(np.r_[np.linspace(2, 9, 30), level, np.full(10, 3.0)])
    assert 25 <= at.onset <= 30 and at.end == 90 and abs(at.level - 10) < 0.15
    assert abs(at.drift) < 0.05
    tilted = found(np.linspace(10.0, 11.0, 100), 0.2)
    np.testing.assert_allclose([tilted.drift, tilted.level], [1 / 10.5, 10.5])
    broken = found(np.r_[level, np.nan, level[:39]])
    assert (broken.onset, broken.end) == (0, 60)
    nothing = found(np.exp(np.arange(100.0)))
    assert nothing.onset == nothing.end == 0 and np.isnan(nothing.level)


def test_a_displacement_splits_into_bouncing_and_orthogonal_drift():
    """Gradient descent in a valley with curvature 10 across it, slope 1 along; step size .199."""
    loss = lambda p: 5.0 * p[0] ** 2 + p[1]
    path = [jnp.array([1.0, 0.0])]
    slope = jax.jit(jax.grad(loss))
    for _ in range(20):
        path.append(path[-1] - 0.199 * slope(path[-1]))
    across = jnp.stack(path)[:, 0]
    assert measure.sign_autocorrelation(across) == -1
    assert measure.sign_autocorrelation(across, lag=2) == 1
    pairs = measure.top_eigenpairs(measure.hessian(loss, path[0]), 1, KEY)
    bounce, drift = measure.split_displacement(path[6] - path[5], pairs.vectors)
    np.testing.assert_allclose(bounce, [float(across[6] - across[5]), 0.0], atol=1e-12)
    np.testing.assert_allclose(drift, [0.0, -0.199], atol=1e-12)
    floor, below = measure.floor_across(loss, path[6], pairs.values, pairs.vectors)
    np.testing.assert_allclose(floor, [0.0, -6 * 0.199], atol=1e-12)
    np.testing.assert_allclose(below, -6 * 0.199)
    same, _ = measure.floor_across(loss, path[6], -pairs.values, pairs.vectors)
    np.testing.assert_array_equal(same, path[6])


@pytest.mark.parametrize(
    ("tx", "options"),
    [
        (optax.rmsprop(0.1, decay=0.9), {"eps": 0.0, "eps_root": 1e-8}),
        (optax.adam(0.1, b1=0.0), {"decay": 0.999}),
        (optax.adam(optax.constant_schedule(0.1), b1=0.0), {"decay": 0.999}),
        (optax.adam(0.1, b1=0.0, eps_root=1e-3), {"decay": 0.999, "eps_root": 1e-3}),
    ],
)
def test_an_adaptive_step_is_the_scale_squared_times_the_gradient(tx, options):
    params, grads = jnp.ones(3), jnp.array([1e-3, 0.5, 2.0])
    _, state = tx.update(2 * grads, tx.init(params), params)
    step, state = tx.update(grads, state, params)
    scale = measure.adaptive_scale(state, **options)
    np.testing.assert_allclose(-0.1 * scale**2 * grads, step, rtol=1e-12)
    matrix = jnp.array([[2.0, 1.0, 0.0], [1.0, -1.0, 0.5], [0.0, 0.5, 3.0]])
    operator = measure.preconditioned(measure.Operator(lambda v: matrix @ v, params), scale)
    expected = np.linalg.eigvals(np.diag(np.asarray(scale) ** 2) @ matrix).real.max()
    np.testing.assert_allclose(measure.top_eigenpairs(operator, 1, KEY).values, expected)
    with pytest.raises(ValueError, match="nu"):
        measure.adaptive_scale(optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="count"):
        measure.adaptive_scale(optax.rmsprop(0.1).init(params), decay=0.9)
