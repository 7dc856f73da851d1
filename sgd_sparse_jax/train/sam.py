"""What a step descends along, as a function of the objective: the sharpness-aware ones.

An objective is (params, stats, batch) -> (loss, stats); a gradient maker turns it into
(params, stats, batch) -> ((loss, stats), gradient), the loss being that at `params`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from sgd_sparse_jax.types import Batch, Gradient, LossFn, Network, Objective, Params, Stats


def sharpness_aware(rho: ArrayLike, *, normalized: bool = False) -> Callable[[Objective], Gradient]:
    """The gradient of L at theta + rho dL(theta); `normalized` moves rho dL / |dL| instead.

    Source: n-SAM of the paper's toy code (not normalized); Foret et al. 2021 (normalized).
    """

    def maker(objective: Objective) -> Gradient:
        gradient = jax.value_and_grad(objective, has_aux=True)

        def of(params: Params, stats: Stats, batch: Batch):
            value_and_stats, ascent = gradient(params, stats, batch)
            length = rho / _positive(optax.tree.norm(ascent)) if normalized else rho
            _, grads = gradient(_moved(params, length, ascent), stats, batch)
            return value_and_stats, grads

        return of

    return maker


def example_sharpness_aware(rho: ArrayLike) -> Callable[[Objective], Gradient]:
    """The mean over examples k of the gradient of l_k at theta + rho dl_k(theta).

    With the half-squared loss, the paper's code (1-SAM) moves by 2 rho r_k dphi_k: its rho is half
    of this one. For networks without batch statistics.
    """

    def maker(objective: Objective) -> Gradient:
        gradient = jax.value_and_grad(objective, has_aux=True)

        def of(params: Params, stats: Stats, batch: Batch):
            _refuse_batch_statistics(stats)

            def of_example(x, y):
                alone = Batch(x[None], y[None])
                (value, _), ascent = gradient(params, stats, alone)
                return value, gradient(_moved(params, rho, ascent), stats, alone)[1]

            values, grads = jax.vmap(of_example)(batch.x, batch.y)
            return (values.mean(), stats), jax.tree.map(lambda leaf: leaf.mean(0), grads)

        return of

    return maker


def residual_sharpness_aware(
    network: Network, loss: LossFn, rho: ArrayLike
) -> Callable[[Objective], Gradient]:
    """As `example_sharpness_aware`, but of l'(f_k) df_k only l'(f_k) is taken at the moved point.

    Source: `loss_derivative_only` of the paper's toy code. For scalar outputs [n].
    """

    def maker(objective: Objective) -> Gradient:
        del objective  # the two factors of its gradient are taken at different parameters

        def of(params: Params, stats: Stats, batch: Batch):
            _refuse_batch_statistics(stats)
            outputs = lambda params, x: network.apply(params, stats, x, train=True).out
            shape = jax.eval_shape(outputs, params, batch.x).shape
            if shape != batch.y.shape or len(shape) != 1:
                raise ValueError(
                    f"The network outputs {shape} for targets {batch.y.shape}; this kind of SAM is "
                    "for scalar outputs [b]: MLP(outputs=None), or out[:, 0]."
                )

            def of_example(x, y):
                predict = lambda params: outputs(params, x[None])[0]
                loss_of = lambda out: loss(out[None], y[None])[0]
                out, pull = jax.vjp(predict, params)
                (ascent,) = pull(jax.grad(loss_of)(out))
                moved = predict(_moved(params, rho, ascent))
                return loss_of(out), pull(jax.grad(loss_of)(moved))[0]

            values, grads = jax.vmap(of_example)(batch.x, batch.y)
            return (values.mean(), stats), jax.tree.map(lambda leaf: leaf.mean(0), grads)

        return of

    return maker


def _refuse_batch_statistics(stats: Stats) -> None:
    if stats:
        raise ValueError("Single-example SAM has no meaning for a net with BatchNorm.")


def _positive(norm: jax.Array) -> jax.Array:
    return jnp.where(norm > 0, norm, 1.0)


def _moved(params: Params, length: ArrayLike, direction: Params) -> Params:
    return jax.tree.map(lambda p, g: p + length * g, params, direction)
