"""Image classification sets as memory-mapped arrays, read through TFDS without TensorFlow.

A new data set is one entry of `IMAGE_SETS` here and one of `builders.SOURCES`.
"""

import contextlib
import json
import logging
import os
import re
import shlex
import struct
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float32, Int32, UInt8

Pixels: TypeAlias = UInt8[np.ndarray, "n h w c"] | Float32[np.ndarray, "n h w c"]
Labels: TypeAlias = Int32[np.ndarray, " n"]


class Images(NamedTuple):
    """`n` examples of a split in the official order; `labels` index `class_names`.

    Bytes stand for 0 … 1 and are divided by 255 on their way to a network; floats are its inputs.
    """

    images: Pixels
    labels: Labels
    class_names: tuple[str, ...]
    source: str = ""  # the data set and its version, where they are known


class ImageSet(NamedTuple):
    """What every image of a data set looks like, and what the labels mean."""

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    tfds_name: str = ""  # where TFDS calls it otherwise


CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_CLASSES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
    "butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch "
    "crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo "
    "keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse "
    "mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy "
    "porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television "
    "tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
FASHION_CLASSES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
TINY_IMAGENET_CLASSES = (  # WordNet's names, in alphabetical order
    "n01443537 n01629819 n01641577 n01644900 n01698640 n01742172 n01768244 n01770393 "
    "n01774384 n01774750 n01784675 n01855672 n01882714 n01910747 n01917289 n01944390 "
    "n01945685 n01950731 n01983481 n01984695 n02002724 n02056570 n02058221 n02074367 "
    "n02085620 n02094433 n02099601 n02099712 n02106662 n02113799 n02123045 n02123394 "
    "n02124075 n02125311 n02129165 n02132136 n02165456 n02190166 n02206856 n02226429 "
    "n02231487 n02233338 n02236044 n02268443 n02279972 n02281406 n02321529 n02364673 "
    "n02395406 n02403003 n02410509 n02415577 n02423022 n02437312 n02480495 n02481823 "
    "n02486410 n02504458 n02509815 n02666196 n02669723 n02699494 n02730930 n02769748 "
    "n02788148 n02791270 n02793495 n02795169 n02802426 n02808440 n02814533 n02814860 "
    "n02815834 n02823428 n02837789 n02841315 n02843684 n02883205 n02892201 n02906734 "
    "n02909870 n02917067 n02927161 n02948072 n02950826 n02963159 n02977058 n02988304 "
    "n02999410 n03014705 n03026506 n03042490 n03085013 n03089624 n03100240 n03126707 "
    "n03160309 n03179701 n03201208 n03250847 n03255030 n03355925 n03388043 n03393912 "
    "n03400231 n03404251 n03424325 n03444034 n03447447 n03544143 n03584254 n03599486 "
    "n03617480 n03637318 n03649909 n03662601 n03670208 n03706229 n03733131 n03763968 "
    "n03770439 n03796401 n03804744 n03814639 n03837869 n03838899 n03854065 n03891332 "
    "n03902125 n03930313 n03937543 n03970156 n03976657 n03977966 n03980874 n03983396 "
    "n03992509 n04008634 n04023962 n04067472 n04070727 n04074963 n04099969 n04118538 "
    "n04133789 n04146614 n04149813 n04179913 n04251144 n04254777 n04259630 n04265275 "
    "n04275548 n04285008 n04311004 n04328186 n04356056 n04366367 n04371430 n04376876 "
    "n04398044 n04399382 n04417672 n04456115 n04465501 n04486054 n04487081 n04501370 "
    "n04507155 n04532106 n04532670 n04540053 n04560804 n04562935 n04596742 n04597913 "
    "n06596364 n07579787 n07583066 n07614500 n07615774 n07695742 n07711569 n07715103 "
    "n07720875 n07734744 n07747607 n07749582 n07753592 n07768694 n07871810 n07873807 "
    "n07875152 n07920052 n09193705 n09246464 n09256479 n09332890 n09428293 n12267677"
)
DIGITS = tuple("0123456789")
IMAGE_SETS = {
    "cifar10": ImageSet((32, 32, 3), tuple(CIFAR10_CLASSES.split())),
    "cifar100": ImageSet((32, 32, 3), tuple(CIFAR100_CLASSES.split())),
    "svhn": ImageSet((32, 32, 3), DIGITS, "svhn_cropped"),
    "mnist": ImageSet((28, 28, 1), DIGITS),
    "fashion_mnist": ImageSet((28, 28, 1), tuple(FASHION_CLASSES.split(","))),
    "tiny_imagenet": ImageSet((64, 64, 3), tuple(TINY_IMAGENET_CLASSES.split())),
}
SPLITS = ("train", "test")

