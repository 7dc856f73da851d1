"""Curvature along the run of a classifier: eigenvalues, trace, and gauges of mini-batches.

All are of the cross-entropy alone, without the penalty of --l2_reg, in float32, on training images
without augmentation and with the labels of the data set, without noise per batch.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.tree_util import Partial

from experiments.deep.setup import Plan
from sgd_sparse_jax import measure, models, train
from sgd_sparse_jax.types import Batch, Fetch, TrainState

TOL, PRODUCTS = 1e-3, 100  # relative residual of eigenvalues; budget of products
PROBES, BATCHES = 8, 8  # random vectors for the trace; mini-batches for the gauges
PART = 256  # images of a device in one product, where the whole is a mean over parts


def make_curvature(
    plan: Plan, mesh: jax.sharding.Mesh, fetch: Fetch, optimizer: Callable
) -> Callable[..., dict[str, Any]]:
    """(numbers, state, progress) -> a row: a function of the state alone, also after a resumption.

    The Hessian is that of the first `curvature_examples` training images. Where BatchNorm takes the
    moments of its batch they are one batch; else they are processed in parts. Mini-batches of
    `batch_size` come from all training images; they and the vectors for the trace are drawn anew
    at each step, by a fixed key, so that the errors of records are independent. Numbers have their
    standard errors in NAME_error.

    `optimizer(numbers)` is the optimizer of a run, whose whole update has the generalized
    sharpness. Edges are those of SGD with momentum β without weight decay: `edge`, 2 (1 + β) / η,
    for the largest eigenvalue and full batches; `batch_edge`, 2 (1 - β) / η, for batch sharpness
    (arXiv 2604.14108). The row is empty, with a warning, where a product isn't finite.
    """
    config, key, shard = plan.config, jr.key(0), train.split_examples(mesh)
    # In bfloat16, whatever the run computes in, products have two digits.
    layers = plan.model.layers._replace(dtype=jnp.float32)
    network = models.from_linen(plan.model.clone(layers=layers))
    network = measure.in_mode(network, config.curvature_mode)
    loss = train.make_objective(network, train.cross_entropy)
    n, examples, k = (
        len(plan.images.labels),
        config.curvature_examples,
        config.curvature_eigenvalues,
    )

    # Examples are given by their indices: each device gathers its own.
    def of_indices(fetch: Fetch, params: Any, stats: Any, indices: Batch):
        return loss(params, stats, fetch(key, shard(indices.x)))

    def update(numbers: Any, *args: Any):
        return optimizer(numbers).update(*args)

    objective = Partial(of_indices, fetch)

    @jax.jit
    def add_gradient(total, objective, params, stats, batch):
        grads = jax.grad(lambda params: objective(params, stats, batch)[0])(params)
        return jax.tree.map(lambda sum, grad: sum + grad / BATCHES, total, grads)

    def of_hessian(state: TrainState, tick: Callable[[], None]) -> tuple[dict[str, Any], Any]:
        """Eigenvalues and trace, and the first eigenvector."""
        coupled = config.curvature_mode == "train" and jax.tree.leaves(state.stats)
        size = examples if coupled else min(config.batch_size_eval, PART * mesh.size)
        parts = [_indices(range(i, min(i + size, examples))) for i in range(0, examples, size)]
        of_part = lambda part: measure.hessian(objective, state.params, state.stats, part)
        mean = measure.mean_over(of_part, parts)
        hessian = mean._replace(matvec=lambda v: tick() or mean.matvec(v))
        pairs = measure.top_eigenpairs(hessian, k, key, tol=TOL, max_matvecs=PRODUCTS)
        row: dict[str, Any] = {f"eigenvalue_{i}": float(v) for i, v in enumerate(pairs.values, 1)}
        row |= {f"residual_{i}": float(v) for i, v in enumerate(pairs.residuals, 1)}
        row |= {"products": pairs.matvecs, "converged": bool(pairs.converged.all())}
        trace = measure.trace(hessian, jr.fold_in(key, int(state.step)), probes=PROBES)
        first = jax.tree.map(lambda leaf: leaf[0], jax.device_get(pairs.vectors))
        first = train.replicate(first, mesh)
        return row | _with_error("trace", trace), first

    def of_batches(
        numbers: Any, state: TrainState, direction: Any, tick: Callable[[], None]
    ) -> dict[str, float]:
        """The gauges of mini-batches."""
        at, rng = (objective, state.params, state.stats), np.random.default_rng(int(state.step))
        rows = np.stack([rng.choice(n, config.batch_size, replace=False) for _ in range(BATCHES)])
        gradient = jax.tree.map(jnp.zeros_like, state.params)
        for indices in rows:
            gradient = add_gradient(gradient, *at, _indices(indices))
            tick()
        whole = {"gradient": gradient, "direction": direction}
        if config.momentum or config.l2_reg:  # else step size times ratio_of_means
            tx = plan.tx._replace(update=Partial(update, numbers))
            whole |= {"tx": tx, "opt_state": state.opt_state}
        # In a loop on the host: the memory of one batch, and convolutions stay fast.
        gauges = measure.batch_gauges(*at, _indices(rows), **whole, chunk=1)
        row = {}
        for name, gauge in gauges.items():
            # The mean gradient is that of the same batches, nearer to theirs than the true one.
            scale = BATCHES / (BATCHES - 1) if name.startswith("gradient_noise") else 1.0
            row |= _with_error(name, gauge, scale)
        return row

    def probe(
        numbers: Any, state: TrainState, progress: Callable[[float], None] = lambda share: None
    ) -> dict[str, Any]:
        started, done = time.perf_counter(), itertools.count(1)
        expected = k + 10 + PROBES + BATCHES  # k + 7 products are the fewest
        numbers = jax.device_get(numbers)
        try:
            tick = lambda: progress(min(next(done) / expected, 1.0))
            row, direction = of_hessian(state, tick)
            row |= of_batches(numbers, state, direction, tick) | edges(numbers, int(state.step))
        except FloatingPointError as error:
            logging.getLogger(__name__).warning("No curvature at step %s: %s", state.step, error)
            return {}
        row["seconds"] = time.perf_counter() - started
        return {f"curvature/{name}": value for name, value in row.items()}

    return probe


def edges(numbers: Any, step: int) -> dict[str, float]:
    """The curvatures above which SGD with momentum is unstable, on full and on mini-batches."""
    # After the last step there is no next one.
    eta = float(numbers.step_sizes[min(step, len(numbers.step_sizes) - 1)])
    edge, beta = 2 / eta if eta else math.inf, float(numbers.momentum)
    return {"edge": (1 + beta) * edge, "batch_edge": (1 - beta) * edge}


def _with_error(name: str, found: measure.Estimate, scale: float = 1.0) -> dict[str, float]:
    return {name: scale * found.value, f"{name}_error": scale * found.standard_error}


def _indices(places: Any) -> Batch:
    """Indices of examples, in place of inputs and of targets."""
    places = np.asarray(places, np.int32)
    return Batch(places, places)  # pyright: ignore[reportArgumentType]
