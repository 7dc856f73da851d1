"""A run of a toy problem as a function of key and schedule, for sweeps."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from experiments.toy.problems import Toy
from sgd_sparse_jax import data, measure, train
from sgd_sparse_jax.types import Batch, Params, TrainState


class Descent(NamedTuple):
    """Additions to plain SGD, and the weights to measure; see the flags of the same names."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    sam_rho: float = 0.0
    sam_of: str = "batch"
    label_noise: float = 0.0
    average: float = 0.0
    valley_steps: int = 0


PLAIN = Descent()


Leaf = jax.Array | np.ndarray  # of schedules: scalars, or one value per schedule


class Schedule(NamedTuple):
    """eta (1 + gain t^exponent), t = step / num_steps; divided by the factor from `decay_step`."""

    step_size: Leaf
    warmup_gain: Leaf
    warmup_exponent: Leaf
    decay_step: Leaf
    decay_factor: Leaf
    init_scale: Leaf


def decayed(start: optax.Schedule, schedule: Schedule, toy: Toy) -> optax.Schedule:
    """`start`, divided by the schedule's factor from its decay on."""
    # optax.piecewise_constant_schedule branches in Python on its factors, which are traced here.
    boundary = schedule.decay_step + toy.decay_after_step
    return train.piecewise_decay(start, [boundary], [schedule.decay_factor])


def step_size(schedule: Schedule, toy: Toy, num_steps: int) -> optax.Schedule:
    """The optax schedule that `schedule` describes."""
    size, gain, exponent = schedule[:3]
    return decayed(train.power_warmup(size, gain, exponent, num_steps), schedule, toy)


def make_run(
    toy: Toy,
    *,
    num_steps: int,
    batch_size: int,
    probes: Sequence[tuple[Callable[[Params, Params], Any], np.ndarray]],
    gd_jitter: float = 0.0,
    descent: Descent = PLAIN,
) -> Callable[[jax.Array, Schedule], tuple]:
    """run(key, schedule) -> the records of each probe.

    A probe is (f, steps): f(initial, params) is recorded before each of the increasing steps. By
    `descent`, `params` are the weights, their average or the valley floor below them.
    """
    # Thresholds of supports and ranks are below the resolution of float32.
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError('Float64 is off; call jax.config.update("jax_enable_x64", True) first.')
    n = len(toy.train.y)
    everything = batch_size == n
    ascents = {"batch": train.sharpness_aware, "examples": train.example_sharpness_aware}

    def measured(state: TrainState) -> Params:
        if descent.valley_steps:
            loss = lambda params: toy.mean_loss(params, toy.train)
            return measure.valley_floor(loss, state.params, num_steps=descent.valley_steps)
        return state.average if descent.average else state.params

    def fetch(key, idx) -> Batch:
        return toy.train if everything else Batch(toy.train.x[idx], toy.train.y[idx])

    def run(key: jax.Array, schedule: Schedule):
        drawing, running, jittering = jr.split(key, 3)
        network = toy.network(schedule.init_scale)
        sizes = step_size(schedule, toy, num_steps)
        # Not `momentum=0.0`, for which optax keeps a trace of zeros.
        tx = optax.sgd(sizes, momentum=descent.momentum or None)
        if descent.weight_decay:
            tx = optax.chain(optax.add_decayed_weights(descent.weight_decay), tx)
        initial, _ = network.init(drawing, toy.train.x)
        if everything:  # gradient descent has no other random numbers
            flat, unravel = ravel_pytree(initial)
            initial = unravel(flat * (1 + gd_jitter * jr.normal(jittering, flat.shape, flat.dtype)))
        averaged = bool(descent.average)
        state = train.init_state(
            drawing, network, tx, toy.train.x, averaged=averaged, params=initial
        )
        step = train.make_step(
            train.make_objective(network, toy.loss),
            tx,
            ema_decay=descent.average if averaged else None,
            gradient=ascents[descent.sam_of](descent.sam_rho) if descent.sam_rho else None,
        )
        noise = None
        if descent.label_noise:
            level = lambda step: jnp.asarray(descent.label_noise)
            noise = data.gaussian_label_noise(decayed(level, schedule, toy))
        _, records = train.record_run(
            running,
            train.full_batch(n) if everything else train.with_replacement(n, batch_size),
            train.make_segment(step, fetch, noise=noise),
            state,
            [train.Probe(lambda state, f=f: f(initial, measured(state)), at) for f, at in probes],
            num_steps,
        )
        return records

    return run


def snapshot(initial: Params, params: Params) -> jax.Array:
    """A probe of all parameters [p]; `parameters` is its inverse."""
    return ravel_pytree(params)[0]


def parameters(toy: Toy, theta: jax.Array | np.ndarray) -> Params:
    """The network's parameters from a snapshot [p]."""
    template, _ = toy.network(1.0).init(jr.key(0), toy.train.x[:1])
    return ravel_pytree(template)[1](jnp.asarray(theta))


def seed_keys(seed: int, seeds: int) -> jax.Array:
    """Keys fold_in(key(seed), i) for i < `seeds`."""
    return jax.vmap(lambda i: jr.fold_in(jr.key(seed), i))(jnp.arange(seeds))
