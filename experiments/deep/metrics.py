"""What is measured along the run of a classifier: a row of numbers per evaluation."""

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from experiments.deep.setup import Plan
from sgd_sparse_jax import measure, models, train
from sgd_sparse_jax.types import Fetch, TrainState


def make_evaluation(
    plan: Plan, mesh: jax.sharding.Mesh, fetch: Fetch, fetch_test: Fetch
) -> Callable[..., dict[str, Any]]:
    """(state, progress) -> a row: loss, error and sparsity on training images, and on test images.

    Each image passes the network once per set of weights, current and averaged; at step 0 they are
    equal, and the averaged ones are left out. Their BatchNorm moments are estimated on `bn_images`
    training images, after all epochs on all of them. `progress(share)` is called after each batch.
    """
    # One key for each block, the same at every step and in every run: curves compare the same
    # sampled units, and runs of several seeds share a program.
    key, network = jr.key(0), plan.network
    block_keys = {f"block{i}": jr.fold_in(key, i) for i in range(1, 10)}
    shard = train.split_examples(mesh)
    n, n_test = len(plan.images.labels), len(plan.test_images.labels)
    few = min(plan.config.bn_images, n)
    # Whole batches for the moments: a multiple of the devices, at most the images that there are.
    batch = min(plan.config.batch_size_eval, few - few % mesh.size)
    placed = {"batch": batch, "shard": shard}
    on_train = measure.make_evaluation(
        network,
        train.cross_entropy,
        fetch,
        sample=lambda block, phi: measure.sample_units(block_keys[block], phi),
        distinct=lambda phi: measure.feature_sparsity(phi)[1],
        **placed,
    )
    on_test = measure.make_evaluation(network, train.cross_entropy, fetch_test, **placed)
    # Without memory, each batch's own moments are what `make_moments` averages.
    forgetful = plan.model.clone(layers=plan.model.layers._replace(norm_momentum=0.0))
    moments = measure.make_moments(models.from_linen(forgetful), fetch, **placed)
    norms = make_norms(plan, fetch, shard)

    def evaluate(
        state: TrainState, progress: Callable[[float], None] = lambda share: None
    ) -> dict[str, Any]:
        started, step, done = time.perf_counter(), int(state.step), itertools.count(1)
        n_moments, n_train = n if step == plan.total_steps else few, plan.config.sparsity_images
        n_train = min(n_train, n)
        sizes = (n_train, n_test, *((n_moments, n_test) if step else ()))
        batches = sum(-(-size // batch) for size in sizes)
        on_batch = lambda: progress(min(next(done) / batches, 1.0))
        parts = {
            "train": on_train(key, state.params, state.stats, n_train, on_batch),
            "test": on_test(key, state.params, state.stats, n_test, on_batch),
        }
        if step:
            stats = moments(key, state.average, state.stats, n_moments, on_batch)
            parts["test_average"] = on_test(key, state.average, stats, n_test, on_batch)
        row = {f"{of}/{name}": value for of, part in parts.items() for name, value in part.items()}
        row |= jax.tree.map(float, norms(state))
        if plan.config.jacobian_examples:
            row["jacobian_rank"] = jacobian_rank(plan, state)
        return row | {"eval_seconds": time.perf_counter() - started}

    return evaluate


def make_norms(plan: Plan, fetch: Fetch, shard: Callable) -> Callable:
    """State -> |p| and |∇L| on the first `batch_size` training images, normalized as a batch."""
    objective = train.make_objective(plan.network, train.cross_entropy)

    @jax.jit
    def norms(fetch: Fetch, state: TrainState) -> dict[str, jax.Array]:
        batch = fetch(jr.key(0), shard(jnp.arange(plan.config.batch_size)))
        grads = jax.grad(lambda p: objective(p, state.stats, batch)[0])(state.params)
        return {"param_norm": optax.tree.norm(state.params), "grad_norm": optax.tree.norm(grads)}

    return partial(norms, fetch)


def jacobian_rank(plan: Plan, state: TrainState) -> int:
    """Rank of the Jacobian of all logits on the first `jacobian_examples` training images.

    In float64: its squared singular values, the eigenvalues of J J^T, span tol^2 = 1e-8.
    """
    images = np.asarray(plan.images.images[: plan.config.jacobian_examples])
    x = images / 255.0 if images.dtype == np.uint8 else images.astype(np.float64)
    host = jax.device_get((state.params, state.stats))
    with jax.enable_x64(True):
        wide = lambda leaf: jnp.asarray(leaf, float if leaf.dtype == np.float32 else leaf.dtype)
        params, stats = jax.tree.map(wide, host)
        layers = plan.model.layers._replace(dtype=jnp.float64)
        network = models.from_linen(plan.model.clone(layers=layers))
        predict = lambda params, x: network.apply(params, stats, x).out
        gram = measure.tangent_kernel(predict, params, jnp.asarray(x))
    # Rounding makes eigenvalues of 0 slightly negative.
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None))
    return int((values > plan.config.jacobian_tol * values[0]).sum())
