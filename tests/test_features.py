import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sgd_sparse_jax.measure import feature_sparsity, sample_units


def greedy(phi: np.ndarray, threshold: float) -> tuple[float, float]:
    """The definition, one deletion at a time: (all, distinct) shares of positive entries."""
    kept = [j for j in range(phi.shape[1]) if (phi[:, j] > 0).any()]
    with np.errstate(invalid="ignore"):
        correlation = np.abs(np.atleast_2d(np.corrcoef(phi.T)))
    at = 0
    while at < len(kept):
        others = [j for j in kept if j != kept[at]]
        if (correlation[kept[at], others] > threshold).any():
            kept.pop(at)
        else:
            at += 1
    return (phi > 0).mean(), (phi[:, kept] > 0).sum() / phi.size


def random_features(seed: int, n: int = 40, m: int = 60) -> np.ndarray:
    """Units with near-duplicates, anti-duplicates, constants and dead ones among them."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, 12))
    sign = rng.choice([1.0, 1.0, -1.0], size=m)
    noise = rng.choice([0.0, 0.1, 0.35]) * rng.normal(size=(n, m))
    phi = base[:, rng.integers(0, 12, m)] * sign * rng.uniform(0.5, 2, m) + noise
    if seed % 2:
        phi = np.maximum(phi, 0)
    columns = rng.permutation(m)
    phi[:, columns[:4]] = 0.0
    # Exact in binary, so that NumPy's mean has no rounding error to correlate.
    phi[:, columns[4:7]] = rng.choice([0.25, 0.5, 1.0, 2.0], 3)
    phi[:, columns[7]] = -1.0
    return phi


measured = jax.jit(feature_sparsity, static_argnums=1)


@pytest.mark.parametrize("threshold", [0.95, 0.99])
def test_the_closed_form_is_the_greedy_loop_on_100_matrices(threshold):
    deleted = 0
    for seed in range(100):
        phi = random_features(seed)
        expected = greedy(phi, threshold)
        np.testing.assert_allclose(measured(jnp.asarray(phi), threshold), expected, rtol=1e-12)
        deleted += expected[1] < expected[0]
    assert deleted > 50  # most of the matrices do have duplicates


def test_float32_finds_the_same_units():
    for seed in range(20):
        phi = random_features(seed).astype(np.float32)
        np.testing.assert_allclose(measured(jnp.asarray(phi), 0.95), greedy(phi, 0.95), rtol=1e-5)


def test_a_copy_or_mirror_of_a_unit_adds_nothing_to_the_distinct_ones():
    phi = np.maximum(np.random.default_rng(0).normal(size=(50, 8)), 0)
    total = lambda phi: float(feature_sparsity(jnp.asarray(phi))[1]) * phi.size
    assert total(phi) == pytest.approx((phi > 0).sum())
    copy = np.concatenate([3.0 * phi[:, :1], phi], axis=1)
    assert total(copy) == pytest.approx(total(phi))
    mirror = np.concatenate([phi.max(0)[:1] - phi[:, :1], phi], axis=1)
    assert total(mirror) == pytest.approx(total(phi))


def test_constant_units_are_distinct_and_dead_ones_count_as_zeros():
    phi = np.full((1000, 3), [0.1, 0.3, 0.7])
    np.testing.assert_allclose(feature_sparsity(jnp.asarray(phi)), (1.0, 1.0))
    phi = np.concatenate([phi, np.zeros((1000, 3))], axis=1)
    np.testing.assert_allclose(feature_sparsity(jnp.asarray(phi)), (0.5, 0.5))


def test_a_dead_unit_deletes_nobody():
    live = np.abs(np.random.default_rng(1).normal(size=(30, 1)))
    phi = np.concatenate([live, -live], axis=1)  # the second correlates, and is never positive
    np.testing.assert_allclose(feature_sparsity(jnp.asarray(phi)), (0.5, 0.5))


def test_nan_is_not_positive_and_deletes_nobody():
    phi = np.maximum(np.random.default_rng(2).normal(size=(30, 4)), 0)
    phi[:, 1] = np.nan
    share = (phi > 0).mean()
    np.testing.assert_allclose(feature_sparsity(jnp.asarray(phi)), (share, share))


def test_vmapped_is_looped():
    stack = jnp.stack([jnp.asarray(random_features(seed)) for seed in range(4)])
    looped = [feature_sparsity(phi) for phi in stack]
    np.testing.assert_allclose(jax.vmap(feature_sparsity)(stack), np.transpose(looped), rtol=1e-12)


def test_sampled_units_are_columns_the_same_in_every_batch():
    maps = jr.normal(jr.key(0), (6, 5, 4, 3))
    whole = sample_units(jr.key(1), maps, 10)
    halves = [sample_units(jr.key(1), half, 10) for half in (maps[:3], maps[3:])]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
    flat = np.asarray(maps).reshape(6, 60)
    where = [np.flatnonzero((flat == column[:, None]).all(0)) for column in np.asarray(whole).T]
    assert len({int(found[0]) for found in where}) == 10
    np.testing.assert_array_equal(sample_units(jr.key(1), maps, 60), flat)
    assert (np.asarray(sample_units(jr.key(2), maps, 10)) != np.asarray(whole)).any()
