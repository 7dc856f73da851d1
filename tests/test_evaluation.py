"""One forward pass for loss, error and sparsity: counts are exact, whatever the batch."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sgd_sparse_jax import measure, train
from sgd_sparse_jax.models import Layers, ResNet, from_linen
from sgd_sparse_jax.types import Batch

MODEL = ResNet((1,), classes=3, width=4, layers=Layers(jnp.float64))
FORGETFUL = MODEL.clone(layers=MODEL.layers._replace(norm_momentum=0.0))
X = jr.normal(jr.key(0), (45, 6, 6, 3))
Y = jr.randint(jr.key(1), (45,), 0, 3)
VARIABLES = dict(jax.jit(MODEL.init)(jr.key(2), X))
# A unit that is never active: the first at the end of the first stage.
VARIABLES["params"]["BasicBlock_0"]["BatchNorm_1"]["bias"] = jnp.asarray([-1e3, 0.0, 0.0, 0.0])
PARAMS, STATS = VARIABLES["params"], {"batch_stats": VARIABLES["batch_stats"]}
FETCH = lambda key, idx: Batch(X[idx], Y[idx])
LOGITS, FEATURES = jax.jit(MODEL.apply)(VARIABLES, X)


def evaluation(batch, **options):
    return measure.make_evaluation(
        from_linen(MODEL), train.cross_entropy, FETCH, batch=batch, **options
    )


@pytest.mark.parametrize(("batch", "n"), [(8, 45), (45, 45), (64, 45), (8, 17)])
def test_means_are_exact_for_every_batch_size(batch, n):
    row = evaluation(batch)(jr.key(0), PARAMS, STATS, n)
    loss = train.cross_entropy(LOGITS, Y)[:n].mean()
    np.testing.assert_allclose(row["loss"], loss, rtol=1e-12)
    np.testing.assert_allclose(
        row["error"], np.mean(np.asarray(LOGITS.argmax(-1) != Y)[:n]), rtol=1e-12
    )
    assert list(row) == ["loss", "error"]


def test_sparsity_is_that_of_all_examples_at_once():
    sample = lambda block, phi: measure.sample_units(jr.key(7), phi, 30)
    distinct = lambda phi: measure.feature_sparsity(phi)[1]
    row = evaluation(8, sample=sample, distinct=distinct)(jr.key(0), PARAMS, STATS, 45)
    for block, phi in FEATURES.items():
        np.testing.assert_allclose(row[f"active/{block}"], np.mean(np.asarray(phi) > 0), rtol=1e-6)
        want = distinct(sample(block, phi))
        np.testing.assert_allclose(row[f"distinct/{block}"], want, rtol=1e-9)
        never = ~(np.asarray(phi) > 0).any(0)
        np.testing.assert_allclose(row[f"dead/{block}"], never.mean(), rtol=1e-6)
    # Else the line above has shown nothing.
    assert max(row[f"dead/{block}"] for block in FEATURES) == 0.25
    assert set(FEATURES) == {"block1", "block2"}


def test_devices_change_nothing():
    mesh = train.data_mesh()
    alone = evaluation(16)(jr.key(0), PARAMS, STATS, 45)
    spread = evaluation(16, shard=train.split_examples(mesh))(jr.key(0), PARAMS, STATS, 45)
    assert alone == pytest.approx(spread, rel=1e-9)


def test_moments_are_the_mean_of_the_batches_own():
    moments = measure.make_moments(from_linen(FORGETFUL), FETCH, batch=15)
    found = moments(jr.key(0), PARAMS, STATS, 45)["batch_stats"]["BatchNorm_0"]
    _, kept = MODEL.apply(
        VARIABLES, X, capture_intermediates=lambda m, _: m.name == "Conv_0", mutable=True
    )
    (first,) = kept["intermediates"]["Conv_0"]["__call__"]
    np.testing.assert_allclose(found["mean"], first.mean((0, 1, 2)), rtol=1e-9, atol=1e-12)
    within = np.mean([first[i : i + 15].var((0, 1, 2)) for i in (0, 15, 30)], axis=0)
    np.testing.assert_allclose(found["var"], within, rtol=1e-9)


def test_moments_forget_what_they_were():
    moments = measure.make_moments(from_linen(FORGETFUL), FETCH, batch=15)
    spoiled = jax.tree.map(lambda leaf: leaf + 100.0, STATS)
    a, b = (moments(jr.key(0), PARAMS, stats, 45) for stats in (STATS, spoiled))
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-12), a, b)
    assert moments(jr.key(0), PARAMS, {}, 45) == {}


def test_an_example_beyond_the_last_does_not_revive_a_unit():
    """The last batch is padded with copies of the last example: they must not count either."""
    sample = lambda block, phi: measure.sample_units(jr.key(7), phi, 30)
    few = evaluation(8, sample=sample)(jr.key(0), PARAMS, STATS, 3)
    never = ~(np.asarray(FEATURES["block1"][:3]) > 0).any(0)
    np.testing.assert_allclose(few["dead/block1"], never.mean(), rtol=1e-6)
    assert "distinct/block1" not in few


def test_moments_leave_other_variables_alone():
    moments = measure.make_moments(from_linen(FORGETFUL), FETCH, batch=15)
    key = {"dropout": {"key": jnp.arange(2, dtype=jnp.uint32)}}
    kept = moments(jr.key(0), PARAMS, {**STATS, **key}, 45)
    jax.tree.map(np.testing.assert_array_equal, kept["dropout"], key["dropout"])
    assert moments(jr.key(0), PARAMS, key, 45) == key
