"""Loss stabilization: the level of the loss under large steps, and the outcome of a run."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from sgd_sparse_jax.types import Scalar

OUTCOMES = ("converged", "stabilized", "period-2", "diverged")


def noise_level(losses: Float[Array, " t"]) -> Scalar:
    """delta = mean_t L_t, the level at which large steps hold the training loss.

    `losses` [t] are records of the loss while it is held; NaN and inf propagate.
    Source: the delta of Eq. 8.

    Example:
        >>> float(noise_level(jnp.array([1.0, 3.0])))
        2.0
    """
    # The trace of the covariance of SGD's noise is proportional to L, so its mean along the run is
    # set by the arithmetic mean of L; a geometric one is smaller, the more the loss fluctuates.
    return losses.mean()


def outcome(
    trend: Float[Array, " t"], tail: Float[Array, " s"], *, converged_below: ArrayLike = 1e-8
) -> Int[Array, ""]:
    """The outcome of a run, as its index in `OUTCOMES`.

    `trend` are losses at 8 or more records, spread evenly over the run at its large step size;
    `tail` those of 4 or more consecutive steps at its end; ValueError for fewer. Outcomes:
    diverged: a loss isn't finite. converged: the tail's mean is below `converged_below` times the
    first loss, or the last quarter of the trend lies below half of the quarter before it, beyond
    three standard errors. period-2: losses two steps apart are ten times nearer than those of
    neighbouring steps, which differ by more than a millionth. stabilized: all else.

    Example:
        >>> trend, tail = jnp.ones(16), jnp.array([1.1, 0.9, 1.1, 0.9])
        >>> OUTCOMES[int(outcome(trend, tail))]
        'period-2'
    """
    if trend.shape[0] < 8 or tail.shape[0] < 4:
        raise ValueError(
            f"trend has {trend.shape[0]} losses and tail {tail.shape[0]}; give 8 and 4 or more."
        )
    quarter = len(trend) // 4
    # Of log losses: a loss that falls by a constant factor per record falls by the same difference.
    logs = jnp.log(jnp.maximum(trend, jnp.finfo(trend.dtype).tiny))  # exact zeros: no -inf
    before, last = logs[-2 * quarter : -quarter], logs[-quarter:]
    error = jnp.sqrt((before.var(ddof=1) + last.var(ddof=1)) / quarter)
    falls = before.mean() - last.mean() > jnp.maximum(jnp.log(2.0), 3.0 * error)
    converged = (tail.mean() < converged_below * trend[0]) | falls
    one_apart, two_apart = jnp.abs(tail[1:] - tail[:-1]), jnp.abs(tail[2:] - tail[:-2])
    # The tail alone: at even steps only, one side of the valley shows and no period does.
    period = 10 * two_apart.mean() < one_apart.mean()
    period &= one_apart.mean() > 1e-6 * tail.mean()
    bounded = jnp.isfinite(trend).all() & jnp.isfinite(tail).all()
    return jnp.where(bounded, jnp.where(converged, 0, jnp.where(period, 2, 1)), 3)
