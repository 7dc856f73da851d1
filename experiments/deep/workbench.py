"""Compiled functions and data on the devices, shared by runs that differ in numbers alone."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from experiments.deep import curvature, metrics, setup
from experiments.deep.config import MAY_CHANGE, Config
from experiments.deep.setup import Plan
from experiments.launch import devices
from sgd_sparse_jax import data, train, types

# Flags that compiled functions don't depend on: what follows from them is in `Numbers`, or on the
# host. Seeds give keys, which are arguments.
FREE = (
    *("lr_init", "lr_schedule", "warmup_factor", "warmup_exp", "ln_schedule", "swa_tau", "seed"),
    *("eval_iter_freq", "save_model_each_k_epochs", "steps_per_call", "model_path", "fork_from"),
    *("fork_step", "exp_name", "curvature_every", *MAY_CHANGE),
)
ON_OR_OFF = ("momentum", "l2_reg", "sgd_p_label_noise")  # only whether they are 0 is compiled


class Numbers(NamedTuple):
    """What a training step takes as arguments, so that other values need no other program."""

    step_sizes: jax.Array  # of each step
    label_noise: jax.Array  # of each step: the share of labels drawn anew
    momentum: jax.Array
    l2_reg: jax.Array
    swa_tau: jax.Array


class Workbench(NamedTuple):
    """The functions of a run."""

    initial_state: Callable[..., types.TrainState]  # (key, weights or None), compiled
    images: Callable[[], list[types.Batch]]  # both splits, on the devices from the first call on
    step: Callable  # (pixels, numbers, key, state, indices) -> (state, losses), see `segment`
    evaluation: Callable[[], Callable[..., dict[str, Any]]]
    probe: Callable[[], Callable[..., dict[str, Any]]]  # see `curvature`

    def segment(self, plan: Plan) -> Partial:
        """The segment of a run, as `train.windows` compiles it: once for all runs."""
        # Arguments, pixels too: JAX keeps compiled functions, and what is part of them, for long.
        return Partial(self.step, self.images()[0], numbers_of(plan))

    def curvature(self, plan: Plan) -> Callable[..., dict[str, Any]]:
        """(state, progress) -> the curvature at a state of a run."""
        return functools.partial(self.probe(), numbers_of(plan))


def numbers_of(plan: Plan) -> Numbers:
    """The numbers of a run, on all devices."""
    steps, config = jnp.arange(plan.total_steps), plan.config
    table = lambda schedule: jnp.broadcast_to(schedule(steps), steps.shape).astype(jnp.float32)
    numbers = Numbers(
        table(plan.step_size),
        table(plan.label_noise),
        *map(jnp.float32, (config.momentum, config.l2_reg, config.swa_tau)),
    )
    return train.replicate(numbers, train.data_mesh())


_latest: dict[tuple, Workbench] = {}  # one: a data set fills a part of a device's memory


def of(plan: Plan) -> Workbench:
    """That of the run before, if all that is compiled and all data are the same."""
    config = plan.config
    defaults = {name: getattr(Config(), name) for name in FREE}
    if config.p_label_noise:
        del defaults["seed"]  # which labels are wrong
    switches = {name: float(getattr(config, name) > 0) for name in ON_OR_OFF}
    key = dataclasses.replace(config, **defaults, **switches), json.dumps(plan.about_data)
    if key not in _latest:
        _latest.clear()
        _latest[key] = _make(plan)
    return _latest[key]


def _make(plan: Plan) -> Workbench:
    config, mesh, shape = plan.config, train.data_mesh(), plan.images.images.shape[1:]
    augment, shard = setup.augmentation(config), train.split_examples(mesh)
    objective = train.make_objective(plan.network, train.cross_entropy)
    classes, noisy = len(plan.images.class_names), config.sgd_p_label_noise > 0

    def optimizer(numbers: Numbers) -> optax.GradientTransformation:
        momentum = numbers.momentum if config.momentum else None
        decay = numbers.l2_reg if config.l2_reg else None
        return setup.optimizer(lambda step: numbers.step_sizes[step], momentum, decay)

    def step(pixels: types.Batch, numbers: Numbers, key, state, indices):
        one = train.make_step(objective, optimizer(numbers), ema_decay=numbers.swa_tau)
        share = lambda step: numbers.label_noise[step]
        noise = data.uniform_label_noise(share, classes) if noisy else None
        fetch = setup.make_fetch(pixels, shape, augment)
        return train.make_segment(one, fetch, shard, unroll=1, noise=noise)(key, state, indices)

    def initial_state(key, weights):
        x, (params, stats) = jnp.zeros((1, *shape), jnp.float32), weights or (None, None)
        state = train.init_state(key, plan.network, plan.tx, x, averaged=True, params=params)
        return state if stats is None else state._replace(stats=stats)

    # Once, and not before training: a finished run, or one that is refused, needs no images.
    @functools.cache
    def images():
        return [setup.placed(each, mesh) for each in (plan.images, plan.test_images)]

    @functools.cache
    def evaluation():
        fetches = [setup.make_fetch(pixels, shape) for pixels in images()]
        return metrics.make_evaluation(plan, mesh, *fetches)

    @functools.cache
    def probe():
        return curvature.make_curvature(plan, mesh, setup.make_fetch(images()[0], shape), optimizer)

    # Runs once: at XLA's highest level it takes three times as long to compile, for the same bits.
    once = jax.jit(initial_state, compiler_options=devices.QUICK_COMPILATION)
    return Workbench(once, images, step, evaluation, probe)
