"""One forward pass for loss, error and sparsity: counts are exact, whatever the batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sgd_sparse_jax import measure, train
from sgd_sparse_jax.models import from_linen
from sgd_sparse_jax.types import Batch, Network, Outputs

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(45, 6, 6, 3)), RNG.integers(0, 3, 45)
FETCH = lambda key, idx: Batch(jnp.asarray(X)[idx], jnp.asarray(Y)[idx])
# Of the first features every fourth unit is never positive.
PARAMS = {"first": RNG.normal(size=(3, 4)) * [0, 1, 1, 1], "last": RNG.normal(size=(4, 3))}


def forward(np, params, x):
    maps = np.maximum(x @ params["first"], 0)
    pooled = maps.mean((1, 2))
    return pooled @ params["last"], {"block1": maps, "block2": pooled - 0.6}


NETWORK = Network(
    lambda key, x: (PARAMS, {}),
    lambda params, stats, x, *, train=False: Outputs(*forward(jnp, params, x), stats),
)
LOGITS, FEATURES = forward(np, PARAMS, X)


def evaluated(batch, n=45, **options):
    evaluate = measure.make_evaluation(NETWORK, train.cross_entropy, FETCH, batch=batch, **options)
    return evaluate(jr.key(0), jax.tree.map(jnp.asarray, PARAMS), {}, n)


sample = lambda block, phi: phi.reshape(len(phi), -1)[:, ::3]
share = lambda phi: measure.feature_sparsity(phi)[1]


@pytest.mark.parametrize(("batch", "n"), [(8, 45), (64, 17)])
def test_means_are_exact_for_every_batch_size(batch, n):
    row = evaluated(batch, n)
    assert list(row) == ["loss", "error"]
    loss = np.log(np.exp(LOGITS).sum(1)) - LOGITS[np.arange(45), Y]
    assert row["loss"] == pytest.approx(loss[:n].mean(), rel=1e-12)
    assert row["error"] == pytest.approx((LOGITS.argmax(-1) != Y)[:n].mean(), rel=1e-12)


@pytest.mark.parametrize(("devices", "n"), [(1, 45), (8, 45), (1, 3)])
def test_sparsity_equals_that_of_a_single_batch(devices, n):
    """Padding examples do not make a unit live."""
    shard = train.split_examples(train.data_mesh(jax.devices()[:devices]))
    row = evaluated(8, n, sample=sample, distinct=share, shard=shard)
    for block, phi in FEATURES.items():
        phi = phi[:n]
        assert row[f"active/{block}"] == pytest.approx((phi > 0).mean(), rel=1e-6)
        assert row[f"dead/{block}"] == pytest.approx(1 - (phi > 0).any(0).mean(), rel=1e-6)
        whole = float(jax.jit(share)(sample(block, phi)))
        assert row[f"distinct/{block}"] == pytest.approx(whole, rel=1e-9)
        assert row[f"dead/{block}"] > 0  # else the test is vacuous


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = nn.BatchNorm(not train, momentum=0.0, use_fast_variance=False, use_bias=False)
        return norm(x + 1)


def test_moments_are_means_over_batches_independent_of_the_old_ones():
    network = from_linen(Normalized())
    x = X[:45, 0, 0].astype(np.float32)
    fetch = lambda key, idx: Batch(jnp.asarray(x)[idx], idx)
    moments = measure.make_moments(network, fetch, batch=15)
    params, stats = network.init(jr.key(0), jnp.asarray(x))
    elsewhere = jax.tree.map(lambda leaf: leaf + 100, stats)
    found = moments(jr.key(0), params, elsewhere, 45)
    mean, var = jax.tree.leaves(found)
    parts = (x + 1).reshape(3, 15, 3)
    np.testing.assert_allclose(mean, parts.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(var, parts.var(1).mean(0), rtol=1e-5)
    short = moments(jr.key(0), params, stats, 10)
    np.testing.assert_allclose(jax.tree.leaves(short)[0], (x[:10] + 1).mean(0), rtol=1e-5)


def test_moments_keep_counts_and_keys():
    later = lambda stats, x: {"key": stats["key"] + 1, "mean": x.mean()}
    apply = lambda p, stats, x, *, train: Outputs(x, {}, later(stats, x))
    moments = measure.make_moments(Network(lambda key, x: ((), {}), apply), FETCH, batch=15)
    found = moments(jr.key(0), (), {"key": jnp.arange(2), "mean": jnp.zeros(())}, 45)
    np.testing.assert_array_equal(found["key"], jnp.arange(2))
    assert found["mean"] == pytest.approx(X.mean(), rel=1e-9)
