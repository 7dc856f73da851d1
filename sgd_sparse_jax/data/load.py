"""Image data sets from disk, as memory-mapped arrays."""

import json
import logging
import os
import re
import shlex
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from . import archives, prepared, variants
from .images import DRAWN, IMAGE_SETS, PAIRS, STORED, Images, ImageSet

SPLITS = ("train", "test")
MANUAL = "downloads/manual"  # where TFDS also looks for archives


def load_images(name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None) -> Images:
    """Loads one split of an image data set, in the official order.

    Reads the first of these that exists in DATA_DIR/NAME:

    1. `{train,test}_{images,labels}.npy`, your own arrays: images uint8 [n, h, w, c] (also
       [n, c, h, w], or [n, h, w] with one channel), labels [n] or [n, 1], integers;
    2. `decoded/`, a cache written by an earlier call, if its source is unchanged;
    3. `VERSION/`, prepared by TFDS as array_record or tfrecord, read without TensorFlow;
    4. the official archive in DATA_DIR/downloads/manual[/NAME], else a verified download of it.

    Args:
        name: a key of `IMAGE_SETS`. NAME_gs (grey-scale) and sets of two classes are derived from
            another set; gaussians_binary and uniform_noise are generated and need no files.
        split: "train" or "test".
        data_dir: default: the environment variable TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
        `Images`; stored sets are memory-mapped unless `decoded/` can't be written.

    Raises:
        ValueError: unknown name or split, `data_dir` is a URL, or invalid files.
        FileNotFoundError: no files to read, and no network.
        PermissionError: the archive can't be decoded because DATA_DIR isn't writable.

    Example:
        >>> load_images("uniform_noise", "train").images.shape
        (1000, 28, 28, 1)
    """
    if name not in IMAGE_SETS or split not in SPLITS:
        raise ValueError(
            f"Unknown data set or split, {name!r} {split!r}; choose train or test of one of "
            f"{', '.join(sorted(IMAGE_SETS))}."
        )
    if name in DRAWN:
        return variants.drawn(name, split)
    if name in PAIRS:
        parent, pair = PAIRS[name]
        return variants.two_classes(load_images(parent, split, data_dir=data_dir), pair)
    if name not in STORED:
        return variants.grey(load_images(name.removesuffix("_gs"), split, data_dir=data_dir))
    path = os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    if re.match(r"[A-Za-z][\w+.-]+:/", path):  # it would create a local folder named gs:
        raise ValueError(f"data_dir is {path}; URLs can't be read, copy the data to a local disk.")
    root = Path(os.path.expanduser(path)).absolute()  # not resolve(): keeps symbolic links
    if any((root / name / f"{s}_{k}.npy").exists() for s in SPLITS for k in ("images", "labels")):
        return _open(root / name, split, STORED[name])
    return _decoded(name, split, root)


def _open(folder: Path, split: str, kind: ImageSet) -> Images:
    """Opens and validates the memory maps of a split without reading the pixels."""
    path = folder / f"{split}_images.npy"
    images, (h, w, c) = _array(path), kind.shape
    if images.shape[1:] == (c, h, w):
        images = images.transpose(0, 2, 3, 1)  # a view
    if c == 1 and images.shape[1:] == (h, w):
        images = images[..., None]
    if images.dtype != np.uint8 or images.shape[1:] != kind.shape:
        expected = f"uint8 [n, {h}, {w}, {c}] with values from 0 to 255"
        raise _unfit(path, f"holds {images.dtype} {list(images.shape)}; expected {expected}")
    labels = _labels(folder / f"{split}_labels.npy", len(images), len(kind.class_names))
    return Images(images, labels, kind.class_names)


