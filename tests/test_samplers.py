import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sgd_sparse_jax.train import samplers

KEY = jr.key(0)
MAKERS = [
    samplers.with_replacement,
    samplers.without_replacement,
    samplers.reshuffled_epochs,
    samplers.shuffled_once,
    samplers.cyclic,
]


@pytest.mark.parametrize("make", MAKERS)
def test_a_window_is_a_part_of_the_whole_stream(make):
    sample = make(13, 3)
    whole = sample(KEY, 0, 200)
    for num_steps in (1, 2, 66):
        window = jax.jit(lambda start, num_steps=num_steps: sample(KEY, start, num_steps))
        for start in (0, 1, 3, 63, 64, 130):
            expected = whole[start : start + num_steps]
            np.testing.assert_array_equal(window(jnp.asarray(start)), expected)


@pytest.mark.parametrize("make", MAKERS[1:])
def test_a_batch_has_no_example_twice(make):
    rows = np.asarray(make(13, 5)(KEY, 0, 200))
    assert all(len(set(row)) == 5 for row in rows) and rows.min() >= 0 and rows.max() < 13


@pytest.mark.parametrize("make", MAKERS[2:])
def test_an_epoch_visits_everything_once(make):
    rows = np.asarray(make(12, 3)(KEY, 2, 30))
    for epoch in range(6):
        assert sorted(rows[2 + 4 * epoch : 6 + 4 * epoch].ravel()) == list(range(12))


def test_epochs_are_reshuffled_or_not():
    fresh = np.asarray(samplers.reshuffled_epochs(12, 3)(KEY, 0, 8))
    assert (fresh[:4] != fresh[4:]).any()
    once = np.asarray(samplers.shuffled_once(12, 3)(KEY, 0, 8))
    np.testing.assert_array_equal(once[:4], once[4:])
    assert (once.ravel()[:12] != np.arange(12)).any()


def test_draws_with_replacement_are_uniform_and_independent_of_the_step_before():
    rows = np.asarray(samplers.with_replacement(5, 1)(KEY, 0, 50_000))[:, 0]
    pairs = np.bincount(5 * rows[:-1] + rows[1:], minlength=25) / len(rows)
    np.testing.assert_allclose(pairs, 1 / 25, atol=5 * np.sqrt(1 / 25 / len(rows)))


def test_fresh_subsets_contain_every_example_equally_often():
    rows = np.asarray(samplers.without_replacement(7, 3)(KEY, 0, 20_000))
    np.testing.assert_allclose(np.bincount(rows.ravel()) / 20_000, 3 / 7, atol=0.02)


def test_full_batch_and_recorded_streams():
    np.testing.assert_array_equal(samplers.full_batch(4)(KEY, 7, 3), np.tile(np.arange(4), (3, 1)))
    stream = jnp.arange(10)[:, None]
    rows = samplers.recorded(stream)(KEY, 8, 4)
    np.testing.assert_array_equal(rows[:, 0], [8, 9, 9, 9])


@pytest.mark.parametrize("make", MAKERS)
def test_other_keys_give_other_streams(make):
    if make is not samplers.cyclic:
        a, b = make(50, 3)(KEY, 0, 20), make(50, 3)(jr.key(1), 0, 20)
        assert (np.asarray(a) != np.asarray(b)).any()


@pytest.mark.parametrize("make", MAKERS[1:])
def test_a_batch_larger_than_the_set_is_refused(make):
    with pytest.raises(ValueError, match="batch size is 5; choose one between 1 and the 4"):
        make(4, 5)
    with pytest.raises(ValueError, match="batch size is 0"):
        make(4, 0)
