"""Feature sparsity, as the paper defines it. Static shapes throughout: it jits and vmaps."""

import math

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from sgd_sparse_jax._types import PRNGKey, Scalar


def feature_sparsity(
    phi: Float[Array, "n m"], corr_threshold: float = 0.95
) -> tuple[Scalar, Scalar]:
    """Share of positive entries of `phi`: of all m units, and of the distinct ones, both over n m.

    A live unit (positive somewhere) is a duplicate if its |correlation| with a later live unit
    exceeds the threshold: what deleting duplicates one by one, in order, leaves behind. A constant
    unit has no correlation and is distinct. NaN entries count as not positive, and a unit that
    holds one correlates with none. Source: the paper's section 4 and its released code.
    """
    active = phi > 0
    live = active.any(0)
    centred = phi - phi.mean(0, keepdims=True)
    norm = jnp.linalg.norm(centred, axis=0, keepdims=True)
    # A constant unit's deviations are rounding errors of its mean, which would correlate.
    varies = norm > len(phi) * jnp.finfo(phi.dtype).eps * jnp.abs(phi).max(0, keepdims=True)
    unit = jnp.where(varies, centred / jnp.where(varies, norm, 1.0), 0.0)
    correlation = jnp.abs(jnp.matmul(unit.T, unit, precision="highest"))
    twins = jnp.triu(correlation > corr_threshold, k=1) & live[None]
    kept = live & ~twins.any(1)
    return active.mean(dtype=phi.dtype), (active & kept[None]).mean(dtype=phi.dtype)


def sample_units(
    key: PRNGKey, phi: Float[Array, "n ..."], limit: int = 1000
) -> Float[Array, "n m"]:
    """At most `limit` random units of `phi`, whose maps are flattened: a unit is a place in a map.

    The same key picks the same units from every batch of the same shape.
    """
    units = math.prod(phi.shape[1:])
    flat = phi.reshape(len(phi), units)
    return flat if units <= limit else flat[:, jr.permutation(key, units)[:limit]]
