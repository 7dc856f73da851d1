"""From an official archive to a prepared TFDS directory, without TensorFlow."""

import os
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np


class Archive(NamedTuple):
    """A file to download, and what proves that it is the official one."""

    url: str
    size: int
    sha256: str


class Source(NamedTuple):
    """Where a data set comes from and how its archives are read, one split at a time."""

    version: str  # of TFDS's own data set with these features: both read each other's directories
    archives: tuple[Archive, ...]
    examples: Callable[[Sequence[Path], str], Iterator[tuple[np.ndarray, Mapping[str, int]]]]
    more_labels: tuple[tuple[str, int], ...] = ()  # (feature, classes), beside "label"


def prepare(
    name: str,
    shape: tuple[int, int, int],
    class_names: tuple[str, ...],
    data_dir: Path,
    *,
    source: Source | None = None,
) -> None:
    """Writes `data_dir`/name/VERSION in array_record form from the official archives, or nothing.

    An archive that already lies in `data_dir`/downloads/manual is not downloaded. Raises
    ConnectionError within seconds where the network is missing; TFDS alone retries for minutes.
    """
    source = source or SOURCES[name]
    manual = data_dir / "downloads" / "manual"
    for archive in source.archives:
        by_hand = manual / PurePosixPath(archive.url).name
        if not by_hand.is_file() and (reason := _unreachable(archive.url)):
            raise ConnectionError(
                f"{archive.url} can't be reached ({reason}), nor is there {by_hand}"
            )
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        # Everything half-done lives in here: the download, TFDS's incomplete folder.
        workspace = tempfile.TemporaryDirectory(prefix="incomplete.", dir=data_dir)
    except OSError as error:
        raise PermissionError(
            f"{data_dir} is not writable ({error.strerror}): "
            "set TFDS_DATA_DIR, or pass data_dir, to a folder that is."
        ) from error
    with workspace as work:
        _write(name, source, _features(shape, class_names, source), Path(work), manual)
        target = data_dir / name / source.version
        target.parent.mkdir(exist_ok=True)
        try:
            os.rename(Path(work) / name / source.version, target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same content
                raise


def _unreachable(url: str, seconds: float = 3.0) -> str | None:
    """Why the server doesn't answer, if it doesn't; one that hangs, or its name server, counts."""
    import requests  # what TFDS downloads with: the same proxies and certificates apply

    reasons: list[str | None] = [f"no answer in {seconds:g} s"]

    def ask():
        try:
            response = requests.head(url, timeout=seconds, allow_redirects=True)
            reasons[0] = None if response.ok else f"HTTP status {response.status_code}"
        except requests.RequestException as error:
            reasons[0] = type(error).__name__

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return reasons[0]


def _features(shape, class_names, source: Source) -> Any:
    import tensorflow_datasets as tfds

    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(names=class_names),
    }
    for label, classes in source.more_labels:
        features[label] = tfds.features.ClassLabel(num_classes=classes)
    return tfds.features.FeaturesDict(features)


def _write(dataset: str, source: Source, features: Any, data_dir: Path, manual: Path) -> None:
    """Downloads, checks and rewrites the archives by TFDS's own machinery."""
    import requests
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.core import registered
    from tensorflow_datasets.core.download import checksums, download_manager
    from tensorflow_datasets.core.units import Size

    urls = [archive.url for archive in source.archives]

    with registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            name = dataset
            VERSION = tfds.core.Version(source.version)
            url_infos = {  # noqa: RUF012
                url: checksums.UrlInfo(Size(size), sha256, PurePosixPath(url).name)
                for url, size, sha256 in source.archives
            }

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=features, supervised_keys=("image", "label")
                )

            def _split_generators(self, dl_manager: Any):
                paths = [Path(path) for path in dl_manager.download(urls)]
                return {split: self._generate_examples(paths, split) for split in ("train", "test")}

            def _generate_examples(self, paths, split):
                for i, (image, labels) in enumerate(source.examples(paths, split)):
                    # TFDS encodes an array with TensorFlow, but an image with Pillow.
                    yield i, {"id": f"{split}_{i:05d}", "image": Image.fromarray(image), **labels}

    config = tfds.download.DownloadConfig(
        manual_dir=manual, try_download_gcs=False, force_checksums_validation=True
    )
    builder = Builder(data_dir=os.fspath(data_dir), file_format="array_record")
    try:
        builder.download_and_prepare(download_config=config)
    except download_manager.NonMatchingChecksumError as error:
        raise ValueError(
            f"An archive of {dataset} is not the official one: delete it from {manual} if it is "
            f"there, and run again to download it from {', '.join(urls)}."
        ) from error
    except (tfds.download.DownloadError, requests.RequestException) as error:
        raise ConnectionError(f"{', '.join(urls)} can't be downloaded ({error})") from error


def cifar_examples(
    archives: Sequence[Path],
    split: str,
    *,
    files: Mapping[str, tuple[str, ...]],
    labels: tuple[str, ...],
) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
    """Records of one byte per label and 3 x 32 x 32 bytes of pixels, file after file."""
    (archive,) = archives
    contents: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:  # read member by member: nothing is unpacked onto the disk
        for member in tar:
            key = PurePosixPath(member.name).name
            if key in files[split] and (file := tar.extractfile(member)) is not None:
                contents[key] = file.read()
    for key in files[split]:
        size = len(labels) + 3 * 32 * 32
        if key not in contents or len(contents[key]) % size:
            raise ValueError(f"{archive} has no whole {key}: delete it and download it again.")
        for record in np.frombuffer(contents[key], np.uint8).reshape(-1, size):
            image = record[len(labels) :].reshape(3, 32, 32).transpose(1, 2, 0)
            yield image, dict(zip(labels, record[: len(labels)].tolist(), strict=True))


CIFAR10_FILES = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
CIFAR100_FILES = {"train": ("train.bin",), "test": ("test.bin",)}

SOURCES = {
    "cifar10": Source(
        "3.0.2",
        (
            Archive(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                170052171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        partial(cifar_examples, files=CIFAR10_FILES, labels=("label",)),
    ),
    "cifar100": Source(
        "3.0.2",
        (
            Archive(
                "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                168513733,
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            ),
        ),
        partial(cifar_examples, files=CIFAR100_FILES, labels=("coarse_label", "label")),
        more_labels=(("coarse_label", 20),),
    ),
}
