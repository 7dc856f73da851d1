"""One run with pauses: advance, evaluate, save, repeat."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
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
    steps_per_call: int = 1,
    on_call: Callable[[int], None] = lambda step: None,
) -> TrainState:
    """Runs from wherever `state` is to `num_steps`; its buffers are given up.

    At step 0, every `eval_every` steps and at the end: one row to `on_row`, then `save(state)`. So
    a saved state has its row, and a run that starts from one does not write it again.
    `steps_per_call` steps go in one compiled call; between rows nothing waits for the device.
    `on_call(step)` hears how far the calls have got. Raises FloatingPointError, with nothing
    saved since the last row, when a loss isn't finite.
    """
    order, noise = jr.split(key)
    advance = jax.jit(segment, donate_argnums=1)
    draw = jax.jit(sampler, static_argnums=2)
    step = int(state.step)
    if step == 0:
        on_row({"step": 0} | dict(evaluate(state)))
        if save:
            save(state)
    while step < num_steps:
        stop = min(step - step % eval_every + eval_every, num_steps)
        # Drawn once per window: a permutation of the data set is too dear for every step.
        indices = np.asarray(draw(order, step, stop - step))
        losses = []
        for first in range(0, stop - step, steps_per_call):
            state, loss = advance(noise, state, indices[first : first + steps_per_call])
            losses.append(loss)
            on_call(min(step + first + steps_per_call, stop))
        mean = _mean_if_finite(np.concatenate(jax.device_get(losses)), step)
        step = stop
        on_row({"step": step, "window_loss": mean} | dict(evaluate(state)))
        if save:
            save(state)
    return state


def _mean_if_finite(losses: np.ndarray, start: int) -> float:
    """Mean of a window's losses, the first of which belongs to step `start`."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        before = f"{losses[bad[0] - 1]:g} the step before" if bad[0] else "finite until there"
        raise FloatingPointError(
            f"The loss is {losses[bad[0]]} at step {start + bad[0]} ({before}; window of steps "
            f"{start} to {start + len(losses) - 1}); lower the step size. "
            f"The state of step {start} is the last good one."
        )
    return float(losses.mean(dtype=np.float64))
