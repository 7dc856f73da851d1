"""One run with pauses: advance, evaluate, save, repeat."""

import enum
import functools
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from sgd_sparse_jax.types import PRNGKey, Sampler, Segment, TrainState

Row = dict[str, Any]
IN_FLIGHT = 8  # calls that may wait for the device: it never idles, and a pause comes soon


class Window(NamedTuple):
    """What is known of the steps since the last row; a state saved between rows has it beside."""

    loss_sum: float = 0.0  # of their training losses, added one by one: cuts change no bit of it
    steps: int = 0
    seconds: float = 0.0  # their time without compilation


class Pause(enum.IntEnum):
    """What a run is asked between two calls."""

    NO = 0
    SAVE = 1
    STOP = 2  # having saved


def fit(
    key: PRNGKey,
    state: TrainState,
    sampler: Sampler,
    segment: Segment,
    *,
    num_steps: int,
    eval_every: int,
    evaluate: Callable[[TrainState], Mapping[str, Any]],
    on_row: Callable[[Row], None],
    save: Callable[[TrainState, Window], None] = lambda state, window: None,
    keep_every: int = 0,
    keep: Callable[[TrainState], None] = lambda state: None,
    steps_per_call: int = 1,
    on_call: Callable[[int], None] = lambda step: None,
    pause: Callable[[], Pause] = lambda: Pause.NO,
    start: int = 0,
    window: Window = Window(),  # noqa: B008
) -> TrainState:
    """Runs from wherever `state` is to `num_steps`; its buffers are given up.

    At step `start`, where the run began, every `eval_every` steps and at the end: one row to
    `on_row`, then, but for the first, `save(state, Window())`. So a saved state has its row, and a
    run that goes on from one does not write it again. A row has `window_loss`, the mean training
    loss of the steps since the row before, and `step_seconds`, their mean time without compilation.
    Every `keep_every` steps (0: never) `keep(state)`, between rows too.

    `steps_per_call` steps go in one compiled call (what is left of a window one by one: two
    programs at most); between rows the device never waits for the host. `on_call(step)` hears how
    far the calls have got. `pause()` is asked after each: to SAVE is `save(state, window)` between
    rows, and whoever goes on from there gives `window` back; to STOP is to save and return early.

    Raises FloatingPointError, with nothing saved since the last good state, when a loss or a weight
    isn't finite.
    """
    order, noise = jr.split(key)
    advance = _Timed(jax.jit(segment, donate_argnums=1))
    draw = jax.jit(sampler, static_argnums=2)
    put = _placing(state)
    noise = put(noise)
    step, last = int(state.step), None
    if step == start:
        on_row({"step": step} | dict(evaluate(state)))
    while step < num_steps:
        stop = min(step - step % eval_every + eval_every, num_steps)
        # Drawn once per window: a permutation of the data set is too dear for every step.
        indices = np.asarray(jax.device_get(draw(order, jax.device_put(step), stop - step)))
        losses: list[jax.Array] = []
        begun, compiling, at, asked = time.perf_counter(), advance.compiling, step, Pause.NO
        for rows in _calls(indices, steps_per_call, step, keep_every):
            state, loss = advance(noise, state, put(rows))
            losses.append(loss)
            if len(losses) > IN_FLIGHT:
                losses[-1 - IN_FLIGHT].block_until_ready()
            at += len(rows)
            on_call(at)
            if keep_every and at % keep_every == 0 and _is_finite(state):
                keep(state)
            if asked := pause():
                break
        values = np.concatenate(jax.device_get(losses)).astype(np.float64)
        seconds = time.perf_counter() - begun - (advance.compiling - compiling)
        _assert_finite(values, step, last, _is_finite(state))
        step, last = at, float(values[-1])
        window = Window(
            functools.reduce(operator.add, values.tolist(), window.loss_sum),
            window.steps + len(values),
            window.seconds + seconds,
        )
        if at == stop:
            told = {
                "window_loss": window.loss_sum / window.steps,
                "step_seconds": window.seconds / window.steps,
            }
            on_row({"step": step} | told | dict(evaluate(state)))
            window = Window()
        save(state, window)
        if asked == Pause.STOP:
            break
    return state


def _placing(state: TrainState) -> Callable[[Any], Any]:
    """Puts what goes in with `state` where it is, and says so: no transfer happens in silence.

    Several hosts give their copies to the compiled call itself, which asks for no comparison.
    """
    place = state.step.sharding
    return (lambda x: jax.device_put(x, place)) if place.is_fully_addressable else lambda x: x


class _Timed:
    """A compiled segment, and the seconds that the first call of each length took to compile."""

    def __init__(self, segment: Segment):
        self.segment = segment
        self.lengths: set[int] = set()
        self.compiling = 0.0

    def __call__(self, key: PRNGKey, state: TrainState, rows: Any) -> tuple[TrainState, jax.Array]:
        if len(rows) in self.lengths:
            return self.segment(key, state, rows)
        self.lengths.add(len(rows))
        started = time.perf_counter()
        out = self.segment(key, state, rows)  # returns once it is compiled, and runs on
        self.compiling += time.perf_counter() - started
        return out


def _calls(
    indices: np.ndarray, steps_per_call: int, start: int, keep_every: int
) -> Iterator[np.ndarray]:
    """A window's rows in calls of `steps_per_call`, what is left one by one.

    No call crosses a multiple of `keep_every`; the first row belongs to step `start`.
    """
    first = 0
    while first < len(indices):
        room = len(indices) - first
        if keep_every:
            room = min(room, keep_every - (start + first) % keep_every)
        size = steps_per_call if steps_per_call <= room else 1
        yield indices[first : first + size]
        first += size


def _is_finite(state: TrainState) -> bool:
    return bool(jax.device_get(_all_finite(state)))


@jax.jit
def _all_finite(state: TrainState) -> jax.Array:
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def _assert_finite(
    losses: np.ndarray, start: int, last: float | None, state_is_finite: bool
) -> None:
    """Of a window's losses, the first of which belongs to step `start`, and the state after it.

    A loss is that before its step: what the last step of a window did shows in the state alone.
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if not len(bad) and state_is_finite:
        return
    stop = start + len(losses)
    first = bad[0] if len(bad) else len(losses)
    before = losses[first - 1] if first else last
    what = (
        f"The loss is {losses[first]} at step {start + first}"
        if len(bad)
        else (f"The state after step {stop - 1} isn't finite")
    )
    known = (
        "no loss is known before it" if before is None else f"the last finite loss is {before:g}"
    )
    at_first = len(bad) and start + first == 0
    cure = "no step is to blame, look at data and weights" if at_first else "lower the step size"
    raise FloatingPointError(
        f"{what} ({known}; window of steps {start} to {stop - 1}); {cure}. "
        f"The state of step {start} is the last good one."
    )
