"""Means and ratios of means over samples, with their standard errors."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

FEWEST = 16  # samples for a reliable standard error


class Estimate(NamedTuple):
    """A number from random samples, and its standard error.

    Example:
        >>> Estimate(2.0, 0.1, samples=64).converged
        False
    """

    value: float
    standard_error: float  # NaN from one sample
    samples: int
    converged: bool = False  # whether the requested tolerance was reached


def mean_estimate(samples: Float[np.ndarray, " m"], tol: float = 0.0) -> Estimate:
    """mean x_i with standard error std(x) / sqrt(m), for independent samples.

    Args:
        samples: x, [m].
        tol: Relative standard error at which the estimate is `converged`; default: never.

    Example:
        >>> mean_estimate(np.array([1.0, 3.0]))
        Estimate(value=2.0, standard_error=1.0, samples=2, converged=False)
    """
    error = samples.std(ddof=1) / np.sqrt(len(samples)) if len(samples) > 1 else np.nan
    return _estimate(samples.mean(), error, len(samples), tol)


@np.errstate(divide="ignore", invalid="ignore")  # 0 / 0 is NaN
def ratio_estimate(
    above: Float[np.ndarray, " m"], below: Float[np.ndarray, " m"], tol: float = 0.0
) -> Estimate:
    """mean(a) / mean(b) with its jackknife standard error, for independent pairs (a_i, b_i).

    The error is that of the ratio of means, not of the mean of ratios, which is a different
    quantity. Source: Efron & Stein, 1981.

    Args:
        above: a, [m].
        below: b, [m].
        tol: Relative standard error at which the estimate is `converged`; default: never.

    Example:
        >>> ratio_estimate(np.array([2.0, 4.0]), np.array([1.0, 2.0])).value
        2.0
    """
    m, error = len(above), np.nan
    if m > 1:
        without = (above.sum() - above) / (below.sum() - below)
        error = np.sqrt((m - 1) * without.var())
    return _estimate(above.sum() / below.sum(), error, m, tol)


def _estimate(value, error, samples: int, tol: float) -> Estimate:
    converged = bool(error <= tol * abs(value)) if tol > 0 else False  # NaN: not converged
    return Estimate(float(value), float(error), samples, converged)
