"""Gradient descent on L(theta) = (1 - theta^2)^2 / 4, the model of loss stabilization.

The map theta -> theta + eta theta (1 - theta^2) converges for eta < 1, alternates between two
points for 1 < eta < sqrt(5) - 1, doubles its period from there on, and is chaotic with periodic
windows above 1.3022. With label noise of variance s^2 it is theta + eta theta (1 + xi - theta^2).

Source: Andriushchenko et al. 2023 (arXiv 2210.05337), section 2, for the map; the closed forms
below are derived from it, and checked by `experiments.loss_stabilization`.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

DOUBLINGS = (1.0, math.sqrt(5) - 1, 1.2880317545, 1.2992279397, 1.3016289140)
VALLEYS_JOIN = 1.5 * math.sqrt(3) - 1  # the iterates change sign above only


def map_step(theta: ArrayLike, step_size: ArrayLike, noise: ArrayLike = 0.0) -> Array:
    """theta + eta theta (1 + xi - theta^2): a step of gradient descent with label noise xi.

    Without noise it stays bounded for |theta| < sqrt(1 + 2 / eta) if eta <= 2.

    Args:
        theta: The parameter.
        step_size: eta.
        noise: xi, that of this step.

    Example:
        >>> float(map_step(0.5, 1.0))
        0.875
    """
    theta = jnp.asarray(theta)
    return theta + step_size * theta * (1 + noise - theta**2)


def period(step_size: float) -> int:
    """2^k, where k of `DOUBLINGS` are smaller than `step_size`: the period of the attractor.

    Known up to 1.302, below the doubling from 32 to 64. The first two doublings are 1 and
    sqrt(5) - 1, the others roots of (f^p)' = -1 on the cycle of period p.

    Args:
        step_size: eta, in (0, 1.302].

    Raises:
        ValueError: If eta is outside this interval.

    Example:
        >>> period(0.5), period(1.2), period(1.3)
        (1, 2, 16)
    """
    if not 0 < step_size <= 1.302:
        raise ValueError(f"step_size is {step_size}; the period is predicted in (0, 1.302].")
    return 2 ** sum(step_size > doubling for doubling in DOUBLINGS)


def two_cycle(step_size: ArrayLike) -> tuple[Array, Array]:
    """(sqrt(1 + 3 / eta) -+ sqrt(1 - 1 / eta)) / 2: the points that alternate; NaN for eta < 1.

    They attract for 1 < eta < sqrt(5) - 1.

    Example:
        >>> low, high = two_cycle(1.2)
        >>> bool(jnp.isclose(map_step(low, 1.2), high))
        True
    """
    eta = jnp.asarray(step_size, float)
    middle, half = jnp.sqrt(1 + 3 / eta), jnp.sqrt(1 - 1 / eta)
    return (middle - half) / 2, (middle + half) / 2


def level(step_size: ArrayLike) -> Array:
    """(1 - eta^-2) / 8: the mean loss at which the map stabilizes.

    0 up to eta = 1; the formula up to sqrt(5) - 1; 1/8 at eta = 2, where the map is sin(phi) ->
    sin(3 phi) in theta = sqrt(2) sin(phi); NaN elsewhere.

    Example:
        >>> round(float(level(1.2)), 6)
        0.038194
    """
    eta = jnp.asarray(step_size, float)
    cycle = jnp.where(eta <= DOUBLINGS[1], (1 - eta**-2) / 8, jnp.nan)
    return jnp.where(eta <= 1, 0.0, jnp.where(eta == 2, 0.125, cycle))


def lyapunov_exponent(step_size: ArrayLike) -> Array:
    """lim mean_t ln |f'(theta_t)|: ln |1 - 2 eta| up to eta = 1, ln 3 at eta = 2.

    Up to sqrt(5) - 1 it is ln |9 - 2 (1 + eta)^2| / 2, of the cycle of period 2; NaN elsewhere.

    Example:
        >>> float(lyapunov_exponent(1.0))
        0.0
    """
    eta = jnp.asarray(step_size, float)
    cycle = jnp.where(eta <= DOUBLINGS[1], jnp.log(jnp.abs(9 - 2 * (1 + eta) ** 2)) / 2, jnp.nan)
    cycle = jnp.where(eta == 2, math.log(3), cycle)
    return jnp.where(eta <= 1, jnp.log(jnp.abs(1 - 2 * eta)), cycle)


def label_noise_level(step_size: ArrayLike, noise: ArrayLike) -> Array:
    """eta s^2 / (4 (1 - eta)): the stationary mean loss with label noise of standard deviation s.

    First order in s^2, for eta < 1 (NaN from there on): within 2 % for eta <= .5 and s <= .1, and
    too high near eta = 1.

    Args:
        step_size: eta.
        noise: s.

    Example:
        >>> round(float(label_noise_level(0.2, 0.1)), 8)
        0.000625
    """
    eta = jnp.asarray(step_size, float)
    return jnp.where(eta < 1, eta * jnp.square(noise) / (4 * (1 - eta)), jnp.nan)


def largest_step_size(noise: float) -> float:
    """The root eta of (4/27) (1 + eta (1 + s))^3 = 2 + eta (1 - s); 2 without noise.

    No run with label noise xi = +-s diverges up to it. Gaussian noise has no such bound.

    Example:
        >>> round(largest_step_size(0.0), 9)
        2.0
    """
    from scipy.optimize import root_scalar

    excess = lambda eta: 4 / 27 * (1 + eta * (1 + noise)) ** 3 - 2 - eta * (1 - noise)
    return root_scalar(excess, bracket=(0.0, 2.0), xtol=1e-12).root


def random_step_threshold(spread: ArrayLike) -> Array:
    """1 / (1 - kappa^2): the step size above which xi = +-kappa (1 - theta^2) stabilizes the loss.

    Such noise vanishes at the minimum, as that of SGD does if all examples are fitted. The minimum
    attracts almost surely where E ln |1 - 2 eta (1 +- kappa)| < 0, although second moments grow
    from 1 / (1 + kappa^2) on. Valid for kappa < 1 / sqrt(2); NaN above.

    Example:
        >>> float(random_step_threshold(0.6))
        1.5625
    """
    kappa = jnp.asarray(spread, float)
    return jnp.where(kappa < math.sqrt(0.5), 1 / (1 - kappa**2), jnp.nan)
