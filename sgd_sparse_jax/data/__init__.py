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
from .label_noise import (
    CIFAR10_CONFUSIONS as CIFAR10_CONFUSIONS,
    corrupt_labels as corrupt_labels,
    gaussian_label_noise as gaussian_label_noise,
    uniform_label_noise as uniform_label_noise,
)
from .synthetic import (
    CIRCLE_TEACHER as CIRCLE_TEACHER,
    DEEP_TEACHER as DEEP_TEACHER,
    Examples as Examples,
    Layer as Layer,
    Problem as Problem,
    binary_gaussians as binary_gaussians,
    examples as examples,
    random_teacher as random_teacher,
    regression_1d as regression_1d,
    relu_network as relu_network,
    sparse_regression as sparse_regression,
    teacher_student as teacher_student,
)


def load_images(name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None) -> Images:
    """A split of an image set: from its cache, else a TFDS directory, else its official archive."""
    return _images.load_images(name, split, data_dir=data_dir, prepare=prepare)
