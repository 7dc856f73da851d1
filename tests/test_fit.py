"""Laws of deep training: cuts, resumes and device counts change nothing; bad steps stop it."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax import train
from sgd_sparse_jax.models import Layers, ResNet, from_linen
from sgd_sparse_jax.types import Batch

MODEL = ResNet((1,), classes=4, layers=Layers(), width=4)
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
    step = train.make_step(
        train.make_objective(from_linen(MODEL), train.cross_entropy), tx, ema_decay=tau
    )

    def fetch(key, idx):
        noise = jr.normal(key, (len(idx), 1, 1, 3), jnp.float32)  # augmentation, by (key, step)
        return Batch(images[idx] + 0.1 * noise, labels[idx])

    segment = train.make_segment(step, fetch, shard=train.split_examples(mesh), unroll=1)
    fresh = lambda key: train.init_state(key, from_linen(MODEL), tx, IMAGES[:1], averaged=True)
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
        save = lambda state, window: train.save(checkpoints, state)
        run(state, segment, cut, save=save, on_row=rows.append)
    with train.open_checkpoints(tmp_path) as checkpoints:
        fresh, segment = training()
        state, _ = train.restore(checkpoints, jax.tree.map(jnp.zeros_like, fresh))
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
    assert sorted(traced) == [
        1,
        3,
    ]  # windows of 4, 4 and 2 steps: what isn't a whole call goes singly


def test_a_run_on_many_devices_is_compiled_once_and_stays_replicated():
    """A state that came back with another layout than it went in would compile the step anew."""
    state, segment = training(devices=8)
    advance = jax.jit(segment)
    for idx in ORDER(KEY, 0, 3):
        state, _ = advance(KEY, state, idx[None])
    assert advance._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("steps_per_call", [1, 3, 4])
def test_calls_cover_a_window_once_and_are_told(steps_per_call):
    state, segment = training()
    seen, told = [], []

    def noted(key, state, indices):
        jax.debug.callback(lambda idx: seen.extend(np.asarray(idx).tolist()), indices)
        return segment(key, state, indices)

    run(state, noted, 10, steps_per_call=steps_per_call, on_call=told.append)
    jax.effects_barrier()
    assert sorted(map(tuple, seen)) == sorted(map(tuple, ORDER(jr.split(KEY)[0], 0, 10).tolist()))
    assert told[-1] == 10 and told == sorted(set(told))


def test_a_run_killed_before_its_first_save_starts_again(tmp_path):
    state, segment = training()

    def killed(*args):
        raise KeyboardInterrupt

    rows = []
    with train.open_checkpoints(tmp_path) as checkpoints:
        save = lambda state, window: train.save(checkpoints, state)
        with pytest.raises(KeyboardInterrupt):
            run(state, killed, 10, save=save, on_row=rows.append)
        assert [row["step"] for row in rows] == [0] and not checkpoints.all_steps()
        state, _ = train.restore(checkpoints, training()[0])
        run(state, segment, 4, save=save)
        assert checkpoints.all_steps() == [4]


def test_saved_states_are_untouched_by_the_steps_that_follow(tmp_path):
    """A save goes on in the background while its buffers are donated to the next step."""
    kept = {}

    def save(state, window):
        kept[int(state.step)] = jax.tree.map(lambda x: np.array(x, copy=True), state)
        train.save(checkpoints, state)

    import orbax.checkpoint as ocp

    with train.open_checkpoints(tmp_path, keep=9) as checkpoints:
        run(*training(), 6, eval_every=1, save=save)
    for step in (1, 4):
        saved = ocp.StandardCheckpointer().restore(tmp_path / str(step) / "default")
        assert_same(jax.tree.leaves(saved["params"]), jax.tree.leaves(kept[step].params))


def test_a_run_goes_on_past_the_step_whose_state_was_damaged(whole, tmp_path):
    with train.open_checkpoints(tmp_path) as checkpoints:
        run(*training(), 8, save=lambda state, window: train.save(checkpoints, state))
    for path in (tmp_path / "8" / "default").glob("_*"):
        path.write_bytes(b"")
    with train.open_checkpoints(tmp_path) as checkpoints:
        fresh, segment = training()
        state, _ = train.restore(checkpoints, fresh)
        assert int(state.step) == 4
        ended = run(state, segment, 10, save=lambda state, window: train.save(checkpoints, state))
    assert_same(ended, whole[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "8", "damaged-8"]


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
        words = (
            r"nan at step 6 \(the last finite loss is [\d.]+; window of steps 4 to 7\).* step 4 is"
        )
        with pytest.raises(FloatingPointError, match=words):
            save = lambda state, window: train.save(checkpoints, state)
            run(state, poisoned, 10, save=save, on_row=rows.append)
        checkpoints.wait_until_finished()
        assert checkpoints.latest_step() == 4 and [row["step"] for row in rows] == [0, 4]


@pytest.mark.parametrize("field", ["params", "stats", "average"])
def test_a_state_spoiled_by_the_last_step_of_a_window_is_not_saved(field):
    """The loss is that before the step: all of a window's can be finite, and its state not."""
    state, segment = training()

    def poisoned(key, state, indices):
        state, losses = segment(key, state, indices)
        worse = jax.tree.map(
            lambda x: jnp.where(state.step == 8, jnp.inf, x), getattr(state, field)
        )
        return state._replace(**{field: worse}), losses

    kept, rows = [], []
    with pytest.raises(
        FloatingPointError, match=r"state after step 7 isn't .*loss is [\d.]+;.* 4 is"
    ):
        run(state, poisoned, 10, save=lambda s, w: kept.append(int(s.step)), on_row=rows.append)
    assert kept == [4] and [row["step"] for row in rows] == [0, 4]


