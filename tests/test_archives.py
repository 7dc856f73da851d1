"""Official archives, local or downloaded, become arrays completely or not at all."""

import functools
import gzip
import hashlib
import io
import re
import shlex
import socket
import struct
import tarfile
import threading
import time
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from sgd_sparse_jax import data
from sgd_sparse_jax.data import archives
from sgd_sparse_jax.data.images import STORED

N = {"train": 15, "test": 5}


@functools.cache
def official(name, split):
    """Pixels and labels in the official order; smooth ones for Tiny ImageNet, because of JPEG."""
    rng = np.random.default_rng(N[split])
    kind = STORED[name]
    labels = rng.integers(0, len(kind.class_names), N[split]).astype(np.int32)
    pixels = rng.integers(0, 256, (N[split], *kind.shape), np.uint8)
    if name == "tiny_imagenet":
        pixels = np.broadcast_to(pixels[:, :1, :1], pixels.shape)
        labels = np.sort(labels) if split == "train" else labels
    return pixels, labels


def tarred(name):
    """CIFAR: records of labels and planes, in unsorted files."""
    files = {"train.bin": ("train", slice(None)), "test.bin": ("test", slice(None))}
    if name == "cifar10":
        files = {f"data_batch_{i}.bin": ("train", slice(3 * i - 3, 3 * i)) for i in range(1, 6)}
        files["test_batch.bin"] = ("test", slice(None))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for file, (split, part) in reversed(files.items()):
            pixels, labels = (array[part] for array in official(name, split))
            planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
            coarse = [7 * labels[:, None] % 20] * (name == "cifar100")
            records = np.concatenate([*coarse, labels[:, None], planes], 1).astype(np.uint8)
            info = tarfile.TarInfo(f"cifar-binary/{file}")
            info.size = records.size
            tar.addfile(info, io.BytesIO(records.tobytes()))
        tar.addfile(tarfile.TarInfo("cifar-binary/readme.html"))
    return out.getvalue()


def idx(array):
    header = struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def mat(pixels, labels):
    file, y = io.BytesIO(), np.where(labels == 0, 10, labels)[:, None]
    savemat(file, {"X": pixels.transpose(1, 2, 3, 0), "y": y})
    return file.getvalue()


def zipped():
    """Tiny ImageNet: unsorted members, one grey image, tab-separated annotations."""
    wnids, root = STORED["tiny_imagenet"].class_names, "tiny-imagenet-200"
    members, lines, counts = {}, [], {}
    for split in N:
        for i, (pixels, label) in enumerate(zip(*official("tiny_imagenet", split), strict=True)):
            file, image, wnid = io.BytesIO(), Image.fromarray(pixels), wnids[label]
            (image.convert("L") if i == 1 else image).save(file, "JPEG", quality=95)
            counts[wnid] = counts.get(wnid, 8) + 1  # 9, 10: in numerical order
            place = f"train/{wnid}/images/{wnid}_{counts[wnid]}.JPEG"
            if split == "test":
                place = f"val/images/val_{i}.JPEG"
                lines.append(f"val_{i}.JPEG\t{wnid}\t0\t1\t2\t3\n")
            members[f"{root}/{place}"] = file.getvalue()
    members[f"{root}/val/val_annotations.txt"] = "".join(reversed(lines)).encode()
    members[f"{root}/wnids.txt"] = "\n".join(reversed(wnids)).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for place in sorted(members, key=lambda place: hashlib.sha256(place.encode()).digest()):
            archive.writestr(place, members[place])
    return out.getvalue()


def contents(name):
    """Contents of the archives of a data set, in the order of `SOURCES`."""
    if name.startswith("cifar"):
        return [tarred(name)]
    if name == "tiny_imagenet":
        return [zipped()]
    parts = [official(name, split) for split in N]
    if name == "svhn":
        return [mat(*part) for part in parts]
    return [idx(array) for pixels, labels in parts for array in (pixels[..., 0], labels)]


