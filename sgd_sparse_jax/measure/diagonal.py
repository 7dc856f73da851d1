"""Observables of a diagonal net f(x) = <u * v, x>."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sgd_sparse_jax.types import Scalar


def support_size(
    u: Float[Array, " d"], v: Float[Array, " d"], threshold: float = 1e-50
) -> Int[Array, ""]:
    """||u * v||_0, the number of entries with |u_i v_i| > `threshold` (default: the paper's).

    Example:
        >>> int(support_size(jnp.array([1.0, 0.1, 0.0]), jnp.array([2.0, 1e-6, 3.0]), 1e-3))
        1
    """
    # As logarithms: float32 has no positive numbers below 1e-38, and would round 1e-50 to 0.
    log_product = jnp.log(jnp.abs(u)) + jnp.log(jnp.abs(v))
    return (log_product > (math.log(threshold) if threshold else -math.inf)).sum()


def balancedness(u: Float[Array, " d"], v: Float[Array, " d"]) -> Scalar:
    """||u^2 - v^2||_1, a constant of gradient flow; 0 where the two layers are balanced.

    A step of size eta multiplies entry i by 1 - eta^2 g_i^2, with g_i the derivative of the loss by
    (u * v)_i: large steps and noise shrink it.

    Example:
        >>> float(balancedness(jnp.array([2.0, 1.0]), jnp.array([1.0, 3.0])))
        11.0
    """
    return jnp.abs(u**2 - v**2).sum()


def imbalance(u: Float[Array, " d"], v: Float[Array, " d"]) -> Scalar:
    """| |u| - |v| |_2, the distance between the layers that the paper's code prints.

    Example:
        >>> float(imbalance(jnp.array([3.0, -1.0]), jnp.array([0.0, 5.0])))
        5.0
    """
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

    `balanced` takes it at |u| = |v| = sqrt|u*v|, the same predictor. `as_released` exchanges u and
    v in the two off-diagonal blocks, as the paper's code does: that is the Hessian only where u is
    a multiple of v.

    Example:
        >>> one = jnp.ones(1)
        >>> diagonal_net_hessian(one[None], 0 * one, one, 2 * one).tolist()
        [[4.0, 4.0], [4.0, 1.0]]
    """
    if balanced:
        size = jnp.sqrt(jnp.abs(u * v))
        u, v = size * jnp.sign(u), size * jnp.sign(v)
    gram = x.T @ x
    residual = jnp.diag(x.T @ (x @ (u * v) - y))
    scaled = lambda rows, columns: rows[:, None] * gram * columns[None]
    # Blocks V G V, V G U + R; U G V + R, U G U over n, with U = diag(u) and G = X^T X.
    upper = (scaled(u, v) if as_released else scaled(v, u)) + residual
    return jnp.block([[scaled(v, v), upper], [upper.T, scaled(u, u)]]) / len(y)
