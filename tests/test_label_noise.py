"""Label noise: distribution, schedule, and dependence on key and step only."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from scipy import stats

from sgd_sparse_jax import data
from sgd_sparse_jax.train import make_segment, piecewise_decay
from sgd_sparse_jax.types import Batch, TrainState

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, STEPS, KEY = 3, 12, jr.key(7)
CONSTANT = optax.constant_schedule(0.4)
ROUNDING = 1e-14  # of a Gaussian's inverse error function, compiled inside a loop and outside
LABELS = (np.arange(1000) % 10).astype(np.int32)


def segment_of(scale):
    """A compiled segment whose losses are the noise of its steps."""
    step = lambda state, batch: (state._replace(step=state.step + 1), batch.y)
    fetch = lambda key, idx: Batch(idx, jnp.zeros(len(idx)))
    return jax.jit(make_segment(step, fetch, noise=data.gaussian_label_noise(scale), unroll=1))


def seen(segment, cuts=(STEPS,), key=KEY, start=0):
    """Noise [steps, b] of a run in several segments."""
    state, rows = TrainState(jnp.int32(start), {}, {}, (), ()), []
    for length in cuts:
        state, labels = segment(key, state, jnp.zeros((length, B), jnp.int32))
        rows.append(labels)
    return np.concatenate(rows)


def test_noise_is_gaussian_with_its_scale_and_inputs_are_untouched():
    scale, batch = 0.3, Batch(jnp.ones((80_000, 2)), jnp.arange(80_000.0))
    noisy = data.gaussian_label_noise(lambda step: scale)(KEY, jnp.int32(0), batch)
    np.testing.assert_array_equal(noisy.x, batch.x)
    standard = (np.asarray(noisy.y) - np.arange(80_000.0)) / scale
    assert stats.kstest(standard, "norm").statistic < 1.95 / standard.size**0.5
    assert abs(np.corrcoef(standard[1:], standard[:-1])[0, 1]) < 5 / standard.size**0.5


def test_noise_follows_its_schedule_the_key_and_the_step_alone():
    constant = segment_of(CONSTANT)
    plain = seen(constant)
    assert len(np.unique(np.stack([plain, seen(constant, key=jr.key(8))]))) == 2 * STEPS * B
    np.testing.assert_allclose(seen(constant, (6, 6)), plain, rtol=ROUNDING)
    np.testing.assert_allclose(seen(constant, (6,), start=6), plain[6:], rtol=ROUNDING)
    decayed = seen(segment_of(piecewise_decay(CONSTANT, [4, 9], [2.0, 5.0])), (6, 6))
    factors = np.array([1.0] * 4 + [2.0] * 5 + [10.0] * 3)[:, None]
    np.testing.assert_allclose(plain / decayed, factors * np.ones(B), ROUNDING)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_a_share_of_the_labels_is_drawn_again_among_all_classes(share):
    labels = jnp.arange(20_000) % 10
    noise = data.uniform_label_noise(lambda step: jnp.where(step < 5, share, 0.0), 10)
    before, after = (noise(KEY, jnp.int32(step), Batch(labels, labels)).y for step in (4, 5))
    assert before.dtype == labels.dtype and (after == labels).all()
    np.testing.assert_allclose((before != labels).mean(), 0.9 * share, atol=0.012)
    counts = np.bincount(np.asarray(before), minlength=10)
    np.testing.assert_allclose(counts / len(before), 0.1, atol=0.01)


@pytest.mark.parametrize("share", [0.0, 0.137, 0.29, 1.0])
def test_exactly_the_share_of_labels_is_wrong_and_spread_over_the_others(share):
    wrong = data.corrupt_labels(LABELS, share, 10, seed=3)
    assert (wrong != LABELS).sum() == round(share * 1000)
    assert wrong.dtype == np.int32 and set(wrong) <= set(range(10))
    if share == 1:
        assert len(set((wrong - LABELS) % 10)) == 9
    np.testing.assert_array_equal(wrong, data.corrupt_labels(LABELS, share, 10, seed=3))


def test_confusions_change_their_classes_alone():
    confusions = data.confusions("cifar10_gs")
    wrong = data.corrupt_labels(LABELS, 1.0, 10, 0, confusions)
    names = data.IMAGE_SETS["cifar10"].class_names
    became = {names[a]: names[b] for a, b in zip(LABELS, wrong, strict=True)}
    pairs = ["truck", "automobile", "bird", "airplane", "cat", "dog", "dog", "cat", "deer", "horse"]
    confused = dict(zip(pairs[::2], pairs[1::2], strict=True))
    assert became == {name: confused.get(name, name) for name in names}
    hit = data.corrupt_labels(LABELS, 0.3, 10, 0, confusions) != LABELS
    uniform = data.corrupt_labels(LABELS, 0.3, 10, 0) != LABELS
    assert 0 < hit.sum() < uniform.sum() and (hit <= uniform).all()  # the same examples are chosen
    for name, classes in (("cifar100", 100), ("svhn", 10)):
        assert data.confusions(name) == {c: (c + 1) % classes for c in range(classes)}


def test_a_share_is_the_whole_part_of_the_decimal_number_as_written():
    for share, count in ((0.29, 14_500), (0.57, 28_500), (1.0, 50_000), (0.0, 0), (2e-5, 1)):
        assert data.share_of(50_000, share) == data.share_of(50_000, np.float64(share)) == count
    assert data.share_of(64, 0.2) == 12
    for share in (-0.1, 1.1, float("nan"), float("inf"), 1e-6):
        with pytest.raises(ValueError, match="--frac"):
            data.share_of(50_000, share, "--frac")
