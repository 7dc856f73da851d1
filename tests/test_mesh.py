"""One device axis: a copy of the state on every device, a share of the batch on each."""

import jax
import numpy as np

from sgd_sparse_jax import train


def test_replicated_is_on_every_device():
    mesh = train.data_mesh(jax.devices()[:3])
    tree = train.replicate({"a": np.arange(3.0), "b": (np.ones(()),)}, mesh)
    for leaf in jax.tree.leaves(tree):
        assert leaf.is_fully_replicated and len(leaf.sharding.device_set) == 3
    np.testing.assert_array_equal(tree["a"], [0, 1, 2])


def test_each_device_gathers_its_own_examples():
    indices = np.arange(48).reshape(3, 16)
    split = jax.jit(train.split_examples(train.data_mesh()))(indices)
    np.testing.assert_array_equal(split, indices)
    assert {shard.data.shape for shard in split.addressable_shards} == {(3, 2)}