# Writes DATA_DIR/name/VERSION from the official archive: (name, shape, class_names, data_dir).
Prepare: TypeAlias = Callable[[str, tuple[int, int, int], tuple[str, ...], Path], None]


def load_images(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    prepare: Prepare | None = None,
) -> Images:
    """The images of a split, from the first of: decoded cache, TFDS directory, official archive.

    `data_dir` is by default the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets. The arrays
    are memory maps of DATA_DIR/name/SPLIT_{images,labels}.npy, written at the first call; where
    they can't be written, the images are decoded into memory and the log says so.
    """
    if name not in IMAGE_SETS:
        raise ValueError(f"Unknown data set {name!r}; known are {', '.join(sorted(IMAGE_SETS))}.")
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r} of {name}; it has {' and '.join(SPLITS)}.")
    image_set = IMAGE_SETS[name]
    folder = _data_root(data_dir) / name
    paths = (folder / f"{split}_images.npy", folder / f"{split}_labels.npy")
    if not all(path.is_file() for path in paths):
        images, labels = _decode(_prepared(name, folder, prepare), split, image_set)
        try:
            # Labels first: a cache counts as whole once both are there, and the images take long.
            _save(paths[1], labels)
            _save(paths[0], images)
        except OSError as error:
            logging.getLogger(__name__).warning(
                "%s can't be written (%s): %s is decoded into memory, in every run anew.",
                *(folder, error, name),
            )
            return Images(images, labels, image_set.class_names)
    return _open_cache(*paths, image_set)


def _data_root(data_dir: str | os.PathLike[str] | None) -> Path:
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(data_dir or default).expanduser().absolute()


# The decoded cache.


def _open_cache(images_path: Path, labels_path: Path, image_set: ImageSet) -> Images:
    """Memory maps of both files, checked as far as that is possible without reading the pixels."""
    images, labels = _open_array(images_path), _open_array(labels_path)
    cure = "delete it and run again to rebuild it"
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != image_set.shape:
        raise ValueError(
            f"{images_path} holds {images.dtype}{list(images.shape)}, "
            f"not uint8[n, {str(image_set.shape)[1:-1]}]: {cure}."
        )
    if labels.dtype != np.int32 or labels.ndim != 1:
        raise ValueError(
            f"{labels_path} holds {labels.dtype}{list(labels.shape)}, not int32[n]: {cure}."
        )
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds {len(images)} images but {labels_path.name} {len(labels)} "
            "labels: delete both and run again to rebuild them."
        )
    _check_labels(labels, image_set, f"{labels_path}", cure)
    return Images(images, labels, image_set.class_names)


def _open_array(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")  # it refuses Python objects, and archives
    except OSError:
        raise
    except Exception as error:  # a header is read as Python's literals, which fail in many ways
        raise ValueError(  # without NumPy's words, which may quote pixels that it took for a header
            f"{path} is truncated or no array: delete it and run again; it is rebuilt from the "
            "TFDS directory beside it or, without one, from the official archive."
        ) from error


def _check_labels(labels: np.ndarray, image_set: ImageSet, where: str, cure: str) -> None:
    # Out of range, a label would silently turn the cross-entropy into NaN.
    classes = len(image_set.class_names)
    if not len(labels):
        raise ValueError(f"{where} is empty: {cure}.")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{where} has labels from {labels.min()} to {labels.max()}, "
            f"outside [0, {classes}): {cure}."
        )


