"""Feature sparsity, as defined in the paper."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Bool, Float

from sgd_sparse_jax.types import PRNGKey, Scalar


def distinct_units(
    phi: Float[Array, "n ..."], corr_threshold: ArrayLike = 0.95
) -> Bool[Array, " m"]:
    """A mask of the units of features that are live and not duplicates.

    A unit is live if it is positive for some example, and a duplicate if its absolute correlation
    with a later live unit exceeds `corr_threshold`, which is equivalent to deleting duplicates one
    by one, in order. Units that are constant or contain NaN correlate with no other.

    Args:
        phi: Features of n examples, [n, m].
        corr_threshold: Largest absolute correlation of units that aren't duplicates.

    Raises:
        ValueError: If `phi` isn't a matrix, such as a map [n, h, w, c]; see `sample_units`.

    Example:
        >>> distinct_units(jnp.array([[1.0, 2.0, 0.0, 1.0], [3.0, 6.0, 0.0, 0.0]])).tolist()
        [False, False, False, True]
    """
    if phi.ndim != 2:  # a map has too many units for all pairwise correlations
        raise ValueError(f"phi has shape {phi.shape}, not [n, m]; use sample_units(key, phi).")
    live = (phi > 0).any(0)
    centred = phi - phi.mean(0, keepdims=True)
    norm = jnp.linalg.norm(centred, axis=0, keepdims=True)
    # Deviations of a constant unit from its mean are rounding errors, which would correlate.
    varies = norm > len(phi) * jnp.finfo(phi.dtype).eps * jnp.abs(phi).max(0, keepdims=True)
    unit = jnp.where(varies, centred / jnp.where(varies, norm, 1.0), 0.0)
    correlation = jnp.abs(jnp.matmul(unit.T, unit, precision="highest"))
    twins = jnp.triu(correlation > corr_threshold, k=1) & live[None]  # greedy deletion, vectorized
    return live & ~twins.any(1)


def feature_sparsity(
    phi: Float[Array, "n ..."], corr_threshold: ArrayLike = 0.95, *, signed: bool = False
) -> tuple[Scalar, Scalar]:
    """(#active, #active in `distinct_units`) / (n m), for features of m units.

    An entry is active if it is positive (the paper's deep nets) or, with `signed`, nonzero (its
    fully connected nets, on `unit_rows(phi)`); NaN is not active. Source: section 4 of the paper
    and its released code.

    Args:
        phi: Features of n examples, [n, m].
        corr_threshold: That of `distinct_units`.
        signed: Whether negative entries are active.

    Raises:
        ValueError: If `phi` isn't a matrix; see `sample_units`.

    Example:
        >>> phi = jnp.array([[1.0, 2.0, 0.0, 1.0], [3.0, 6.0, 0.0, 0.0]])
        >>> [float(share) for share in feature_sparsity(phi)]
        [0.625, 0.125]
    """
    active = (phi > 0) | ((phi < 0) & signed)
    distinct = distinct_units(phi, corr_threshold)
    return active.mean(dtype=phi.dtype), (active & distinct[None]).mean(dtype=phi.dtype)


def unit_rows(phi: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
    """phi_i / |phi_i| for every example i; 0 if phi_i is 0.

    Example:
        >>> unit_rows(jnp.array([[0.0, -2.0], [0.0, 0.0]])).tolist()
        [[0.0, -1.0], [0.0, 0.0]]
    """
    norm = jnp.sqrt((phi**2).sum(range(1, phi.ndim), keepdims=True))
    # Two `where`s: the gradient of a division by 0 is NaN even in the branch not taken.
    return jnp.where(norm > 0, phi / jnp.where(norm > 0, norm, 1.0), jnp.where(phi == 0, 0.0, phi))


def relu_flips(before: Float[Array, "n m"], after: Float[Array, "n m"]) -> Scalar:
    """Share of (example, unit) pairs that are positive in exactly one of `before` and `after`.

    Args:
        before: Features of n examples, [n, m].
        after: Those of the same examples and units with other weights.

    Example:
        >>> float(relu_flips(jnp.array([[1.0, -1.0]]), jnp.array([[2.0, 0.5]])))
        0.5
    """
    return ((before > 0) != (after > 0)).mean(dtype=after.dtype)


def sample_units(
    key: PRNGKey, phi: Float[Array, "n ..."], limit: int = 1000
) -> Float[Array, "n m"]:
    """At most `limit` random units of `phi`, as columns; a map [n, h, w, c] has h w c units.

    They depend on the key and the shape of `phi` only; all are returned if there are few enough.

    Args:
        key: Of the choice of units.
        phi: Features of n examples, [n, m] or [n, h, w, c].
        limit: Largest number of units to return.

    Example:
        >>> sample_units(jr.key(0), jnp.ones((8, 4, 4, 3)), limit=10).shape
        (8, 10)
    """
    units = math.prod(phi.shape[1:])
    flat = phi.reshape(len(phi), units)
    if units <= limit:
        return flat
    with jax.ensure_compile_time_eval():  # a constant of the program, for a concrete key
        chosen = jnp.sort(jr.permutation(key, units)[:limit])
    return flat[:, chosen]
