"""Label noise: its law, its schedule, and what its draws may depend on."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax.data import (
    CIFAR10_CONFUSIONS,
    corrupt_labels,
    gaussian_label_noise,
    sparse_regression,
    uniform_label_noise,
)
from sgd_sparse_jax.models import DiagonalNet, from_linen
from sgd_sparse_jax.train import (
    Probe,
    cyclic,
    half_squared,
    init_state,
    make_objective,
    make_segment,
    make_step,
    piecewise_decay,
    record_run,
    with_replacement,
)
from sgd_sparse_jax.types import Batch

N, B, STEPS = 10, 3, 12
DATA = jax.tree.map(jnp.asarray, sparse_regression(3, n=N, d=12, support=2, n_test=4).train)
MODEL, TX = DiagonalNet(0.3), optax.sgd(0.05)
STEP = make_step(make_objective(from_linen(MODEL), half_squared), TX)
KEY = jr.key(7)
ORDER = with_replacement(N, B)
CONSTANT = optax.constant_schedule(0.4)
ROUNDING = 1e-14  # of a Gaussian's inverse error function, compiled inside a loop and outside


def fetch(key, idx):
    return Batch(DATA.x[idx], DATA.y[idx])


def fresh():
    return init_state(jr.key(5), from_linen(MODEL), TX, DATA.x)


def trained(noise, cuts=(STEPS,), compiled=jax.jit):
    """(state, losses) after STEPS steps, run in pieces of the given lengths."""
    segment = compiled(make_segment(STEP, fetch, noise=noise, unroll=1))
    state, losses = fresh(), []
    for length in cuts:
        indices = ORDER(jr.key(2), state.step, length)
        state, some = segment(KEY, state, indices)
        losses.append(some)
    return state, jnp.concatenate(losses)


def see(scale, fetch):
    """A segment whose losses are the labels that each step sees."""
    step = lambda state, batch: (state._replace(step=state.step + 1), batch.y)
    return jax.jit(make_segment(step, fetch, noise=gaussian_label_noise(scale), unroll=1))


def zeros(key, idx):
    return Batch(idx, jnp.zeros(len(idx)))


SEE = see(CONSTANT, zeros)


def draws(segment=SEE, cuts=(STEPS,), key=KEY):
    """What steps 0 … STEPS - 1 see [steps, b]: of `zeros`, the noise itself."""
    state, rows = fresh(), []
    for length in cuts:
        state, row = segment(key, state, jnp.zeros((length, B), jnp.int32))
        rows.append(row)
    return np.concatenate(rows)


def test_noise_of_scale_zero_is_no_noise_to_the_bit():
    zero = gaussian_label_noise(optax.constant_schedule(0.0))
    batch = Batch(DATA.x, DATA.y)
    jax.tree.map(np.testing.assert_array_equal, zero(KEY, jnp.int32(3), batch), batch)
    # Uncompiled, because a compiler that fuses the noise sums in an order of its own.
    one_by_one = lambda noise: trained(noise, (1,) * STEPS, compiled=lambda segment: segment)
    jax.tree.map(np.testing.assert_array_equal, one_by_one(zero), one_by_one(None))


def test_noise_is_centred_with_the_variance_asked_for_and_independent_between_labels():
    keys, labels, scale = 20_000, 4, 0.3
    batch = Batch(jnp.ones((labels, 2)), jnp.arange(4.0))
    noise = gaussian_label_noise(optax.constant_schedule(scale))
    one = lambda key: noise(key, jnp.int32(0), batch)
    noisy = jax.vmap(one)(jr.split(jr.key(0), keys))
    np.testing.assert_array_equal(noisy.x, jnp.broadcast_to(batch.x[None], (keys, labels, 2)))
    standard = (np.asarray(noisy.y) - np.arange(4.0)) / scale
    # Five standard errors of a mean, of a variance and of a covariance of unit Gaussians.
    assert np.abs(standard.mean(0)).max() < 5 / np.sqrt(keys)
    covariance = standard.T @ standard / keys
    bound = 5 * np.sqrt((1 + np.eye(labels)) / keys)
    assert (np.abs(covariance - np.eye(labels)) < bound).all()
    fourth = (standard**4).mean()  # 3 for a Gaussian, with variance 96 of one draw
    assert abs(fourth - 3) < 5 * np.sqrt(96 / standard.size)


def test_noise_has_the_shape_and_precision_of_the_labels():
    batch = Batch(jnp.ones((5, 2), jnp.float32), jnp.zeros((5, 3), jnp.float32))
    noisy = gaussian_label_noise(CONSTANT)(KEY, jnp.int32(0), batch)
    assert noisy.y.shape == (5, 3) and noisy.y.dtype == jnp.float32
    assert len(np.unique(noisy.y)) == 15


def test_a_decay_divides_the_noise_from_its_boundary_on():
    decayed = draws(see(piecewise_decay(CONSTANT, [4, 9], [2.0, 5.0]), zeros))
    expected = np.array([1.0] * 4 + [2.0] * 5 + [10.0] * 3)
    np.testing.assert_allclose(draws() / decayed, expected[:, None] * np.ones(B), ROUNDING)


def test_noise_is_drawn_anew_at_every_step_and_for_every_key():
    once, other = draws(), draws(key=jr.key(8))
    assert len(np.unique(np.stack([once, other]))) == 2 * STEPS * B
    np.testing.assert_array_equal(draws(), once)


def test_the_noise_of_a_step_depends_on_nothing_but_its_number_and_the_key():
    once, row = draws(), jnp.zeros((1, B), jnp.int32)
    for k in (0, 5, 11):
        late = fresh()._replace(step=jnp.int32(k))
        np.testing.assert_allclose(SEE(KEY, late, row)[1][0], once[k], rtol=ROUNDING)


@pytest.mark.parametrize("cuts", [(1,) * STEPS, (5, 1, 6), (11, 1)])
def test_a_run_cut_anywhere_sees_the_same_noise(cuts):
    np.testing.assert_allclose(draws(cuts=cuts), draws(), rtol=ROUNDING)


def test_a_run_cut_before_and_after_its_noise_decays_goes_on():
    noise = gaussian_label_noise(piecewise_decay(CONSTANT, [7], [3.0]))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15)
    jax.tree.map(close, trained(noise, (5, 2, 5)), trained(noise))


def test_records_change_no_noise():
    steps = 70  # more than a window of indices

    def note(state, batch):
        notes = state.params.at[state.step].set(batch.y)
        return state._replace(step=state.step + 1, params=notes), jnp.float64(0)

    segment = make_segment(note, zeros, noise=gaussian_label_noise(CONSTANT), unroll=1)

    def seen(key, at):
        start = fresh()._replace(params=jnp.zeros((steps, B)))
        gauges = [Probe(lambda state: state.step, at)]
        return record_run(key, cyclic(N, B), segment, start, gauges, steps)[0].params

    rare = jax.jit(partial(seen, at=[0]))
    often = jax.jit(partial(seen, at=[0, 1, 5, 63, 66]))(KEY)
    np.testing.assert_allclose(often, rare(KEY), rtol=ROUNDING)
    assert len(np.unique(np.stack([often, rare(jr.key(9))]))) == 2 * steps * B


def test_noise_is_not_the_draw_of_the_augmentation():
    augmented = lambda key, idx: Batch(idx, -jr.normal(key, (len(idx),)))
    # Were both drawn from one key, they would cancel.
    left = draws(see(optax.constant_schedule(1.0), augmented))
    assert np.abs(left).min() > 1e-6


def test_a_vmapped_scale_is_the_loop_over_scales():
    def run(scale):
        noise = gaussian_label_noise(piecewise_decay(lambda step: scale, [7], [3.0]))
        return trained(noise)

    scales, one = jnp.array([0.0, 0.2, 0.5]), jax.jit(run)
    rows = jax.device_get([one(scale) for scale in scales])
    looped = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)
    jax.tree.map(close, jax.jit(jax.vmap(run))(scales), looped)
    assert np.abs(np.diff(looped[0].params["v"], axis=0)).max(1).min() > 1e-3


def redrawn(share, step=0, n=20_000, classes=10):
    labels = jnp.arange(n) % classes
    noise = uniform_label_noise(share, classes)
    batch = Batch(jnp.zeros(n), labels)
    return labels, noise(KEY, jnp.asarray(step), batch).y


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_share_of_the_labels_is_drawn_anew_among_all_classes(share):
    labels, noisy = redrawn(optax.constant_schedule(share))
    assert noisy.dtype == labels.dtype
    np.testing.assert_allclose((noisy != labels).mean(), 0.9 * share, atol=0.012)
    if share == 1:
        counts = np.bincount(np.asarray(noisy), minlength=10)
        np.testing.assert_allclose(counts / len(noisy), 0.1, atol=0.01)


def test_redrawn_labels_follow_the_schedule_and_the_key():
    schedule = lambda step: jnp.where(step < 5, 0.5, 0.0)
    labels, before = redrawn(schedule, step=4)
    assert (before != labels).any() and (redrawn(schedule, step=5)[1] == labels).all()
    np.testing.assert_array_equal(before, redrawn(schedule, step=4)[1])


LABELS = (np.arange(1000) % 10).astype(np.int32)


@pytest.mark.parametrize("share", [0.0, 0.137, 0.5, 1.0])
def test_exactly_the_share_of_labels_is_wrong_and_spread_over_the_others(share):
    wrong = corrupt_labels(LABELS, share, 10, seed=3)
    assert (wrong != LABELS).sum() == int(share * 1000)
    assert wrong.dtype == np.int32 and set(wrong) <= set(range(10))
    if share == 1:
        assert len(set((wrong - LABELS) % 10)) == 9
    np.testing.assert_array_equal(wrong, corrupt_labels(LABELS, share, 10, seed=3))


def test_confusions_change_their_classes_alone():
    wrong = corrupt_labels(LABELS, 1.0, 10, 0, CIFAR10_CONFUSIONS)
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    became = {names[a]: names[b] for a, b in set(zip(LABELS.tolist(), wrong.tolist(), strict=True))}
    assert became == dict(zip(names, names, strict=True)) | {
        "truck": "automobile",
        "bird": "airplane",
        "cat": "dog",
        "dog": "cat",
        "deer": "horse",
    }
    hit = corrupt_labels(LABELS, 0.3, 10, 0, CIFAR10_CONFUSIONS) != LABELS
    sym = corrupt_labels(LABELS, 0.3, 10, 0) != LABELS
    assert 0 < hit.sum() < sym.sum() and (hit <= sym).all()  # the same examples are chosen


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_1_is_refused(share):
    with pytest.raises(ValueError, match=r"share of wrong labels is .*; choose one in \[0, 1\]"):
        corrupt_labels(LABELS, share, 10, 0)
    with pytest.raises(ValueError, match="no label can be made wrong"):
        corrupt_labels(LABELS * 0, 0.5, 1, 0)
