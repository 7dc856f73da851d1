"""What may not change a run: what is seen of it, how many devices compute it, where it was cut.

And what changes it, from the step of a fork on: the settings that the fork was given.
"""

import functools
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from experiments.deep import config as deep_flags, training as classifiers
from experiments.deep.config import Config
from experiments.storage import records
from sgd_sparse_jax import data, train
from sgd_sparse_jax.models import Layers, ResNet, from_linen
from sgd_sparse_jax.types import Batch

pytestmark = pytest.mark.usefixtures("shallow", "compiled_once", "single_precision")


@pytest.fixture(scope="module")
def base(small_cifar):
    """With BatchNorm, crops and flips."""
    return Config(
        model="shallow",
        model_width=2,
        batch_size=16,
        batch_size_eval=32,
        epochs=4,
        max_steps=5,
        eval_iter_freq=5,
        lr_init=0.05,
        lr_schedule="constant",
        sparsity_images=40,
        bn_images=32,
        keep=9,
        save_every_seconds=1e9,
        data_dir=small_cifar,
    )


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    with jax.enable_x64(False):
        return classifiers.run(replace(base, runs_dir=str(tmp_path_factory.mktemp("runs"))))


def saved_state(folder, step):
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer().restore(folder / "checkpoints" / str(step) / "default")


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol, atol):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=rtol, atol=atol), a, b)


