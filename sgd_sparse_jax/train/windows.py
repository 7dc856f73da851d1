"""Training as a generator of windows, between which the caller evaluates, saves or stops."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Float64

from sgd_sparse_jax.types import PRNGKey, Sampler, Segment, TrainState

# Calls dispatched ahead: the device never idles, and interruptions and NaN are noticed soon.
IN_FLIGHT = 8


class Window(NamedTuple):
    """The steps since the previous window, and the state after them.

    Example:
        >>> window = Window({}, 2, np.array([0.5, 0.125]), 0.01)
        >>> window.step, window.losses.mean()
        (2, np.float64(0.3125))
    """

    state: TrainState  #: valid until the next window is requested, which donates its buffers
    step: int  #: number of steps taken
    losses: Float64[np.ndarray, " steps"]  #: of the batches, before each step
    seconds: float  #: duration of the steps, without compilation


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

    The result depends neither on `stops` nor on `steps_per_call`.

    Args:
        key: split between `sampler` and `segment`.
        state: the initial state; its buffers are donated.
        sampler: (key, step, count) -> indices [count, b], see `train.samplers`.
        segment: what `make_segment` returns, or a `jax.tree_util.Partial(function, *arrays)`, which
            is compiled once for all runs that share `function`, whatever the values of `arrays`.
        stops: steps to yield at; those up to `state.step` are ignored.
        steps_per_call: steps in one compiled call; at most two programs are compiled.
        interrupt: called after each call with the step reached; True yields a window there too.
        on_call: called after each call with the step reached; up to 8 calls may be unfinished.

    Raises FloatingPointError if a loss isn't finite, which is noticed at most 8 calls later, or if
    the state at a stop isn't, which is then not yielded.

    Example:
        >>> import optax
        >>> from sgd_sparse_jax import train, types
        >>> tx = optax.sgd(0.5)
        >>> step = train.make_step(lambda p, stats, batch: (0.5 * p**2, stats), tx)
        >>> segment = train.make_segment(step, lambda key, idx: types.Batch(idx, idx))
        >>> state = TrainState(jnp.array(0), jnp.array(1.0), {}, tx.init(1.0), ())
        >>> run = windows(jr.key(0), state, train.full_batch(1), segment, [2, 3])
        >>> [(window.step, window.losses.tolist()) for window in run]
        [(2, [0.5, 0.125]), (3, [0.03125])]
    """
    order, noise = jr.split(key)
    place = state.step.sharding
    # Explicit transfers, for `jax.transfer_guard`. Several hosts pass their copies to the compiled
    # call directly: `device_put` to devices of other hosts would first compare them.
    put = lambda x: jax.device_put(x, place) if place.is_fully_addressable else x
    noise = put(noise)
    # Committed to devices, as the outputs are: else the second call would compile again.
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), state)
    draw = jax.jit(sampler, static_argnums=2)
    shared = isinstance(segment, Partial)
    advance = partial(_advance, segment) if shared else jax.jit(segment, donate_argnums=1)
    compiled: set[int] = set()
    step, last_loss = int(state.step), None
    for stop in sorted({stop for stop in stops if stop > step}):
        # One draw per window: a permutation of the data set per step is too expensive.
        indices = np.asarray(jax.device_get(draw(order, jax.device_put(step), stop - step)))
        under_way: deque[jax.Array] = deque()
        losses: list[float] = []
        done, begun = step, time.perf_counter()
        # The remainder runs step by step: two programs suffice for any distance.
        whole = len(indices) - len(indices) % steps_per_call
        cuts = [*range(0, whole, steps_per_call), *range(whole, len(indices) + 1)]
        for rows in np.split(indices, cuts[1:-1]):
            called = time.perf_counter()
            state, loss = advance(noise, state, put(rows))
            if len(rows) not in compiled:  # the first call blocks to compile
                compiled.add(len(rows))
                begun += time.perf_counter() - called
            step += len(rows)
            under_way.append(loss)
            on_call(step)
            ends = interrupt(step) or step == stop
            while len(under_way) > (0 if ends else IN_FLIGHT):
                for value in np.asarray(jax.device_get(under_way.popleft()), float).tolist():
                    if not math.isfinite(value):
                        raise _not_finite(f"loss of step {done}", done, last_loss)
                    losses.append(last_loss := value)
                    done += 1
            if ends:
                seconds = time.perf_counter() - begun
                if not jax.device_get(_is_finite(state)):
                    # Losses precede their steps: only the state shows the effect of the last one.
                    raise _not_finite(f"state at step {step}", step, last_loss)
                yield Window(state, step, np.array(losses), seconds)
                losses, begun = [], time.perf_counter()


@partial(jax.jit, donate_argnums=2)
def _advance(segment: Partial, key: PRNGKey, state: TrainState, rows: jax.Array):
    return segment(key, state, rows)


@jax.jit
def _is_finite(state: TrainState) -> jax.Array:
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def _not_finite(what: str, step: int, last_loss: float | None) -> FloatingPointError:
    hint = "lower the step size" if step else "check the data and the initial weights"
    known = "no loss before it" if last_loss is None else f"last finite loss: {last_loss:g}"
    return FloatingPointError(f"The {what} isn't finite ({known}); {hint}.")
