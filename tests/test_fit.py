"""Laws of deep training: cuts, resumes and device counts change nothing; bad steps stop it."""

import functools
import logging

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax import train
from sgd_sparse_jax._types import Batch, TrainState
from sgd_sparse_jax.models import ResNet

MODEL = ResNet((1,), classes=4, width=4)
IMAGES = jr.normal(jr.key(3), (64, 8, 8, 3), jnp.float32)
LABELS = jr.randint(jr.key(4), (64,), 0, 4)
KEY = jr.key(1)
ORDER = train.reshuffled_epochs(64, 16)


def training(devices=1, lr=0.05, momentum=0.9, tau=0.9):
    """(fresh state, segment) of a small ResNet on random images; segments are compiled once."""
    mesh, fresh, segment = parts(devices, lr, momentum, tau)
    return train.replicate(fresh(jr.key(0)), mesh), segment


@functools.lru_cache
def parts(devices, lr, momentum, tau):
    mesh = train.data_mesh(jax.devices()[:devices])
    images, labels = train.replicate((IMAGES, LABELS), mesh)
    tx = optax.sgd(lr, momentum or None)
    step = train.make_step(MODEL, train.cross_entropy, tx, ema_decay=tau)

    def fetch(key, idx):
        noise = jr.normal(key, (len(idx), 1, 1, 3), jnp.float32)  # augmentation, by (key, step)
        return Batch(images[idx] + 0.1 * noise, labels[idx])

    segment = train.make_segment(step, fetch, shard=train.split_examples(mesh), unroll=1)
    fresh = lambda key: train.init_state(key, MODEL, tx, IMAGES[:1], averaged=True)
    return mesh, jax.jit(fresh), segment


def run(state, segment, num_steps, **options):
    defaults = {"eval_every": 4, "evaluate": lambda state: {}, "on_row": lambda row: None}
    return train.fit(KEY, state, ORDER, segment, num_steps=num_steps, **(defaults | options))


@pytest.fixture(scope="module")
def whole():
    rows = []
    return run(*training(), 10, on_row=rows.append), rows


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol=2e-3, atol=2e-5):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=rtol, atol=atol), a, b)


def test_rows_come_at_the_start_every_few_steps_and_at_the_end(whole):
    state, rows = whole
    assert [row["step"] for row in rows] == [0, 4, 8, 10] and int(state.step) == 10
    assert "window_loss" not in rows[0] and all(row["window_loss"] > 0 for row in rows[1:])


@pytest.mark.parametrize("cut", [3, 4, 9])
def test_a_run_cut_anywhere_goes_on_bit_for_bit(whole, cut, tmp_path):
    state, segment = training()
    rows = []
    with train.open_checkpoints(tmp_path) as checkpoints:
        save = lambda state: train.save(checkpoints, state)
        run(state, segment, cut, save=save, on_row=rows.append)
    with train.open_checkpoints(tmp_path) as checkpoints:
        fresh, segment = training()
        state = train.restore(checkpoints, jax.tree.map(jnp.zeros_like, fresh))
        assert int(state.step) == cut
        resumed = run(state, segment, 10, on_row=rows.append)
    assert_same(resumed, whole[0])
    steps = [row["step"] for row in rows]
    assert steps == sorted({0, *range(4, 11, 4), cut, 10})  # no row twice, none missing


def test_steps_per_call_and_records_change_nothing(whole):
    state = run(*training(), 10, eval_every=7, steps_per_call=3)
    assert_close(state, whole[0], rtol=1e-5, atol=1e-6)


def test_device_count_does_not_matter(whole):
    eight = run(*training(devices=8), 10)
    assert_close(eight, whole[0])


def test_gradients_are_not_multiplied_by_the_number_of_devices():
    after = []
    for devices in (1, 8):
        state, segment = training(devices, lr=1.0, momentum=0.0)
        before = jax.device_get(state.params)
        after.append(jax.tree.map(np.subtract, run(state, segment, 1).params, before))
    ratios = jax.tree.map(lambda a, b: np.linalg.norm(b) / np.linalg.norm(a), *after)
    assert_close(ratios, jax.tree.map(lambda _: 1.0, ratios), rtol=1e-3)