def _save(path: Path, array: np.ndarray) -> None:
    """Writes a neighbour and renames it: other processes see the whole file or none."""
    neighbour = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with neighbour.open("xb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        neighbour.replace(path)
    finally:
        neighbour.unlink(missing_ok=True)


# A directory prepared by TFDS.


def _prepared(name: str, folder: Path, prepare: Prepare | None) -> Path:
    """The newest prepared version in the folder; if there is none, the official archive's."""
    shape, class_names, tfds_name = IMAGE_SETS[name]
    stock = folder.with_name(tfds_name or name)
    if (found := _newest_version(folder) or _newest_version(stock)) is not None:
        return found
    reason = "and no builder was given"
    if prepare is not None:
        try:
            prepare(name, shape, class_names, folder.parent)
        except ConnectionError as error:
            reason = f"and {error}"
    if (found := _newest_version(folder)) is not None:
        return found
    program = f'from sgd_sparse_jax.data import load_images; load_images("{name}", "train")'
    raise FileNotFoundError(
        f"{name} is neither decoded nor prepared in {folder} (the parent is data_dir, else "
        f"TFDS_DATA_DIR, else ~/tensorflow_datasets), {reason}. On a machine with network run "
        f"`TFDS_DATA_DIR={shlex.quote(str(folder.parent))} python -c {shlex.quote(program)}` "
        f"and copy {folder} here."
    )


def _newest_version(folder: Path) -> Path | None:
    """DATA_DIR/name/VERSION or DATA_DIR/name/CONFIG/VERSION; TFDS's incomplete.* don't match."""
    found = [
        info.parent
        for pattern in ("*/dataset_info.json", "*/*/dataset_info.json")
        for info in folder.glob(pattern)
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)
    ]
    return max(found, key=lambda path: [int(n) for n in path.name.split(".")], default=None)


def _decode(prepared: Path, split: str, image_set: ImageSet) -> tuple[Pixels, Labels]:
    """All examples of a split; TFDS shuffles by hash, the `id` brings back the official order."""
    import tensorflow_datasets as tfds

    cure = "move it away and run again to prepare it anew"
    try:
        _check_classes(json.loads((prepared / "features.json").read_bytes()))
        builder: Any = tfds.builder_from_directory(prepared)
        names = tuple(builder.info.features["label"].names)
        images = np.empty((builder.info.splits[split].num_examples, *image_set.shape), np.uint8)
        labels = np.empty(len(images), np.int32)
        ids, count = [], 0
        for count, record in enumerate(_records(builder, split), 1):
            example = builder.info.features.deserialize_example_np(record)
            if example["image"].shape != image_set.shape:
                raise ValueError(f"an image has shape {example['image'].shape}")
            images[count - 1], labels[count - 1] = example["image"], example["label"]
            ids.append(example.get("id", b""))
        if count != len(images):
            raise ValueError(f"{count} examples of {len(images)}")
    except Exception as error:  # each format and each codec has its own exceptions
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{prepared} can't be read ({reason}): {cure}.") from error
    if names != image_set.class_names:
        raise ValueError(f"{prepared} has other classes, {', '.join(names)}: {cure}.")
    _check_labels(labels, image_set, f"{prepared} ({split})", cure)
    # Stable, and shorter first: train_99999 before train_100000; mnist has no id and stays.
    order = sorted(range(count), key=lambda i: (len(ids[i]), ids[i]))
    return images[order], labels[order]


def _check_classes(described: Any) -> None:
    """TFDS imports, and so runs, the modules that features.json names: its own ones may be."""
    if isinstance(described, str):  # it also takes descriptions as text inside of its JSON
        with contextlib.suppress(ValueError):
            described = json.loads(described)
    for key in ("pythonClassName", "python_class_name", "type"):
        named = described.get(key) if isinstance(described, dict) else None
        if isinstance(named, str) and not named.startswith("tensorflow_datasets."):
            raise ValueError(f"features.json names {named[:60]!r}, which is not TFDS's")
    if isinstance(described, dict | list):
        for part in described.values() if isinstance(described, dict) else described:
            _check_classes(part)


def _records(builder: Any, split: str) -> Iterator[bytes]:
    """The serialized examples of a split, in any format that needs no TensorFlow."""
    import tensorflow_datasets as tfds

    if builder.info.file_format is tfds.core.FileFormat.TFRECORD:
        for path in builder.info.splits[split].filepaths:
            with open(path, "rb") as file:
                yield from _tfrecords(file)
        return
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    source = builder.as_data_source(split, deserialize_method=raw)
    for start in range(0, len(source), 1000):  # one by one is ten times slower
        yield from source.__getitems__(list(range(start, min(start + 1000, len(source)))))


def _tfrecords(file: BinaryIO) -> Iterator[bytes]:
    """Payloads of a TFRecord file: 8 bytes of length, 4 of checksum, payload, 4 of checksum."""
    while header := file.read(12):
        if len(header) < 12:
            raise ValueError(f"{file.name} is truncated")
        (length,) = struct.unpack("<Q4x", header)
        body = file.read(length + 4)
        if len(body) < length + 4:
            raise ValueError(f"{file.name} is truncated")
        yield body[:-4]
