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
# A warm start has a random part of relative length FRESH and takes k + FEWEST products or more: its
# vectors may be orthogonal to an eigenvector whose eigenvalue has become the largest.
FRESH, FEWEST = 0.1, 7


class Eigenpairs(NamedTuple):
    """k eigenvalues and eigenvectors in the requested order, with their residuals.

    Example:
        >>> A = Operator(lambda v: jnp.arange(5.0) * v, jnp.zeros(5))
        >>> top_eigenpairs(A, 1, jax.random.key(0)).converged.tolist()
        [True]
    """

    values: Float[np.ndarray, " k"]  #: lambda
    vectors: Params  #: unit vectors, leaves [k, ...]; the entry of largest magnitude positive
    residuals: Float[np.ndarray, " k"]  #: |A v - lambda v| / |lambda|; inf where lambda is 0
    converged: Bool[np.ndarray, " k"]  #: residuals <= tol
    matvecs: int  #: products with the operator


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

    The loop runs on the host in float64, over products in the dtype of the parameters, until all
    residuals are at most `tol` or `max_matvecs` is reached (see `converged`). As with any Krylov
    method, a small residual shows that a pair is an eigenpair, not that no more extreme one exists.
    A Krylov space has one eigenvector of a multiple eigenvalue, as those of the last layer under
    squared errors of several outputs are. For k > 1 the search is therefore repeated orthogonally
    to the pairs, in 8 products or more, until none is new. Source: Wu & Simon, 2000.

    Args:
        operator: A, symmetric.
        k: Number of pairs, at most the dimension.
        key: Of the random start vector.
        tol: Relative residual |A v - lambda v| / |lambda|. The relative error of an eigenvalue is
            then at most `tol`, and about tol^2 |lambda| / gap if its neighbours are farther away.
        max_matvecs: Largest number of products, at least k.
        which: "largest" or "smallest" values, or those of largest "magnitude".
        start: Start vectors, leaves [any, ...], such as those of an earlier step of a run, which
            save a third of the products (default: random).
        basis: Number of Lanczos vectors, in float64 (default: 2 k + 10, at least 20).

    Raises:
        ValueError: If k, `basis` or `max_matvecs` is out of range, `which` is unknown, or `start`
            is zero or has other shapes.
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
    rank, options = ORDERS[which], {"tol": tol, "which": which, "rows": rows, "rng": rng}
    values, vectors, errors, matvecs = _lanczos(
        product, k, _first(rng, operator, start), np.zeros((0, size)), max_matvecs, **options
    )
    while 1 < k < size and matvecs < max_matvecs and _converged(values, errors, tol).all():
        fresh = project_out(rng.normal(size=size), vectors)[1]
        bound = rank(values[-1:])[0] - tol * abs(values[-1])
        value, vector, error, more = _lanczos(
            product, 1, fresh, vectors, max_matvecs - matvecs, bound=bound, **options
        )
        matvecs += more
        if rank(value)[0] >= bound:
            break
        values, errors = np.append(values, value), np.append(errors, error)
        best = np.argsort(rank(values), kind="stable")[:k]
        values, errors = values[best], errors[best]
        vectors = np.concatenate([vectors, vector])[best]
    largest = np.abs(vectors).argmax(1)
    vectors *= np.sign(vectors[np.arange(k), largest])[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        residuals = np.where(values != 0, errors / np.abs(values), np.inf)
    tree = jax.tree.map(jnp.asarray, unflatten(vectors, operator.like))
    return Eigenpairs(values, tree, residuals, _converged(values, errors, tol), matvecs)


def _converged(values: np.ndarray, errors: np.ndarray, tol: float) -> np.ndarray:
    return (errors <= tol * np.abs(values)) & (values != 0)


def _lanczos(
    product: Callable[[np.ndarray], np.ndarray],
    k: int,
    first: Float[np.ndarray, " p"],
    others: Float[np.ndarray, "j p"],
    max_matvecs: int,
    *,
    tol: float,
    which: str,
    rows: int,
    rng: np.random.Generator,
    bound: float = np.inf,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(values, unit vectors, |A v - lambda v|, products) of k pairs orthogonal to `others`.

    It stops early where the first pair is close to an eigenvalue that ranks behind `bound`.
    """
    j, p = others.shape
    size = p - j
    rows = min(rows, size)
    # Columns of M are the products with the basis V in coordinates: A V^T = V^T M, with one row for
    # the next vector added. M is symmetric up to rounding errors of A. Columns of `out` are their
    # components along `others`, which only the errors have.
    W, M, out = np.zeros((j + rows + 1, p)), np.zeros((rows + 1, rows)), np.zeros((j, rows))
    W[:j], V = others, W[j:]
    V[0] = first / np.linalg.norm(first)
    used = matvecs = 0
    while True:
        w = product(V[used])
        matvecs += 1
        along, w = project_out(w, W[: j + used + 1])
        out[:, used], M[: used + 1, used] = along[:j], along[j:]
        used += 1
        length = np.linalg.norm(w)
        if used < size:
            # The basis spans an invariant subspace; other eigenvectors are in its complement.
            exhausted = length <= 1e-14 * np.linalg.norm(M[:used, used - 1])
            w = project_out(rng.normal(size=p), W[: j + used])[1] if exhausted else w
            V[used], M[used, used - 1] = w / np.linalg.norm(w), 0.0 if exhausted else length
        square = M[:used, :used]
        values, S = np.linalg.eigh((square + square.T) / 2)
        order = np.argsort(ORDERS[which](values), kind="stable")
        values, S = values[order], S[:, order]
        rest = M[: used + 1, :used] @ S[:, :k]
        rest[:used] -= values[:k] * S[:, :k]
        errors = np.linalg.norm(np.concatenate([rest, out[:, :used] @ S[:, :k]]), axis=0)
        found = _converged(values[:k], errors, tol).all()
        found |= ORDERS[which](values[:1])[0] - errors[0] > bound
        enough = found and matvecs >= k + FEWEST
        if used >= k and (enough or matvecs >= max_matvecs or used == size):
            break
        if used == rows:
            retained = k + (rows - k) // 2
            V[:retained], V[retained] = S[:, :retained].T @ V[:used], V[used]
            last, M[:retained, :retained] = (
                M[used, :used] @ S[:, :retained],
                S[:, :retained].T @ square @ S[:, :retained],
            )
            out[:, :retained] = out[:, :used] @ S[:, :retained]
            M[retained, :retained], used = last, retained
    return values[:k], S[:, :k].T @ V[:used], errors, matvecs


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
    again = rows @ w  # left by rounding errors
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
    """(lambda_max, relative residual) from a fixed number of Lanczos steps, for jit and vmap.

    A lower bound of the largest eigenvalue, up to rounding, for sweeps of small networks or many
    batches in one program. It stores `steps` vectors, reorthogonalized in their dtype, at least
    float32. On CPUs, convolutions in its loop are slow; use `top_eigenpairs`.

    Args:
        matvec: v -> A v, symmetric.
        start: Any vector that isn't orthogonal to the eigenvector; random, or an earlier one.
        steps: Number of products; at most the dimension.

    Raises:
        ValueError: If `steps` is below 1.

    Example:
        >>> A = lambda v: jnp.array([1.0, 4.0, 2.0]) * v
        >>> value, residual = lanczos_sharpness(A, jnp.ones(3))
        >>> round(float(value), 6)
        4.0
    """
    flat, unravel = ravel_pytree(start)
    narrow, flat = flat.dtype, flat.astype(jnp.promote_types(flat.dtype, jnp.float32))
    if steps < 1:
        raise ValueError(f"steps = {steps} of the Lanczos method; give 1 or more.")
    steps = min(steps, flat.size)

    def project(w, V):
        along = V @ w
        w = w - along @ V
        again = V @ w
        return along + again, w - again @ V

    def norm(w):  # squares of tiny and of huge entries are out of range
        largest = jnp.abs(w).max()
        return largest * jnp.linalg.norm(w / jnp.where(largest > 0, largest, 1.0))

    def product(v):
        return ravel_pytree(matvec(unravel(v.astype(narrow))))[0].astype(v.dtype)

    def step(i, state):
        V, M, w, length = state
        tiny = 100 * jnp.finfo(w.dtype).eps * jnp.abs(M).max()
        v = jnp.where(length > tiny, w / jnp.where(length > tiny, length, 1.0), 0.0)
        V = V.at[i].set(v)
        along, w = project(product(v), V)
        # Rows after an invariant subspace are uncoupled, with a value inside the spectrum.
        along = along.at[i].set(jnp.where(length > tiny, along[i], M[0, 0]))
        return V, M.at[:, i].set(along), w, norm(w)

    V, M = jnp.zeros((steps, flat.size), flat.dtype), jnp.zeros((steps, steps), flat.dtype)
    begin = (V, M, flat, norm(flat))
    _, M, _, length = jax.lax.fori_loop(0, steps, step, begin)
    value, last = _largest(jnp.triu(M) + jnp.triu(M, 1).T)
    return value, length * jnp.abs(last) / jnp.abs(value)


@jax.custom_batching.sequential_vmap  # batched LAPACK can deadlock: see `singular_values`
def _largest(matrix: Float[Array, "k k"]) -> tuple[Scalar, Scalar]:
    finite = jnp.isfinite(matrix).all()
    values, vectors = jnp.linalg.eigh(jnp.where(finite, matrix, 0.0))
    return jnp.where(finite, values[-1], jnp.nan), vectors[-1, -1]
