"""Gradients of sharpness-aware minimization (SAM), for the argument `gradient` of `make_step`.

Each function returns a map from an objective, (params, stats, batch) -> (loss, stats), to a
gradient, (params, stats, batch) -> ((loss, stats), gradient). Loss and statistics are those at
`params`, before the ascent step.
"""

from collections.abc import Callable

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
        >>> _, gradient = sharpness_aware(0.5)(objective)(jnp.array(2.0), {}, batch)
        >>> float(gradient)
        3.0
    """

    def maker(objective: Objective) -> Gradient:
        gradient = jax.value_and_grad(objective, has_aux=True)

        def of(params: Params, stats: Stats, batch: Batch):
            value_and_stats, ascent = gradient(params, stats, batch)
            norm = optax.tree.norm(ascent) if normalized else 1.0
            length = rho / jnp.where(norm > 0, norm, 1.0)  # no step from a stationary point
            # Statistics of the moved point are dropped: they aren't those of an iterate.
            _, grads = gradient(_moved(params, length, ascent), stats, batch)
            return value_and_stats, grads

        return of

    return maker


def example_sharpness_aware(rho: ArrayLike) -> Callable[[Objective], Gradient]:
    """mean_k dl_k(theta + rho dl_k(theta)) over the examples k: each has an ascent of its own.

    For networks without batch statistics; the gradient raises ValueError if `stats` isn't empty.
    Source: 1-SAM of the paper's toy code. With the half-squared loss it moves by 2 rho r_k dphi_k
    for a residual r_k, so that its rho is half of this one.

    Example:
        >>> objective = lambda params, stats, batch: (0.5 * params**2 * batch.x.mean(), stats)
        >>> batch = Batch(jnp.array([1.0, 3.0]), jnp.zeros(2))
        >>> _, gradient = example_sharpness_aware(0.5)(objective)(jnp.array(2.0), {}, batch)
        >>> float(gradient)
        9.0
    """

    def maker(objective: Objective) -> Gradient:
        gradient = jax.value_and_grad(objective, has_aux=True)

        def of_example(params: Params, batch: Batch):
            (value, _), ascent = gradient(params, {}, batch)
            return value, gradient(_moved(params, rho, ascent), {}, batch)[1]

        return _mean_over_examples(of_example)

    return maker


def residual_sharpness_aware(
    network: Network, loss: LossFn, rho: ArrayLike
) -> Callable[[Objective], Gradient]:
    """mean_k l'(f_k(theta + rho dl_k(theta))) df_k(theta): the ascent moves the residual alone.

    As `example_sharpness_aware`, for `network` with scalar outputs [b] and `loss`; the objective
    of `make_step` is not used. Source: `loss_derivative_only` of the paper's toy code.

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

    def maker(objective: Objective) -> Gradient:
        del objective  # the two factors of its gradient are taken at different parameters

        def of_example(params: Params, batch: Batch):
            predict = lambda params: network.apply(params, {}, batch.x, train=True).out[0]
            loss_of = lambda out: loss(out[None], batch.y)[0]
            out, pull = jax.vjp(predict, params)  # df at theta, for both products below
            (ascent,) = pull(jax.grad(loss_of)(out))
            moved = predict(_moved(params, rho, ascent))
            return loss_of(out), pull(jax.grad(loss_of)(moved))[0]

        return _mean_over_examples(of_example)

    return maker


def _mean_over_examples(of_example: Callable[[Params, Batch], tuple]) -> Gradient:
    """The mean of (loss, gradient) over batches of one example."""

    def of(params: Params, stats: Stats, batch: Batch):
        if stats:
            raise ValueError(
                "SAM per example normalizes each example by itself, and the network has batch "
                f"statistics ({', '.join(stats)}); take sharpness_aware, or GroupNorm."
            )
        alone = jax.tree.map(lambda leaf: leaf[:, None], batch)  # [b, 1, ...]
        values, grads = jax.vmap(of_example, (None, 0))(params, alone)
        return (values.mean(), stats), jax.tree.map(lambda leaf: leaf.mean(0), grads)

    return of


def _moved(params: Params, length: ArrayLike, direction: Params) -> Params:
    return jax.tree.map(lambda p, g: p + length * g, params, direction)
