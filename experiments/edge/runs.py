"""Trajectories of one problem as snapshots, and gauges of curvature at snapshots.

Gauges are taken from snapshots after the run, hence can't change it. A snapshot is the vector [q]
of parameters and optimizer state before a step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from experiments.toy.problems import Toy
from experiments.toy.run import parameters
from sgd_sparse_jax import measure, train
from sgd_sparse_jax.types import Batch, Fetch, Objective, PRNGKey, Sampler

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
    batch_size: Any = None  # may be traced; default: that of the program


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
    def objective(self) -> Objective:
        """(params, stats, batch) -> (mean loss, stats)."""
        return train.make_objective(self.toy.network(1.0), self.toy.loss)

    def steps(self, size: Any = None) -> tuple[Sampler, Fetch, Objective]:
        """How a step draws, gathers and evaluates its batch.

        With a traced batch `size`, independent batches of that many examples: a step evaluates all
        examples, in a new order, and gives those after the first `size` the weight 0.
        """
        toy, n = self.toy, len(self.toy.train.y)
        drawn = train.with_replacement if self.with_replacement else train.reshuffled_epochs
        if size is not None:
            share = jnp.where(jnp.arange(n) < size, n / size, 0.0).astype(toy.train.x.dtype)

            def weighted(params: Any, stats: Any, batch: Batch) -> tuple[jax.Array, Any]:
                out = toy.network(1.0).apply(params, stats, batch.x, train=True).out
                return (share * toy.loss(out, batch.y)).mean(), stats

            return drawn(n, n), self.gather, weighted
        if self.full:
            return train.full_batch(n), lambda key, idx: toy.train, self.objective
        return drawn(n, self.batch_size), self.gather, self.objective

    def gather(self, key: PRNGKey, idx: jax.Array) -> Batch:
        """The examples of a batch."""
        return Batch(self.toy.train.x[idx], self.toy.train.y[idx])

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

    def scale(self, snapshot: jax.Array) -> jax.Array:
        """P^(-1/2) of the step of RMSProp or Adam before a snapshot, as a vector [p]."""
        opt_state = self.state(jr.key(0), Point(1.0, 0.0, snapshot)).opt_state
        corrected = BETA2 if self.optimizer == "adam" else 0.0
        return ravel_pytree(measure.adaptive_scale(opt_state, eps=EPS, decay=corrected))[0]


def make_run(
    program: Program, at: np.ndarray, *, snapshots: bool = True
) -> Callable[[PRNGKey, Point], dict[str, jax.Array]]:
    """run(key, point) -> records before the steps `at`: "loss" [records], "snapshot" [records, q].

    The loss is that of the whole training set. With full batches, "after" are the snapshots after
    these steps.
    """
    stops = np.union1d(at, at + 1) if program.full and snapshots else at
    places = np.searchsorted(stops, at)

    def record(state):
        found = {"loss": program.toy.mean_loss(state.params, program.toy.train)}
        if snapshots:
            found["snapshot"] = ravel_pytree((state.params, state.opt_state))[0]
        return found

    def run(key, point):
        drawing, running = jr.split(key)
        sampler, fetch, objective = program.steps(point.batch_size)
        step = train.make_step(objective, program.tx(point))
        probes, state = [train.Probe(record, stops)], program.state(drawing, point)
        segment = train.make_segment(step, fetch)
        last = int(stops[-1])
        args = running, sampler, segment, state, probes, last
        records = train.record_run(*args, unroll=1)[1][0]  # half of the time is compilation
        found = {name: leaf[places] for name, leaf in records.items()}
        return found | ({"after": records["snapshot"][places + 1]} if len(stops) > len(at) else {})

    return run


def make_sharpness(toy: Toy, steps: int) -> Callable[[PRNGKey, Any], dict[str, Any]]:
    """f(key, (theta, scale)) -> lambda_max(D H D), D = diag(scale), at the parameters theta [p].

    H is the Hessian of the training loss; "sharpness" is after `steps` Lanczos iterations, with its
    relative "residual".
    """

    def sharpness(key, at):
        params, scale = (parameters(toy, vector) for vector in at)
        loss = lambda params: toy.mean_loss(params, toy.train)
        operator = measure.preconditioned(measure.hessian(loss, params, linearize=True), scale)
        start = random_signs(toy, key, at[0])
        value, residual = measure.lanczos_sharpness(operator.matvec, start, steps=steps)
        return {"sharpness": value, "residual": residual}

    return sharpness


def random_signs(toy: Toy, key: PRNGKey, theta: jax.Array) -> Any:
    """A start vector; normal draws take XLA seconds to compile on CPUs."""
    return parameters(toy, jr.rademacher(key, theta.shape, theta.dtype))


def make_batch_gauges(
    program: Program, batches: int, lanczos_steps: int = 0
) -> Callable[[PRNGKey, jax.Array], dict[str, Any]]:
    """f(key, theta) -> samples over mini-batches B at the parameters theta [p], each [batches].

    "rayleigh" is g^T H_B g / |g|^2 and "g2" is |g|^2, for gradients g of B; with `lanczos_steps`
    only "top", lambda_max(H_B) after so many products. Batches are drawn from `key`, without
    replacement inside.
    """
    data, n, b = program.toy.train, len(program.toy.train.y), program.batch_size

    def gauges(key, theta):
        params, objective = parameters(program.toy, theta), program.objective
        start = random_signs(program.toy, key, theta)
        draw = jax.vmap(lambda key: jr.permutation(key, n)[:b])
        indices = draw(jr.split(key, batches))

        def along_gradient(idx):
            batch = Batch(data.x[idx], data.y[idx])
            return measure.step_sharpness(objective, params, {}, batch)

        def top(idx):
            loss = lambda params: objective(params, {}, Batch(data.x[idx], data.y[idx]))
            product = measure.hessian(loss, params, linearize=True).matvec
            return measure.lanczos_sharpness(product, start, steps=lanczos_steps)[0]

        if lanczos_steps:
            return {"top": jax.lax.map(top, indices)}
        rayleigh, g2 = jax.lax.map(along_gradient, indices)
        return {"rayleigh": rayleigh, "g2": g2}

    return gauges


def continued(run: Callable[[PRNGKey, Any], Any]) -> Callable[[PRNGKey, Any], Any]:
    """f(key, (number, point)): `run` with the key of a number, whatever the point.

    Continuations of a seed with other step sizes thus take the same batches.
    """
    return lambda key, item: run(jr.fold_in(key, item[0]), item[1])
