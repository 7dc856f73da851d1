"""Training in windows: between two of them the caller evaluates, saves or stops."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Float64

from sgd_sparse_jax.types import PRNGKey, Sampler, Segment, TrainState

# Calls that may wait for the device: it never idles, and an interruption or NaN is noticed soon.
IN_FLIGHT = 8


class Window(NamedTuple):
    """The steps since the previous window, and the state after them."""

    state: TrainState
    step: int
    losses: Float64[np.ndarray, " steps"]
    seconds: float


def windows(
    key: PRNGKey,
    state: TrainState,
    sampler: Sampler,
    segment: Segment,
    stops: Iterable[int],
    *,
    steps_per_call: int = 1,
    interrupt: Callable[[int], bool] = lambda step: False,
    on_call: Callable[[int], None] = lambda step: None,
) -> Iterator[Window]:
    """Trains from `state.step` to the last of `stops`; yields a window at each of them.

    The result depends neither on where the run is cut nor on `steps_per_call`: the order of
    examples and all noise are functions of (key, step).

    Args:
        key: `sampler` gets its first half, `segment` the second (`jax.random.split(key)`).
        state: where to begin; its buffers are donated.
        sampler: (key, step, count) -> indices [count, b], see `train.samplers`.
        segment: what `make_segment` returns.
        stops: steps to yield at; those up to `state.step` are ignored.
        steps_per_call: steps in one compiled call. What is left of a window goes one by one, so
            that at most two programs are compiled.
        interrupt: called after each call with the step reached; where it returns True a window is
            yielded there too.
        on_call: called with the step that the calls so far reach, 8 of which may be under way.

    Yields:
        `Window(state, step, losses, seconds)`: the state after `step` steps, which is valid until
        the next window is requested (its buffers are donated); the losses [steps] of the steps
        since the previous window, in float64; the seconds they took without compilation.

    Raises:
        FloatingPointError: a loss or a state isn't finite. A loss is looked at when its call is
            done, at most 8 calls later. States that were yielded are finite.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sgd_sparse_jax import train
        >>> from sgd_sparse_jax.types import Batch
        >>> tx = optax.sgd(0.5)
        >>> step = train.make_step(lambda p, stats, batch: (0.5 * p**2, stats), tx)
        >>> segment = train.make_segment(step, lambda key, idx: Batch(idx, idx))
        >>> state = TrainState(jnp.array(0), jnp.array(1.0), {}, tx.init(1.0), ())
        >>> run = windows(jax.random.key(0), state, train.full_batch(1), segment, [2, 3])
        >>> [(window.step, window.losses.tolist()) for window in run]
        [(2, [0.5, 0.125]), (3, [0.03125])]
    """
    order, noise = jr.split(key)
    put = _placement(state)
    noise = put(noise)
    # Committed to their devices, as what comes back: else the second call would compile again.
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), state)
    draw = jax.jit(sampler, static_argnums=2)
    advance = jax.jit(segment, donate_argnums=1)
    compiled: set[int] = set()
    step, last_loss = int(state.step), None
    for stop in sorted({stop for stop in stops if stop > step}):
        # All of them at once: a permutation of the data set is too expensive for every step.
        indices = np.asarray(jax.device_get(draw(order, jax.device_put(step), stop - step)))
        under_way: deque[jax.Array] = deque()
        losses: list[float] = []
        done, begun = step, time.perf_counter()
        for rows in _calls(indices, steps_per_call):
            called = time.perf_counter()
            state, loss = advance(noise, state, put(rows))
            if len(rows) not in compiled:  # such a call returns as soon as it is compiled
                compiled.add(len(rows))
                begun += time.perf_counter() - called
            step += len(rows)
            under_way.append(loss)
            on_call(step)
            ends = interrupt(step) or step == stop
            while len(under_way) > (0 if ends else IN_FLIGHT):
                values = np.asarray(jax.device_get(under_way.popleft()), np.float64)
                _assert_finite(values, done, last_loss)
                done, last_loss = done + len(values), float(values[-1])
                losses.extend(values.tolist())
            if ends:
                seconds = time.perf_counter() - begun
                if not jax.device_get(_is_finite(state)):
                    # A loss is the one before its step: what the last step did shows here alone.
                    raise _not_finite(f"state at step {step}", step, last_loss)
                yield Window(state, step, np.array(losses), seconds)
                losses, begun = [], time.perf_counter()


def _placement(state: TrainState) -> Callable[[Any], Any]:
    """Puts indices and keys onto the devices of `state`, explicitly (see `jax.transfer_guard`).

    Several hosts pass their copies to the compiled call as they are: `device_put` onto devices of
    other hosts would compare them first.
    """
    place = state.step.sharding
    return (lambda x: jax.device_put(x, place)) if place.is_fully_addressable else lambda x: x


def _calls(indices: np.ndarray, steps_per_call: int) -> Iterator[np.ndarray]:
    """Rows for whole calls of `steps_per_call` steps, then one by one."""
    whole = len(indices) - len(indices) % steps_per_call
    for first in range(0, whole, steps_per_call):
        yield indices[first : first + steps_per_call]
    for first in range(whole, len(indices)):
        yield indices[first : first + 1]


@jax.jit
def _is_finite(state: TrainState) -> jax.Array:
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def _assert_finite(losses: np.ndarray, first: int, last_loss: float | None) -> None:
    """Checks the losses of the steps from `first` on; `last_loss` is the one before them."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        at = int(bad[0])
        last_loss = float(losses[at - 1]) if at else last_loss
        raise _not_finite(f"loss of step {first + at}", first + at, last_loss)


def _not_finite(what: str, step: int, last_loss: float | None) -> FloatingPointError:
    hint = "lower the step size" if step else "check the data and the initial weights"
    known = "no loss before it" if last_loss is None else f"last finite loss: {last_loss:g}"
    return FloatingPointError(f"The {what} isn't finite ({known}); {hint}.")