def test_the_last_finite_loss_is_that_of_the_window_before():
    state, segment = training()

    def poisoned(key, state, indices):
        state, losses = segment(key, state, indices)
        return state, jnp.where(state.step == 5, jnp.inf, losses)

    with pytest.raises(
        FloatingPointError, match=r"inf at step 4 \(the last finite loss is [\d.]+;"
    ):
        run(state, poisoned, 10)


@pytest.mark.parametrize(
    ("step", "cure"), [(1, "no step is to blame, look at data and weights"), (2, "lower the step")]
)
def test_no_step_is_blamed_for_a_loss_that_none_has_changed(step, cure):
    state, segment = training()

    def poisoned(key, state, indices):
        state, losses = segment(key, state, indices)
        return state, jnp.where(state.step == step, jnp.nan, losses)

    with pytest.raises(FloatingPointError, match=rf"nan at step {step - 1} .*; {cure}"):
        run(state, poisoned, 10)


@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_states_are_kept_between_rows_and_change_nothing(whole, steps_per_call):
    kept, rows = {}, []
    keep = lambda state: kept.setdefault(int(state.step), jax.device_get(state.params))
    state = run(*training(), 10, keep_every=3, keep=keep, on_row=rows.append)
    assert list(kept) == [3, 6, 9] and [row["step"] for row in rows] == [0, 4, 8, 10]
    assert_same(state, whole[0])
    again = {}
    run(*training(), 6, keep_every=6, keep=lambda s: again.update({6: jax.device_get(s.params)}))
    assert_same(kept[6], again[6])


def test_steps_are_timed_without_their_compilation(whole):
    import time

    naps = iter([0.5] + [0.0] * 100)

    def slow_to_compile(key, state, rows):  # as jit is at the first call of a shape
        time.sleep(next(naps))
        return state._replace(step=state.step + len(rows)), jnp.zeros(len(rows))

    from sgd_sparse_jax.train.fit import _Timed

    timed = _Timed(slow_to_compile)
    for _ in range(3):
        timed(KEY, training()[0], np.zeros((2, 4)))
    assert 0.5 <= timed.compiling < 1
    assert all(0 < row["step_seconds"] < 10 for row in whole[1][1:])


