"""What the paper watches in a diagonal net f(x) = <u * v, x>."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sgd_sparse_jax.types import Scalar


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


def imbalance(u: Float[Array, " d"], v: Float[Array, " d"]) -> Scalar:
    """| |u| - |v| |_2, the distance of the layers that the paper's code prints."""
    return jnp.linalg.norm(jnp.abs(u) - jnp.abs(v))


def diagonal_net_hessian(
    x: Float[Array, "n d"],
    y: Float[Array, " n"],
    u: Float[Array, " d"],
    v: Float[Array, " d"],
    *,
    balanced: bool = False,
    as_released: bool = False,
) -> Float[Array, "p p"]:
    """The Hessian of (1/2n) |X(u*v) - y|^2 in (u, v), 2d x 2d, in closed form.

    With G = X^T X and r = X^T (X(u*v) - y): blocks V G V, V G U + diag(r); U G V + diag(r), U G U,
    over n, U = diag(u). `balanced` takes it at |u| = |v| = sqrt|u*v|, same predictor.
    The paper's code exchanges U and V in the two outer blocks; `as_released` does so too. That is
    the Hessian only where u is a multiple of v.
    """
    if balanced:
        size = jnp.sqrt(jnp.abs(u * v))
        u, v = size * jnp.sign(u), size * jnp.sign(v)
    gram = x.T @ x
    residual = jnp.diag(x.T @ (x @ (u * v) - y))
    scaled = lambda rows, columns: rows[:, None] * gram * columns[None]
    upper = scaled(u, v) if as_released else scaled(v, u)
    upper = upper + residual
    return jnp.block([[scaled(v, v), upper], [upper.T, scaled(u, u)]]) / len(y)
