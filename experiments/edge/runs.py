"""Trajectories of one problem as snapshots, and gauges of curvature at snapshots.

Gauges are taken from snapshots after the run, hence can't change it. A snapshot is the vector [q]
of parameters and optimizer state before a step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from experiments.toy.problems import Toy
from sgd_sparse_jax import measure, train
from sgd_sparse_jax.types import Batch, Params, PRNGKey

Optimizer = Callable[[Any, Any], optax.GradientTransformation]  # of step size and momentum
BETA1, BETA2, EPS = 0.9, 0.99, 1e-7  # of Adam; RMSProp has the last two
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda step_size, momentum: optax.sgd(step_size, momentum),
    "rmsprop": lambda step_size, momentum: optax.rmsprop(
        step_size, decay=BETA2, eps=EPS, eps_in_sqrt=False
    ),
    "adam": lambda step_size, momentum: optax.adam(step_size, BETA1, BETA2, EPS),
}


class Point(NamedTuple):
    """What the runs of one program differ in; leaves [points]."""

    step_size: Any  # scalar, or [points]
    momentum: Any  # of SGD
    start: Any = None  # a snapshot [q]; default: drawn from the key


class Program(NamedTuple):
    """What the runs of one program have in common."""

    toy: Toy
    optimizer: str  # a key of OPTIMIZERS
    batch_size: int  # the number of examples: gradient descent
    with_replacement: bool = False  # mini-batches; default: reshuffled epochs

    @property
    def full(self) -> bool:
        """Whether each step takes all examples."""
        return self.batch_size == len(self.toy.train.y)

    @property
    def objective(self) -> Any:
        """(params, stats, batch) -> (mean loss, stats)."""
        return train.make_objective(self.toy.network(1.0), self.toy.loss)

    def tx(self, point: Point) -> optax.GradientTransformation:
        """The optimizer of a run, in the dtype of the data."""
        as_data = lambda value: jnp.asarray(value, self.toy.train.x.dtype)
        return OPTIMIZERS[self.optimizer](as_data(point.step_size), as_data(point.momentum))

    def state(self, key: PRNGKey, point: Point) -> Any:
        """The state before the first step."""
        state = train.init_state(key, self.toy.network(1.0), self.tx(point), self.toy.train.x)
        if point.start is None:
            return state
        params, opt_state = ravel_pytree((state.params, state.opt_state))[1](point.start)
        return state._replace(params=params, opt_state=opt_state)

    def full_loss(self, params: Params) -> jax.Array:
        """The training loss."""
        return self.toy.mean_loss(params, self.toy.train)


def make_run(
    program: Program, num_steps: int, at: Sequence[int] | np.ndarray, *, snapshots: bool = True
) -> Callable[[PRNGKey, Point], dict[str, jax.Array]]:
    """run(key, point) -> records before the steps `at`: "loss" [records], "snapshot" [records, q].

    The loss is that of the whole training set.
    """
    data, n = program.toy.train, len(program.toy.train.y)
    drawn = train.with_replacement if program.with_replacement else train.reshuffled_epochs
    sampler = train.full_batch(n) if program.full else drawn(n, program.batch_size)
    fetch = lambda key, idx: data if program.full else Batch(data.x[idx], data.y[idx])

    def record(state):
        found = {"loss": program.full_loss(state.params)}
        if snapshots:
            found["snapshot"] = ravel_pytree((state.params, state.opt_state))[0]
        return found

    def run(key, point):
        drawing, running = jr.split(key)
        step = train.make_step(program.objective, program.tx(point))
        probes, state = [train.Probe(record, at)], program.state(drawing, point)
        segment = train.make_segment(step, fetch)
        return train.record_run(running, sampler, segment, state, probes, num_steps)[1][0]

    return run


def make_sharpness(program: Program, steps: int) -> Callable[[PRNGKey, Point], dict[str, Any]]:
    """f(key, point) -> largest eigenvalues of the Hessian at the snapshot `point.start`.

    "sharpness" is lambda_max of the full-batch loss, after `steps` Lanczos iterations, with its
    relative "residual". With full batches, "midpoint" is that half-way to the next iterate:
    iterates jump across the valley every step, and every second record would see one side of it.
    For RMSProp and Adam, "preconditioned" is lambda_max(P^-1/2 H P^-1/2) there, with the P of the
    step.
    """

    def sharpness(key, point):
        state = program.state(key, point)
        start = optax.tree.random_like(key, state.params)

        def top(params, scale=None):
            operator = measure.hessian(program.full_loss, params)
            if scale is not None:
                operator = measure.preconditioned(operator, scale)
            return measure.lanczos_sharpness(operator.matvec, start, steps=steps)

        if not program.full:
            value, residual = top(state.params)
            return {"sharpness": value, "residual": residual}
        grads = jax.grad(program.full_loss)(state.params)
        updates, after = program.tx(point).update(grads, state.opt_state, state.params)
        both = jax.tree.map(lambda p, u: jnp.stack([p, p + u / 2]), state.params, updates)
        values, residuals = jax.lax.map(top, both)
        found = {"sharpness": values[0], "residual": residuals[0], "midpoint": values[1]}
        if program.optimizer != "sgd":
            corrected = BETA2 if program.optimizer == "adam" else 0.0
            scale = measure.adaptive_scale(after, eps=EPS, decay=corrected)
            found["preconditioned"] = top(jax.tree.map(lambda leaf: leaf[1], both), scale)[0]
        return found

    return sharpness


def make_batch_gauges(
    program: Program, batches: int, lanczos_steps: int = 0
) -> Callable[[PRNGKey, Point], dict[str, Any]]:
    """f(key, point) -> samples over mini-batches B at a snapshot, each [batches].

    "rayleigh" is g^T H_B g / |g|^2 and "g2" is |g|^2, for gradients g of B; with `lanczos_steps`
    only "top", lambda_max(H_B) after so many products. Batches are drawn from `key`, without
    replacement inside.
    """
    data, n, b = program.toy.train, len(program.toy.train.y), program.batch_size

    def gauges(key, point):
        params, objective = program.state(key, point).params, program.objective
        start = optax.tree.random_like(key, params)
        draw = jax.vmap(lambda key: jr.permutation(key, n)[:b])
        indices = draw(jr.split(key, batches))

        def along_gradient(idx):
            batch = Batch(data.x[idx], data.y[idx])
            return measure.step_sharpness(objective, params, {}, batch)

        def top(idx):
            loss = lambda params: objective(params, {}, Batch(data.x[idx], data.y[idx]))
            product = measure.hessian(loss, params).matvec
            return measure.lanczos_sharpness(product, start, steps=lanczos_steps)[0]

        if lanczos_steps:
            return {"top": jax.lax.map(top, indices)}
        rayleigh, g2 = jax.lax.map(along_gradient, indices, batch_size=8)
        return {"rayleigh": rayleigh, "g2": g2}

    return gauges


def continued(run: Callable[[PRNGKey, Point], Any]) -> Callable[[PRNGKey, Any], Any]:
    """f(key, (seed, point)): `run` with the key of a seed, whatever the rest of the point.

    Continuations of a seed with other step sizes thus take the same batches.
    """
    return lambda key, item: run(jr.fold_in(key, item[0]), item[1])
