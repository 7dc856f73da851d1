"""What eight devices exchange in one training step, read off the compiled program."""

import json
import math
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from benchmarks import scaling
from benchmarks.scaling import Collective, collectives
from sgd_sparse_jax import data, models, train
from sgd_sparse_jax.types import Batch

BATCH, CLASSES, SIZE = 16, 4, 8
LAYERS = models.Layers(jnp.float32)


class Net(nn.Module):
    """One convolution, soon compiled."""

    batch_norm: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        norm = LAYERS.norm(train, groups=0 if self.batch_norm else 2)
        return LAYERS.dense(CLASSES)(LAYERS.pool(nn.relu(norm(LAYERS.conv(4)(x)))))


def exchanged(model, *, split=True, shared_images=True):
    """Collectives of one compiled step over eight devices, and the shapes of the state."""
    mesh, network = train.data_mesh(), models.from_linen(model)
    tx = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9))
    step = train.make_step(train.make_objective(network, train.cross_entropy), tx, ema_decay=0.9)
    shard = train.split_examples(mesh) if split else lambda idx: idx

    def program(x, y, key, state, idx):
        def fetch(key, idx):
            images = data.crop_and_flip(key, x[idx])
            return Batch(images.astype(jnp.float32) / 255, y[idx])

        return train.make_segment(step, fetch, shard=shard)(key, state, idx)

    def described(like, *axes):
        place = NamedSharding(mesh, P(*axes))
        describe = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
        return jax.tree.map(describe, like)

    images = np.zeros((64, SIZE, SIZE, 3), np.uint8)
    key, example = jax.eval_shape(lambda: jr.key(0)), jnp.zeros((1, SIZE, SIZE, 3), jnp.float32)
    init = lambda key: train.init_state(key, network, tx, example, averaged=True)
    state = jax.eval_shape(init, key)
    labels, idx = np.zeros(64, np.int32), np.zeros((1, BATCH), np.int32)
    images = described(images, *() if shared_images else ("data",))
    arguments = (images, *map(described, (labels, key, state, idx)))
    compiled = jax.jit(program, donate_argnums=3).lower(*arguments).compile()
    return collectives(compiled.as_text()), state


def dims(shape):
    """The shape, whatever the order of axes and those of length 1."""
    return tuple(sorted(n for n in shape if n > 1))


def counted(found):
    return Counter(dims(shape) for each in found for _, shape in each.arrays)


