"""Arrays in, batches out."""

import os

from . import images as _images
from .augment import (
    crop_and_flip as crop_and_flip,
    random_crop as random_crop,
    random_flip as random_flip,
)
from .builders import prepare as prepare
from .images import IMAGE_SETS as IMAGE_SETS, Images as Images
from .synthetic import Problem as Problem, sparse_regression as sparse_regression


def load_images(name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None) -> Images:
    """A split of an image set: from its cache, else a TFDS directory, else its official archive."""
    return _images.load_images(name, split, data_dir=data_dir, prepare=prepare)
