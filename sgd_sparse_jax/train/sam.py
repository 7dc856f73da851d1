"""Gradients of sharpness-aware minimization (SAM), for the argument `gradient` of `make_step`.

Each function maps rho to a function from an objective, (params, stats, batch) -> (loss, stats), to
its gradient, (params, stats, batch) -> ((loss, stats), gradient). Loss and statistics are those at
`params`, before the ascent step.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from sgd_sparse_jax.types import Batch, Gradient, Objective, Params, Stats


def sharpness_aware(rho: ArrayLike, *, normalized: bool = False) -> Callable[[Objective], Gradient]:
    """dL(theta + rho dL(theta)), or dL(theta + rho dL(theta) / |dL(theta)|) if `normalized`.

    Source: n-SAM of the paper's toy code (not normalized); Foret et al., 2021 (normalized).

    Args:
        rho: Length of the ascent step, in multiples of the gradient unless `normalized`.
        normalized: Whether the ascent step follows the gradient divided by its norm.

    Example:
        >>> objective = lambda params, stats, batch: (0.5 * params**2 * batch.x.mean(), stats)
        >>> batch = Batch(jnp.ones(3), jnp.zeros(3))
        >>> float(sharpness_aware(0.5)(objective)(jnp.array(2.0), {}, batch)[1])
        3.0
    """

    def gradient(objective: Objective, params: Params, stats: Stats, batch: Batch):
        descent = jax.value_and_grad(objective, has_aux=True)
        value_and_stats, ascent = descent(params, stats, batch)
        norm = optax.tree.norm(ascent) if normalized else 1.0
        length = rho / jnp.where(norm > 0, norm, 1.0)  # no step from a stationary point
        # Statistics at the ascended point, which is no iterate, are dropped.
        _, grads = descent(optax.tree.add_scale(params, length, ascent), stats, batch)
        return value_and_stats, grads

    return lambda objective: partial(gradient, objective)


def example_sharpness_aware(rho: ArrayLike) -> Callable[[Objective], Gradient]:
    """mean_k dl_k(theta + rho dl_k(theta)) over examples k, each with its own ascent step.

    Source: 1-SAM of the paper's toy code, which ascends by 2 rho r_k dphi_k for a residual r_k and
    the half-squared loss: its rho is half of this one.

    Args:
        rho: Length of the ascent step, in multiples of the gradient of the example.

    Raises:
        ValueError: By the gradient, if `stats` isn't empty, as with BatchNorm.

    Example:
        >>> objective = lambda params, stats, batch: (0.5 * params**2 * batch.x.mean(), stats)
        >>> batch = Batch(jnp.array([1.0, 3.0]), jnp.zeros(2))
        >>> float(example_sharpness_aware(0.5)(objective)(jnp.array(2.0), {}, batch)[1])
        9.0
    """

    def gradient(objective: Objective, params: Params, stats: Stats, batch: Batch):
        if stats:  # Flax would silently start new statistics for each example
            raise ValueError(
                f"SAM per example needs a network without statistics, not {', '.join(stats)}; "
                "use sharpness_aware, or GroupNorm."
            )
        descent = jax.value_and_grad(objective, has_aux=True)

        def of_example(example: Batch):
            (value, _), ascent = descent(params, {}, example)
            return value, descent(optax.tree.add_scale(params, rho, ascent), {}, example)[1]

        alone = jax.tree.map(lambda leaf: leaf[:, None], batch)  # [b, 1, ...]
        values, grads = jax.vmap(of_example)(alone)
        return (values.mean(), stats), jax.tree.map(lambda leaf: leaf.mean(0), grads)

    return lambda objective: partial(gradient, objective)