def test_no_call_crosses_a_step_to_keep():
    from sgd_sparse_jax.train.fit import _calls

    for start, length, per_call, every in [
        (0, 10, 4, 6),
        (7, 20, 4, 6),
        (0, 9, 5, 0),
        (3, 3, 1, 2),
    ]:
        calls = list(_calls(np.arange(length)[:, None], per_call, start, every))
        np.testing.assert_array_equal(np.concatenate(calls)[:, 0], np.arange(length))
        assert {len(call) for call in calls} <= {1, per_call}
        ends = start + np.cumsum([len(call) for call in calls])
        for k in range(start + 1, start + length + 1) if every else ():
            assert k % every or k in ends


def asking(pauses):
    """A `pause` that answers in turn, and NO from there on."""
    answers = iter(pauses)
    return lambda: next(answers, train.Pause.NO)


NO, SAVE, STOP = train.Pause.NO, train.Pause.SAVE, train.Pause.STOP


@pytest.mark.parametrize("last", [1, 2, 3, 4, 5, 9])
def test_a_run_stopped_between_rows_goes_on_with_its_rows_unchanged(whole, last, tmp_path):
    """Bit for bit, the mean loss of the window that was cut included."""
    rows = []
    with train.open_checkpoints(tmp_path) as checkpoints:
        save = lambda state, window: train.save(checkpoints, state, None, window._asdict())
        options = {"save": save, "on_row": rows.append}
        stopped = run(*training(), 10, pause=asking([NO] * (last - 1) + [STOP]), **options)
        assert int(stopped.step) == last and checkpoints.latest_step() == last
    with train.open_checkpoints(tmp_path) as checkpoints:
        fresh, segment = training()
        state, window = train.restore(checkpoints, fresh)
        assert window["steps"] == last % 4
        save = lambda state, window: train.save(checkpoints, state, None, window._asdict())
        options = {"save": save, "on_row": rows.append}
        resumed = run(state, segment, 10, window=train.Window(**window), **options)
    assert_same(resumed, whole[0])
    untimed = lambda row: {k: v for k, v in row.items() if k != "step_seconds"}
    assert list(map(untimed, rows)) == list(map(untimed, whole[1]))


def test_saves_between_rows_change_nothing(whole):
    saved, rows = [], []
    save = lambda state, window: saved.append((int(state.step), window.steps))
    state = run(*training(), 10, pause=lambda: SAVE, save=save, on_row=rows.append)
    assert saved == [(k, k % 4 if k < 10 else 0) for k in range(1, 11)]
    assert_same(state, whole[0])
    assert [row.get("window_loss") for row in rows] == [r.get("window_loss") for r in whole[1]]


def test_a_run_that_begins_at_a_later_step_has_a_row_there(whole):
    half, rows = run(*training(), 6), []
    run(half, training()[1], 10, start=6, on_row=rows.append)
    assert [row["step"] for row in rows] == [6, 8, 10]


def test_no_transfer_happens_in_silence(whole):
    """Under the guard every copy between host and device has to be an explicit one."""
    state, segment = training(devices=8)
    with jax.transfer_guard("disallow"):
        guarded = run(state, segment, 10, steps_per_call=2)
    assert_close(guarded, whole[0])


def test_the_host_is_never_more_than_a_few_calls_ahead(monkeypatch):
    """Else a signal would have to wait for a whole window."""
    import sys

    module = sys.modules["sgd_sparse_jax.train.fit"]
    waited, ahead = [], []

    class Loss:
        def __init__(self, step):
            self.step = step

        def block_until_ready(self):
            waited.append(self.step)

    class Advance:
        compiling = 0.0

        def __init__(self, segment):
            self.calls = 0

        def __call__(self, key, state, rows):
            ahead.append(self.calls - len(waited))
            self.calls += 1
            return state._replace(step=state.step + 1), Loss(self.calls - 1)

    monkeypatch.setattr(module, "IN_FLIGHT", 3)
    monkeypatch.setattr(module, "_Timed", Advance)
    monkeypatch.setattr(jax, "device_get", lambda x: np.zeros((9, 1)) if isinstance(x, list) else x)
    monkeypatch.setattr(module, "_is_finite", lambda state: True)
    monkeypatch.setattr(module, "_calls", lambda *_: np.zeros((9, 1, 1), int))
    run(*training(), 9, eval_every=9)
    assert waited == [0, 1, 2, 3, 4, 5] and max(ahead) == 3
