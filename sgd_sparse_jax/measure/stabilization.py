"""Stabilization under large steps: levels, plateaus, bouncing across a valley, outcomes of runs."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int

from sgd_sparse_jax.types import Params, Scalar

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

    - diverged: a loss isn't finite;
    - converged: the mean of the tail is below `converged_below` times the first loss, or the last
      quarter of the trend is below half of the one before, by more than three standard errors;
    - period-2: losses two steps apart are ten times closer than those of adjacent steps, which
      differ by more than a relative 1e-6;
    - stabilized: otherwise.

    Args:
        trend: 8 or more losses, evenly spaced over the run at its large step size, [t].
        tail: Losses of 4 or more consecutive steps at the end of the run, [s].
        converged_below: Loss, as a multiple of the first one, below which a run has converged.

    Raises:
        ValueError: If there are fewer losses.

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


class Plateau(NamedTuple):
    """Where a series stays level: records `onset` to `end` - 1; empty, with NaN, if nowhere.

    Example:
        >>> series = jnp.array([1.0, 5.0, 9.9, 10.0, 10.1, 10.0, 10.0, 4.0])
        >>> found = plateau(series)
        >>> float(found.level), int(found.onset), int(found.end)
        (10.0, 2, 7)
    """

    level: Scalar  #: the median
    onset: Int[Array, ""]  #: first record
    end: Int[Array, ""]  #: first record after it
    drift: Scalar  #: rise of the fitted line from onset to end, relative to the level


def plateau(
    series: Float[Array, " t"], *, width: ArrayLike = 0.1, shortest: ArrayLike = 0.25
) -> Plateau:
    """The longest window in which a positive series stays within +-`width` of its mid-range.

    For the sharpness of a run with large steps, whose level is compared with 2 / step size.
    Catapults and values that aren't finite end a window. Record odd and even steps: at the edge of
    stability iterates cross the valley at every step, and even steps are all on one side.

    Args:
        series: Positive values at equal distances, [t]; memory is quadratic in t.
        width: Largest relative deviation from (max + min) / 2 of the window.
        shortest: Share of the series that a plateau must cover.

    Example:
        >>> float(plateau(jnp.exp(jnp.arange(20.0))).level)  # no plateau
        nan
    """
    t = jnp.arange(len(series))
    inside = t[:, None] <= t[None]  # row i: windows that begin at i
    row = jnp.broadcast_to(series[None], inside.shape)
    high = jax.lax.cummax(jnp.where(inside, row, -jnp.inf), axis=1)
    low = jax.lax.cummin(jnp.where(inside, row, jnp.inf), axis=1)
    level = inside & (high - low <= width * (high + low)) & jnp.isfinite(row) & (low > 0)
    lengths = jnp.where(inside, jnp.cumprod(level | ~inside, axis=1), 0).sum(1)
    onset, length = lengths.argmax(), lengths.max()
    found = (length >= shortest * len(series)) & (length > 1)
    within = (t >= onset) & (t < onset + length) & found
    middle = jnp.nanmedian(jnp.where(within, series, jnp.nan))
    away = jnp.where(within, t - (onset + (length - 1) / 2), 0.0)
    rise = (away * jnp.where(within, series, 0.0)).sum() / (away**2).sum() * (length - 1)
    return Plateau(middle, jnp.where(found, onset, 0), within.sum() + onset * found, rise / middle)


def sign_autocorrelation(series: Float[Array, " t"], lag: int = 1) -> Scalar:
    """mean_t sign(x_t) sign(x_(t + lag)): -1 for an iterate that switches sides at every step.

    Args:
        series: The coordinate across a valley at consecutive steps, 0 at its floor, [t]: the
            component of the gradient, or of the displacement, along the top eigenvector.
        lag: In steps; with 2, +1 for an iterate that switches sides at every step.

    Example:
        >>> float(sign_autocorrelation(jnp.array([0.3, -0.1, 0.2, -0.4])))
        -1.0
    """
    signs = jnp.sign(series)
    return (signs[lag:] * signs[: len(signs) - lag]).mean()


def split_displacement(displacement: Params, directions: Params) -> tuple[Params, Params]:
    """(V V^T d, d - V V^T d): bouncing in the span of sharp directions, and drift orthogonal to it.

    Args:
        displacement: d, such as the difference of two iterates.
        directions: Orthonormal V, leaves [k, ...]: `Eigenpairs.vectors`.

    Example:
        >>> bounce, drift = split_displacement(jnp.array([3.0, 4.0]), jnp.array([[0.0, 1.0]]))
        >>> bounce.tolist(), drift.tolist()
        ([0.0, 4.0], [3.0, 0.0])
    """
    bounce = _combine(_coordinates(directions, displacement), directions)
    return bounce, optax.tree.sub(displacement, bounce)


def floor_across(
    loss: Callable[[Params], Scalar],
    params: Params,
    values: ArrayLike,
    directions: Params,
) -> tuple[Params, Scalar]:
    """(theta - sum_i v_i (v_i, g) / lambda_i, its loss): the valley floor below an iterate.

    One Newton step within the sharp directions, exact in a quadratic valley: the loss without the
    excess caused by bouncing. `valley_floor` descends in all directions.

    Args:
        loss: Of the full batch.
        params: theta.
        values: Eigenvalues lambda of the Hessian, [k]; directions with values that aren't positive
            have no floor and are ignored.
        directions: Their unit eigenvectors v, leaves [k, ...].

    Example:
        >>> loss = lambda p: 5.0 * p[0] ** 2 + p[1]
        >>> values, directions = jnp.array([10.0]), jnp.array([[1.0, 0.0]])
        >>> _, below = floor_across(loss, jnp.array([1.0, 2.0]), values, directions)
        >>> float(below)
        2.0
    """
    along = _coordinates(directions, jax.grad(loss)(params))
    curvature = jnp.asarray(values, along.dtype)
    positive = curvature > 0
    steps = jnp.where(positive, -along / jnp.where(positive, curvature, 1.0), 0.0)
    floor = optax.tree.add(params, _combine(steps, directions))
    return floor, loss(floor)


def _coordinates(directions, vector) -> Float[Array, " k"]:
    return jnp.asarray(jax.vmap(lambda v: optax.tree.vdot(v, vector))(directions))


def _combine(coefficients, directions):
    return jax.tree.map(lambda v: jnp.tensordot(coefficients.astype(v.dtype), v, 1), directions)