def test_each_length_is_traced_once():
    state, segment = training()
    traced = []

    def counted(key, state, indices):
        traced.append(len(indices))
        return segment(key, state, indices)

    run(state, counted, 10, steps_per_call=3)
    assert traced == [3, 1, 2]  # windows of 4, 4 and 2 steps


def test_the_moving_average_is_its_closed_form():
    steps = []
    on_row = lambda row: None
    evaluate = lambda state: steps.append(jax.device_get((state.params, state.average))) or {}
    run(*training(tau=0.8), 3, eval_every=1, evaluate=evaluate, on_row=on_row)
    expected = steps[0][0]
    for params, _ in steps[1:]:
        expected = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * p, expected, params)
    assert_close(steps[-1][1], expected, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path):
    state, segment = training()

    def poisoned(key, state, indices):
        state, losses = segment(key, state, indices)
        return state, jnp.where(state.step == 7, jnp.nan, losses)

    with train.open_checkpoints(tmp_path) as checkpoints:
        rows = []
        with pytest.raises(FloatingPointError, match=r"at step 6 .*steps 4 to 7\).* step 4 is the"):
            save = lambda state: train.save(checkpoints, state)
            run(state, poisoned, 10, save=save, on_row=rows.append)
        checkpoints.wait_until_finished()
        assert checkpoints.latest_step() == 4 and [row["step"] for row in rows] == [0, 4]


def saved(tmp_path, steps=(1, 2)):
    state, _ = training()
    with train.open_checkpoints(tmp_path) as checkpoints:
        for step in steps:
            train.save(checkpoints, state._replace(step=jnp.asarray(step, jnp.int32)))
    return state


def test_a_damaged_newest_state_falls_back_and_says_so(tmp_path, caplog):
    state = saved(tmp_path)
    for path in (tmp_path / "2").rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])
    with train.open_checkpoints(tmp_path) as checkpoints, caplog.at_level(logging.WARNING):
        assert int(train.restore(checkpoints, state).step) == 1
    assert "The state of step 2" in caplog.text and "going back" in caplog.text


def test_states_that_are_all_damaged_are_no_fresh_start(tmp_path):
    state = saved(tmp_path, steps=(1,))
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with (
        train.open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"No state under .* can be read"),
    ):
        train.restore(checkpoints, state)


def test_another_networks_state_is_refused(tmp_path):
    state = saved(tmp_path, steps=(1,))
    with train.open_checkpoints(tmp_path) as checkpoints:
        kernel = {"kernel": jnp.zeros((4, 5), jnp.float32)}
        wider = state._replace(params=state.params | {"Dense_0": state.params["Dense_0"] | kernel})
        with pytest.raises(ValueError, match=r"params/Dense_0/kernel is \(\(4, 4\).*\(\(4, 5\)"):
            train.restore(checkpoints, wider)
        double = state._replace(params=jax.tree.map(lambda p: p.astype(jnp.float64), state.params))
        with pytest.raises(ValueError, match=r"float32.* there and .*float64"):
            train.restore(checkpoints, double)


def test_a_step_is_not_saved_twice_in_silence(tmp_path):
    state = saved(tmp_path)
    with (
        train.open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"Step 1 isn't newer than .*step 2"),
    ):
        train.save(checkpoints, state._replace(step=jnp.asarray(1, jnp.int32)))


def test_a_state_moves_between_device_counts(tmp_path):
    saved(tmp_path)
    with train.open_checkpoints(tmp_path) as checkpoints:
        like, _ = training(devices=8)
        moved = train.restore(checkpoints, like)
    assert isinstance(moved, TrainState)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(moved)} == {8}
    assert_same(moved.params, like.params)


def test_a_batch_that_does_not_split_is_refused():
    shard = train.split_examples(train.data_mesh())
    with pytest.raises(ValueError, match="batch size 12 can't be split over 8 devices"):
        shard(jnp.zeros((3, 12), jnp.int32))