@pytest.fixture
def place(monkeypatch):
    """Writes archives of a data set into a folder, and registers them as official."""

    def write(name, folder, address=None):
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for (url, *_), content in zip(archives.SOURCES[name].archives, contents(name), strict=True):
            file = url.rpartition("/")[2]
            (folder / file).write_bytes(content)
            proof = hashlib.sha256(content).hexdigest()
            rows.append((f"{address}/{file}" if address else url, str(len(content)), proof))
        source = archives.SOURCES[name]._replace(archives=rows)
        monkeypatch.setitem(archives.SOURCES, name, source)
        return folder / file

    return write


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local web server of `tmp_path`/server: its address, and its requests."""
    monkeypatch.setenv("NO_PROXY", "*")
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requests.append(self.command)

    handler = functools.partial(Handler, directory=str(tmp_path / "server"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}", requests
        served.shutdown()
        thread.join()


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def assert_official(name, split, root):
    found, (pixels, labels) = data.load_images(name, split, data_dir=root), official(name, split)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.images.shape == pixels.shape and found.images.dtype == np.uint8
    assert isinstance(found.images, np.memmap) and found.class_names == STORED[name].class_names
    assert found.source == f"{name} {archives.SOURCES[name].version}"
    if name != "tiny_imagenet":
        np.testing.assert_array_equal(found.images, pixels)
        return
    off = np.abs(found.images.astype(int) - pixels).max((1, 2, 3))
    assert (np.delete(off, 1) <= 6).all()  # JPEG's rounding
    assert len(np.unique(found.images[1][0, 0])) == 1  # the grey one has equal channels


@pytest.mark.parametrize("name", STORED)
def test_a_local_archive_is_read_once_and_without_network(tmp_path, place, name):
    manual = tmp_path / "downloads" / "manual"
    place(name, manual / name if name == "mnist" else manual)
    for split in N:
        assert_official(name, split, tmp_path)
    manual.rename(tmp_path / "elsewhere")
    assert_official(name, "train", tmp_path)
    assert [path.name for path in (tmp_path / name).iterdir()] == ["decoded"]


def test_without_network_the_error_has_the_address_and_the_command(
    tmp_path, place, server, monkeypatch
):
    root = tmp_path / "my data"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # not listening: connections are refused
        place("cifar10", tmp_path / "server", f"http://127.0.0.1:{unused.getsockname()[1]}")
        start = time.perf_counter()
        with pytest.raises(FileNotFoundError) as error:
            data.load_images("cifar10", "test", data_dir=root)
    assert time.perf_counter() - start < 5 and files(root) == []
    message = str(error.value)
    assert "\n" not in message and str(root / "downloads" / "manual") in message
    # The command of the message, on a machine with network.
    place("cifar10", tmp_path / "server", server[0])
    variable, _, _, program = shlex.split(re.findall("`(.*)`", message)[0])
    monkeypatch.setenv(*variable.split("=", 1))
    exec(program, {})
    for split in N:
        assert_official("cifar10", split, root)
    assert server[1] == ["GET"]  # a single download
    assert {path.parent for path in files(root)} == {root / "cifar10" / "decoded"}


@pytest.mark.parametrize("fault", ["missing", "other", "silent"])
def test_a_failed_download_leaves_no_files(tmp_path, place, server, monkeypatch, fault):
    monkeypatch.setattr(archives, "TIMEOUT", (1.0, 0.3))
    address, root = server[0], tmp_path / "data"
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        if fault == "silent":
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        path = place("cifar10", tmp_path / "server", address)
        if fault == "missing":
            path.unlink()
        elif fault == "other":
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises((FileNotFoundError, ValueError), match=address) as error:
            data.load_images("cifar10", "train", data_dir=root)
    assert "\n" not in str(error.value) and files(root) == []
    assert ("404" in str(error.value)) == (fault == "missing")


def test_a_read_only_folder_is_an_error_before_any_download(tmp_path, place, server):
    path = place("cifar10", tmp_path / "server", server[0])
    with pytest.raises(PermissionError, match=f"{path}/cifar10"):
        data.load_images("cifar10", "train", data_dir=path)
    assert server[1] == []


def test_the_table_of_archives_agrees_with_the_one_of_tfds():
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums

    known = checksums.get_all_url_infos.__wrapped__()
    svhn = Path(tfds.__file__).parent / "datasets" / "svhn_cropped" / "checksums.tsv"
    known |= checksums.load_url_infos(svhn)
    assert set(archives.SOURCES) == set(STORED)
    rows = [row for source in archives.SOURCES.values() for row in source.archives]
    for url, size, sha256 in rows:
        if "tiny-imagenet" not in url:  # TFDS has no such data set
            assert (known[url].size, known[url].checksum) == (int(size), sha256)
