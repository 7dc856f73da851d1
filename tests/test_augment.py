"""Laws of the random crops and flips."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sgd_sparse_jax.data.augment import crop_and_flip, random_crop, random_flip

FUNCTIONS = [random_crop, random_flip, crop_and_flip]


def distinct(b, h=8, w=8, c=3, dtype=np.float32):
    """Images whose pixels are all different from each other and from zero."""
    return jnp.asarray(1 + np.arange(b * h * w * c).reshape(b, h, w, c), dtype)


def windows(image, padding=4):
    """Every window of the padded image, by the definition."""
    h, w, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    sides = range(2 * padding + 1)
    return {(i, j): padded[i : i + h, j : j + w] for i in sides for j in sides}


def test_a_crop_is_a_window_and_every_image_has_its_own():
    images = distinct(64)
    crops = np.asarray(random_crop(jr.key(0), images))
    found = []
    for image, crop in zip(np.asarray(images), crops, strict=True):
        found += [at for at, view in windows(image).items() if np.array_equal(view, crop)]
    assert len(found) == 64  # the pixels are distinct: exactly one window fits each crop
    assert len(set(found)) > 32


def test_the_81_windows_are_uniform():
    n = 81 * 200
    marker = jnp.zeros((n, 9, 9, 1), jnp.uint8).at[:, 4, 4].set(1)
    crops = np.asarray(random_crop(jr.key(1), marker))
    assert (crops.sum((1, 2, 3)) == 1).all()  # the marker stays in view whatever the offset
    counts = crops.sum((0, 3), dtype=int)
    chi_squared = ((counts - 200) ** 2 / 200).sum()  # mean 80, standard deviation 12.6
    assert counts.min() > 0 and chi_squared < 80 + 5 * 12.6


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_padding_sets_the_range(padding):
    n = 400
    size = 2 * padding + 1
    marker = jnp.zeros((n, size, size, 1)).at[:, padding, padding].set(1)
    counts = random_crop(jr.key(2), marker, padding=padding).sum((0, 3))
    assert (counts > 0).all() and counts.sum() == n


def test_flip_is_horizontal_and_an_involution():
    images = distinct(256)
    flipped = random_flip(jr.key(3), images)
    same = np.asarray((flipped == images).all((1, 2, 3)))
    mirrored = np.asarray((flipped == images[:, :, ::-1]).all((1, 2, 3)))
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / 16
    np.testing.assert_array_equal(random_flip(jr.key(3), flipped), images)


def test_crop_and_flip_are_independent():
    n = 4000
    marker = jnp.zeros((n, 9, 9, 2)).at[:, 4, 4, 0].set(1).at[:, :, :5, 1].set(1)
    out = np.asarray(crop_and_flip(jr.key(4), marker))
    assert len(np.unique(out[..., 0].reshape(n, 81).argmax(1))) == 81
    unflipped = np.asarray(crop_and_flip(jr.key(4), marker, flip=False))
    changed = (out != unflipped).any((1, 2, 3))
    above = unflipped[:, :4, :, 0].any((1, 2))  # mirroring must not depend on where the window is
    rates = changed[above].mean(), changed[~above].mean()
    assert abs(rates[0] - rates[1]) < 5 * np.sqrt(0.25 * 4 / n)


@pytest.mark.parametrize("augment", FUNCTIONS)
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.float64, jnp.bfloat16])
def test_dtype_and_shape_are_kept(augment, dtype):
    images = distinct(4, 6, 7, 1).astype(dtype)
    out = augment(jr.key(5), images)
    assert out.dtype == dtype and out.shape == images.shape


@pytest.mark.parametrize("augment", FUNCTIONS)
def test_the_key_decides(augment):
    images = distinct(32)
    first, again = augment(jr.key(6), images), augment(jr.key(6), images)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, augment(jr.key(7), images))


@pytest.mark.parametrize("augment", FUNCTIONS)
def test_vmapped_is_looped(augment):
    keys, images = jr.split(jr.key(8), 3), distinct(24).reshape(3, 8, 8, 8, 3)
    looped = jnp.stack([augment(k, x) for k, x in zip(keys, images, strict=True)])
    np.testing.assert_array_equal(jax.vmap(augment)(keys, images), looped)


@pytest.mark.parametrize("augment", FUNCTIONS)
def test_sharded_is_unsharded_and_no_image_travels(augment):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    program = jax.jit(augment, in_shardings=(whole, split), out_shardings=split)
    images = distinct(32, dtype=np.uint8)
    compiled = program.lower(jr.key(9), images).compile()
    out = compiled(jax.device_put(jr.key(9), whole), jax.device_put(images, split))
    assert out.sharding.is_equivalent_to(split, 4)
    np.testing.assert_array_equal(out, augment(jr.key(9), images))
    assert "u8[32," not in compiled.as_text()  # a whole batch on one device would have this shape
