"""Curvature of a toy's training loss, at the weights of its records."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from experiments.toy.problems import Toy
from sgd_sparse_jax import measure, train
from sgd_sparse_jax.types import Batch, Params

LANCZOS_STEPS, BATCHES = 20, 64


def make_curvature(toy: Toy, batch_size: int) -> Callable[[Params], dict[str, jax.Array]]:
    """params -> curvature of the loss that SGD descends, whose edge is 2 / step size.

    g and H are gradient and Hessian of the toy's own loss (`half_squared` or `squared`), averaged
    over a batch B of `batch_size`, or over all examples; without label noise and weight decay.

    - sharpness, sharpness_residual: lambda_max(H) and |H v - lambda v| / lambda, by Lanczos.
    - trace: tr H, exact.
    - batch_sharpness: E[g_B^T H_B g_B / |g_B|^2] over batches whose gradient isn't zero.
    - ratio_of_means: E[g_B^T H_B g_B] / E|g_B|^2, a different quantity.
    - batch_sharpness_error, ratio_of_means_error: their standard errors, 0 for batches of one or of
      all examples, whose means are exact. Other means are over `BATCHES` batches of a fixed seed,
      shared by all records, so that their error doesn't average out along a run.
    """
    n = len(toy.train.y)
    loss = lambda params: toy.mean_loss(params, toy.train)
    objective = train.make_objective(toy.network(1.0), toy.loss)
    exact = batch_size in (1, n)
    drawn = np.random.default_rng(0).integers(n, size=(BATCHES, batch_size))
    places = np.arange(n).reshape(-1, batch_size) if exact else drawn
    batches = Batch(toy.train.x[places], toy.train.y[places])

    def trace(params: Params) -> jax.Array:
        # Outputs are piecewise linear in each single weight: the diagonal is Gauss-Newton's.
        bend = jax.grad(jax.grad(lambda out, y: toy.loss(out[None], y[None])[0]))
        rows = measure.jacobian(toy.predict, params, toy.train.x)
        return jax.vmap(bend)(toy.predict(params, toy.train.x), toy.train.y) @ (rows**2).sum(1) / n

    def curvature(params: Params) -> dict[str, jax.Array]:
        flat, unravel = ravel_pytree(params)
        start = unravel(jnp.asarray(np.random.default_rng(0).normal(size=flat.size)))
        product = measure.hessian(loss, params, linearize=True).matvec
        sharpness, residual = measure.lanczos_sharpness(product, start, steps=LANCZOS_STEPS)
        of = lambda batch: measure.step_sharpness(objective, params, {}, batch)
        along, squared = jax.vmap(of)(batches)
        moves = squared > 0
        mean, error = measure.mean_and_error(along, where=moves)
        bends = jnp.where(moves, along, 0.0) * squared
        ratio, ratio_error = measure.ratio_and_error(bends, squared)
        return {
            "sharpness": sharpness,
            "sharpness_residual": residual,
            "trace": trace(params),
            "batch_sharpness": mean,
            "batch_sharpness_error": 0 * mean if exact else error,
            "ratio_of_means": ratio,
            "ratio_of_means_error": 0 * ratio if exact else ratio_error,
        }

    return curvature
