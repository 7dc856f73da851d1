"""Extreme eigenpairs of linear maps by the Lanczos method, each with its residual."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from sgd_sparse_jax.types import Params, PRNGKey, Scalar

from .operators import Operator, dimension, flatten, generator, on_host, unflatten

Which = Literal["largest", "smallest", "magnitude"]
ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "largest": lambda values: -values,
    "smallest": lambda values: values,
    "magnitude": lambda values: -np.abs(values),
}
# A warm start also has a random part of this length, and at least these products besides one per
# pair: old vectors are blind to an eigenvalue that has overtaken theirs, and converge without it.
FRESH, FEWEST = 0.1, 7


class Eigenpairs(NamedTuple):
    """k eigenvalues and eigenvectors, in the order that was asked for, and how good they are.

    Example:
        >>> A = Operator(lambda v: jnp.arange(5.0) * v, jnp.zeros(5))
        >>> top_eigenpairs(A, 1, jax.random.key(0)).converged.tolist()
        [True]
    """

    values: Float[np.ndarray, " k"]
    vectors: Params  # unit vectors: leaves [k, ...], the entry of largest magnitude positive
    residuals: Float[np.ndarray, " k"]  # |A v - lambda v| / |lambda|; inf where lambda is 0
    converged: Bool[np.ndarray, " k"]  # residuals <= tol
    matvecs: int  # products with the operator


def top_eigenpairs(
    operator: Operator,
    k: int,
    key: PRNGKey,
    *,
    tol: float = 1e-3,
    max_matvecs: int = 200,
    which: Which = "largest",
    start: Params | None = None,
    basis: int | None = None,
) -> Eigenpairs:
    """The k extreme eigenpairs of A, by the Lanczos method with thick restarts.

    The loop runs on the host, in float64, over products in the dtype of the parameters, until all
    residuals are below `tol` or the budget ends: see `converged`. As of any Krylov method, a
    residual says that a pair is an eigenpair, not that none lies beyond it. Source: Wu & Simon,
    2000.

    Args:
        operator: A, symmetric.
        k: Number of pairs, at most the dimension.
        key: Of the random start vector.
        tol: Relative residual |A v - lambda v| / |lambda|. An eigenvalue is then exact to about
            tol^2 |lambda| / gap to its neighbours, and to tol at worst.
        max_matvecs: Budget of products, k or more.
        which: "largest" or "smallest" values, or those of largest "magnitude".
        start: Vectors to start from, leaves [any, ...], as of an earlier call: along a run they
            save a third of the products. Default: random.
        basis: Vectors kept between restarts, float64 (default: 2 k + 10, 20 or more).

    Raises:
        ValueError: k, `basis` or `max_matvecs` out of range, `which` unknown, or a `start` that is
            zero or of other shapes.
        TypeError: If the parameters aren't real numbers.
        FloatingPointError: If a product isn't finite.

    Example:
        >>> A = Operator(lambda v: jnp.arange(100.0) * v, jnp.zeros(100))
        >>> pairs = top_eigenpairs(A, 2, jax.random.key(0), tol=1e-6)
        >>> pairs.values.round(6).tolist(), pairs.vectors.shape
        ([99.0, 98.0], (2, 100))
    """
    product, size = on_host(operator), dimension(operator)
    rows = min(basis or max(2 * k + 10, 20), size)
    if not 1 <= k <= size:
        raise ValueError(f"k = {k} eigenpairs of an operator of dimension {size}.")
    if which not in ORDERS:
        raise ValueError(f"Unknown which={which!r}; choose one of {', '.join(ORDERS)}.")
    if max_matvecs < k or (rows < k + 2 and rows < size):
        raise ValueError(
            f"{k} eigenpairs need {k} products and a basis of {k + 2} or more; max_matvecs is "
            f"{max_matvecs}, basis {rows}."
        )
    rng = generator(key)
    # Columns of M are the products with the basis V in coordinates: A V^T = V^T M, with one row
    # more for the vector that comes next. Its asymmetry is that of the rounding in A.
    V, M = np.zeros((rows + 1, size)), np.zeros((rows + 1, rows))
    V[0] = _first(rng, operator, start)
    used = matvecs = 0
    while True:
        w = product(V[used])
        matvecs += 1
        M[: used + 1, used], w = project_out(w, V[: used + 1])
        used += 1
        length = np.linalg.norm(w)
        if used < size:
            # Nothing new: an invariant subspace. Other eigenvectors lie in its complement.
            exhausted = length <= 1e-14 * np.linalg.norm(M[:used, used - 1])
            w = project_out(rng.normal(size=size), V[:used])[1] if exhausted else w
            V[used], M[used, used - 1] = w / np.linalg.norm(w), 0.0 if exhausted else length
        square = M[:used, :used]
        values, S = np.linalg.eigh((square + square.T) / 2)
        order = np.argsort(ORDERS[which](values), kind="stable")
        values, S = values[order], S[:, order]
        rest = M[: used + 1, :used] @ S[:, :k]
        rest[:used] -= values[:k] * S[:, :k]
        errors = np.linalg.norm(rest, axis=0)
        converged = errors <= tol * np.abs(values[:k])
        converged &= values[:k] != 0
        found = converged.all() and matvecs >= k + FEWEST
        if used >= k and (found or matvecs >= max_matvecs or used == size):
            break
        if used == rows:
            kept = k + (rows - k) // 2
            V[:kept], V[kept] = S[:, :kept].T @ V[:used], V[used]
            last, M[:kept, :kept] = (
                M[used, :used] @ S[:, :kept],
                S[:, :kept].T @ square @ S[:, :kept],
            )
            M[kept, :kept], used = last, kept
    vectors = S[:, :k].T @ V[:used]
    largest = np.abs(vectors).argmax(1)
    vectors *= np.sign(vectors[np.arange(k), largest])[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        residuals = np.where(values[:k] != 0, errors / np.abs(values[:k]), np.inf)
    tree = jax.tree.map(jnp.asarray, unflatten(vectors, operator.like))
    return Eigenpairs(values[:k], tree, residuals, converged, matvecs)


def project_out(
    w: Float[np.ndarray, " p"], rows: Float[np.ndarray, "j p"]
) -> tuple[Float[np.ndarray, " j"], Float[np.ndarray, " p"]]:
    """(V w, w - V^T V w) for orthonormal rows V, by two passes of Gram-Schmidt.

    Example:
        >>> project_out(np.array([3.0, 4.0]), np.array([[1.0, 0.0]]))
        (array([3.]), array([0., 4.]))
    """
    along = rows @ w
    w = w - along @ rows
    again = rows @ w  # what rounding has left of it
    return along + again, w - again @ rows


def _first(rng: np.random.Generator, operator: Operator, start: Any) -> Float[np.ndarray, " p"]:
    fresh = rng.normal(size=dimension(operator))
    fresh /= np.linalg.norm(fresh)
    if start is None:
        return fresh
    shapes, mine = ([np.shape(leaf) for leaf in jax.tree.leaves(t)] for t in (operator.like, start))
    if [shape[1:] for shape in mine] != shapes:
        raise ValueError(f"start has shapes {mine}; give [any, ...] of {shapes}, as in `vectors`.")
    known = flatten(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64).sum(0), start))
    if not 0 < np.linalg.norm(known) < np.inf:
        raise ValueError("The sum of the vectors in start is zero or not finite: leave it out.")
    first = known / np.linalg.norm(known) + FRESH * fresh
    return first / np.linalg.norm(first)


def lanczos_sharpness(
    matvec: Callable[[Params], Params], start: Params, *, steps: int = 16
) -> tuple[Scalar, Scalar]:
    """(lambda_max, relative residual) from a fixed number of Lanczos steps; jits and vmaps.

    A lower bound of the largest eigenvalue, up to rounding: for sweeps of small networks, and for
    many batches, inside one program. It holds `steps` vectors, reorthogonalized in their dtype. On
    CPUs, convolutions are slow inside its loop: `top_eigenpairs`.

    Args:
        matvec: v -> A v, symmetric.
        start: Any vector that isn't orthogonal to the eigenvector; random, or an earlier one.
        steps: Products, at most the dimension are taken.

    Example:
        >>> A = lambda v: jnp.array([1.0, 4.0, 2.0]) * v
        >>> value, residual = lanczos_sharpness(A, jnp.ones(3))
        >>> round(float(value), 6)
        4.0
    """
    flat, unravel = ravel_pytree(start)
    if steps < 1:
        raise ValueError(f"steps = {steps} of the Lanczos method; give 1 or more.")
    steps = min(steps, flat.size)

    def project(w, V):
        along = V @ w
        w = w - along @ V
        again = V @ w
        return along + again, w - again @ V

    def step(i, state):
        V, M, w, length = state
        tiny = 100 * jnp.finfo(w.dtype).eps * jnp.abs(M).max()
        v = jnp.where(length > tiny, w / jnp.where(length > tiny, length, 1.0), 0.0)
        V = V.at[i].set(v)
        along, w = project(ravel_pytree(matvec(unravel(v)))[0], V)
        # After an invariant subspace, rows repeat a value inside the spectrum, uncoupled.
        along = along.at[i].set(jnp.where(length > tiny, along[i], M[0, 0]))
        return V, M.at[:, i].set(along), w, jnp.linalg.norm(w)

    V, M = jnp.zeros((steps, flat.size), flat.dtype), jnp.zeros((steps, steps), flat.dtype)
    begin = (V, M, flat, jnp.linalg.norm(flat))
    _, M, _, length = jax.lax.fori_loop(0, steps, step, begin)
    value, last = _largest(jnp.triu(M) + jnp.triu(M, 1).T)
    return value, length * jnp.abs(last) / jnp.abs(value)


@jax.custom_batching.sequential_vmap  # batched LAPACK can deadlock: see `singular_values`
def _largest(matrix: Float[Array, "k k"]) -> tuple[Scalar, Scalar]:
    finite = jnp.isfinite(matrix).all()
    values, vectors = jnp.linalg.eigh(jnp.where(finite, matrix, 0.0))
    return jnp.where(finite, values[-1], jnp.nan), vectors[-1, -1]
