"""Official archives: where they are, what proves them genuine, how they become arrays."""

import gzip
import hashlib
import logging
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, TypeAlias, cast

import numpy as np

# (paths of the archives, split) -> images uint8 [n, h, w, c] and labels [n]. The archives have the
# official checksums by then: readers need no checks of their own.
Read: TypeAlias = Callable[[Sequence[Path], str], tuple[np.ndarray, np.ndarray]]

TIMEOUT = (5.0, 30.0)  # seconds to connect, and between two blocks of a download


class Archive(NamedTuple):
    """A file to download, and what proves that it is the official one."""

    url: str
    size: int
    sha256: str


class Source(NamedTuple):
    """The archives of a data set, and how a split is read from them."""

    version: str  # of the data set of TFDS with the same content
    read: Read
    archives: tuple[Archive, ...]


def obtain(name: str, manual: Path, work: Path) -> list[Path]:
    """Paths of the archives in `manual` or `manual`/`name`; others are downloaded to `work`.

    Raises ValueError for a file that isn't the official one, ConnectionError without network.
    """
    paths = []
    for archive in SOURCES[name].archives:
        file = PurePosixPath(archive.url).name
        # Two data sets have archives of the same names, hence the folders.
        by_hand = [path for path in (manual / name / file, manual / file) if path.is_file()]
        path = by_hand[0] if by_hand else work / file
        if not by_hand:
            _download(archive, path, otherwise=f"nor is there {manual / file}")
        with path.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        if (path.stat().st_size, sha256) != (archive.size, archive.sha256):
            where = f"{path}: move it away, or replace it by" if by_hand else "but sent by"
            raise ValueError(f"This is not the official archive of {name}, {where} {archive.url}.")
        paths.append(path)
    return paths


def _download(archive: Archive, path: Path, *, otherwise: str) -> None:
    import requests  # as TFDS: the same proxies and certificates apply

    size = f"{archive.size / 1e6:.0f} MB"
    logging.getLogger(__name__).warning("Downloading %s (%s) ...", archive.url, size)
    try:
        with (
            requests.get(archive.url, stream=True, timeout=TIMEOUT) as response,
            path.open("wb") as file,
        ):
            response.raise_for_status()
            for block in response.iter_content(2**20):
                file.write(block)
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", None)
        reason = f"HTTP status {status}" if status else type(error).__name__
        raise ConnectionError(
            f"{archive.url} can't be downloaded ({reason}), {otherwise}"
        ) from error


def _cifar(paths, split):
    """Records of label bytes, the last of which counts, and 3 x 32 x 32 bytes of pixels."""
    contents = {}
    with tarfile.open(paths[0]) as tar:  # read member by member: nothing is unpacked
        for member in tar:
            if member.name.endswith(".bin"):
                contents[member.name] = cast(IO[bytes], tar.extractfile(member)).read()
    files = sorted(file for file in contents if ("test" in file) == (split == "test"))
    label_bytes = 2 if len(contents) == 2 else 1  # CIFAR-100 has coarse labels, too
    records = np.frombuffer(b"".join(contents[file] for file in files), np.uint8)
    records = records.reshape(-1, label_bytes + 3 * 32 * 32)
    planes = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return planes.transpose(0, 2, 3, 1), records[:, label_bytes - 1]


def _idx(paths, split):
    """MNIST's form: images behind a header of 16 bytes, labels behind one of 8."""
    # Training images, training labels, test images, test labels.
    of_split = paths[:2] if split == "train" else paths[2:]
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

        def place(member: str) -> tuple[str, int]:
            """Class, and number inside of the class: 10 comes after 9."""
            stem, _, number = member.removesuffix(".JPEG").rpartition("_")
            return stem, int(number)

        members = sorted(labelled, key=place)
        images = np.empty((len(members), 64, 64, 3), np.uint8)
        for i, member in enumerate(members):
            with archive.open(member) as file, Image.open(file, formats=("JPEG",)) as image:
                images[i] = np.asarray(image.convert("RGB"))  # some are grey
    return images, np.array([wnids.index(labelled[member]) for member in members])


def _source(name: str, version: str, read: Read) -> Source:
    table = Path(__file__).with_suffix(".tsv").read_text("utf-8")  # name, url, size, SHA-256
    rows = [line.split("\t")[1:] for line in table.splitlines() if line.startswith(f"{name}\t")]
    return Source(version, read, tuple(Archive(url, int(size), proof) for url, size, proof in rows))


SOURCES = {
    "cifar10": _source("cifar10", "3.0.2", _cifar),
    "cifar100": _source("cifar100", "3.0.2", _cifar),
    "svhn": _source("svhn", "3.1.0", _svhn),
    "mnist": _source("mnist", "3.0.1", _idx),
    "fashion_mnist": _source("fashion_mnist", "3.0.1", _idx),
    "tiny_imagenet": _source("tiny_imagenet", "1.0.0", _tiny_imagenet),  # not in TFDS
}
