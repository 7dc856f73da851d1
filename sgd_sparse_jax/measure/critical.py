"""Critical step sizes, above which a step along a direction, or SGD on a quadratic, ascends."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from sgd_sparse_jax.types import Params

from .operators import as_tree, value_of


class Critical(NamedTuple):
    """The step size eta_c at which a step no longer lowers the loss, as a sharpness 2 / eta_c.

    Example:
        >>> Critical(4.0, 0.5, converged=True).sharpness
        4.0
    """

    sharpness: float  #: 2 / step_size
    step_size: float  #: eta_c
    converged: bool  #: the last step of the search changed it by less than `tol`


def critical_sharpness(
    loss: Callable[..., Any],
    params: Params,
    direction: Params,
    *args: Any,
    guess: float = 1.0,
    tol: float = 1e-2,
    passes: int = 6,
) -> Critical:
    """2 / eta_c, where L(params + eta_c direction) = L(params): sharpness from forward passes.

    For the direction -g of gradient descent it is g^T H g / |g|^2 on quadratics, found exactly in
    four passes: the mean slope (L(eta) - L(0)) / eta is linear in eta there, and the search is a
    secant method for its zero, bracketed between steps that lower and steps that raise the loss.
    Source: Kalra et al., 2026 (arXiv 2601.16979).

    Args:
        loss: `loss(params, *args)`, or an objective, whose first output is taken.
        params: The parameters at which the steps begin.
        direction: Of descent: -gradient, or a whole update of an optimizer.
        args: Data, arguments of the compiled program.
        guess: First step size to try, such as an earlier eta_c.
        tol: Relative change of eta_c below which it is `converged`.
        passes: Largest number of evaluations of the loss.

    Raises:
        ValueError: If `guess` isn't a positive number.
        FloatingPointError: If the loss at `params`, or the direction, isn't finite.

    Example:
        >>> loss = lambda p: 3.0 * p**2
        >>> round(critical_sharpness(loss, jnp.array(1.0), jnp.array(-6.0)).sharpness, 4)
        6.0
    """
    if not 0 < guess < np.inf:
        raise ValueError(f"guess = {guess}; give a positive step size.")
    at = lambda eta: float(_value_at(as_tree(loss), params, direction, args, eta))
    base = at(0.0)
    if not np.isfinite(base):
        raise FloatingPointError(
            f"The loss at the parameters is {base}; check that the direction is finite, too."
        )
    low, high, eta, last = 0.0, np.inf, guess, None
    change, secant = np.inf, False
    for _ in range(passes - 1):
        slope, zero = (at(eta) - base) / eta, np.nan
        rises = not slope < 0  # also where the loss overflows
        low, high = (low, min(high, eta)) if rises else (max(low, eta), high)
        if last is not None and (slope - last[1]) / (eta - last[0]) > 0 and np.isfinite(slope):
            zero = eta - slope * (eta - last[0]) / (slope - last[1])
        last = (eta, slope) if np.isfinite(slope) else last
        secant = low <= zero <= high and zero > 0
        if secant:
            proposal = zero
        elif not low or high == np.inf:
            proposal = eta / 2 if rises else eta * 2
        else:
            proposal = (low + high) / 2
        change, eta = abs(proposal / eta - 1), float(proposal)
        if secant and change <= tol * 1e-3:
            break
    return Critical(2 / eta, eta, bool(secant and change <= tol))


def critical_step_size(
    curvature: ArrayLike, variance: ArrayLike = 0.0, momentum: ArrayLike = 0.0
) -> Float[Array, "..."]:
    """eta_max of SGD with momentum beta on h x^2 / 2, with h random of mean a and variance s^2.

    1 / eta_max = a / (2 (1 + beta)) + s^2 / (2 a (1 - beta)); E x^2 stays bounded for smaller
    steps. For full batches it is 2 (1 + beta) / a. Derived from the operator of the second moments
    of (x_t, x_(t-1)); the two regimes are those of arXiv 2604.14108.

    Args:
        curvature: a, positive.
        variance: s^2, over batches (default: full batches).
        momentum: beta of heavy-ball momentum, v <- beta v + g.

    Example:
        >>> [float(critical_step_size(10.0, 0.0, beta)) for beta in (0.0, 0.5)]
        [0.2, 0.3]
    """
    a, beta = jnp.asarray(curvature), jnp.asarray(momentum)
    return 1 / (a / (2 * (1 + beta)) + variance / (2 * a * (1 - beta)))


@jax.jit
def _value_at(loss, params, direction, args, eta):
    moved = jax.tree.map(lambda p, d: p + jnp.asarray(eta, p.dtype) * d, params, direction)
    return value_of(loss(moved, *args))
