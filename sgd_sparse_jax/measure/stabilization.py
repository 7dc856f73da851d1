"""Loss stabilization: the level at which large steps hold the loss, and outcomes of runs."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from sgd_sparse_jax.types import Scalar

OUTCOMES = ("converged", "stabilized", "period-2", "diverged")


def noise_level(losses: Float[Array, " t"]) -> Scalar:
    """delta = mean_t L_t, the level at which the training loss stabilizes.

    `losses` [t] are records during stabilization; NaN and inf propagate.
    Source: the delta of Eq. 8.

    Example:
        >>> float(noise_level(jnp.array([1.0, 3.0])))
        2.0
    """
    # Arithmetic: the trace of the covariance of SGD's noise is proportional to L, so that its mean
    # over the run is proportional to this. A geometric mean of a fluctuating loss is smaller.
    return losses.mean()


def outcome(
    trend: Float[Array, " t"], tail: Float[Array, " s"], *, converged_below: ArrayLike = 1e-8
) -> Int[Array, ""]:
    """The outcome of a run, as an index into `OUTCOMES`.

    `trend` are 8 or more losses, evenly spaced over the run at its large step size; `tail` are the
    losses of 4 or more consecutive steps at its end. Raises ValueError for fewer.

    - diverged: a loss isn't finite;
    - converged: the mean of the tail is below `converged_below` times the first loss, or the last
      quarter of the trend is below half of the one before, by more than three standard errors;
    - period-2: losses two steps apart are ten times closer than those of adjacent steps, which
      differ by more than a relative 1e-6;
    - stabilized: otherwise.

    Example:
        >>> trend, tail = jnp.ones(16), jnp.array([1.1, 0.9, 1.1, 0.9])
        >>> OUTCOMES[int(outcome(trend, tail))]
        'period-2'
    """
    if trend.shape[0] < 8 or tail.shape[0] < 4:
        raise ValueError(
            f"trend has {trend.shape[0]} losses and tail {tail.shape[0]}; the least are 8 and 4."
        )
    quarter = len(trend) // 4
    # In logarithms: a constant factor per record is a constant difference.
    logs = jnp.log(jnp.maximum(trend, jnp.finfo(trend.dtype).tiny))  # log 0 is -inf
    before, last = logs[-2 * quarter : -quarter], logs[-quarter:]
    error = jnp.sqrt((before.var(ddof=1) + last.var(ddof=1)) / quarter)
    falls = before.mean() - last.mean() > jnp.maximum(jnp.log(2.0), 3.0 * error)
    converged = (tail.mean() < converged_below * trend[0]) | falls
    one_apart, two_apart = jnp.abs(tail[1:] - tail[:-1]), jnp.abs(tail[2:] - tail[:-2])
    # From the tail: in records at even steps only, a period of 2 is invisible.
    period = 10 * two_apart.mean() < one_apart.mean()
    period &= one_apart.mean() > 1e-6 * tail.mean()
    bounded = jnp.isfinite(trend).all() & jnp.isfinite(tail).all()
    return jnp.where(bounded, jnp.where(converged, 0, jnp.where(period, 2, 1)), 3)
