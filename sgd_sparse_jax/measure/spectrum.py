"""Singular values, eigenvalues, and the numbers made of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from sgd_sparse_jax.types import Scalar


# One matrix at a time: a batched LAPACK call spreads over XLA's thread pool and waits for it, and
# two CPU devices that do so inside loops can wait for each other for ever (jaxlib 0.10.2).
@jax.custom_batching.sequential_vmap
def singular_values(matrix: Float[Array, "n p"]) -> Float[Array, " k"]:
    """All min(n, p) singular values, in descending order; NaN where the matrix isn't finite.

    With several CPU devices, OPENBLAS_NUM_THREADS=1 makes them three times faster: each device
    has a core of its own already.
    """
    finite = jnp.isfinite(matrix).all()
    values = jnp.linalg.svd(jnp.where(finite, matrix, 0.0), compute_uv=False)
    return jnp.where(finite, values, jnp.nan)


@jax.custom_batching.sequential_vmap
def symmetric_eigenvalues(matrix: Float[Array, "p p"]) -> Float[Array, " p"]:
    """Eigenvalues of (A + A^T) / 2, in ascending order."""
    return jnp.linalg.eigvalsh(matrix)


def numerical_rank(matrix: Float[Array, "n p"], tol: ArrayLike) -> Int[Array, ""]:
    """How many singular values exceed `tol` times the largest; -1 where the matrix isn't finite."""
    return rank_of(singular_values(matrix), tol)


def rank_of(s: Float[Array, " k"], tol: ArrayLike) -> Int[Array, ""]:
    """The rank that singular values in descending order tell: those above `tol` s_1; -1 if NaN."""
    return jnp.where(jnp.isfinite(s[0]), (s > tol * s[0]).sum(), -1)


def effective_rank(s: Float[Array, " k"]) -> Scalar:
    """The entropy -sum p_i log p_i of p = s / sum s over singular values, in nats.

    0 for a matrix of rank one, log k for k equal values. The paper's code calls this the effective
    rank; Roy & Vetterli (2007) call so its exponential.
    """
    p = s / s.sum()
    return -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum()


def schatten_sum(s: Float[Array, " k"], p: ArrayLike = 1.0) -> Scalar:
    """sum_i s_i^p over the positive singular values: the nuclear norm at p = 1, the rank at 0."""
    return jnp.where(s > 0, jnp.where(s > 0, s, 1.0) ** p, 0.0).sum()
