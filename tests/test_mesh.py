"""One device axis: a copy of the state on every device, a share of the batch on each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgd_sparse_jax import train


@pytest.mark.parametrize("devices", [1, 8])
def test_replicated_is_on_every_device(devices):
    mesh = train.data_mesh(jax.devices()[:devices])
    assert mesh.shape == {"data": devices}
    tree = train.replicate({"a": np.arange(3.0), "b": (np.ones(()),)}, mesh)
    for leaf in jax.tree.leaves(tree):
        assert leaf.is_fully_replicated and len(leaf.sharding.device_set) == devices
    np.testing.assert_array_equal(tree["a"], [0, 1, 2])


@pytest.mark.parametrize("shape", [(16,), (3, 16)])
def test_each_device_gathers_its_own_examples(shape):
    indices = np.arange(np.prod(shape)).reshape(shape)
    split = jax.jit(train.split_examples(train.data_mesh()))(indices)
    np.testing.assert_array_equal(split, indices)
    assert {shard.data.shape for shard in split.addressable_shards} == {(*shape[:-1], 2)}


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="12 can't be split over 8"):
        train.split_examples(train.data_mesh())(jnp.zeros((3, 12), int))
