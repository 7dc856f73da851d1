"""Image classification data sets: arrays, shapes and class names."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8


class Images(NamedTuple):
    """The `n` examples of a split, in the official order.

    Networks get uint8 images divided by 255, and float32 images unchanged.

    Example:
        >>> pixels, labels = np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1], np.int32)
        >>> Images(pixels, labels, ("cat", "dog")).images.shape
        (2, 8, 8, 1)
    """

    images: UInt8[np.ndarray, "n h w c"] | Float32[np.ndarray, "n h w c"]  #: pixels
    labels: Int32[np.ndarray, " n"]  #: indices of `class_names`
    class_names: tuple[str, ...]  #: in the order of the labels
    source: str = ""  #: name and version of the data set; "" if unknown


class ImageSet(NamedTuple):
    """The image shape and the class names of a data set."""

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    tfds_name: str = ""  # name in TFDS, if different


_NAMES = json.loads(Path(__file__).with_name("class_names.json").read_text("utf-8"))
DIGITS = tuple("0123456789")

# Sets on disk. A new one needs an entry here and, to be downloadable, one in `archives.SOURCES`.
STORED = {
    "cifar10": ImageSet((32, 32, 3), tuple(_NAMES["cifar10"])),
    "cifar100": ImageSet((32, 32, 3), tuple(_NAMES["cifar100"])),
    "svhn": ImageSet((32, 32, 3), DIGITS, "svhn_cropped"),
    "mnist": ImageSet((28, 28, 1), DIGITS),
    "fashion_mnist": ImageSet((28, 28, 1), tuple(_NAMES["fashion_mnist"])),
    "tiny_imagenet": ImageSet((64, 64, 3), tuple(_NAMES["tiny_imagenet"])),
}
# Class 0 and class 1 of two-class sets, numbered as in the released code.
PAIRS = {
    "cifar10_horse_car": ("cifar10", ("horse", "automobile")),
    "cifar10_dog_cat": ("cifar10", ("dog", "cat")),
}
DRAWN = {
    "gaussians_binary": ImageSet((1, 100, 1), ("+v", "-v")),
    "uniform_noise": ImageSet((28, 28, 1), DIGITS),
}
_COLOUR = {name: kind for name, kind in STORED.items() if kind.shape[-1] == 3} | {
    name: STORED[parent]._replace(class_names=pair) for name, (parent, pair) in PAIRS.items()
}
_GREY = {f"{name}_gs": ImageSet((*c.shape[:2], 1), c.class_names) for name, c in _COLOUR.items()}
IMAGE_SETS = STORED | _COLOUR | _GREY | DRAWN
