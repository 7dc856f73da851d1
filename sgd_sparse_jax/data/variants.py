"""Image sets made of others: two of the classes, grey-scale, or drawn at random."""

import numpy as np

from .images import DRAWN, Images
from .synthetic import binary_gaussians


def two_classes(images: Images, pair: tuple[str, str]) -> Images:
    """The examples of two classes, in their order; the first of the pair is class 0."""
    zero, one = (images.labels == images.class_names.index(name) for name in pair)
    chosen = np.flatnonzero(zero | one)
    labels = one[chosen].astype(np.int32)
    return images._replace(images=images.images[chosen], labels=labels, class_names=pair)


def grey(images: Images) -> Images:
    """The mean over channels, rounded down: one channel."""
    pixels = np.asarray(images.images)
    total = pixels.sum(-1, dtype=np.uint16, keepdims=True)  # a mean would need 8 bytes a pixel
    return images._replace(images=(total // pixels.shape[-1]).astype(np.uint8))


def drawn(name: str, split: str) -> Images:
    """1,000 float32 images of fixed seeds, as in the released code.

    gaussians_binary: +-v + .1 N(0, I) as images of one row, v a random unit vector.
    uniform_noise: uniform on [0, 1) at every pixel; the class is floor(10 x) of the first pixel.
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
