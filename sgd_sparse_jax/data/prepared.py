"""Folders prepared by TFDS, read without TensorFlow."""

import glob
import json
import re
import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from .images import DIGITS, ImageSet


def newest(folder: Path) -> Path | None:
    """The newest of FOLDER/VERSION and FOLDER/CONFIG/VERSION; TFDS's incomplete.* don't match."""
    # Not Path.glob, which raises if another process removes a folder meanwhile.
    infos = glob.glob("**/dataset_info.json", root_dir=folder, recursive=True)
    found = [folder / Path(info).parent for info in infos]
    versions = [path for path in found if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    return max(versions, key=lambda path: [int(n) for n in path.name.split(".")], default=None)


def describe(folder: Path) -> dict[str, Any]:
    """Version, and size and time of each file, which reveal that a folder was prepared again."""
    status = {path.name: path.stat() for path in sorted(folder.iterdir())}
    files = {name: [found.st_size, found.st_mtime_ns] for name, found in status.items()}
    return {"version": folder.name, "files": files}


def read(folder: Path, kind: ImageSet, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a split, in the official order.

    Parsed here, not by TFDS, which imports every Python module named in features.json.
    """
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    proto: Any = tf_example_pb2  # its classes are generated at import
    try:
        names = folder / "label.labels.txt"  # missing if classes are numbers
        classes = tuple(names.read_text("utf-8").splitlines()) if names.exists() else DIGITS
        if classes != kind.class_names:
            raise ValueError(f"its classes are {', '.join(classes)}")
        splits = json.loads((folder / "dataset_info.json").read_text("utf-8"))["splits"]
        (shards,) = [each["shardLengths"] for each in splits if each["name"] == split]
        n, ids = sum(map(int, shards)), []
        images, labels = np.empty((n, *kind.shape), np.uint8), np.empty(n, np.int32)
        for i, record in zip(range(n), _records(folder, split), strict=True):
            fields = proto.Example.FromString(record).features.feature
            with Image.open(BytesIO(fields["image"].bytes_list.value[0])) as image:
                images[i] = np.asarray(image).reshape(kind.shape)
            labels[i] = fields["label"].int64_list.value[0]
            ids.append(b"".join(fields["id"].bytes_list.value))
        # TFDS shuffles by hash; ids restore the order. Shorter ids first: train_99999 precedes
        # train_100000. The sort is stable, so mnist, which has no ids, keeps its order.
        order = sorted(range(n), key=lambda i: (len(ids[i]), ids[i]))
        return images[order], labels[order]
    except Exception as error:  # formats and codecs raise many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"{folder} can't be read ({reason}): move it away, and the next call downloads the "
            "official archive."
        ) from error


def _records(folder: Path, split: str) -> Iterator[bytes]:
    """The serialized examples of a split."""
    for path in sorted(folder.glob(f"*-{split}.tfrecord-*")):
        with path.open("rb") as file:
            # 8 bytes of length, 4 of checksum, the record, 4 of checksum.
            while header := file.read(12):
                (length,) = struct.unpack("<Q4x", header)
                yield file.read(length)
                file.seek(4, 1)
    for path in sorted(folder.glob(f"*-{split}.array_record-*")):
        from array_record.python.array_record_module import ArrayRecordReader

        reader = ArrayRecordReader(str(path))
        yield from reader.read_all()
        reader.close()
