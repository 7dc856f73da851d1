"""What the paper watches in a diagonal net f(x) = <u * v, x>."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sgd_sparse_jax._types import Scalar


def support_size(
    u: Float[Array, " d"], v: Float[Array, " d"], threshold: float = 1e-50
) -> Int[Array, ""]:
    """||u * v||_0: entries above `threshold` in size. Needs float64: 1e-50 is 0 in float32."""
    return (jnp.abs(u * v) > threshold).sum()


def balancedness(u: Float[Array, " d"], v: Float[Array, " d"]) -> Scalar:
    """||u^2 - v^2||_1, which gradient flow conserves; 0 where the two layers are balanced.

    A step of size eta multiplies entry i by exactly 1 - eta^2 g_i^2, with g_i the derivative of
    the batch's loss by (u * v)_i: large steps and noise shrink it, and with it small entries.
    """
    return jnp.abs(u**2 - v**2).sum()
