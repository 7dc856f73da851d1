"""SGD without replacement: what the order of the batches in an epoch adds to gradient descent.

An epoch has k steps of size eta on batches with losses l_1, ..., l_k and gradients g_i, each once.

Source: Beneventano 2023 (arXiv 2312.16143) for the drift; the other closed forms are derived, and
all are checked by `experiments.without_replacement`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from sgd_sparse_jax.types import Scalar

Losses = Callable[[Float[Array, " p"]], Float[Array, " k"]]


def gradient_variance(losses: Losses, params: Float[Array, " p"]) -> Scalar:
    """tr Cov(g) = mean_i |g_i|^2 - |mean_i g_i|^2 of the gradients of the k batch losses.

    Args:
        losses: params -> the loss of each batch, [k].
        params: theta, [p].

    Example:
        >>> target = jnp.array([-1.0, 1.0])
        >>> float(gradient_variance(lambda p: (p[0] - target) ** 2 / 2, jnp.array([3.0])))
        1.0
    """
    gradients = jax.jacobian(losses)(params)
    return ((gradients - gradients.mean(0, keepdims=True)) ** 2).sum() / len(gradients)


def reshuffling_drift(
    losses: Losses, params: Float[Array, " p"], step_size: ArrayLike
) -> Float[Array, " p"]:
    """-(eta^2 k / 4) grad tr Cov(g): mean of an epoch without replacement, minus k steps of GD.

    The error is O(eta^3); so is the drift with replacement. The mean is over all orders of fixed
    batches. One order and its reverse have this mean too, up to O(eta^3).

    Args:
        losses: params -> the loss of each batch, [k].
        params: theta at the start of the epoch, [p].
        step_size: eta.

    Example:
        >>> slopes = jnp.array([1.0, 3.0])
        >>> losses = lambda p: slopes * p[0] ** 2 / 2  # tr Cov = p^2, k = 2
        >>> round(float(reshuffling_drift(losses, jnp.array([2.0]), 0.1)[0]), 6)
        -0.02
    """
    k = jax.eval_shape(losses, params).shape[0]
    gradient = jax.grad(lambda p: gradient_variance(losses, p))(params)
    return -(jnp.asarray(step_size) ** 2) * k / 4 * gradient


def batch_factor(examples: int, batch: int) -> float:
    """(n - b) / (b (n - 1)): tr Cov of random batches of b distinct examples, over that of one.

    Args:
        examples: n, 2 or more.
        batch: b, from 1 to n.

    Raises:
        ValueError: If n or b is not as above.

    Example:
        >>> batch_factor(6, 2)
        0.4
    """
    if not (1 <= batch <= examples and examples > 1):
        raise ValueError(f"There are no batches of {batch} distinct examples of {examples}.")
    return (examples - batch) / (batch * (examples - 1))


def stationary_variance(step_size: ArrayLike) -> Array:
    """eta / (2 - eta): variance of SGD with replacement on (theta - c_i)^2 / 2, c_i = +-1.

    Example:
        >>> float(stationary_variance(1.0))
        1.0
    """
    eta = jnp.asarray(step_size)
    return eta / (2 - eta)


def flat_shrinkage(step_size: ArrayLike, slope: ArrayLike, batches: ArrayLike) -> Array:
    """(1 - eta^2 s^2)^(k / 2): factor of z per epoch on l_i = +-s z^2 / 2, half of either sign.

    Exact for any order without replacement. The mean loss is 0: gradient descent doesn't move, and
    with replacement E z is constant.

    Args:
        step_size: eta.
        slope: s.
        batches: k, the even number of batches in an epoch.

    Example:
        >>> float(flat_shrinkage(0.5, 1.0, 2))
        0.75
    """
    return (1 - jnp.square(jnp.multiply(step_size, slope))) ** (jnp.asarray(batches) / 2)


def valley_rate(step_size: ArrayLike, noise: ArrayLike) -> Array:
    """eta^2 s^2: rate per step at which u^2 - v^2 decays on l_i = (u v - 1 -+ s)^2 / 2.

    Each step multiplies it by 1 - eta^2 r^2, where r is the residual: to leading order in eta the
    same for all orders, with and without replacement.

    Args:
        step_size: eta.
        noise: s.

    Example:
        >>> float(valley_rate(0.5, 1.0))
        0.25
    """
    return jnp.square(jnp.multiply(step_size, noise))
