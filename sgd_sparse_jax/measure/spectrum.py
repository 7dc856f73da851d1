"""Singular values, and the ranks and norms derived from them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from sgd_sparse_jax.types import Scalar


# One matrix at a time: a batched LAPACK call waits for threads of XLA's pool, and two CPU devices
# that do so inside loops can deadlock (jaxlib 0.10.2).
@jax.custom_batching.sequential_vmap
def singular_values(matrix: Float[Array, "n p"]) -> Float[Array, " k"]:
    """All min(n, p) singular values, in descending order; NaN if the matrix isn't finite.

    With one CPU device per core, OPENBLAS_NUM_THREADS=1 makes this three times faster.

    Example:
        >>> singular_values(jnp.array([[0.0, 2.0], [3.0, 0.0]])).round(9).tolist()
        [3.0, 2.0]
    """
    finite = jnp.isfinite(matrix).all()  # LAPACK's result for NaN is undefined
    values = jnp.linalg.svd(jnp.where(finite, matrix, 0.0), compute_uv=False)
    return jnp.where(finite, values, jnp.nan)


def numerical_rank(matrix: Float[Array, "n p"], tol: ArrayLike) -> Int[Array, ""]:
    """The number of singular values above `tol` times the largest; -1 if the matrix isn't finite.

    Args:
        matrix: [n, p].
        tol: Threshold, relative to the largest singular value.

    Example:
        >>> int(numerical_rank(jnp.diag(jnp.array([1.0, 0.1, 1e-6])), 1e-4))
        2
    """
    s = singular_values(matrix)
    return jnp.where(jnp.isfinite(s[0]), (s > tol * s[0]).sum(), -1)


def effective_rank(s: Float[Array, " k"]) -> Scalar:
    """The entropy -sum p_i log p_i of p = s / sum s over singular values, in nats.

    0 for a matrix of rank one, log k for k equal values. Source: the effective rank of the paper's
    code; that of Roy & Vetterli (2007) is its exponential.

    Example:
        >>> round(float(jnp.exp(effective_rank(jnp.array([2.0, 2.0, 0.0])))), 6)
        2.0
    """
    p = s / s.sum()
    # Two `where`s: the gradient of log 0 is NaN even in the branch not taken.
    return -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum()


def schatten_sum(s: Float[Array, " k"], p: ArrayLike = 1.0) -> Scalar:
    """sum_i s_i^p over the positive singular values: the nuclear norm at p = 1, the rank at 0.

    Args:
        s: Singular values, [k].
        p: Exponent.

    Example:
        >>> float(schatten_sum(jnp.array([4.0, 1.0, 0.0]))), float(schatten_sum(jnp.ones(3), 0.0))
        (5.0, 3.0)
    """
    return jnp.where(s > 0, jnp.where(s > 0, s, 1.0) ** p, 0.0).sum()
