"""Image sets of any size and number of classes, in the formats of other tools."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import arrays, encoded, released
from .images import Images, ImageSet
from .released import Found


def npy(folder: Path, split: str) -> Found:
    """Arrays {train,test}_{images,labels}.npy, as memory maps."""
    images, labels = (arrays.opened(folder / f"{split}_{k}.npy") for k in ("images", "labels"))
    return Found(labels, (), lambda: images)


def npz(path: Path, split: str) -> Found:
    """Pairs of arrays in one file, or in train.npz and test.npz."""
    whole = path.is_file()
    pairs = [(f"{split}_images", f"{split}_labels"), (f"x_{split}", f"y_{split}")]
    pairs += [] if whole else [("images", "labels"), ("x", "y")]
    file = path if whole else path / f"{split}.npz"
    with np.load(file, allow_pickle=False) as content:
        found = [pair for pair in pairs if {*pair} <= {*content.files}]
        if not found:
            raise ValueError(f"{file} holds {', '.join(content.files)}, no pair of {split} arrays")
        images, labels = found[0]
        return Found(content[labels], (), lambda: np.load(file, allow_pickle=False)[images])


class Format(NamedTuple):
    """How to recognize a format, what it consists of, and the function that reads a split."""

    signs: tuple[str, ...]  # patterns of paths that formats above it do not have
    expected: str
    read: Callable[[Path, str], Found]
    torchvision: Mapping[str, str] = {}  # name of a set -> its folder in torchvision's `root`

    def matches(self, path: Path) -> bool:
        """Whether a file, or any file in a folder, is of this format."""
        if path.is_file():
            return any(path.match(sign) for sign in self.signs)
        return any(next(path.glob(sign), None) for sign in self.signs)


_UBYTE = "{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz], or these in raw/ (MNIST)"
FORMATS = (
    Format(
        ("data_batch_?",),
        "data_batch_1, ..., data_batch_5, test_batch, batches.meta (CIFAR-10)",
        released.cifar_pickles,
        {"cifar10": "cifar-10-batches-py"},
    ),
    Format(
        ("*_batch*.bin",),
        "data_batch_1.bin, ..., data_batch_5.bin, test_batch.bin, batches.meta.txt (CIFAR-10)",
        released.cifar_binary,
        {"cifar10": "cifar-10-batches-bin"},
    ),
    Format(
        ("meta",),
        "train, test, meta (CIFAR-100)",
        released.cifar_pickles,
        {"cifar100": "cifar-100-python"},
    ),
    Format(
        ("fine_label_names.txt",),
        "train.bin, test.bin, fine_label_names.txt (CIFAR-100)",
        released.cifar_binary,
        {"cifar100": "cifar-100-binary"},
    ),
    Format(
        ("*_32x32.mat",), "train_32x32.mat, test_32x32.mat (SVHN)", released.svhn, {"svhn": "."}
    ),
    Format(
        ("*-ubyte*", "raw/*-ubyte*"),
        _UBYTE,
        released.idx,
        {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"},
    ),
    Format(("*_images.npy", "*_labels.npy"), "{train,test}_{images,labels}.npy", npy),
    Format(("*.npz",), "x_train, y_train, x_test, y_test, or images, labels in each of two", npz),
    Format(
        ("train/*/",),
        "train/CLASS/NAME.png, test/CLASS/NAME.png (or val, .jpg)",
        encoded.image_folder,
    ),
    Format(
        encoded.PARQUET,
        "train*.parquet, test*.parquet with image bytes and labels",
        encoded.parquet,
    ),
)
# The most common formats; the docstring describes all.
KNOWN = (
    "train/CLASS/NAME.png, train*.parquet, train_images.npy and train_labels.npy, train.npz, or "
    "files of CIFAR, MNIST or SVHN: see docs/your_own.md or help(sgd_sparse_jax.data.load_images)"
)


def load(path: Path, split: str) -> Images:
    """A split of the image set in `path`, in any of `FORMATS`.

    A file stands for its folder, except .npz. Sizes, channels and classes are those of the data.
    Raises ValueError, in one line with what was found and expected.
    """
    path = path.parent if path.is_file() and path.suffix != ".npz" else path
    if not path.exists():
        raise ValueError(f"{path} doesn't exist; give a folder with {KNOWN}.")
    form = next((form for form in FORMATS if form.matches(path)), None)
    if form is None:
        names = sorted(each.name for each in path.iterdir())
        content = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
        raise ValueError(f"{path} holds {content or 'nothing'}, not {KNOWN}.")
    return read(form, path, split)


def of_torchvision(root: Path, name: str) -> tuple[Format, Path] | None:
    """Format and folder of the set `name` in torchvision's `root`; None if it isn't there."""
    known = [(form, root / form.torchvision[name]) for form in FORMATS if name in form.torchvision]
    return next(((form, path) for form, path in known if form.matches(path)), None)


def read(form: Format, path: Path, split: str, kind: ImageSet | None = None) -> Images:
    """A split of the image set in `path`, which has to be of this `kind`, if any."""
    try:
        labels, names, pixels = form.read(path, split)
        first = labels if names or split == "train" else form.read(path, "train").labels
        images = pixels()
    except Exception as error:  # formats and codecs raise many types
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, FileNotFoundError):
            reason = f"{error.filename} is missing"
        elif type(error) is ValueError:
            reason = str(error)
        reason = " ".join(reason.split())[:300]
        raise ValueError(f"{path} can't be read: {reason}; expected {form.expected}.") from error
    images = arrays.checked_images(images, f"{path} ({split} images)", kind and kind.shape)
    if not names:  # not more classes than training images
        first = arrays.checked_labels(first, len(first), len(first), f"{path} (training labels)")
        names = tuple(map(str, range(1 + first.max())))
    names = kind.class_names if kind else names
    where = f"{path} ({split} labels)"
    return Images(images, arrays.checked_labels(labels, len(images), len(names), where), names)
