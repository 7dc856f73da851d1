from functools import cache

import jax
import jax.random as jr
import numpy as np
import pytest

from sgd_sparse_jax import train

pytestmark = pytest.mark.usefixtures("quick_compilation")
N, B, EPOCH, STEPS = 13, 3, 4, 200  # an epoch leaves one example out
NAMES = ["with_replacement", "without_replacement", "reshuffled_epochs", "shuffled_once", "cyclic"]
MAKERS = {name: getattr(train, name) for name in NAMES}


@cache
def stream(name):
    """The compiled sampler, and its first steps for two keys, drawn one by one."""
    sample = jax.jit(MAKERS[name](N, B), static_argnums=2)
    draw = lambda key: np.concatenate([sample(key, step, 1) for step in range(STEPS)])
    return sample, draw(jr.key(0)), draw(jr.key(1))


@pytest.mark.parametrize("name", MAKERS)
def test_a_window_is_a_part_of_the_whole_stream(name):
    sample, whole, _ = stream(name)
    for start in (0, 1, 3, 63, 64, 130):
        np.testing.assert_array_equal(sample(jr.key(0), start, 66), whole[start : start + 66])


@pytest.mark.parametrize("name", MAKERS)
def test_indices_are_in_range_and_determined_by_the_key(name):
    _, whole, other = stream(name)
    assert whole.shape == (STEPS, B) and set(whole.ravel()) <= set(range(N))
    if name != "with_replacement":
        assert all(len(set(row)) == B for row in whole)
    assert (whole != other).any() == (name != "cyclic")


@pytest.mark.parametrize("name", list(MAKERS)[2:])
def test_an_epoch_visits_every_example_once_but_for_the_remainder(name):
    _, whole, _ = stream(name)
    epochs = whole.reshape(-1, EPOCH * B)
    assert all(len(set(epoch)) == EPOCH * B for epoch in epochs)
    again = (epochs[1:] == epochs[0]).all(1)
    assert not again.any() if name == "reshuffled_epochs" else again.all()
    assert (epochs[0] == np.arange(EPOCH * B)).all() == (name == "cyclic")


def test_draws_with_replacement_are_uniform_and_independent_of_the_step_before():
    rows = np.asarray(train.with_replacement(5, 1)(jr.key(0), 0, 50_000))[:, 0]
    pairs = np.bincount(5 * rows[:-1] + rows[1:], minlength=25) / len(rows)
    np.testing.assert_allclose(pairs, 1 / 25, atol=5 * np.sqrt(1 / 25 / len(rows)))


@pytest.mark.parametrize("name", ["without_replacement", "reshuffled_epochs"])
def test_fresh_subsets_contain_every_example_equally_often(name):
    assert len({tuple(row) for row in stream(name)[1]}) > 170  # of 200, of some 2,000 batches
    counts = np.bincount(np.concatenate(stream(name)[1:]).ravel(), minlength=N)
    np.testing.assert_allclose(counts / counts.sum(), 1 / N, atol=5 * np.sqrt(1 / N / counts.sum()))


@pytest.mark.parametrize("name", list(MAKERS)[1:])
def test_a_batch_larger_than_the_set_or_empty_is_refused(name):
    for batch in (0, N + 1):
        with pytest.raises(ValueError):
            MAKERS[name](N, batch)
