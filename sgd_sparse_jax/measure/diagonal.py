"""Metrics of a diagonal net f(x) = <u * v, x>."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sgd_sparse_jax.types import Scalar


def support_size(
    u: Float[Array, " d"], v: Float[Array, " d"], threshold: float = 1e-50
) -> Int[Array, ""]:
    """||u * v||_0, the number of entries with |u_i v_i| > `threshold`.

    Args:
        u: First layer, [d].
        v: Second layer, [d].
        threshold: Largest |u_i v_i| that counts as 0 (default: the paper's).

    Example:
        >>> int(support_size(jnp.array([1.0, 0.1, 0.0]), jnp.array([2.0, 1e-6, 3.0]), 1e-3))
        1
    """
    # In logarithms: float32 would round a threshold of 1e-50 to 0.
    log_product = jnp.log(jnp.abs(u)) + jnp.log(jnp.abs(v))
    return (log_product > (math.log(threshold) if threshold else -math.inf)).sum()


def balancedness(u: Float[Array, " d"], v: Float[Array, " d"]) -> Scalar:
    """||u^2 - v^2||_1, a constant of gradient flow; 0 where the two layers are balanced.

    A step of size eta multiplies entry i by 1 - eta^2 g_i^2, where g_i is the derivative of the
    loss with respect to (u * v)_i, so that large steps and noise decrease it.

    Args:
        u: First layer, [d].
        v: Second layer, [d].

    Example:
        >>> float(balancedness(jnp.array([2.0, 1.0]), jnp.array([1.0, 3.0])))
        11.0
    """
    return jnp.abs(u**2 - v**2).sum()
