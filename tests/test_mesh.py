"""One device axis: a copy of the state on every device, a share of the batch on each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgd_sparse_jax import train


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_replicated_is_on_every_device(devices):
    mesh = train.data_mesh(jax.devices()[:devices])
    assert mesh.shape == {"data": devices}
    tree = train.replicate({"a": jnp.arange(3.0), "b": (jnp.ones(()),)}, mesh)
    for leaf in jax.tree.leaves(tree):
        assert leaf.is_fully_replicated and len(leaf.sharding.device_set) == devices
    np.testing.assert_array_equal(tree["a"], [0, 1, 2])


@pytest.mark.parametrize("shape", [(16,), (3, 16)])
def test_each_device_gathers_its_own_examples(shape):
    indices = jnp.arange(np.prod(shape)).reshape(shape)
    split = jax.jit(train.split_examples(train.data_mesh()))(indices)
    np.testing.assert_array_equal(split, indices)
    assert {shard.data.shape for shard in split.addressable_shards} == {(*shape[:-1], 2)}


def test_a_batch_that_does_not_split_is_refused():
    shard = train.split_examples(train.data_mesh())
    with pytest.raises(ValueError, match=r"batch size 12 can't be split over 8 .* a multiple of 8"):
        shard(jnp.zeros((3, 12), jnp.int32))