def _labels(path: Path, n: int, classes: int) -> np.ndarray:
    labels, span = _array(path), ""
    labels = labels[:, 0] if labels.shape[1:] == (1,) else labels
    if labels.dtype.kind in "iuf" and labels.size:
        with np.errstate(invalid="ignore"):  # casts of NaN
            numbers = labels.astype(np.int32, copy=False)
        # Out-of-range labels would silently make the cross-entropy NaN.
        in_range = numbers.min() >= 0 and numbers.max() < classes
        if labels.shape == (n,) and in_range and (numbers == labels).all():
            return numbers
        span = f" from {labels.min()} to {labels.max()}"
    expected = f"integers from 0 to {classes - 1}, one for each of {n} images"
    raise _unfit(path, f"holds {labels.dtype} {list(labels.shape)}{span}; expected {expected}")


def _array(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
    except Exception as error:  # a damaged header raises many types
        # NumPy's message is not included: it may quote pixels that it parsed as a header.
        found = f"can't be read ({type(error).__name__}): it is missing, truncated or not an array"
        raise _unfit(path, found) from error


def _unfit(path: Path, found: str) -> ValueError:
    hint = f" Delete {path.parent}: the next call writes it again."
    return ValueError(f"{path} {found}.{hint if path.parent.name == 'decoded' else ''}")


def _decoded(name: str, split: str, root: Path) -> Images:
    """Opens DATA_DIR/NAME/decoded, which is first written if missing or outdated."""
    folder, kind = root / name, STORED[name]
    tfds_folder = prepared.newest(folder) or prepared.newest(root / (kind.tfds_name or name))
    try:
        note = _note(folder, tfds_folder) or _decode(name, root, tfds_folder)
    except ConnectionError as error:
        program = f'from sgd_sparse_jax import data; data.load_images("{name}", "train")'
        raise FileNotFoundError(
            f"{name} is not in {folder} (data_dir, else TFDS_DATA_DIR, else "
            f"~/tensorflow_datasets), its archive is not in {root / MANUAL}, and {error}. Put the "
            "archive there, or on a machine with network run "
            f"`TFDS_DATA_DIR={shlex.quote(str(root))} python -c {shlex.quote(program)}` "
            f"and copy {folder} here."
        ) from error
    except OSError as error:
        reason = f"{folder} can't be written ({error.strerror or error})"
        if tfds_folder is None:
            raise PermissionError(f"{reason}; choose another data_dir or TFDS_DATA_DIR.") from error
        logging.getLogger(__name__).warning("%s: each run decodes %s again.", reason, name)
        images, labels = prepared.read(tfds_folder, kind, split)
        return Images(images, labels, kind.class_names, f"{name} {tfds_folder.name}")
    return _open(folder / "decoded", split, kind)._replace(source=f"{name} {note['version']}")


def _note(folder: Path, tfds_folder: Path | None) -> dict | None:
    """The source of `decoded`; None if there is no `decoded` or its TFDS folder has changed."""
    try:
        note = json.loads((folder / "decoded" / "source.json").read_text())
    except FileNotFoundError:
        return None
    # Archives are not compared: their content is fixed, and they may be removed.
    outdated = tfds_folder and note["files"] and note != prepared.describe(tfds_folder)
    return None if outdated else note


def _decode(name: str, root: Path, tfds_folder: Path | None) -> dict:
    """Writes both splits to DATA_DIR/NAME/decoded atomically; returns the note on their source."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="incomplete.", dir=folder) as work:
        if tfds_folder:
            note = prepared.describe(tfds_folder)
            read = partial(prepared.read, tfds_folder, STORED[name])
        else:
            source = archives.SOURCES[name]
            note = {"version": source.version, "files": {}}
            paths = archives.obtain(name, root / MANUAL, Path(work))
            read = partial(source.read, paths)
        new, decoded = Path(work) / "new", folder / "decoded"
        new.mkdir()
        for split in SPLITS:
            images, labels = read(split)
            np.save(new / f"{split}_images.npy", np.ascontiguousarray(images))
            np.save(new / f"{split}_labels.npy", labels.astype(np.int32))
        (new / "source.json").write_text(json.dumps(note))
        try:
            if decoded.exists() and not _note(folder, tfds_folder):
                decoded.rename(Path(work) / "old")
            new.rename(decoded)  # atomic: readers never see a part of it
        except OSError:
            if not _note(folder, tfds_folder):  # otherwise another process wrote it first
                raise
    return note
