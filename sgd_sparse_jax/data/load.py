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

from . import archives, arrays, formats, prepared, variants
from .images import DRAWN, IMAGE_SETS, PAIRS, STORED, Images, ImageSet

PATH = "path:"  # before the folder of an image set of any kind
SPLITS = ("train", "test")
MANUAL = "downloads/manual"  # where TFDS also looks for archives


def load_images(name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None) -> Images:
    """Loads one split of an image data set, in the official order.

    Reads the first of these that exists in DATA_DIR/NAME:

    1. `{train,test}_{images,labels}.npy`, your own arrays: images uint8 [n, h, w, c] (also
       [n, c, h, w], or [n, h, w] with one channel), labels [n] or [n, 1], integers;
    2. `decoded/`, a cache written by an earlier call, if its source is unchanged;
    3. `VERSION/`, prepared by TFDS as array_record or tfrecord, read without TensorFlow;
    4. files unpacked by torchvision in DATA_DIR: cifar-10-batches-py, cifar-100-python (or the
       binary versions), MNIST/raw, FashionMNIST/raw, train_32x32.mat of SVHN;
    5. the official archive in DATA_DIR/downloads/manual[/NAME], else a verified download of it.

    "path:FOLDER" is an image set of any size and number of classes: one of the folders of 4; arrays
    as in 1, or a .npz file with x_train, y_train, x_test, y_test; images in train/CLASS and
    test/CLASS (or val); Parquet files as on the Hugging Face hub (needs pyarrow). Nothing in a file
    is executed.

    Args:
        name: a key of `IMAGE_SETS`, or "path:FOLDER", relative to `data_dir` if that is given.
            NAME_gs (grey-scale) and sets of two classes are derived from another set;
            gaussians_binary and uniform_noise are generated and need no files.
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
    own = name.startswith(PATH)
    if not (own or name in IMAGE_SETS) or split not in SPLITS:
        raise ValueError(
            f"Unknown data set or split, {name!r} {split!r}; choose train or test of "
            f"{PATH}FOLDER or one of {', '.join(sorted(IMAGE_SETS))}."
        )
    if own:
        place = Path(name.removeprefix(PATH)).expanduser()
        return formats.load(Path(data_dir or "").expanduser().absolute() / place, split)
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
    path, of_labels = (folder / f"{split}_{what}.npy" for what in ("images", "labels"))
    images = arrays.checked_images(arrays.opened(path), path, kind.shape)
    labels = arrays.opened(of_labels)
    classes = len(kind.class_names)
    labels = arrays.checked_labels(labels, len(images), classes, of_labels)
    return Images(images, labels, kind.class_names)


def _decoded(name: str, split: str, root: Path) -> Images:
    """Opens DATA_DIR/NAME/decoded, which is first written if missing or outdated."""
    folder, kind = root / name, STORED[name]
    tfds_folder = prepared.newest(folder) or prepared.newest(root / (kind.tfds_name or name))
    try:
        note = _note(folder, tfds_folder)
        if not (note or tfds_folder) and (found := formats.of_torchvision(root, name)):
            return formats.read(*found, split, kind)
        note = note or _decode(name, root, tfds_folder)
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
