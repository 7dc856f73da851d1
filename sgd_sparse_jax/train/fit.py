"""One run with pauses: advance, evaluate, save, repeat."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from sgd_sparse_jax._types import PRNGKey, Sampler, Segment, TrainState

Row = dict[str, Any]


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
    save: Callable[[TrainState], None] | None = None,
    keep_every: int = 0,
    keep: Callable[[TrainState], None] = lambda state: None,
    steps_per_call: int = 1,
    on_call: Callable[[int], None] = lambda step: None,
) -> TrainState:
    """Runs from wherever `state` is to `num_steps`; its buffers are given up.

    At step 0, every `eval_every` steps and at the end: one row to `on_row`, then, but for step 0,
    which its key gives back, `save(state)`. So a saved state has its row, and a run that starts
    from one does not write it again. Every `keep_every` steps (0: never) `keep(state)`, between
    rows too. A row has `window_loss`, the mean training loss of the steps since the row before, and
    `step_seconds`, their mean time without compilation.

    `steps_per_call` steps go in one compiled call (what is left of a window one by one: two
    programs at most); between rows nothing waits for the device. `on_call(step)` hears how far the
    calls have got. Raises FloatingPointError, with nothing saved since the last row, when a loss
    or a weight isn't finite.
    """
    order, noise = jr.split(key)
    advance = _Timed(jax.jit(segment, donate_argnums=1))
    draw = jax.jit(sampler, static_argnums=2)
    step, last = int(state.step), None
    if step == 0:
        on_row({"step": 0} | dict(evaluate(state)))
    while step < num_steps:
        stop = min(step - step % eval_every + eval_every, num_steps)
        # Drawn once per window: a permutation of the data set is too dear for every step.
        indices = np.asarray(draw(order, step, stop - step))
        losses: list[jax.Array] = []
        started, compiling, at = time.perf_counter(), advance.compiling, step
        for rows in _calls(indices, steps_per_call, step, keep_every):
            state, loss = advance(noise, state, rows)
            losses.append(loss)
            at += len(rows)
            on_call(at)
            if keep_every and at % keep_every == 0 and bool(_is_finite(state)):
                keep(state)
        values = np.concatenate(jax.device_get(losses))
        seconds = time.perf_counter() - started - (advance.compiling - compiling)
        _assert_finite(values, step, last, bool(_is_finite(state)))
        window = {
            "window_loss": float(values.mean(dtype=np.float64)),
            "step_seconds": seconds / len(values),
        }
        step, last = stop, float(values[-1])
        on_row({"step": step} | window | dict(evaluate(state)))
        if save:
            save(state)
    return state


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


@jax.jit
def _is_finite(state: TrainState) -> jax.Array:
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
    raise FloatingPointError(
        f"{what} ({known}; window of steps {start} to {stop - 1}); lower the step size. "
        f"The state of step {start} is the last good one."
    )
