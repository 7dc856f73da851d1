"""The Jacobian of the predictions with respect to the parameters, and smaller equivalents.

Functions named after a network return a matrix with fewer columns and the same nonzero singular
values: those of J Q are those of J if Q Q^T = I on the rows of J.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from sgd_sparse_jax.types import Params


def jacobian(
    predict: Callable[[Params, jax.Array], jax.Array], params: Params, x: Float[Array, "n ..."]
) -> Float[Array, "n p"]:
    """d predict(params, x_i) / d params, one row per example.

    Args:
        predict: (params, x) -> one output per example, [n].
        params: The parameters at which the Jacobian is taken, p numbers in all.
        x: Inputs, [n, ...].

    Example:
        >>> predict = lambda params, x: x @ params["w"]
        >>> jacobian(predict, {"w": jnp.zeros(2)}, jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [[1.0, 2.0], [3.0, 4.0]]
    """
    gradient = jax.grad(lambda params, x_i: predict(params, x_i[None]).sum())
    rows = jax.vmap(gradient, (None, 0))(params, x)
    return jax.vmap(lambda row: ravel_pytree(row)[0])(rows)


def diagonal_net_jacobian(
    x: Float[Array, "n d"], u: Float[Array, " d"], v: Float[Array, " d"]
) -> Float[Array, "n d"]:
    """X diag(sqrt(u^2 + v^2)), whose singular values are those of the Jacobian [X*v, X*u].

    Args:
        x: Inputs, [n, d]; R of X = QR, with at most d rows, gives the same singular values.
        u: First layer, [d].
        v: Second layer, [d].

    Example:
        >>> u, v = jnp.array([3.0, 0.0]), jnp.array([4.0, 1.0])
        >>> diagonal_net_jacobian(jnp.array([[1.0, 2.0]]), u, v).tolist()
        [[5.0, 2.0]]
    """
    return x * jnp.hypot(u, v)[None]


def two_layer_jacobian(
    x: Float[Array, "n d"],
    kernel: Float[Array, "d m"],
    outgoing: Float[Array, " m"],
    bias: Float[Array, " m"] | None = None,
) -> Float[Array, "n k"]:
    """The Jacobian of sum_j w_j relu(<kernel_j, x> + bias_j), in d (+ 1) columns per unit.

    Args:
        x: Inputs, [n, d].
        kernel: Weights of the m units, one per column, [d, m].
        outgoing: w, the weights of the output, [m].
        bias: Those of the units, [m] (default: a layer without biases).

    Returns:
        [n, d m], or [n, (d + 1) m] with biases.

    Example:
        >>> kernel, outgoing = jnp.array([[3.0, -1.0]]), jnp.array([4.0, 2.0])
        >>> two_layer_jacobian(jnp.ones((1, 1)), kernel, outgoing).tolist()  # the second is off
        [[5.0, 0.0]]
    """
    if bias is not None:
        x = jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], axis=1)
        kernel = jnp.concatenate([kernel, bias[None]])
    # With c = (kernel_j, bias_j), the d + 2 columns of unit j are 1[active] (x, 1) [w I, c]: their
    # Gram matrix is that of (x, 1) (w^2 I + c c^T)^(1/2), and this root has a closed form.
    active = (x @ kernel > 0).astype(x.dtype)
    square = (kernel**2).sum(0)
    along = jnp.where(square > 0, jnp.hypot(outgoing, jnp.sqrt(square)) - jnp.abs(outgoing), 0.0)
    along = along / jnp.where(square > 0, square, 1.0)
    root = jnp.abs(outgoing)[None, None] * jnp.eye(len(kernel), dtype=x.dtype)[:, :, None]
    root += along[None, None] * kernel[:, None] * kernel[None]  # [d, d, units]
    columns = jnp.einsum("nd,dem->nem", x, root) * active[:, None]
    return columns.reshape(len(x), -1)


def gradient_dimension(
    distinct: Callable[[Float[Array, "n m"]], Array], columns: Float[Array, "n g m"]
) -> Int[Array, ""]:
    """The number of units with distinct squared gradient norms.

    Source: gradient-matrix dimension of the paper's 1-D regression.

    Args:
        distinct: Squared norms [n, m] -> a mask of the distinct units, [m], such as
            `partial(distinct_units, corr_threshold=0.999)`.
        columns: The Jacobian by group (weight, bias, outgoing weight) and unit, [n, groups, m].

    Example:
        >>> columns = jnp.array([[[1.0, 2.0], [1.0, 0.0]]])  # one example, two groups, two units
        >>> int(gradient_dimension(lambda norms: (norms > 0).all(0), columns))
        1
    """
    return distinct((columns**2).sum(0)).sum()


def tangent_kernel(
    predict: Callable[[Params, jax.Array], Float[jax.Array, "n c"]],
    params: Params,
    x: Float[Array, "n ..."],
    *,
    chunk: int = 8,
) -> Float[np.ndarray, "k k"]:
    """J J^T over the k = n c outputs of a network; its eigenvalues are J's squared singular values.

    A rank at tolerance 1e-4 needs float64. Source: empirical neural tangent kernel, Jacot et al.,
    2018 (arXiv 1806.07572).

    Args:
        predict: (params, x) -> outputs [n, c], which treats examples independently (BatchNorm:
            running moments).
        params: The parameters at which the Jacobian is taken, p numbers in all.
        x: Inputs, [n, ...].
        chunk: Number of examples whose rows of J are computed at a time; two chunks are in memory.

    Example:
        >>> predict = lambda params, x: x @ params
        >>> tangent_kernel(predict, jnp.ones((2, 1)), jnp.array([[1.0, 2.0], [0.0, 3.0]])).tolist()
        [[5.0, 6.0], [6.0, 9.0]]
    """

    @jax.jit
    def rows(params, some):
        one = lambda x_i: jax.jacrev(lambda params: predict(params, x_i[None])[0])(params)
        leaves = jax.tree.leaves(jax.vmap(one)(some))
        return [leaf.reshape(leaf.shape[0] * leaf.shape[1], -1) for leaf in leaves]

    @jax.jit
    def block(left, right):
        # The default on GPUs is TF32, whose three digits hide small eigenvalues.
        product: Any = lambda a, b: jnp.matmul(a, b.T, precision="highest")
        return sum(map(product, left, right))

    count = -(-len(x) // chunk)
    parts = np.pad(x, [(0, count * chunk - len(x)), *[(0, 0)] * (x.ndim - 1)], "edge")
    parts = jnp.asarray(parts).reshape(count, chunk, *x.shape[1:])  # one shape, one compilation
    blocks: list[list[Any]] = [[None] * count for _ in parts]
    for i, left in enumerate(parts):
        of_left = rows(params, left)
        for j in range(i, count):
            of_right = of_left if i == j else rows(params, parts[j])
            blocks[i][j] = np.asarray(block(of_left, of_right))
            blocks[j][i] = blocks[i][j].T
    gram = np.block(blocks)
    size = len(gram) // (count * chunk) * len(x)
    return gram[:size, :size]
