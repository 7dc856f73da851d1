"""Feature sparsity against its definition, one deletion at a time."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sgd_sparse_jax import measure

pytestmark = pytest.mark.usefixtures("quick_compilation")


def greedy(phi: np.ndarray, threshold: float) -> tuple[float, float]:
    """The definition, one deletion at a time: (all, distinct) shares of positive entries."""
    left = [j for j in range(phi.shape[1]) if (phi[:, j] > 0).any()]
    with np.errstate(invalid="ignore"):
        correlation = np.abs(np.atleast_2d(np.corrcoef(phi.T)))
    at = 0
    while at < len(left):
        others = [j for j in left if j != left[at]]
        if (correlation[left[at], others] > threshold).any():
            left.pop(at)
        else:
            at += 1
    return (phi > 0).mean(), (phi[:, left] > 0).sum() / phi.size


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
    # Exact in binary: rounding errors of NumPy's mean would correlate.
    phi[:, columns[4:7]] = rng.choice([0.25, 0.5, 1.0, 2.0], 3)
    phi[:, columns[7]] = -1.0
    return phi


measured = jax.jit(measure.feature_sparsity, static_argnames="signed")


def active(phi, signed=False) -> list[float]:
    """Numbers of active entries of all and of distinct units, padded by dead units."""
    padded = np.concatenate([phi, np.zeros((len(phi), 6 - phi.shape[1]))], axis=1)
    return [round(padded.size * float(share), 9) for share in measured(padded, signed=signed)]


def test_the_closed_form_is_the_greedy_loop_on_100_matrices():
    """Vmapped, at two thresholds, in both precisions."""
    wide = np.stack([random_features(seed) for seed in range(100)])
    many = jax.jit(jax.vmap(measure.feature_sparsity, (0, None)))
    for stack, rtol in ((wide, 1e-12), (wide.astype(np.float32), 1e-5)):
        for threshold in (0.95, 0.99):
            expected = np.array([greedy(phi, threshold) for phi in stack])
            assert (expected[:, 1] < expected[:, 0]).sum() > 50  # most of them have duplicates
            np.testing.assert_allclose(many(stack, threshold), expected.T, rtol=rtol)


def test_signed_sparsity_counts_negative_features_too():
    rng = np.random.default_rng(6)
    phi = np.abs(rng.normal(size=(30, 4))) * rng.choice([-1.0, 0.0, 1.0], size=(30, 4))
    phi[3, 2] = np.nan  # neither active nor a duplicate
    assert active(phi) == [(phi > 0).sum()] * 2
    assert active(phi, signed=True) == [(np.abs(phi) > 0).sum()] * 2
    # A unit that is nowhere positive is dead, signed or not; the mirror of a unit is a duplicate.
    assert active(-1 - phi[:, :1] ** 2, signed=True) == [30, 0]
    signs = rng.choice([-1.0, 1.0], size=(30, 1)) * rng.uniform(1, 2, size=(30, 1))
    assert active(np.concatenate([signs, -signs], axis=1), signed=True) == [60, 30]


def test_sampled_units_are_columns_the_same_in_every_batch():
    sample = jax.jit(measure.sample_units, static_argnums=2)
    maps = jr.normal(jr.key(0), (6, 5, 4, 3))
    whole, flat = np.asarray(sample(jr.key(1), maps, 10)), np.asarray(maps).reshape(6, 60)
    halves = [sample(jr.key(1), half, 10) for half in (maps[:3], maps[3:])]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
    where = [np.flatnonzero((flat == column[:, None]).all(0)) for column in whole.T]
    assert len({int(found[0]) for found in where}) == 10
    np.testing.assert_array_equal(sample(jr.key(1), maps, 60), flat)
    assert (sample(jr.key(2), maps, 10) != whole).any()


def test_unit_rows_have_norm_one_or_zero():
    phi = np.random.default_rng(4).normal(size=(4, 2, 3))
    phi[1], phi[3, 1, 1] = 0.0, np.nan
    actual = np.asarray(measure.unit_rows(jnp.asarray(phi)))
    for i in (0, 2):
        np.testing.assert_allclose(actual[i], phi[i] / np.linalg.norm(phi[i]), rtol=1e-13)
    np.testing.assert_array_equal(actual[1], 0.0)
    assert np.isnan(actual[3, 1, 1])


def test_flips_are_the_share_of_relus_that_changed():
    before = jnp.array([[1.0, 0.0, -2.0], [0.5, 3.0, 0.0]])
    after = jnp.array([[2.0, 1.0, 5.0], [-1.0, 0.0, 0.0]])
    assert measure.relu_flips(before, after) == pytest.approx(4 / 6)
    assert measure.relu_flips(after, before) == pytest.approx(4 / 6)
    assert measure.relu_flips(before, 7.0 * before) == 0
