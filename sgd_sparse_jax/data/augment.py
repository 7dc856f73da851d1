"""Random crops and flips: pure functions of (key, images), with static shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Num

from sgd_sparse_jax.types import PRNGKey


@partial(jax.jit, static_argnames="padding")
def random_crop(
    key: PRNGKey, images: Num[Array, "b h w c"], padding: int = 4
) -> Num[Array, "b h w c"]:
    """Crops a random h x w window from each image, zero-padded by `padding` pixels.

    Args:
        key: Of the positions, one per image.
        images: Of any dtype, [b, h, w, c].
        padding: Width of the border of zeros.

    Example:
        >>> random_crop(jr.key(0), jnp.ones((4, 6, 6, 1)), padding=0).sum().item()
        144.0
    """
    # One slice per image: on a CPU 7 times faster than one-hot products and 30 times faster than a
    # select over all shifts; a sharded batch stays sharded.
    border = ((padding, padding), (padding, padding), (0, 0))
    corners = jr.randint(key, (len(images), 2), 0, 2 * padding + 1)

    def window(image, corner):
        return jax.lax.dynamic_slice(jnp.pad(image, border), (*corner, 0), image.shape)

    return jax.vmap(window)(images, corners)


@jax.jit
def random_flip(key: PRNGKey, images: Num[Array, "b h w c"]) -> Num[Array, "b h w c"]:
    """Mirrors each image left to right with probability 1/2.

    Args:
        key: Of the choice of images.
        images: Of any dtype, [b, h, w, c].

    Example:
        >>> random_flip(jr.key(0), jnp.ones((4, 6, 6, 1))).shape
        (4, 6, 6, 1)
    """
    mirrored = jr.bernoulli(key, 0.5, (len(images),))
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


@partial(jax.jit, static_argnames="flip")
def crop_and_flip(
    key: PRNGKey, images: Num[Array, "b h w c"], flip: bool = True
) -> Num[Array, "b h w c"]:
    """`random_crop` with a border of 4 pixels, then `random_flip` unless `flip` is False.

    Images are transformed independently, shape and dtype are preserved. Source: the paper's deep
    networks.

    Args:
        key: Of the crops and flips.
        images: Of any dtype, [b, h, w, c].
        flip: Whether to flip; digits shouldn't be.

    Example:
        >>> images = jnp.ones((2, 32, 32, 3), jnp.uint8)
        >>> crop_and_flip(jr.key(0), images).shape
        (2, 32, 32, 3)
    """
    crop_key, flip_key = jr.split(key)
    cropped = random_crop(crop_key, images)
    return random_flip(flip_key, cropped) if flip else cropped
