"""Official archives of image data sets: URLs, checksums and readers."""

import hashlib
import logging
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import released

TIMEOUT = (5.0, 30.0)  # seconds to connect, and between two chunks of a download


class Source(NamedTuple):
    """The archives of a data set and the function that reads a split from them."""

    version: str  # version of the TFDS data set with the same content
    # (paths, split) -> images uint8 [n, h, w, c], labels [n]. Readers don't validate the content:
    # checksums are verified first.
    read: Callable[[Sequence[Path], str], tuple[np.ndarray, np.ndarray]]
    archives: list[tuple[str, ...]]  # url, size, SHA-256


def obtain(name: str, manual: Path, work: Path) -> list[Path]:
    """Paths of the archives of `name`; those not in `manual`[/`name`] are downloaded to `work`.

    Raises ValueError if a checksum differs, ConnectionError if a download fails.
    """
    paths = []
    for url, size, sha256 in SOURCES[name].archives:
        file = url.rpartition("/")[2]
        # Archives of mnist and fashion_mnist have the same names, hence the subfolders.
        by_hand = [path for path in (manual / name / file, manual / file) if path.is_file()]
        path = by_hand[0] if by_hand else _download(url, int(size), work / file)
        with path.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != sha256:
            hint = f"{path}; replace it by" if by_hand else "the file downloaded from"
            raise ValueError(f"Not the official archive of {name} (wrong SHA-256): {hint} {url}.")
        paths.append(path)
    return paths


def _download(url: str, size: int, path: Path) -> Path:
    import requests  # as TFDS does: it uses the same proxies and certificates

    logging.getLogger(__name__).warning("Downloading %s (%.0f MB) ...", url, size / 1e6)
    try:
        with (
            requests.get(url, stream=True, timeout=TIMEOUT) as response,
            path.open("wb") as file,
        ):
            response.raise_for_status()
            for chunk in response.iter_content(2**20):
                file.write(chunk)
    except requests.RequestException as error:
        reason = getattr(error.response, "status_code", None) or type(error).__name__
        raise ConnectionError(f"{url} can't be downloaded (error {reason})") from error
    return path


def _cifar(paths, split):
    """Binary records: 1 or 2 label bytes, of which the last is used, and 3 x 32 x 32 pixels."""
    with tarfile.open(paths[0]) as tar:  # read in memory: nothing is extracted to disk
        contents = {
            member.name: file.read()
            for member in tar
            if member.name.endswith(".bin") and (file := tar.extractfile(member))
        }
    files = sorted(file for file in contents if ("test" in file) == (split == "test"))
    label_bytes = 2 if len(contents) == 2 else 1  # CIFAR-100 also has coarse labels
    records = np.frombuffer(b"".join(contents[file] for file in files), np.uint8)
    records = records.reshape(-1, label_bytes + 3 * 32 * 32)
    return released.colour_planes(records[:, label_bytes:]), records[:, label_bytes - 1]


def _idx(paths, split):
    images, labels = paths[:2] if split == "train" else paths[2:]
    return released.idx_array(images, 3)[..., None], released.idx_array(labels, 1)


def _svhn(paths, split):
    return released.svhn_arrays(paths[0 if split == "train" else 1])


def _tiny_imagenet(paths, split):
    """JPEG files: a folder per class for training; one folder with a list of labels for test."""
    from PIL import Image

    root = "tiny-imagenet-200"
    with zipfile.ZipFile(paths[0]) as archive:  # read in memory: nothing is extracted to disk
        wnids = sorted(archive.read(f"{root}/wnids.txt").decode().split())
        if split == "train":
            found = [m for m in archive.namelist() if re.fullmatch(rf"{root}/train/.*\.JPEG", m)]
            labelled = {member: member.split("/")[2] for member in found}
        else:
            lines = archive.read(f"{root}/val/val_annotations.txt").decode().splitlines()
            fields = map(str.split, lines)
            labelled = {f"{root}/val/images/{file}": wnid for file, wnid, *_ in fields}
        # By folder, then by number: shorter names first puts 10 after 9.
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
