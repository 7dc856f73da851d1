"""Derived image sets: two classes of another, grey-scale, or random images."""

import numpy as np

from .images import DRAWN, Images
from .synthetic import binary_gaussians


def two_classes(images: Images, pair: tuple[str, str]) -> Images:
    """The examples of two classes, in order; the first of `pair` becomes class 0."""
    zero, one = (images.labels == images.class_names.index(name) for name in pair)
    chosen = np.flatnonzero(zero | one)
    labels = one[chosen].astype(np.int32)
    return images._replace(images=images.images[chosen], labels=labels, class_names=pair)


def grey(images: Images) -> Images:
    """Grey-scale images with one channel: the mean over channels, rounded down."""
    pixels = np.asarray(images.images)
    total = pixels.sum(-1, dtype=np.uint16, keepdims=True)  # mean() takes 8 bytes per pixel
    return images._replace(images=(total // pixels.shape[-1]).astype(np.uint8))


def drawn(name: str, split: str) -> Images:
    """1,000 random float32 images with fixed seeds, as in the released code.

    gaussians_binary: +-v + .1 N(0, I) as 1 x 100 images, v a random unit vector.
    uniform_noise: uniform pixels in [0, 1); the class is floor(10 x) of the first pixel x.
    """
    if name == "gaussians_binary":
        problem = binary_gaussians(0, n=1000, d=100, std=0.1, n_test=1000)
        points, signs = problem.train if split == "train" else problem.test
        x, labels = points[:, None, :, None].astype(np.float32), signs < 0
    else:
        rng = np.random.default_rng(0 if split == "train" else 1)
        x = rng.random((1000, 28, 28, 1), np.float32)
        labels = np.floor(10 * x[:, 0, 0, 0])
    return Images(x, labels.astype(np.int32), DRAWN[name].class_names)
