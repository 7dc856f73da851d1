"""Folders prepared by TFDS, read without TensorFlow."""

import contextlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .images import ImageSet


def newest(folder: Path) -> Path | None:
    """The newest of FOLDER/VERSION and FOLDER/CONFIG/VERSION; TFDS's incomplete.* don't match."""
    found = [
        info.parent
        for pattern in ("*/dataset_info.json", "*/*/dataset_info.json")
        for info in folder.glob(pattern)
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)
    ]
    return max(found, key=lambda path: [int(n) for n in path.name.split(".")], default=None)


def describe(folder: Path) -> dict[str, Any]:
    """Version, and size and time of each file: what changes when the folder is prepared again."""
    status = {path.name: path.stat() for path in sorted(folder.iterdir())}
    files = {name: [found.st_size, found.st_mtime_ns] for name, found in status.items()}
    return {"version": folder.name, "files": files}


def read(folder: Path, kind: ImageSet, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a split; TFDS shuffles by hash, its `id` restores the official order."""
    import tensorflow_datasets as tfds

    try:
        _check_modules((folder / "features.json").read_text())
        builder: Any = tfds.builder_from_directory(folder)
        features, n = builder.info.features, builder.info.splits[split].num_examples
        names, shape = tuple(features["label"].names), features["image"].shape
        if names != kind.class_names or shape != kind.shape:
            raise ValueError(f"it has images {shape} of {', '.join(names)}")
        images, labels = np.empty((n, *kind.shape), np.uint8), np.empty(n, np.int32)
        ids = []
        for i, record in zip(range(n), _records(builder, split), strict=True):
            example = features.deserialize_example_np(record)
            images[i], labels[i] = example["image"], example["label"]
            ids.append(example.get("id", b""))
        # Stable, and shorter first: train_99999 before train_100000; mnist has no id and stays.
        order = sorted(range(n), key=lambda i: (len(ids[i]), ids[i]))
        return images[order], labels[order]
    except Exception as error:  # each format and each codec has its own exceptions
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"{folder} can't be read ({reason}): move it away, and the next call downloads the "
            "official archive."
        ) from error


def _check_modules(described: Any) -> None:
    """TFDS imports, and so runs, every module that features.json names."""
    if isinstance(described, str):  # descriptions may be JSON as text inside of JSON
        with contextlib.suppress(ValueError):
            described = json.loads(described)
    if isinstance(described, dict):
        for key in ("pythonClassName", "python_class_name", "type"):
            module = described.get(key, "tensorflow_datasets.")
            if isinstance(module, str) and not module.startswith("tensorflow_datasets."):
                raise ValueError(f"features.json names {module[:60]}, which is not part of TFDS")
        described = list(described.values())
    if isinstance(described, list):
        for part in described:
            _check_modules(part)


def _records(builder: Any, split: str) -> Iterator[bytes]:
    """The serialized examples of a split."""
    import tensorflow_datasets as tfds

    if builder.info.file_format is tfds.core.FileFormat.TFRECORD:
        for path in builder.info.splits[split].filepaths:
            yield from _tfrecords(Path(path))
        return
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    source = builder.as_data_source(split, deserialize_method=raw)
    for start in range(0, len(source), 1000):  # one by one is ten times slower
        yield from source.__getitems__(list(range(start, min(start + 1000, len(source)))))


def _tfrecords(path: Path) -> Iterator[bytes]:
    """Payloads of a TFRecord file: 8 bytes of length, 4 of checksum, payload, 4 of checksum."""
    with path.open("rb") as file:
        while header := file.read(12):
            (length,) = struct.unpack("<Q4x", header)
            yield file.read(length)
            file.seek(4, 1)
