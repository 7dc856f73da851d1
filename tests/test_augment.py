"""Laws of the random crops and flips."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sgd_sparse_jax.data import crop_and_flip, random_crop


def distinct(b, h=8, w=8, c=3, dtype=np.float32):
    """Images whose pixels are all different from each other and from zero."""
    return jnp.asarray(1 + np.arange(b * h * w * c).reshape(b, h, w, c), dtype)


def test_each_image_gets_its_own_window_and_flip():
    images = np.asarray(distinct(64))
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    crops, upright = (crop_and_flip(jr.key(0), images, flip=flip) for flip in (True, False))
    found = [
        (i, j)
        for image, crop in zip(padded, np.asarray(upright), strict=True)
        for i, j in np.ndindex(9, 9)
        if np.array_equal(image[i : i + 8, j : j + 8], crop)
    ]
    # The pixels are distinct: exactly one window fits each crop.
    assert len(found) == 64 and len(set(found)) > 32
    same, mirrored = ((crops == other).all((1, 2, 3)) for other in (upright, upright[:, :, ::-1]))
    assert (same ^ mirrored).all() and 0 < same.sum() < 64


def test_all_windows_are_equally_likely():
    marker = jnp.zeros((200 * 81, 9, 9, 1), jnp.uint8).at[:, 4, 4].set(1)
    crops = np.asarray(random_crop(jr.key(1), marker))
    assert (crops.sum((1, 2, 3)) == 1).all()  # the marker stays in view whatever the offset
    counts = crops.sum((0, 3), dtype=int)
    assert counts.min() > 0 and ((counts - 200) ** 2 / 200).sum() <= 80 + 5 * np.sqrt(160)


def test_sharded_equals_unsharded_without_exchange_of_images():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    program = jax.jit(crop_and_flip, in_shardings=(whole, split), out_shardings=split)
    images = distinct(32, dtype=np.uint8)
    compiled = program.lower(jr.key(9), images).compile()
    out = compiled(jax.device_put(jr.key(9), whole), jax.device_put(images, split))
    assert out.sharding.is_equivalent_to(split, 4) and out.dtype == images.dtype
    np.testing.assert_array_equal(out, crop_and_flip(jr.key(9), images))
    assert "u8[32," not in compiled.as_text()  # a whole batch on one device would have this shape
