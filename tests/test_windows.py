"""Laws of training in windows: stops, calls and callbacks do not change a run; NaN ends it."""

import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax import train
from sgd_sparse_jax.train.windows import IN_FLIGHT
from sgd_sparse_jax.types import Batch, TrainState

pytestmark = pytest.mark.usefixtures("quick_compilation")
X = jr.normal(jr.key(3), (64, 5))
Y = jr.normal(jr.key(4), (64,))
KEY = jr.key(1)
ORDER = train.cyclic(64, 16)


def objective(params, stats, batch):
    """Least squares with a statistic that training updates."""
    loss = train.half_squared(batch.x @ params, batch.y).mean()
    return loss, {"mean": 0.9 * stats["mean"] + 0.1 * batch.x.mean(0)}


TX = optax.sgd(0.05, 0.9)
STEP = train.make_step(objective, TX, ema_decay=0.9)


def fetch(key, idx):
    return Batch(X[idx] + 0.1 * jr.normal(key, (len(idx), 5)), Y[idx])


SEGMENT = train.make_segment(STEP, fetch, unroll=1)


def fresh():
    params = jnp.zeros(5)
    stats = {"mean": jnp.zeros(5)}
    return TrainState(jnp.array(0), params, stats, TX.init(params), params.copy())


def run(state, stops, segment=SEGMENT, **options):
    """Windows with copies of their states."""
    for window in train.windows(KEY, state, ORDER, segment, stops, **options):
        yield window._replace(state=jax.device_get(window.state))


@pytest.fixture(scope="module")
def whole():
    """One window of ten steps."""
    (window,) = run(fresh(), [10])
    return window


def test_a_window_is_the_plain_loop_over_its_steps():
    """Sampler and segment get one half of the key each, as in earlier versions."""
    order, noise = jr.split(KEY)
    random = train.with_replacement(64, 16)
    (window,) = train.windows(KEY, fresh(), random, SEGMENT, [10])
    state, expected = jax.jit(SEGMENT)(noise, fresh(), random(order, 0, 10))
    assert window.step == 10 and window.losses.dtype == np.float64
    assert_close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12)
    jax.tree.map(assert_close, (window.state, window.losses), (state, expected))


@pytest.mark.parametrize(
    ("stops", "interrupt", "cuts"),
    [
        ([10, 3, 3, 9, 0], lambda step: False, [3, 9, 10]),
        ([4, 10], lambda step: step in (1, 7, 10), [1, 4, 7, 10]),
    ],
)
def test_cuts_change_nothing(whole, stops, interrupt, cuts):
    windows = list(run(fresh(), stops, interrupt=interrupt))
    assert [window.step for window in windows] == cuts
    assert [len(window.losses) for window in windows] == np.diff([0, *cuts]).tolist()
    jax.tree.map(np.testing.assert_array_equal, windows[-1].state, whole.state)
    np.testing.assert_array_equal(np.concatenate([w.losses for w in windows]), whole.losses)


@pytest.mark.parametrize("steps_per_call", [3, 11])
def test_calls_of_many_steps_change_nothing_and_compile_two_programs(whole, steps_per_call):
    traced, reached = [], []

    def counted(key, state, indices):
        traced.append(len(indices))
        return SEGMENT(key, state, indices)

    options = {"steps_per_call": steps_per_call, "on_call": reached.append}
    windows = list(run(fresh(), [5, 7, 10], counted, **options))
    np.testing.assert_allclose(np.concatenate([w.losses for w in windows]), whole.losses, 1e-12)
    assert len(traced) == len(set(traced)) and set(traced) <= {1, steps_per_call}
    assert reached == sorted(set(reached)) and {5, 7, 10} <= set(reached)


def test_at_most_a_few_calls_are_dispatched_ahead():
    """A step is done when its callback has run, on which its loss depends."""
    done = []

    def slow(key, state, indices):
        state, loss = SEGMENT(key, state, indices)
        step = jax.pure_callback(lambda s: done.append(int(s)) or s, state.step, state.step)
        return state._replace(step=step), loss + 0 * step

    ahead = []
    list(run(fresh(), [40], slow, on_call=lambda step: ahead.append(step - len(done))))
    assert max(ahead) <= IN_FLIGHT + 1


def poisoned(step, field=None):
    """The segment, whose loss before `step`, or whose `field` after it, is NaN."""

    def segment(key, state, indices):
        bad = lambda x, now=state.step == step: x * jnp.where(now, jnp.nan, 1)
        state, loss = SEGMENT(key, state, indices)
        if field is None:
            return state, bad(loss)
        return state._replace(**{field: jax.tree.map(bad, getattr(state, field))}), loss

    return segment


@pytest.mark.parametrize("step", [0, 6])
def test_a_loss_that_is_not_finite_stops_the_run_within_a_few_calls(step):
    seen, reached = [], []
    with pytest.raises(FloatingPointError) as stop:
        for window in run(fresh(), [4, 100], poisoned(step), on_call=reached.append):
            seen.append(window.step)
    assert seen == [4] * (step >= 4) and reached[-1] <= max(step, 4) + IN_FLIGHT + 1
    assert f"step {step} " in str(stop.value)
    if step:
        (expected,) = run(fresh(), [step])
        assert f"{expected.losses[-1]:g}" in str(stop.value)


@pytest.mark.parametrize("field", ["params", "opt_state"])
def test_a_state_that_is_not_finite_is_not_yielded(field):
    """Losses precede their steps: all of a window's can be finite, and its state not."""
    seen = []
    with pytest.raises(FloatingPointError, match="state"):
        for window in run(fresh(), [4, 8], poisoned(7, field)):
            seen.append(window.step)
    assert seen == [4]


def test_steps_are_timed_without_compilation_and_without_the_caller():
    def slow_to_trace(key, state, indices):
        time.sleep(0.3)
        return SEGMENT(key, state, indices)

    for window in run(fresh(), [4, 8], slow_to_trace):
        assert window.seconds < 0.25
        time.sleep(0.3)