def differs(a, b):
    return any(np.any(p != q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture
def board(monkeypatch):
    """In the place of tensorboardX, which need not be installed: what it is told."""
    told = []

    class SummaryWriter:
        def __init__(self, folder):
            self.flush = self.close = lambda: None

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

    module = ModuleType("tensorboardX")
    module.__spec__ = ModuleSpec("tensorboardX", None)
    monkeypatch.setattr(module, "SummaryWriter", SummaryWriter, raising=False)
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    return told


@pytest.mark.parametrize(
    "seen",
    [
        {"eval_iter_freq": 1, "jacobian_examples": 2, "tensorboard": True},
        {"save_every_seconds": 0.0, "keep": 1, "save_model_each_k_epochs": 1, "n_final_eval": 5}
        | {"eval_iter_freq": 3, "sparsity_images": 7, "bn_images": 64, "deterministic": True},
    ],
)
def test_what_is_seen_of_a_run_does_not_change_it(whole, base, tmp_path, board, seen):
    """Bit for bit: parameters, moments, momentum, the average and the count of steps."""
    folder = classifiers.run(replace(base, runs_dir=str(tmp_path), **seen))
    assert_same(saved_state(folder, 5), saved_state(whole, 5))
    rows = records.read_rows(folder)
    if "jacobian_examples" in seen:
        assert all(row["jacobian_rank"] >= 1 for row in rows)
    every = seen.get("eval_iter_freq", 5)
    assert [row["step"] for row in rows] == sorted({*range(0, 5, every), 5})
    assert {name for name, _, _ in board} >= {"train/loss", "lr"} or "tensorboard" not in seen


MODEL = ResNet((1,), classes=4, layers=Layers(), width=4)
IMAGES = jr.randint(jr.key(3), (64, 16, 16, 3), 0, 256, jnp.uint8)
LABELS = jr.randint(jr.key(4), (64,), 0, 4)
KEY = jr.key(1)
SCHEDULES = {"cosine": optax.cosine_decay_schedule(0.05, 8)}


@functools.cache
def parts(devices=1, lr=0.05, momentum=0.9, batch=16):
    """Mesh, key -> fresh state, order and segment, of BatchNorm under crops and flips."""
    mesh = train.data_mesh(jax.devices()[:devices])
    images, labels = train.replicate((IMAGES, LABELS), mesh)
    constant = lambda step: jnp.float32(lr)  # it counts steps, as the command's constant does
    tx = optax.sgd(SCHEDULES.get(lr, constant), momentum or None)

    def fetch(key, idx):
        return Batch(data.crop_and_flip(key, images[idx]) / jnp.float32(255), labels[idx])

    step = train.make_step(
        train.make_objective(from_linen(MODEL), train.cross_entropy), tx, ema_decay=0.9
    )
    segment = train.make_segment(step, fetch, shard=train.split_examples(mesh), unroll=1)
    x = jnp.zeros((1, 16, 16, 3), jnp.float32)
    init = jax.jit(lambda key: train.init_state(key, from_linen(MODEL), tx, x, averaged=True))
    return mesh, init, train.reshuffled_epochs(64, batch), segment


def fresh(devices=1, **settings):
    mesh, init, *_ = parts(devices, **settings)
    return train.replicate(init(jr.key(0)), mesh)


def trained(state, num_steps, devices=1, save=lambda state, window: None, every=1, **settings):
    """Up to step `num_steps`, and the losses on the way."""
    rows = []
    _, _, order, segment = parts(devices, **settings)
    show = {"eval_every": every, "evaluate": lambda state: {}, "on_row": rows.append}
    ended = train.fit(KEY, state, order, segment, num_steps=num_steps, save=save, **show)
    return ended, [row["window_loss"] for row in rows if "window_loss" in row]


@pytest.fixture(scope="module")
def alone():
    with jax.enable_x64(False):
        return trained(fresh(), 8)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_any_number_of_devices_gives_the_same_training(alone, devices):
    """Moments of the whole batch, the same crops and flips: up to what sums in another order do."""
    assert differs(data.crop_and_flip(KEY, IMAGES), IMAGES)
    state, losses = trained(fresh(devices), 8, devices)
    assert_close(state, alone[0], rtol=2e-3, atol=5e-5)
    np.testing.assert_allclose(losses, alone[1], rtol=2e-4)


def test_a_run_moves_from_eight_devices_to_four_to_one_and_back(alone, tmp_path):
    """Each state arrives bit for bit, and the run ends where one on a single device does."""
    left = jax.device_get(fresh(8))
    for until, devices in ((2, 8), (4, 4), (6, 1), (8, 8)):
        with train.open_checkpoints(tmp_path) as checkpoints:
            state, _ = train.restore(checkpoints, fresh(devices))
            assert_same(jax.device_get(state), left)
            assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {devices}
            save = lambda state, window, to=checkpoints: train.save(to, state)
            ended, _ = trained(state, until, devices, save, every=2)
            left = jax.device_get(ended)
    assert_close(left, alone[0], rtol=2e-3, atol=5e-5)


def test_a_run_lives_on_no_hidden_transfer(alone):
    """Under JAX's guard it is the same run, bit for bit."""
    state = fresh()
    with jax.transfer_guard("disallow"):
        guarded, losses = trained(state, 8)
    assert_same(guarded, alone[0])
    assert losses == alone[1]


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """Runs with and without momentum, saved at each step; and their states at steps 3 and 4."""
    found = {}
    with jax.enable_x64(False):
        for momentum in (0.9, 0.0):
            folder, states = tmp_path_factory.mktemp("parent"), {}
            with train.open_checkpoints(folder / "checkpoints", keep=None) as checkpoints:

                def save(state, window, to=checkpoints, states=states):
                    states[int(state.step)] = jax.device_get(state)
                    train.save(to, state)

                trained(fresh(momentum=momentum), 4, save=save, momentum=momentum)
            found[momentum] = folder, states[3], states[4]
    return found


def forked(parent, momentum=0.9, **changed):
    """What the fork's only step adds to the parameters, and what the parent's step added."""
    folder, before, after = parent
    state = train.fork(folder, 3, fresh(momentum=momentum, **changed))
    assert_same(jax.device_get(state.params), before.params)
    ended, _ = trained(state, 4, momentum=momentum, **changed)
    added = lambda to: jax.tree.map(np.subtract, jax.device_get(to.params), before.params)
    return added(ended), added(after)


def velocity(parents):
    """Of the parent with momentum, at step 3."""
    (trace,) = (part.trace for part in parents[0.9][1].opt_state if hasattr(part, "trace"))
    return trace


@pytest.mark.parametrize("lr", [0.02, "cosine"])
def test_a_fork_with_another_step_size_takes_the_same_step_scaled(parents, lr):
    """By the ratio of the two step sizes at that step, be it a constant or a schedule's."""
    ratio = float(SCHEDULES[lr](3) if lr in SCHEDULES else lr) / 0.05
    assert ratio < 0.9
    ours, its = forked(parents[0.9], lr=lr)
    assert_close(ours, jax.tree.map(lambda x: ratio * x, its), rtol=1e-3, atol=2e-7)


def test_a_fork_into_momentum_begins_with_none(parents):
    """Its first step is that of plain SGD."""
    ours, its = forked(parents[0.0], momentum=0.9)
    assert_close(ours, its, rtol=1e-3, atol=2e-7)


def test_a_fork_out_of_momentum_leaves_it_behind(parents):
    """Its step is the parent's without the velocity that the parent came with."""
    ours, its = forked(parents[0.9], momentum=0.0)
    wanted = jax.tree.map(lambda step, v: step + 0.05 * 0.9 * v, its, velocity(parents))
    assert_close(ours, wanted, rtol=1e-3, atol=2e-7)
    assert differs(ours, its)


def test_a_fork_with_another_batch_size_keeps_the_velocity(parents):
    """Its step is that of its own gradient, and 0.9 of the velocity that the parent came with."""
    ours, its = forked(parents[0.9], batch=32)
    gradient, _ = forked(parents[0.9], batch=32, momentum=0.0)
    wanted = jax.tree.map(lambda step, v: step - 0.05 * 0.9 * v, gradient, velocity(parents))
    assert_close(ours, wanted, rtol=1e-3, atol=2e-7)
    assert differs(ours, its)


@pytest.mark.parametrize(
    ("name", "its", "ours"),
    [
        ("lr_init", 0.05, 0.02),
        ("batch_size", 16, 32),
        ("momentum", 0.0, 0.9),
        ("momentum", 0.9, 0.0),
        ("lr_schedule", "constant", "cosine"),
    ],
)
def test_a_fork_tells_its_parent_and_what_it_changed(base, tmp_path, name, its, ours):
    parent = replace(base, runs_dir=str(tmp_path), **{name: its})
    folder = records.open_run(*deep_flags.place_of(parent), parent)
    fork = replace(parent, fork_from=str(folder), fork_step=3, **{name: ours})
    told = classifiers.parent_of(fork)
    changed = {k: v for k, v in told["changed"].items() if not k.startswith("fork_")}
    assert told["run"] == str(folder) and told["step"] == 3 and changed == {name: [its, ours]}
    assert deep_flags.place_of(fork) != deep_flags.place_of(parent)
