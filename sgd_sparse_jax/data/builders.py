"""From an official archive to a prepared TFDS directory, without TensorFlow."""

import gzip
import os
import re
import struct
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

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

    An archive that already lies in `data_dir`/downloads/manual, or in a folder called `name` there
    (two data sets have archives of the same names), is not downloaded. Raises ConnectionError
    within seconds where the network is missing; TFDS alone retries for minutes.
    """
    source = source or SOURCES[name]
    manual = data_dir / "downloads" / "manual"
    manual = manual / name if (manual / name).is_dir() else manual
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
                    pixels = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
                    yield i, {"id": f"{split}_{i:05d}", "image": pixels, **labels}

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
    try:
        with tarfile.open(archive) as tar:  # read member by member: nothing is unpacked
            for member in tar:
                key = PurePosixPath(member.name).name
                if key in files[split] and member.isreg():  # a link would lead to another member
                    contents[key] = cast(IO[bytes], tar.extractfile(member)).read()
    except Exception as error:  # gzip's, zlib's and tar's
        raise ValueError(
            f"{archive} is not whole ({error!r}): delete it and download it again."
        ) from error
    for key in files[split]:
        size = len(labels) + 3 * 32 * 32
        if key not in contents or len(contents[key]) % size:
            raise ValueError(f"{archive} has no whole {key}: delete it and download it again.")
        for record in np.frombuffer(contents[key], np.uint8).reshape(-1, size):
            image = record[len(labels) :].reshape(3, 32, 32).transpose(1, 2, 0)
            yield image, dict(zip(labels, record[: len(labels)].tolist(), strict=True))


def idx_examples(
    archives: Sequence[Path], split: str
) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
    """MNIST's form: images and labels in two files, each after a header of big-endian sizes."""
    of_split = archives[:2] if split == "train" else archives[2:]
    images, labels = (_idx(archive, rank) for archive, rank in zip(of_split, (3, 1), strict=True))
    if len(images) != len(labels):
        raise ValueError(
            f"{of_split[0]} has {len(images)} images but {of_split[1].name} {len(labels)} labels: "
            "delete both and download them again."
        )
    for image, label in zip(images, labels, strict=True):
        yield image[..., None], {"label": int(label)}


def _idx(archive: Path, rank: int) -> np.ndarray:
    """Bytes behind the number 2048 + rank and `rank` sizes."""
    try:
        content = gzip.decompress(archive.read_bytes())
        number, *shape = struct.unpack_from(f">{1 + rank}I", content)
        values = np.frombuffer(content, np.uint8, offset=4 * (1 + rank))
        if number != 2048 + rank:
            raise ValueError(f"it begins with {number}")
        return values.reshape(shape)
    except (OSError, EOFError, struct.error, ValueError, zlib.error) as error:
        raise ValueError(
            f"{archive} has no whole array ({error}): delete it and download it again."
        ) from error


def svhn_examples(
    archives: Sequence[Path], split: str
) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
    """MATLAB files with X [h, w, c, n] and y [n, 1], where 10 stands for the digit 0."""
    from scipy.io import loadmat

    archive = archives[0 if split == "train" else 1]
    try:
        # Objects and functions in it would come as inert arrays; none of them is looked at.
        content = loadmat(archive, variable_names=("X", "y"))
        images, labels = content["X"].transpose(3, 0, 1, 2), content["y"].reshape(-1)
        if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
            raise ValueError(f"X holds {images.dtype}{list(content['X'].shape)}")
        if labels.dtype.kind not in "uif" or not np.isin(labels, range(1, 11)).all():
            raise ValueError(f"y holds {labels.dtype}, and not the labels 1 … 10 alone")
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images, {len(labels)} labels")
    except Exception as error:  # scipy has its own kinds
        raise ValueError(
            f"{archive} has no whole X and y ({error!r}): delete it and download it again."
        ) from error
    for image, label in zip(images, labels, strict=True):
        yield np.ascontiguousarray(image), {"label": int(label) % 10}


def tiny_imagenet_examples(
    archives: Sequence[Path], split: str
) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
    """JPEG files in folders by WordNet name; the labelled validation images are the test split."""
    from PIL import Image

    (archive,) = archives
    try:
        with zipfile.ZipFile(archive) as zipped:  # read member by member: nothing is unpacked
            root = "tiny-imagenet-200"
            names = sorted(zipped.read(f"{root}/wnids.txt").decode().split())
            number = {wnid: label for label, wnid in enumerate(names)}
            if split == "train":
                found = [m for m in zipped.namelist() if re.fullmatch(TRAIN_JPEG, m)]
                labelled = [(m, m.split("/")[2]) for m in found]
            else:
                lines = zipped.read(f"{root}/val/val_annotations.txt").decode().splitlines()
                labelled = [(f"{root}/val/images/{x[0]}", x[1]) for x in map(str.split, lines)]
            count = lambda path: int(path.rpartition("_")[2].removesuffix(".JPEG"))
            for member, wnid in sorted(
                labelled, key=lambda m: (m[0].rpartition("_")[0], count(m[0]))
            ):
                # JPEG and nothing else: Pillow would have another program run what is PostScript.
                with zipped.open(member) as file, Image.open(file, formats=("JPEG",)) as image:
                    if image.size != (64, 64):
                        raise ValueError(f"{member} has {image.size} pixels")
                    # some are grey
                    yield np.asarray(image.convert("RGB")), {"label": number[wnid]}
    except Exception as error:  # zip's, zlib's and Pillow's
        raise ValueError(
            f"{archive} is not whole ({error!r}): delete it and download it again."
        ) from error


TRAIN_JPEG = r"tiny-imagenet-200/train/(n\d+)/images/\1_\d+\.JPEG"
CIFAR10_FILES = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
CIFAR100_FILES = {"train": ("train.bin",), "test": ("test.bin",)}

IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def idx_archives(where: str, *sizes_and_sums: tuple[int, str]) -> tuple[Archive, ...]:
    """The four files of a set in MNIST's form."""
    pairs = zip(IDX_FILES, sizes_and_sums, strict=True)
    return tuple(Archive(where + file, *proof) for file, proof in pairs)


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
    "svhn": Source(
        "3.1.0",
        (
            Archive(
                "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
                182040794,
                "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            ),
            Archive(
                "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
                64275384,
                "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
            ),
        ),
        svhn_examples,
    ),
    "mnist": Source(
        "3.0.1",
        idx_archives(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        ),
        idx_examples,
    ),
    "fashion_mnist": Source(
        "3.0.1",
        idx_archives(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        ),
        idx_examples,
    ),
    "tiny_imagenet": Source(
        "1.0.0",  # TFDS has no such data set
        (
            Archive(
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                248100043,
                "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
            ),
        ),
        tiny_imagenet_examples,
    ),
}
