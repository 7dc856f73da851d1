"""Feature sparsity, as the paper defines it. Static shapes throughout: it jits and vmaps."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float

from sgd_sparse_jax.types import PRNGKey, Scalar


def distinct_units(phi: Float[Array, "n m"], corr_threshold: float = 0.95) -> Bool[Array, " m"]:
    """Which units are live and no duplicates, as a mask.

    A live unit (positive somewhere) is a duplicate if its |correlation| with a later live unit
    exceeds the threshold: what deleting duplicates one by one, in order, leaves behind. A constant
    unit has no correlation and is distinct; a unit that holds NaN correlates with none.
    """
    live = (phi > 0).any(0)
    centred = phi - phi.mean(0, keepdims=True)
    norm = jnp.linalg.norm(centred, axis=0, keepdims=True)
    # A constant unit's deviations are rounding errors of its mean, which would correlate.
    varies = norm > len(phi) * jnp.finfo(phi.dtype).eps * jnp.abs(phi).max(0, keepdims=True)
    unit = jnp.where(varies, centred / jnp.where(varies, norm, 1.0), 0.0)
    correlation = jnp.abs(jnp.matmul(unit.T, unit, precision="highest"))
    twins = jnp.triu(correlation > corr_threshold, k=1) & live[None]
    return live & ~twins.any(1)


def feature_sparsity(
    phi: Float[Array, "n m"], corr_threshold: float = 0.95, *, signed: bool = False
) -> tuple[Scalar, Scalar]:
    """Share of active entries of `phi`: of all m units, and of the distinct ones, both over n m.

    Active is positive (the paper's deep nets), or with `signed` not zero (its fully connected
    ones, whose features are given as `unit_rows(phi)`); NaN entries are not active.
    Source: the paper's section 4 and its released code.
    """
    active = (phi > 0) | ((phi < 0) & signed)
    kept = distinct_units(phi, corr_threshold)
    return active.mean(dtype=phi.dtype), (active & kept[None]).mean(dtype=phi.dtype)


def unit_rows(phi: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """phi_i / |phi_i| for every example i; 0 where the whole row is 0."""
    norm = jnp.linalg.norm(phi, axis=1, keepdims=True)
    return jnp.where(norm > 0, phi / jnp.where(norm > 0, norm, 1.0), jnp.where(phi == 0, 0.0, phi))


def relu_flips(before: Float[Array, "n m"], after: Float[Array, "n m"]) -> Scalar:
    """Share of (example, unit) pairs whose ReLU is on in one of the two features and off in the
    other: how far the activation pattern is from that at initialization, say.
    """
    return ((before > 0) != (after > 0)).mean(dtype=after.dtype)


def sample_units(
    key: PRNGKey, phi: Float[Array, "n ..."], limit: int = 1000
) -> Float[Array, "n m"]:
    """At most `limit` random units of `phi`, whose maps are flattened: a unit is a place in a map.

    The same key picks the same units from every batch of the same shape.
    """
    units = math.prod(phi.shape[1:])
    flat = phi.reshape(len(phi), units)
    if units <= limit:
        return flat
    with jax.ensure_compile_time_eval():  # of a known key the choice is a constant of the program
        chosen = jnp.sort(jr.permutation(key, units)[:limit])
    return flat[:, chosen]
