"""A `jax.pmap` step with explicit averages of gradients and moments equals a step over a mesh."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax import models, train
from sgd_sparse_jax.types import Batch, TrainState

pytestmark = pytest.mark.usefixtures("quick_compilation")
DEVICES, PER_DEVICE, CLASSES, STEPS = 4, 2, 3, 3
BATCH, TAU, AXIS = DEVICES * PER_DEVICE, 0.9, "devices"
# A few hundred float64 additions per number, in two orders, accumulated by momentum.
SAME = {"rtol": 1e-10, "atol": 1e-12}
TX = optax.chain(optax.add_decayed_weights(5e-3), optax.sgd(0.1, 0.9))


class Net(nn.Module):
    """Two convolutions with norms: gradients of the first depend on moments of the second."""

    norm_axis: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        layers = models.Layers(jnp.float64, norm_axis=self.norm_axis)
        for _ in range(2):
            x = nn.relu(layers.norm(train)(layers.conv(4)(x)))
        return layers.dense(CLASSES)(layers.pool(x))


RNG = np.random.default_rng(0)
# Dark and bright images: indices of a batch are sorted, so that the first and the last devices have
# different moments.
DIM = np.repeat([0.3, 1.0], 32)[:, None, None, None]
IMAGES = Batch(RNG.random((64, 4, 4, 3)) * DIM, RNG.integers(0, CLASSES, 64, dtype=np.int32))
ROWS = np.sort([RNG.permutation(64)[:BATCH] for _ in range(STEPS)], axis=1).astype(np.int32)


def by_hand(state, batch):
    """A step for `jax.pmap`: a batch per device, means over devices by name."""

    def objective(params, stats, batch):
        variables = {"params": params, **stats}
        logits, stats = Net(AXIS).apply(variables, batch.x, train=True, mutable=["batch_stats"])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.y[:, None], 1)
        return -chosen.mean(), stats

    grad = jax.value_and_grad(objective, has_aux=True)
    (loss, stats), grads = grad(state.params, state.stats, batch)
    grads, loss = jax.lax.pmean(grads, AXIS), jax.lax.pmean(loss, AXIS)
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = jax.tree.map(lambda a, p: TAU * a + (1 - TAU) * p, state.average, params)
    return TrainState(state.step + 1, params, stats, opt_state, average), loss


def test_pmap_with_synchronized_norms_takes_the_same_steps():
    """Parameters, moments, momentum, averages and losses, on every device, at every step."""
    network, devices = models.from_linen(Net()), jax.devices()[:DEVICES]
    mesh = train.data_mesh(devices)
    x, y = train.replicate(tuple(IMAGES), mesh)
    objective = train.make_objective(network, train.cross_entropy)
    step = train.make_step(objective, TX, ema_decay=TAU)
    fetch = lambda key, idx: Batch(x[idx], y[idx])
    segment = jax.jit(train.make_segment(step, fetch, shard=train.split_examples(mesh)))
    init = lambda key: train.init_state(key, network, TX, jnp.asarray(IMAGES.x[:1]), averaged=True)
    begin = jax.device_get(jax.jit(init)(jr.key(0)))
    everywhere = jax.pmap(by_hand, axis_name=AXIS, devices=devices)

    on_each = lambda leaf: np.stack([leaf] * DEVICES)
    compare = lambda a, b: np.testing.assert_allclose(on_each(a), b, **SAME)
    sharded, mapped = train.replicate(begin, mesh), jax.tree.map(on_each, begin)
    for row in ROWS:
        sharded, losses = segment(jr.key(1), sharded, row[None])
        shares = [a[row].reshape(DEVICES, PER_DEVICE, *a.shape[1:]) for a in IMAGES]
        mapped, loss = everywhere(mapped, Batch(*shares))
        jax.tree.map(compare, *jax.device_get(((sharded, losses[0]), (mapped, loss))))
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), jax.device_get(sharded.params), begin.params
    )
    assert min(jax.tree.leaves(moved)) > 1e-6  # else the test is vacuous
