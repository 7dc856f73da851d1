"""Step-size schedules, whose parameters may all be traced, hence vmapped."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike
from optax import Schedule


def exponential_warmup(init_value: ArrayLike, base: ArrayLike, total_steps: ArrayLike) -> Schedule:
    """init_value * base ** (100 t), where t = step / total_steps is the share of the run.

    Args:
        init_value: Step size at step 0.
        base: Growth factor per percent of the run.
        total_steps: Length of the run, in steps.

    Example:
        >>> float(exponential_warmup(0.5, 2.0, total_steps=1000)(20))
        2.0
    """
    # The step as a float: JAX divides int32 in float32, whatever the default precision.
    return lambda step: init_value * base ** (100.0 * jnp.asarray(step, float) / total_steps)


def power_warmup(
    init_value: ArrayLike, gain: ArrayLike, exponent: ArrayLike, total_steps: ArrayLike
) -> Schedule:
    """init_value * (1 + gain * t ** exponent), where t = step / total_steps.

    Args:
        init_value: Step size at step 0.
        gain: Relative increase over the whole run.
        exponent: Of t: 1 is a linear warm-up, smaller ones grow fastest at the start.
        total_steps: Length of the run, in steps.

    Example:
        >>> float(power_warmup(0.5, 4.0, 0.5, total_steps=1000)(250))
        1.5
    """
    share = lambda step: jnp.asarray(step, float) / total_steps
    return lambda step: init_value * (1.0 + gain * share(step) ** exponent)


def piecewise_decay(
    schedule: Schedule, boundaries: Sequence[ArrayLike], factors: Sequence[ArrayLike]
) -> Schedule:
    """`schedule` until boundaries[0]; then its value there, divided by all factors so far.

    Args:
        schedule: Step size as a function of the step.
        boundaries: Increasing steps, which may be traced.
        factors: factors[i] divides the values from step boundaries[i] on.

    Example:
        >>> decayed = piecewise_decay(lambda step: 8.0, [10, 20], [2.0, 4.0])
        >>> [float(decayed(step)) for step in (9, 10, 20)]
        [8.0, 4.0, 1.0]
    """

    def decayed(step):
        value = schedule(jnp.minimum(step, boundaries[0]) if len(boundaries) else step)
        for boundary, factor in zip(boundaries, factors, strict=True):
            value = value / jnp.where(step < boundary, 1.0, factor)  # no `if`: may be traced
        return value

    return decayed


def released_schedule(
    name: str,
    lr_init: ArrayLike,
    *,
    steps_per_epoch: ArrayLike,
    epochs: ArrayLike,
    warmup_factor: ArrayLike = 1.0,
    warmup_exp: ArrayLike = 1.0,
) -> Schedule:
    """The schedule `name` of the released code, at epoch t = (k + 1) / steps_per_epoch for step k.

    With T = `epochs` and w = `warmup_exp`, in multiples of `lr_init`:

    - `constant`; `cosine`, from 1 to 0; `inverted_cosine`, from 0 to 1; `cyclic`, linearly from 0
      to 1 at 0.4 T and back.
    - `piecewise_A_B` (`10_100`, `3_9`, `3_inf`): 1, then 1/A from T/2 and 1/B from 3T/4;
      `piecewise` is `piecewise_10_100`.
    - `piecewise_0Fepochs` (F = 1, 2, 3, 5; f = F / 10) warms up while t/T < f: w^(100 t/T) for
      w > 1, 1 + (100 t/T)^w for w < 1, and linearly from 1 towards `warmup_factor` at T/2 for
      w = 1. Then it is 1/10 of the value reached at f T, and 1/100 of it from t/T = 0.9. For w = 1,
      the released code takes (f / .5) `warmup_factor` as the value reached: at f = .1 and factor 1
      it decays to 1/50, not 1/10. `piecewise_0Fepochs_clean` takes the value actually reached.

    Args:
        name: Of the schedule, one of those above.
        lr_init: Step size that the schedule multiplies.
        steps_per_epoch: Number of steps of an epoch.
        epochs: Length T of the run, in epochs.
        warmup_factor: Multiple of `lr_init` that a linear warm-up would reach at T/2; 1 is no
            linear warm-up.
        warmup_exp: w, the base or exponent of the warm-up; 1 is linear.

    Raises:
        ValueError: For an unknown name.

    Example:
        >>> schedule = released_schedule("piecewise", 0.5, steps_per_epoch=10, epochs=4)
        >>> [round(float(schedule(k)), 6) for k in (18, 19, 29)]
        [0.5, 0.05, 0.005]
    """
    if name not in RELEASED:
        raise ValueError(f"Unknown schedule {name!r}; known are {', '.join(sorted(RELEASED))}.")
    total = jnp.asarray(steps_per_epoch * epochs, float)
    factor, exponent = jnp.asarray(warmup_factor), jnp.asarray(warmup_exp)

    def schedule(step):
        # t/T < f with a margin for rounding (XLA replaces divisions by products): a boundary that
        # falls on a step decays that step, in float32 and in float64.
        before = lambda share: step + 1.05 < share * total
        return lr_init * RELEASED[name]((step + 1) / total, before, factor, exponent)

    return schedule


# Each takes t = (k + 1) / total, before(share), `warmup_factor` and `warmup_exp`.
def _piecewise(t, before, factor, exponent, *, over: tuple[float, float] = (10.0, 100.0)):
    return jnp.where(before(0.5), 1.0, jnp.where(before(0.75), 1 / over[0], 1 / over[1]))


def _warmup(t, factor, exponent):
    power, exponential = 1.0 + (100.0 * t) ** exponent, exponent ** (100.0 * t)
    linear = 1.0 + (factor - 1.0) * t / 0.5  # reaches `factor` at T/2
    return jnp.select([exponent > 1.0, exponent < 1.0], [exponential, power], linear)


def _warmup_then_decay(t, before, factor, exponent, *, until: float, clean: bool):
    reached = _warmup(until, factor, exponent)
    if not clean:  # as released: not the warm-up's own formula
        reached = jnp.where(exponent == 1.0, until / 0.5 * factor, reached)
    decayed = reached / jnp.where(before(0.9), 10.0, 100.0)
    return jnp.where(before(until), _warmup(t, factor, exponent), decayed)


RELEASED: dict[str, Callable[..., jax.Array]] = {
    "constant": lambda t, *_: jnp.ones_like(t),
    "piecewise": _piecewise,
    "piecewise_10_100": _piecewise,
    "piecewise_3_9": partial(_piecewise, over=(3.0, 9.0)),
    "piecewise_3_inf": partial(_piecewise, over=(3.0, float("inf"))),
    "cosine": lambda t, *_: 0.5 + 0.5 * jnp.cos(jnp.pi * t),
    "inverted_cosine": lambda t, *_: 0.5 - 0.5 * jnp.cos(jnp.pi * t),
    "cyclic": lambda t, *_: jnp.minimum(t / 0.4, (1.0 - t) / 0.6),
} | {
    f"piecewise_0{f}epochs{end}": partial(_warmup_then_decay, until=f / 10, clean=bool(end))
    for f in (1, 2, 3, 5)
    for end in ("", "_clean")
}
