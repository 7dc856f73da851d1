"""Image sets as their authors released them, unpacked: CIFAR, SVHN and the IDX files of MNIST."""

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .images import DIGITS

BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}


class Found(NamedTuple):
    """The labels of a split, the names of all classes (() if unknown), and a reader of pixels."""

    labels: np.ndarray
    class_names: tuple[str, ...]
    pixels: Callable[[], np.ndarray]


class _Recorded:
    """Stands for an object of NumPy in a pickle: records its arguments and calls nothing."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any):
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Knows numbers, text, bytes, lists and dicts, and NumPy arrays as `_Recorded`.

    NumPy itself is not called: a crafted dtype makes its arrays follow pointers of the file.
    """

    def find_class(self, module: str, name: str) -> type:
        known = ("_reconstruct", "_frombuffer", "ndarray", "dtype")
        if module.partition(".")[0] != "numpy" or name not in known:
            raise ValueError(f"refused: the pickle would execute {module}.{name}")
        return _Recorded


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _unpickled(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:  # text of Python 2 becomes bytes
        return {
            _text(key): value for key, value in _Unpickler(file, encoding="bytes").load().items()
        }


def _bytes_of(array: Any) -> np.ndarray:
    """The uint8 array that a pickle describes; protocol 5 passes other arguments."""
    if hasattr(array, "state"):
        _, shape, dtype, fortran, raw = array.state
    else:
        raw, dtype, shape, fortran = array.arguments
    if _text(dtype.arguments[0]) != "u1" or fortran not in (False, "C"):
        raise ValueError(f"pixels of type {_text(dtype.arguments[0])}, or not in the order of C")
    return np.frombuffer(raw, np.uint8).reshape(shape)


def colour_planes(rows: np.ndarray) -> np.ndarray:
    """Images [n, 32, 32, 3] of rows of three 32 x 32 planes, as in all versions of CIFAR."""
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def cifar_pickles(folder: Path, split: str) -> Found:
    """Pickled dicts of `data` uint8 [n, 3072] and `labels` or, of CIFAR-100, `fine_labels`."""
    ten = not (folder / "meta").exists()
    names = _unpickled(folder / ("batches.meta" if ten else "meta"))
    parts = [_unpickled(folder / file) for file in (BATCHES[split] if ten else (split,))]
    labels = np.concatenate([part["labels" if ten else "fine_labels"] for part in parts])
    pixels = np.concatenate([_bytes_of(part["data"]) for part in parts])
    classes = map(_text, names["label_names" if ten else "fine_label_names"])
    return Found(labels, tuple(classes), lambda: colour_planes(pixels))


def cifar_binary(folder: Path, split: str) -> Found:
    """Rows of 1 label byte or, of CIFAR-100, 2 of which the last is used, and 3072 pixels."""
    ten = not (folder / "fine_label_names.txt").exists()
    names = (folder / ("batches.meta.txt" if ten else "fine_label_names.txt")).read_text().split()
    files = [folder / f"{file}.bin" for file in (BATCHES[split] if ten else (split,))]
    rows = np.concatenate([np.fromfile(file, np.uint8) for file in files])
    rows = rows.reshape(-1, (1 if ten else 2) + 3 * 32 * 32)
    return Found(rows[:, -3073], tuple(names), lambda: colour_planes(rows[:, -3072:]))


def idx_array(path: Path, axes: int) -> np.ndarray:
    """Two zeros, 8 for bytes, the number of axes, their lengths in big-endian, and the bytes."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    if content[:4] != bytes([0, 0, 8, axes]):
        raise ValueError(f"{path} is no IDX file of bytes with {axes} axes")
    shape = np.frombuffer(content, ">u4", axes, offset=4).tolist()
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def idx(folder: Path, split: str) -> Found:
    """IDX files, unpacked or as .gz, in `folder` or in its folder raw."""
    folder = folder / "raw" if (folder / "raw").is_dir() else folder
    name = "train" if split == "train" else "t10k"
    paths = (folder / f"{name}-{part}-ubyte" for part in ("images-idx3", "labels-idx1"))
    packed = lambda path: path.with_name(f"{path.name}.gz")
    images, labels = (packed(path) if packed(path).exists() else path for path in paths)
    pixels = idx_array(images, 3)
    return Found(idx_array(labels, 1), (), lambda: pixels)


def svhn_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A MATLAB file with X [h, w, c, n] and y [n, 1], in which 10 is the digit 0."""
    from scipy.io import loadmat

    with path.open("rb") as file:
        content = loadmat(file, variable_names=("X", "y"))
    return content["X"].transpose(3, 0, 1, 2), np.where(content["y"] == 10, 0, content["y"])[:, 0]


def svhn(folder: Path, split: str) -> Found:
    """The file of a split, train_32x32.mat or test_32x32.mat."""
    images, labels = svhn_arrays(folder / f"{split}_32x32.mat")
    return Found(labels, DIGITS, lambda: images)
