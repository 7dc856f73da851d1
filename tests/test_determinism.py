"""Runs do not depend on observation, on the number of devices, or on where they were cut.

A fork with other settings differs from its parent from the step of the fork on.
"""

import functools
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from experiments.deep import training
from experiments.deep.config import Config
from experiments.storage import records
from sgd_sparse_jax import data, train
from sgd_sparse_jax.models import Layers, ResNet, from_linen
from sgd_sparse_jax.types import Batch

pytestmark = pytest.mark.usefixtures("shallow", "single_precision")


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol, atol):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=rtol, atol=atol), a, b)


def test_observing_a_run_does_not_change_it(small_cifar, tmp_path, monkeypatch):
    """Bit for bit: parameters, moments, momentum, average and step count."""
    board = MagicMock(__spec__=ModuleSpec("tensorboardX", None))  # need not be installed
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    shape = {"model": "shallow", "model_width": 2, "batch_size": 32, "batch_size_eval": 32}
    sizes = {"jacobian_examples": 2, "n_final_eval": 5, "sparsity_images": 7, "bn_images": 32}
    length = {"epochs": 2, "max_steps": 3, "lr_init": 0.05, "data_dir": small_cifar}
    often = {"eval_iter_freq": 1, "save_model_each_k_epochs": 1, "tensorboard": True}
    unseen = Config(**shape, **length, **sizes, runs_dir=str(tmp_path / "unseen"))
    folders = [
        training.run(config)
        for config in (unseen, replace(unseen, **often, runs_dir=str(tmp_path / "seen")))
    ]
    read = ocp.StandardCheckpointer().restore
    assert_same(*(read(folder / "checkpoints/3/default") for folder in folders))
    assert [row["step"] for row in records.read_records(folders[1])] == [0, 1, 2, 3]
    written = board.SummaryWriter.return_value.add_scalar.call_args_list
    assert {call.args[0] for call in written} >= {"train/loss", "lr"}


MODEL = from_linen(ResNet((1,), classes=4, layers=Layers(), width=4))
RNG = np.random.default_rng(3)
IMAGES, LABELS = RNG.integers(0, 256, (64, 8, 8, 3), np.uint8), RNG.integers(0, 4, 64, np.int32)
KEY = jr.key(1)
COSINE = optax.cosine_decay_schedule(0.05, 8)


@functools.cache
def parts(devices=1, schedule=lambda step: jnp.float32(0.05), momentum=0.9):
    """Mesh, key -> fresh state, order and segment, of BatchNorm under crops and flips."""
    mesh = train.data_mesh(jax.devices()[:devices])
    images, labels = train.replicate((IMAGES, LABELS), mesh)
    tx = optax.sgd(schedule, momentum or None)

    def fetch(key, idx):
        return Batch(data.crop_and_flip(key, images[idx]) / jnp.float32(255), labels[idx])

    step = train.make_step(train.make_objective(MODEL, train.cross_entropy), tx, ema_decay=0.9)
    segment = train.make_segment(step, fetch, shard=train.split_examples(mesh), unroll=1)
    x = jnp.zeros((1, 8, 8, 3), jnp.float32)
    init = jax.jit(lambda key: train.init_state(key, MODEL, tx, x, averaged=True))
    return mesh, init, train.reshuffled_epochs(64, 16), segment


def fresh(devices=1, **settings):
    mesh, init, *_ = parts(devices, **settings)
    return train.replicate(init(jr.key(0)), mesh)


def windows(state, stops, devices=1, **settings):
    _, _, order, segment = parts(devices, **settings)
    return train.windows(KEY, state, order, segment, stops)


def trained(state, num_steps, devices=1, **settings):
    """The state at step `num_steps`, and all losses."""
    (window,) = windows(state, [num_steps], devices, **settings)
    return window.state, window.losses


@pytest.fixture(scope="module")
def alone():
    with jax.enable_x64(False):
        return trained(fresh(), 5)


def test_eight_devices_give_the_same_training(alone):
    """Moments of the whole batch, the same crops and flips, up to the order of sums.

    No implicit transfers between host and devices; the state stays on all devices.
    """
    begin = fresh(8)
    with jax.transfer_guard("disallow"):
        state, losses = trained(begin, 5, 8)
    assert_close((state, losses), alone, rtol=2e-3, atol=5e-5)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))


def test_a_run_moves_between_device_counts(alone, tmp_path):
    """Each state is restored bit for bit, and the run ends like one on a single device."""
    left = jax.device_get(fresh(8))
    for until, devices in ((2, 8), (4, 1), (5, 2)):
        with train.open_checkpoints(tmp_path) as checkpoints:
            state, _ = train.restore(checkpoints, fresh(devices)) or (fresh(devices), {})
            assert_same(jax.device_get(state), left)
            ended, _ = trained(state, until, devices)
            train.save(checkpoints, ended)
            left = jax.device_get(ended)
    assert_close(left, alone[0], rtol=2e-3, atol=5e-5)


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.9), (0.9, 0.0)])
def test_a_forks_first_step_differs_from_its_parents_by_its_settings(tmp_path, before, after):
    """Its schedule continues at the step of the fork; momentum starts at 0, or is dropped."""
    states = []
    with train.open_checkpoints(tmp_path) as checkpoints:
        for window in windows(fresh(momentum=before), [3, 4], momentum=before):
            states.append(jax.device_get(window.state))
            train.save(checkpoints, window.state)
    settings = {"schedule": COSINE, "momentum": after}
    state = train.fork(tmp_path / "3", fresh(**settings))
    start, parent = (state.params for state in states)
    assert_same(state.params, start)
    ended, _ = trained(state, 4, **settings)
    added = lambda params: jax.tree.map(np.subtract, jax.device_get(params), start)
    wanted, ratio = added(parent), float(COSINE(3)) / 0.05
    assert ratio < 0.9
    if before > after:
        (velocity,) = (part.trace for part in states[0].opt_state if hasattr(part, "trace"))
        wanted = jax.tree.map(lambda step, v: step + 0.05 * before * v, wanted, velocity)
    scaled = jax.tree.map(lambda step: ratio * step, wanted)
    assert_close(added(ended.params), scaled, rtol=1e-3, atol=2e-7)
