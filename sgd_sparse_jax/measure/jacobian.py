"""The Jacobian of the predictions with respect to the parameters, and smaller ones of its kind.

A function named after a network returns a matrix with the Jacobian's singular values (besides
zeros) and fewer columns: J and J Q have the same ones where Q Q^T = I on the rows of J.
"""

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


def two_layer_jacobian(
    x: Float[Array, "n d"],
    kernel: Float[Array, "d m"],
    outgoing: Float[Array, " m"],
    bias: Float[Array, " m"] | None = None,
) -> Float[Array, "n k"]:
    """The Jacobian of x -> sum_j w_j relu(<kernel_j, x> + bias_j), d (+ 1) columns per unit.

    With w `outgoing` and c_j = (kernel_j, bias_j), the d + 2 columns of unit j are
    1[active] x~ [w_j I, c_j] for x~ = (x, 1): their Gram matrix is that of
    x~ (w_j^2 I + c_j c_j^T)^(1/2), whose root is in closed form. Without a bias: x~ = x.
    """
    if bias is not None:
        x = jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], axis=1)
        kernel = jnp.concatenate([kernel, bias[None]])
    active = (x @ kernel > 0).astype(x.dtype)
    square = (kernel**2).sum(0)
    along = jnp.where(square > 0, jnp.hypot(outgoing, jnp.sqrt(square)) - jnp.abs(outgoing), 0.0)
    along = along / jnp.where(square > 0, square, 1.0)
    root = jnp.abs(outgoing)[None, None] * jnp.eye(len(kernel), dtype=x.dtype)[:, :, None]
    root += along[None, None] * kernel[:, None] * kernel[None]  # [d, d, units]
    columns = jnp.einsum("nd,dem->nem", x, root) * active[:, None]
    return columns.reshape(len(x), -1)


def gradient_dimension(
    kept: Callable[[Float[Array, "g m"]], Array], columns: Float[Array, "n g m"]
) -> Int[Array, ""]:
    """How many of m units move differently: units of distinct squared gradient norms, g each.

    `columns` are the Jacobian's, by group (weight, bias, outgoing weight) and unit; `kept` tells
    the distinct columns of a matrix: `partial(distinct_units, corr_threshold=0.999)`.
    Source: gradient-matrix dimension of the paper's 1-D regression.
    """
    return kept((columns**2).sum(0)).sum()
