"""Means and ratios of means over samples, with their standard errors."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

FEWEST = 16  # samples for a reliable standard error


class Estimate(NamedTuple):
    """A number from random samples, and its standard error.

    Example:
        >>> Estimate(2.0, 0.1, samples=64).converged
        False
    """

    value: float  #: the mean, or the ratio of means
    standard_error: float  #: NaN from one sample
    samples: int  #: number of independent samples
    converged: bool = False  #: whether the requested tolerance was reached


@np.errstate(divide="ignore", invalid="ignore")  # 0 / 0 is NaN
def mean_and_error(samples: Any, where: Any = True) -> tuple[Any, Any]:
    """(mean x_i, std(x) / sqrt(m)) over the last axis, for independent samples.

    The error is NaN for one sample. Compatible with jit and vmap.

    Args:
        samples: x, [..., m], of NumPy or of JAX.
        where: Mask [..., m] of the samples that count (default: all).

    Example:
        >>> [float(v) for v in mean_and_error(np.array([1.0, 3.0]))]
        [2.0, 1.0]
    """
    count = samples.shape[-1] if where is True else where.sum(-1)
    mean = samples.sum(-1, where=where) / count
    squares = ((samples - mean[..., None]) ** 2).sum(-1, where=where)
    return mean, (squares / (count - 1) / count) ** 0.5


@np.errstate(divide="ignore", invalid="ignore")
def ratio_and_error(above: Any, below: Any) -> tuple[Any, Any]:
    """mean(a) / mean(b) and its jackknife standard error over the last axis.

    The error is that of the ratio of means, not of the mean of ratios, which is a different
    quantity; NaN for one pair. Compatible with jit and vmap. Source: Efron & Stein, 1981.

    Args:
        above: a, [..., m], of NumPy or of JAX; pairs (a_i, b_i) are independent.
        below: b, [..., m].

    Example:
        >>> [float(v) for v in ratio_and_error(np.array([2.0, 4.0]), np.array([1.0, 2.0]))]
        [2.0, 0.0]
    """
    a, b = (each.sum(-1, keepdims=True) for each in (above, below))
    without = (a - above) / (b - below)
    return (a / b)[..., 0], ((above.shape[-1] - 1) * without.var(-1)) ** 0.5


def mean_estimate(samples: Float[np.ndarray, " m"], tol: float = 0.0) -> Estimate:
    """mean x_i, as of `mean_and_error`.

    Args:
        samples: x, [m].
        tol: Relative standard error at which the estimate is `converged`; default: never.

    Example:
        >>> mean_estimate(np.array([1.0, 3.0]))
        Estimate(value=2.0, standard_error=1.0, samples=2, converged=False)
    """
    return _estimate(*mean_and_error(samples), len(samples), tol)


def ratio_estimate(
    above: Float[np.ndarray, " m"], below: Float[np.ndarray, " m"], tol: float = 0.0
) -> Estimate:
    """mean(a) / mean(b), as of `ratio_and_error`.

    Args:
        above: a, [m].
        below: b, [m].
        tol: Relative standard error at which the estimate is `converged`; default: never.

    Example:
        >>> ratio_estimate(np.array([2.0, 4.0]), np.array([1.0, 2.0])).value
        2.0
    """
    return _estimate(*ratio_and_error(above, below), len(above), tol)


def _estimate(value, error, samples: int, tol: float) -> Estimate:
    converged = bool(error <= tol * abs(value)) if tol > 0 else False  # NaN: not converged
    return Estimate(float(value), float(error), samples, converged)
