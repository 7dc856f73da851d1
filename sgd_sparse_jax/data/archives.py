"""Official archives: where they are, their checksums, and how they become arrays."""

import gzip
import hashlib
import logging
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

TIMEOUT = (5.0, 30.0)  # seconds to connect, and between two blocks of a download


class Source(NamedTuple):
    """The archives of a data set, and how a split is read from them."""

    version: str  # of the data set of TFDS with the same content
    # (paths of the archives, split) -> images uint8 [n, h, w, c] and labels [n]. The archives have
    # the official checksums by then: readers need no checks of their own.
    read: Callable[[Sequence[Path], str], tuple[np.ndarray, np.ndarray]]
    archives: list[tuple[str, ...]]  # url, size, SHA-256


def obtain(name: str, manual: Path, work: Path) -> list[Path]:
    """Paths of the archives in `manual` or `manual`/`name`; others are downloaded to `work`.

    Raises ValueError for a file that isn't the official one, ConnectionError without network.
    """
    paths = []
    for url, size, sha256 in SOURCES[name].archives:
        file = url.rpartition("/")[2]
        # Two data sets have archives of the same names, hence the folders.
        by_hand = [path for path in (manual / name / file, manual / file) if path.is_file()]
        path = by_hand[0] if by_hand else _download(url, int(size), work / file)
        with path.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != sha256:
            hint = f"{path}: move it away, or replace it by" if by_hand else "but was sent by"
            raise ValueError(f"This is not the official archive of {name}, {hint} {url}.")
        paths.append(path)
    return paths


def _download(url: str, size: int, path: Path) -> Path:
    import requests  # as TFDS: the same proxies and certificates apply

    logging.getLogger(__name__).warning("Downloading %s (%.0f MB) ...", url, size / 1e6)
    try:
        with (
            requests.get(url, stream=True, timeout=TIMEOUT) as response,
            path.open("wb") as file,
        ):
            response.raise_for_status()
            for block in response.iter_content(2**20):
                file.write(block)
    except requests.RequestException as error:
        reason = getattr(error.response, "status_code", None) or type(error).__name__
        raise ConnectionError(f"{url} can't be downloaded (error {reason})") from error
    return path


def _cifar(paths, split):
    """Records of label bytes, the last of which counts, and 3 x 32 x 32 bytes of pixels."""
    with tarfile.open(paths[0]) as tar:  # read member by member: nothing is unpacked
        contents = {
            member.name: file.read()
            for member in tar
            if member.name.endswith(".bin") and (file := tar.extractfile(member))
        }
    files = sorted(file for file in contents if ("test" in file) == (split == "test"))
    label_bytes = 2 if len(contents) == 2 else 1  # CIFAR-100 has coarse labels, too
    records = np.frombuffer(b"".join(contents[file] for file in files), np.uint8)
    records = records.reshape(-1, label_bytes + 3 * 32 * 32)
    planes = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return planes.transpose(0, 2, 3, 1), records[:, label_bytes - 1]


def _idx(paths, split):
    """MNIST's form: images behind a header of 16 bytes, labels behind one of 8."""
    of_split = paths[:2] if split == "train" else paths[2:]  # images and labels
    images, labels = (gzip.decompress(path.read_bytes()) for path in of_split)
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1)
    return pixels, np.frombuffer(labels, np.uint8, offset=8)


def _svhn(paths, split):
    """MATLAB files with X [h, w, c, n] and y [n, 1], where 10 stands for the digit 0."""
    from scipy.io import loadmat

    content = loadmat(paths[0 if split == "train" else 1], variable_names=("X", "y"))
    return content["X"].transpose(3, 0, 1, 2), content["y"][:, 0] % 10


def _tiny_imagenet(paths, split):
    """JPEG files: of a folder per class, and of one folder with a list."""
    from PIL import Image

    root = "tiny-imagenet-200"
    with zipfile.ZipFile(paths[0]) as archive:  # read member by member: nothing is unpacked
        wnids = sorted(archive.read(f"{root}/wnids.txt").decode().split())
        if split == "train":
            found = [m for m in archive.namelist() if re.fullmatch(rf"{root}/train/.*\.JPEG", m)]
            labelled = {member: member.split("/")[2] for member in found}
        else:
            lines = archive.read(f"{root}/val/val_annotations.txt").decode().splitlines()
            fields = map(str.split, lines)
            labelled = {f"{root}/val/images/{file}": wnid for file, wnid, *_ in fields}
        # By folder, and shorter names first: 10 comes after 9.
        members = sorted(labelled, key=lambda member: (member.split("/")[2], len(member), member))
        images = np.empty((len(members), 64, 64, 3), np.uint8)
        for i, member in enumerate(members):
            with archive.open(member) as file, Image.open(file, formats=("JPEG",)) as image:
                images[i] = np.asarray(image.convert("RGB"))  # some are grey
    return images, np.array([wnids.index(labelled[member]) for member in members])


_READERS = {
    "cifar10": ("3.0.2", _cifar),
    "cifar100": ("3.0.2", _cifar),
    "svhn": ("3.1.0", _svhn),
    "mnist": ("3.0.1", _idx),
    "fashion_mnist": ("3.0.1", _idx),
    "tiny_imagenet": ("1.0.0", _tiny_imagenet),  # not in TFDS
}
_TABLE = Path(__file__).with_suffix(".tsv").read_text("utf-8")  # name, url, size, SHA-256
_ROWS = [tuple(line.split("\t")) for line in _TABLE.splitlines()]
SOURCES = {
    name: Source(*reader, [row[1:] for row in _ROWS if row[0] == name])
    for name, reader in _READERS.items()
}
