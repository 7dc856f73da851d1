"""The Jacobian of the predictions with respect to the parameters, and its rank."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from sgd_sparse_jax._types import Params


def jacobian(
    predict: Callable[[Params, jax.Array], jax.Array], params: Params, x: Float[Array, "n ..."]
) -> Float[Array, "n p"]:
    """d predict(params, x_i) / d params, one row per example; `predict` is scalar per example."""
    gradient = jax.grad(lambda params, x_i: predict(params, x_i[None]).sum())
    rows = jax.vmap(gradient, (None, 0))(params, x)
    return jax.vmap(lambda row: ravel_pytree(row)[0])(rows)


def diagonal_net_jacobian(
    x: Float[Array, "n d"], u: Float[Array, " d"], v: Float[Array, " d"]
) -> Float[Array, "n d"]:
    """X diag(sqrt(u^2 + v^2)): as many columns as inputs, the singular values of [X*v, X*u].

    Give the R of X = QR in place of X: same singular values, at most d rows.
    """
    return x * jnp.hypot(u, v)[None]


# One matrix at a time: a batched LAPACK call spreads over XLA's thread pool and waits for it, and
# two CPU devices that do so inside loops can wait for each other for ever (jaxlib 0.10.2).
@jax.custom_batching.sequential_vmap
def singular_values(matrix: Float[Array, "n p"]) -> Float[Array, " k"]:
    """All min(n, p) singular values, in descending order; NaN where the matrix isn't finite."""
    return jnp.linalg.svd(matrix, compute_uv=False)


def numerical_rank(matrix: Float[Array, "n p"], tol: float) -> Int[Array, ""]:
    """How many singular values exceed `tol` times the largest; -1 where the matrix isn't finite."""
    s = singular_values(matrix)
    return jnp.where(jnp.isfinite(s[0]), (s > tol * s[0]).sum(), -1)