def once(tree):
    return Counter(dims(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_a_step_adds_up_gradients_moments_and_the_loss():
    """And nothing else: by shape, each parameter once, each norm's channels four times, a scalar.

    Forward, a norm adds up its sums for mean and, which takes the mean, variance. Backward, its
    variance's cotangent is its scale's gradient up to factors; its mean's comes as two sums, of the
    activations' cotangents and, later, of what passes through the variance (0 but for rounding).

    Asserted of arrays: XLA joins those that are known at the same time into one instruction, on
    every platform by rules of its own.
    """
    found, state = exchanged(models.ResNet((1,), CLASSES, LAYERS, width=4))
    assert {each.op for each in found} == {"all-reduce"}
    assert {dtype for each in found for dtype, _ in each.arrays} == {"f32"}
    moments = once(state.stats)  # mean and variance: a channel twice
    assert counted(found) == once(state.params) + moments + moments + Counter([()])
    elements = sum(leaf.size for leaf in jax.tree.leaves((state.params, state.stats, state.stats)))
    assert sum(each.bytes for each in found) == 4 * (elements + 1)
    # Forward and backward, the second waits for the first: BatchNorm's price is latency.
    assert len(found) >= 4 * len(jax.tree.leaves(state.stats)) // 2 + 1


def test_without_batch_norm_only_gradients_and_the_loss_are_exchanged():
    found, state = exchanged(Net(batch_norm=False))
    assert {each.op for each in found} == {"all-reduce"}
    assert counted(found) == once(state.params) + Counter([()])


def test_without_the_split_every_device_does_the_whole_batch():
    """The control: nothing to exchange, as nothing is shared."""
    found, _ = exchanged(Net(), split=False)
    assert found == []


def test_images_spread_over_devices_have_to_be_exchanged():
    """The control: a batch is drawn from all of them, so that no device has its own examples."""
    found, state = exchanged(Net(), shared_images=False)
    more = counted(found) - (once(state.params) + once(state.stats) + once(state.stats))
    assert any(math.prod(shape) >= BATCH // 8 * SIZE * SIZE * 3 for shape in more)


LINES = {
    "  %all-reduce.3 = f32[4]{0} all-reduce(%x), channel_id=4, to_apply=%add": (
        Collective("all-reduce", (("f32", (4,)),))
    ),
    "  ROOT %a = (f32[3,8]{1,0:T(8,128)}, /*index=1*/bf16[], pred[7]{0}) all-reduce-start(%x)": (
        Collective("all-reduce", (("f32", (3, 8)), ("bf16", ()), ("pred", (7,))))
    ),
    "  %g = s32[16]{0} all-gather(%x), dimensions={0}": (
        Collective("all-gather", (("s32", (16,)),))
    ),
    "  %d = f32[4]{0} all-reduce-done(%all-reduce-start)": None,
    "  %e = f32[8]{0} fusion(%all-reduce), kind=kLoop, calls=%all-gather.clone": None,
}


def test_collectives_are_read_off_the_text():
    expected = [found for found in LINES.values() if found]
    assert collectives("\n".join(LINES)) == expected


def test_bytes_follow_from_the_dtype():
    arrays = (("f32", (3, 8)), ("bf16", (5,)), ("pred", (7,)), ("f64", ()), ("f8e4m3fn", (2,)))
    assert Collective("all-reduce", arrays).elements == 24 + 5 + 7 + 1 + 2
    assert Collective("all-reduce", arrays).bytes == 4 * 24 + 2 * 5 + 7 + 8 + 2


@pytest.mark.usefixtures("shallow")
def test_the_benchmark_counts_what_a_step_exchanges(tmp_path, capsys):
    """Eight CPU devices are there already, as many as its default."""
    out = tmp_path / "scaling.json"
    scaling.main(["--nets", "shallow", "--width=2", "--precision=fp32", f"--out={out}"])
    net = json.loads(out.read_text())["nets"]["shallow"]
    exchanged = net["exchanged"]
    assert exchanged["ops"] == ["all-reduce"]
    assert exchanged["elements"] == exchanged["elements_by_law"]
    assert exchanged["bytes"] == net["gradient_bytes"] + net["norm_bytes"] + 4
    assert exchanged["bytes_sent_per_device_of_8"] == round(7 / 4 * exchanged["bytes"])
    # Weights, momentum, average, moments; the steps of training and of the schedule.
    floats = 3 * net["parameters"] + 2 * net["norm_channels"]
    assert 0 <= net["state_bytes"] - 4 * floats <= 16
    assert "shallow" in capsys.readouterr().out


def test_estimates_follow_the_formula():
    """By hand: 2 ms or 4 ms computing on one of four devices, 3 ms of gradients, 1 to 2 waiting."""
    machine = scaling.Machine(4, 1e12, 1e9, (1e-4, 2e-4))
    sizes = {"step_flop_per_image": 32 * 10**8, "gradient_bytes": 2_000_000}
    parts = scaling.estimate(sizes, 10, 1, machine)
    close = lambda pair: pytest.approx(pair, rel=1e-12)
    assert parts["compute_ms"] == close((2.0, 4.0))
    assert parts["gradients_ms"] == close((3.0, 3.0))
    assert parts["waiting_ms"] == close((1.0, 2.0))
    assert parts["step_ms"] == close((6.0, 9.0))
    assert parts["efficiency"] == close((2 / 7, 4 / 8))


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match=r"--batch_size is 12, which can't be split over 8"):
        scaling.run(scaling.Config(batch_size=12))
