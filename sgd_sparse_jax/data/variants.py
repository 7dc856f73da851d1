"""Image sets made of others: two of the classes, grey-scale, or drawn at random."""

from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32, Int32

AnyImages = TypeVar("AnyImages", bound=Any)  # data.Images

# Class 0 and class 1, as the released code numbers them.
TWO_CLASSES = {
    "cifar10_horse_car": ("cifar10", ("horse", "automobile")),
    "cifar10_dog_cat": ("cifar10", ("dog", "cat")),
}


def two_classes(images: AnyImages, pair: tuple[str, str]) -> AnyImages:
    """The examples of two classes, in their order; the first of the pair is class 0."""
    labels = np.asarray(images.labels)
    zero, one = (labels == images.class_names.index(name) for name in pair)
    kept = np.flatnonzero(zero | one)
    return images._replace(
        images=images.images[kept], labels=one[kept].astype(np.int32), class_names=pair
    )


def grey(images: AnyImages) -> AnyImages:
    """The mean over channels, rounded down: one channel."""
    pixels = np.asarray(images.images)
    total = pixels.sum(-1, dtype=np.uint16, keepdims=True)  # a mean would need 8 bytes a pixel
    return images._replace(images=(total // pixels.shape[-1]).astype(np.uint8))


def image_like(
    x: np.ndarray, y: np.ndarray
) -> tuple[Float32[np.ndarray, "n 1 d 1"], Int32[np.ndarray, " n"]]:
    """Vectors as images of one row; y = +1 is class 0, y = -1 class 1."""
    return x[:, None, :, None].astype(np.float32), (y < 0).astype(np.int32)


def uniform_noise(
    seed: int, n: int = 1000
) -> tuple[Float32[np.ndarray, "n 28 28 1"], Int32[np.ndarray, " n"]]:
    """x uniform on [0, 1) at every pixel; the class is floor(10 x) at the first."""
    x = np.random.default_rng(seed).random((n, 28, 28, 1), np.float32)
    return x, np.floor(10 * x[:, 0, 0, 0]).astype(np.int32)
