"""Gradient descent on L(a, b) = (a^T b - Phi)^2 / 2, a shallow linear network, a and b in R^d.

With eps = a^T b - Phi, lambda = |a|^2 + |b|^2, s = (a + b) / sqrt(2) and q = (a - b) / sqrt(2), a
step of size eta is s -> (1 - eta eps) s, q -> (1 + eta eps) q: a map in (|s|, |q|). Q = 2 |s| |q|.

Source: Beneventano & Woodworth 2025 (arXiv 2501.09137); the closed forms below are derived from the
two lines above, and checked by `experiments.shallow_linear`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from . import stabilization


class Invariants(NamedTuple):
    """eps, lambda and Q, each [...]; lambda^2 = 4 (eps + Phi)^2 + Q^2.

    At a minimum lambda is the largest eigenvalue of the Hessian, which has rank one there.

    Example:
        >>> float(Invariants(eps=jnp.zeros(()), trace=jnp.ones(()), imbalance=jnp.ones(())).trace)
        1.0
    """

    eps: Array  #: a^T b - Phi
    trace: Array  #: lambda = |a|^2 + |b|^2
    imbalance: Array  #: Q = |a + b| |a - b|


def invariants(a: Float[Array, "... d"], b: Float[Array, "... d"], target: ArrayLike) -> Invariants:
    """(a^T b - Phi, |a|^2 + |b|^2, |a + b| |a - b|).

    Args:
        a: First layer, [..., d].
        b: Second layer, [..., d].
        target: Phi.

    Example:
        >>> found = invariants(jnp.array([2.0, 0.0]), jnp.array([1.0, 0.0]), target=1.0)
        >>> [float(each) for each in found]
        [1.0, 5.0, 3.0]
    """
    imbalance = jnp.linalg.norm(a + b, axis=-1) * jnp.linalg.norm(a - b, axis=-1)
    return Invariants((a * b).sum(-1) - target, (a**2).sum(-1) + (b**2).sum(-1), imbalance)


def next_invariants(now: Invariants, step_size: ArrayLike, target: ArrayLike) -> Invariants:
    """One step of gradient descent, exact for any step size.

    eps -> eps (1 - eta lambda + eta^2 eps (eps + Phi)), lambda -> (1 + eta^2 eps^2) lambda - 4 eta
    eps (eps + Phi), Q -> |1 - eta^2 eps^2| Q.

    Args:
        now: Those of the current parameters, each [...].
        step_size: eta.
        target: Phi.

    Example:
        >>> now = Invariants(jnp.array(-2.0), jnp.array(2.0), jnp.array(2.0))  # a^T b = 0, Phi = 2
        >>> [round(float(each), 4) for each in next_invariants(now, 0.1, 2.0)]
        [-1.6, 2.08, 1.92]
    """
    eps, trace, imbalance = now
    product, eta = eps + target, jnp.asarray(step_size)
    growth = (eta * eps) ** 2
    return Invariants(
        eps * (1 - eta * trace + eta**2 * eps * product),
        (1 + growth) * trace - 4 * eta * eps * product,
        jnp.abs(1 - growth) * imbalance,
    )


def sharpness(target: ArrayLike, imbalance: ArrayLike, shrinkage: ArrayLike = 1.0) -> Array:
    """sqrt(4 Phi^2 + (Q_0 prod_t |1 - eta^2 eps_t^2|)^2): lambda at the minimum that is reached.

    Args:
        target: Phi; a^T b in its place is exact before convergence, too.
        imbalance: Q_0.
        shrinkage: The product; 1 for gradient flow, which conserves Q. It is below 1, and the
            minimum flatter, if eta |eps_t| < sqrt(2) in all steps; not in general.

    Example:
        >>> float(sharpness(2.0, 3.0)), float(sharpness(2.0, 3.0, shrinkage=0.0))
        (5.0, 4.0)
    """
    return jnp.sqrt(4 * jnp.square(target) + jnp.square(jnp.multiply(imbalance, shrinkage)))


def slow_error(step: ArrayLike, target: ArrayLike) -> Array:
    """Phi / sqrt(2 t): |eps_t| at eta = 1 / Phi, the largest step size that converges, as t grows.

    No larger step size converges to a minimum, since lambda >= 2 Phi there. Starts with small Q_0
    approach it late; those with Q_0 = 0 have another constant.

    Args:
        step: t, from 1.
        target: Phi, positive.

    Example:
        >>> float(slow_error(2, 4.0))
        2.0
    """
    return jnp.asarray(target) / jnp.sqrt(2 * jnp.asarray(step, float))


def level(step_size: ArrayLike, target: ArrayLike) -> Array:
    """2 Phi^2 times the level of `stabilization` at eta Phi: the mean loss for eta > 1 / Phi.

    There Q vanishes, and |s| / sqrt(2 Phi) follows the one-dimensional map; Phi^2 (1 - (eta
    Phi)^-2) / 4 while the period is 2, and NaN where that has no closed form.

    Args:
        step_size: eta.
        target: Phi, positive.

    Example:
        >>> round(float(level(0.6, 2.0)), 4)  # eta Phi = 1.2
        0.3056
    """
    phi, eta = jnp.asarray(target), jnp.asarray(step_size)
    return 2 * phi**2 * stabilization.level(phi * eta)
