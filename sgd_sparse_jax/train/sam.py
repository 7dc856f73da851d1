"""Gradients of sharpness-aware minimization (SAM), for the argument `gradient` of `make_step`.

Each function returns a map from an objective, (params, stats, batch) -> (loss, stats), to a
gradient, (params, stats, batch) -> ((loss, stats), gradient). Loss and statistics are those at
`params`, before the ascent step.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from sgd_sparse_jax.types import Batch, Gradient, LossFn, Network, Objective, Params, Stats


def sharpness_aware(rho: ArrayLike, *, normalized: bool = False) -> Callable[[Objective], Gradient]:
    """dL(theta + rho dL(theta)), or dL(theta + rho dL(theta) / |dL(theta)|) if `normalized`.

    Source: n-SAM of the paper's toy code (not normalized); Foret et al., 2021 (normalized).

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
        # Statistics of the moved point are dropped: they aren't those of an iterate.
        _, grads = descent(optax.tree.add_scale(params, length, ascent), stats, batch)
        return value_and_stats, grads

    return lambda objective: partial(gradient, objective)


def example_sharpness_aware(rho: ArrayLike) -> Callable[[Objective], Gradient]:
    """mean_k dl_k(theta + rho dl_k(theta)) over the examples k: each has an ascent of its own.

    For networks without batch statistics; the gradient raises ValueError if `stats` isn't empty.
    Source: 1-SAM of the paper's toy code. With the half-squared loss it moves by 2 rho r_k dphi_k
    for a residual r_k, so that its rho is half of this one.

    Example:
        >>> objective = lambda params, stats, batch: (0.5 * params**2 * batch.x.mean(), stats)
        >>> batch = Batch(jnp.array([1.0, 3.0]), jnp.zeros(2))
        >>> float(example_sharpness_aware(0.5)(objective)(jnp.array(2.0), {}, batch)[1])
        9.0
    """

    def of_example(objective: Objective, params: Params, batch: Batch):
        gradient = jax.value_and_grad(objective, has_aux=True)
        (value, _), ascent = gradient(params, {}, batch)
        return value, gradient(optax.tree.add_scale(params, rho, ascent), {}, batch)[1]

    return lambda objective: _mean_over_examples(partial(of_example, objective))


def residual_sharpness_aware(
    network: Network, loss: LossFn, rho: ArrayLike
) -> Callable[[Objective], Gradient]:
    """mean_k l'(f_k(theta + rho dl_k(theta))) df_k(theta): the ascent moves the residual alone.

    For a `network` without statistics, with scalar outputs [b], and `loss`; the objective of
    `make_step` is not used. Source: `loss_derivative_only` of the paper's toy code.

    Example:
        >>> from sgd_sparse_jax import models, train
        >>> network = models.from_linen(models.DiagonalNet(0.1))
        >>> objective = train.make_objective(network, train.half_squared)
        >>> gradient = residual_sharpness_aware(network, train.half_squared, 0.25)(objective)
        >>> batch = Batch(jnp.array([[1.0]]), jnp.array([0.0]))
        >>> _, grads = gradient({"u": jnp.array([1.0]), "v": jnp.array([2.0])}, {}, batch)
        >>> float(grads["u"][0])
        10.0
    """

    def of_example(params: Params, batch: Batch):
        predict = lambda params: network.apply(params, {}, batch.x, train=True).out[0]
        loss_of = lambda out: loss(out[None], batch.y)[0]
        out, pull = jax.vjp(predict, params)  # df at theta, for both products below
        (ascent,) = pull(jax.grad(loss_of)(out))
        moved = predict(optax.tree.add_scale(params, rho, ascent))
        return loss_of(out), pull(jax.grad(loss_of)(moved))[0]

    # The objective isn't used: the factors of its gradient are taken at different parameters.
    return lambda objective: _mean_over_examples(of_example)


def _mean_over_examples(of_example: Callable[[Params, Batch], tuple]) -> Gradient:
    """The mean of (loss, gradient) over batches of one example."""

    def of(params: Params, stats: Stats, batch: Batch):
        if stats:  # Flax would begin new statistics for each example, silently
            raise ValueError(
                f"SAM per example allows no batch statistics, the network has {', '.join(stats)}; "
                "take sharpness_aware, or GroupNorm."
            )
        alone = jax.tree.map(lambda leaf: leaf[:, None], batch)  # [b, 1, ...]
        values, grads = jax.vmap(of_example, (None, 0))(params, alone)
        return (values.mean(), stats), jax.tree.map(lambda leaf: leaf.mean(0), grads)

    return of
