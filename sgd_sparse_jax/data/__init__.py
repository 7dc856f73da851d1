"""Arrays in, batches out."""

import os

from . import images as _images, variants as _variants
from .augment import (
    crop_and_flip as crop_and_flip,
    random_crop as random_crop,
    random_flip as random_flip,
)
from .builders import prepare as prepare
from .fingerprint import fingerprint as fingerprint
from .images import IMAGE_SETS as _STORED, Images as Images, ImageSet as ImageSet
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

_SYNTHETIC = {
    "gaussians_binary": ImageSet((1, 100, 1), ("+v", "-v")),
    "uniform_noise": ImageSet((28, 28, 1), _images.DIGITS),
}
_COLOURED = {name: kind for name, kind in _STORED.items() if kind.shape[-1] == 3} | {
    name: _STORED[parent]._replace(class_names=pair)
    for name, (parent, pair) in _variants.TWO_CLASSES.items()
}
_GREY = {
    f"{name}_gs": kind._replace(shape=(*kind.shape[:2], 1)) for name, kind in _COLOURED.items()
}
IMAGE_SETS = _STORED | _COLOURED | _GREY | _SYNTHETIC


def load_images(name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None) -> Images:
    """A split of an image set: from its cache, else a TFDS directory, else its official archive.

    NAME_gs is NAME in grey-scale; the two-class and grey sets are made of their parents, whose data
    they need. gaussians_binary and uniform_noise are drawn from fixed seeds and come as float32.
    Raises ValueError for a name that is not in IMAGE_SETS, FileNotFoundError where the data are
    missing and can't be downloaded.
    """
    if name not in IMAGE_SETS:
        raise ValueError(f"Unknown data set {name!r}; known are {', '.join(sorted(IMAGE_SETS))}.")
    if name in _SYNTHETIC:
        return _drawn(name, split)
    if name in _GREY:
        return _variants.grey(load_images(name.removesuffix("_gs"), split, data_dir=data_dir))
    if name in _variants.TWO_CLASSES:
        parent, pair = _variants.TWO_CLASSES[name]
        return _variants.two_classes(load_images(parent, split, data_dir=data_dir), pair)
    return _images.load_images(name, split, data_dir=data_dir, prepare=prepare)


def _drawn(name: str, split: str) -> Images:
    if split not in _images.SPLITS:
        raise ValueError(f"Unknown split {split!r} of {name}; it has train and test.")
    if name == "uniform_noise":
        x, y = _variants.uniform_noise(_images.SPLITS.index(split))
    else:
        problem = binary_gaussians(0, n=1000, d=100, std=0.1, n_test=1000)
        x, y = _variants.image_like(*(problem.train if split == "train" else problem.test))
    return Images(x, y, IMAGE_SETS[name].class_names)
