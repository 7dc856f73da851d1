"""Step-size schedules: optax schedules whose every number may be traced, hence vmapped."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike


def exponential_warmup(
    init_value: ArrayLike, base: ArrayLike, total_steps: ArrayLike
) -> optax.Schedule:
    """`init_value * base ** (100 t)`, where t in [0, 1] is the fraction of the run."""
    return lambda step: init_value * base ** (100.0 * _share(step, total_steps))


def power_warmup(
    init_value: ArrayLike, gain: ArrayLike, exponent: ArrayLike, total_steps: ArrayLike
) -> optax.Schedule:
    """`init_value * (1 + gain * t ** exponent)`, where t in [0, 1] is the fraction of the run."""
    return lambda step: init_value * (1.0 + gain * _share(step, total_steps) ** exponent)


def _share(step: ArrayLike, total_steps: ArrayLike) -> jax.Array:
    """step / total in the default precision: an int32 count over a number would be float32."""
    return jnp.asarray(step, float) / total_steps


def piecewise_decay(
    schedule: optax.Schedule, boundaries: Sequence[ArrayLike], factors: Sequence[ArrayLike]
) -> optax.Schedule:
    """`schedule` up to `boundaries[0]`; then its value there, over each factor passed."""

    def decayed(step):
        value = schedule(jnp.minimum(step, boundaries[0]))
        for boundary, factor in zip(boundaries, factors, strict=True):
            value = value / jnp.where(step < boundary, 1.0, factor)
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
) -> optax.Schedule:
    """The schedule that the paper's code calls `name`, at t = (k + 1) / steps_per_epoch for step k.

    With T epochs and w = `warmup_exp`, `piecewise_0Fepochs` (F = 1, 2, 3, 5; f = F / 10) warms up
    while t/T < f: lr w^(100 t/T) for w > 1, lr (1 + (100 t/T)^w) for w < 1, and linearly from lr
    towards `warmup_factor` lr at T/2 for w = 1. Then it holds the value reached at f T over 10,
    from t/T = 0.9 over 100. For w = 1 the released code takes (f / .5) `warmup_factor` lr as the
    value reached, which at factor 1 is a drop to lr/50 at 10 % and not to lr/10;
    `piecewise_0Fepochs_clean` divides what the warm-up really reached. `piecewise_A_B` divides by A
    from T/2 and by B from 3T/4; `piecewise` is `piecewise_10_100`. Raises ValueError for an unknown
    name.
    """
    if name not in RELEASED:
        raise ValueError(f"Unknown schedule {name!r}; known are {', '.join(sorted(RELEASED))}.")
    shape = RELEASED[name]
    total = jnp.asarray(steps_per_epoch * epochs, float)
    factor, exponent = jnp.asarray(warmup_factor), jnp.asarray(warmup_exp)

    def schedule(step):
        # t/T < f with room for rounding, because compilers turn a division into a product: where
        # a decay falls on a step, that step is decayed, in float32 as in float64.
        before = lambda share: step + 1.05 < share * total
        return lr_init * shape((step + 1) / total, before, factor, exponent)

    return schedule


def _constant(t, before, factor, exponent):
    return jnp.ones_like(t)


def _piecewise(t, before, factor, exponent, *, over: tuple[float, float] = (10.0, 100.0)):
    return jnp.where(before(0.5), 1.0, jnp.where(before(0.75), 1 / over[0], 1 / over[1]))


def _cosine(t, before, factor, exponent):
    return 0.5 + 0.5 * jnp.cos(jnp.pi * t)


def _inverted_cosine(t, before, factor, exponent):
    return 0.5 - 0.5 * jnp.cos(jnp.pi * t)


def _cyclic(t, before, factor, exponent):
    return jnp.minimum(t / 0.4, (1.0 - t) / 0.6)


def _warmup(t, factor, exponent):
    """What `warmup_exp` and `warmup_factor` make of the initial step size after a share t."""
    power, exponential = 1.0 + (100.0 * t) ** exponent, exponent ** (100.0 * t)
    linear = 1.0 + (factor - 1.0) * t / 0.5
    return jnp.select([exponent > 1.0, exponent < 1.0], [exponential, power], linear)


def _warmup_then_decay(t, before, factor, exponent, *, until: float, clean: bool):
    reached = _warmup(until, factor, exponent)
    if not clean:
        reached = jnp.where(exponent == 1.0, until / 0.5 * factor, reached)
    decayed = reached / jnp.where(before(0.9), 10.0, 100.0)
    return jnp.where(before(until), _warmup(t, factor, exponent), decayed)


RELEASED: dict[str, Callable] = {
    "constant": _constant,
    "piecewise": _piecewise,
    "piecewise_10_100": _piecewise,
    "piecewise_3_9": partial(_piecewise, over=(3.0, 9.0)),
    "piecewise_3_inf": partial(_piecewise, over=(3.0, float("inf"))),
    "cosine": _cosine,
    "inverted_cosine": _inverted_cosine,
    "cyclic": _cyclic,
} | {
    f"piecewise_0{tenths}epochs{suffix}": partial(
        _warmup_then_decay, until=tenths / 10, clean=bool(suffix)
    )
    for tenths in (1, 2, 3, 5)
    for suffix in ("", "_clean")
}
