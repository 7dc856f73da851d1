"""One run of a toy problem as a function of its key and its schedule: what a sweep maps over."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from experiments.toy.problems import Toy
from sgd_sparse_jax import data, measure, train
from sgd_sparse_jax.types import Batch, Noise, Params, TrainState


class Descent(NamedTuple):
    """What is not plain SGD, and which weights are measured; the flags of the same names."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    sam_rho: float = 0.0
    sam_of: str = "batch"
    label_noise: float = 0.0
    average: float = 0.0
    valley_steps: int = 0


PLAIN = Descent()


class Schedule(NamedTuple):
    """eta (1 + gain t^exponent), t = step / num_steps, up to `decay_step`; then over the factor."""

    step_size: jax.Array
    warmup_gain: jax.Array
    warmup_exponent: jax.Array
    decay_step: jax.Array
    decay_factor: jax.Array
    init_scale: jax.Array


def decayed(start: optax.Schedule, schedule: Schedule, toy: Toy) -> optax.Schedule:
    """`start`, over the schedule's factor from its decay on."""
    boundary = schedule.decay_step + toy.decay_after_step
    return train.piecewise_decay(start, [boundary], [schedule.decay_factor])


def step_size(schedule: Schedule, toy: Toy, num_steps: int) -> optax.Schedule:
    """The optax schedule that `schedule` describes."""
    size, gain, exponent = schedule[:3]
    return decayed(train.power_warmup(size, gain, exponent, num_steps), schedule, toy)


def optimizer(schedule: Schedule, toy: Toy, descent: Descent, num_steps: int):
    """SGD with the schedule's step sizes, momentum and weight decay."""
    decay = [optax.add_decayed_weights(descent.weight_decay)] if descent.weight_decay else []
    sizes = step_size(schedule, toy, num_steps)
    return optax.chain(*decay, optax.sgd(sizes, momentum=descent.momentum or None))


def ascent(descent: Descent) -> Callable | None:
    """The gradient maker of `make_step`: SAM's, or None for the plain one."""
    makers = {"batch": train.sharpness_aware, "examples": train.example_sharpness_aware}
    return makers[descent.sam_of](descent.sam_rho) if descent.sam_rho else None


def label_noise(schedule: Schedule, toy: Toy, descent: Descent) -> Noise | None:
    """Noise on labels that decays with the step size; None for none."""
    if not descent.label_noise:
        return None
    constant = lambda step: jnp.asarray(descent.label_noise)
    return data.gaussian_label_noise(decayed(constant, schedule, toy))


def make_run(
    toy: Toy,
    *,
    num_steps: int,
    batch_size: int,
    at: np.ndarray,
    snapshots_at: np.ndarray,
    gd_jitter: float = 0.0,
    watched: bool = True,
    descent: Descent = PLAIN,
):
    """(key, schedule) -> (records at `at`, parameters [snapshots, p] at `snapshots_at`) of one run.

    Every record has the losses, and those of `toy.watch` unless `watched` is False.
    """
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError('Float64 is off; call jax.config.update("jax_enable_x64", True) first.')
    n = len(toy.train.y)
    everything = batch_size == n

    def run(key: jax.Array, schedule: Schedule):
        drawing, running, jittering = jr.split(key, 3)
        network = toy.network(schedule.init_scale)
        tx = optimizer(schedule, toy, descent, num_steps)
        initial, _ = network.init(drawing, toy.train.x)
        if everything:
            initial = _jittered(jittering, initial, gd_jitter)
        averaged = bool(descent.average)
        state = train.init_state(
            drawing, network, tx, toy.train.x, averaged=averaged, params=initial
        )
        step = train.make_step(
            train.make_objective(network, toy.loss),
            tx,
            ema_decay=descent.average if averaged else None,
            gradient=ascent(descent),
        )

        def measured(state: TrainState) -> Params:
            if descent.valley_steps:
                loss = lambda params: toy.mean_loss(params, toy.train)
                return measure.valley_floor(loss, state.params, num_steps=descent.valley_steps)
            return state.average if descent.average else state.params

        def record(state: TrainState) -> dict:
            params = measured(state)
            losses = {
                "train_loss": toy.mean_loss(params, toy.train),
                "test_loss": toy.mean_loss(params, toy.test),
            }
            return losses | (toy.watch(initial, params) if watched else {})

        def fetch(key, idx) -> Batch:
            return toy.train if everything else Batch(toy.train.x[idx], toy.train.y[idx])

        _, records = train.record_run(
            running,
            train.full_batch(n) if everything else train.with_replacement(n, batch_size),
            train.make_segment(step, fetch, noise=label_noise(schedule, toy, descent)),
            state,
            [
                train.Probe(record, at),
                train.Probe(lambda state: ravel_pytree(measured(state))[0], snapshots_at),
            ],
            num_steps,
        )
        return records

    return run


def _jittered(key: jax.Array, params: Params, jitter: float) -> Params:
    flat, unravel = ravel_pytree(params)
    return unravel(flat * (1 + jitter * jr.normal(key, flat.shape, flat.dtype)))


def parameters(toy: Toy, theta: jax.Array | np.ndarray) -> Params:
    """The network's parameters from a snapshot [p]."""
    template, _ = toy.network(1.0).init(jr.key(0), toy.train.x[:1])
    return ravel_pytree(template)[1](jnp.asarray(theta))


def seed_keys(seed: int, seeds: int) -> jax.Array:
    """Key i is fold_in(key(seed), i), whatever the number of seeds."""
    return jax.vmap(lambda i: jr.fold_in(jr.key(seed), i))(jnp.arange(seeds))
