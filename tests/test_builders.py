"""From an official archive to arrays: end to end over a local server, and all or nothing."""

import functools
import hashlib
import io
import re
import socket
import tarfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from sgd_sparse_jax.data import builders
from sgd_sparse_jax.data.builders import SOURCES, Archive, prepare
from sgd_sparse_jax.data.images import IMAGE_SETS, load_images

PER_FILE = 4
FILES = {
    "cifar10": [*builders.CIFAR10_FILES["train"], *builders.CIFAR10_FILES["test"]],
    "cifar100": [*builders.CIFAR100_FILES["train"], *builders.CIFAR100_FILES["test"]],
}


@functools.cache
def contents(name, file):
    """Labels [n, 1 or 2] and pixels [n, h, w, c] of one file."""
    rng = np.random.default_rng(FILES[name].index(file))
    most = [10] if name == "cifar10" else [20, 100]
    labels = rng.integers(0, most, (PER_FILE, len(most)), np.uint8)
    return labels, rng.integers(0, 256, (PER_FILE, 32, 32, 3), np.uint8)


def official(name, split):
    """What the loader has to give."""
    files = [file for file in FILES[name] if ("test" in file) == (split == "test")]
    labels, images = zip(*(contents(name, file) for file in files), strict=True)
    return np.concatenate(images), np.concatenate(labels)[:, -1].astype(np.int32)


def write_archive(folder, name, files=None, spoil=b""):
    """An archive of the official layout, and the entry that describes it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SOURCES[name].archives[0].url.rsplit("/", 1)[-1]
    with tarfile.open(path, "w:gz") as tar:
        for file in reversed(FILES[name] if files is None else files):
            labels, images = contents(name, file)
            planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
            add(tar, f"cifar-binary/{file}", np.concatenate([labels, planes], 1).tobytes() + spoil)
        add(tar, "cifar-binary/readme.html", b"<html>")
        add(tar, "../../outside.bin", b"must not be unpacked")
    content = path.read_bytes()
    return path, len(content), hashlib.sha256(content).hexdigest()


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def source(name, url, size, sha256):
    return SOURCES[name]._replace(archives=(Archive(url, size, sha256),))


def write(name, data_dir, entry):
    prepare(name, *IMAGE_SETS[name][:2], data_dir, source=entry)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """The address of a web server on this machine over `tmp_path`/server, and what it was asked."""
    monkeypatch.setenv("NO_PROXY", "*")
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            asked.append(self.command)

    handler = functools.partial(Handler, directory=str(tmp_path / "server"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.fixture
def closed_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


@pytest.mark.parametrize("name", FILES)
def test_from_the_archive_to_the_arrays(tmp_path, serve, name):
    address, asked = serve
    path, size, sha256 = write_archive(tmp_path / "server", name)
    entry = source(name, f"{address}/{path.name}", size, sha256)
    load = functools.partial(
        load_images,
        name,
        data_dir=tmp_path / "data",
        prepare=functools.partial(prepare, source=entry),
    )
    for split in ("train", "test"):
        data, (images, labels) = load(split), official(name, split)
        np.testing.assert_array_equal(data.images, images)
        np.testing.assert_array_equal(data.labels, labels)
        assert data.class_names == IMAGE_SETS[name].class_names
    assert asked == ["HEAD", "GET"]  # one download serves both splits
    top = {path.name for path in (tmp_path / "data").iterdir()}
    assert top == {name}  # neither downloads nor incomplete folders are left
    assert not list(tmp_path.rglob("outside.bin"))


def test_tfds_reads_what_we_wrote(tmp_path, closed_port):
    import tensorflow_datasets as tfds

    path, size, sha256 = write_archive(tmp_path / "downloads" / "manual", "cifar100")
    write("cifar100", tmp_path, source("cifar100", f"{closed_port}/{path.name}", size, sha256))
    builder = tfds.builder_from_directory(tmp_path / "cifar100" / "3.0.2")
    assert builder.info.splits["train"].num_examples == PER_FILE
    assert builder.info.features["coarse_label"].num_classes == 20
    for example in builder.as_data_source("test"):
        labels, images = contents("cifar100", "test.bin")
        i = int(example["id"].removeprefix(b"test_"))
        assert [example["coarse_label"], example["label"]] == labels[i].tolist()
        np.testing.assert_array_equal(example["image"], images[i])


def test_an_archive_brought_by_hand_needs_no_network(tmp_path, closed_port):
    path, size, sha256 = write_archive(tmp_path / "downloads" / "manual", "cifar10")
    entry = source("cifar10", f"{closed_port}/{path.name}", size, sha256)
    write("cifar10", tmp_path, entry)
    before = tree(tmp_path)
    write("cifar10", tmp_path, entry)  # as if another process had been faster
    assert tree(tmp_path) == before and path.is_file()
    with pytest.raises(ValueError, match=r"not the official one: delete it from .*manual"):
        write("cifar10", tmp_path, entry._replace(archives=(Archive(*entry.archives[0][:2], "0"),)))
    assert tree(tmp_path) == before


def test_a_wrong_checksum_leaves_nothing(tmp_path, serve):
    path, size, _ = write_archive(tmp_path / "server", "cifar10")
    entry = source("cifar10", f"{serve[0]}/{path.name}", size, "0" * 64)
    with pytest.raises(ValueError, match="not the official one") as error:
        write("cifar10", tmp_path / "data", entry)
    assert "\n" not in str(error.value) and entry.archives[0].url in str(error.value)
    assert tree(tmp_path / "data") == []


@pytest.mark.parametrize("flaw", [{"files": ["data_batch_1.bin"]}, {"spoil": b"x"}])
def test_an_incomplete_archive_leaves_nothing(tmp_path, serve, flaw):
    path, size, sha256 = write_archive(tmp_path / "server", "cifar10", **flaw)
    entry = source("cifar10", f"{serve[0]}/{path.name}", size, sha256)
    with pytest.raises(ValueError, match="has no whole"):
        write("cifar10", tmp_path / "data", entry)
    assert tree(tmp_path / "data") == []


def test_offline_is_one_quick_message(tmp_path, closed_port, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    entry = source("cifar10", f"{closed_port}/cifar.tar.gz", 1, "0" * 64)
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as error:
        load_images(
            "cifar10",
            "train",
            data_dir=tmp_path / "data",
            prepare=functools.partial(prepare, source=entry),
        )
    assert time.perf_counter() - start < 5
    by_hand = tmp_path / "data" / "downloads" / "manual" / "cifar.tar.gz"
    for word in ("cifar10 is", "TFDS_DATA_DIR", entry.archives[0].url, f"nor is there {by_hand}"):
        assert word in str(error.value)
    assert "\n" not in str(error.value) and tree(tmp_path) == []


@pytest.mark.parametrize("drip", [b"", b"x"])
def test_a_silent_or_endless_server_is_given_up(monkeypatch, drip):
    monkeypatch.setenv("NO_PROXY", "*")
    stop = threading.Event()

    def answer():
        connection, _ = listening.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Endless: " if drip else b"")
            while not stop.wait(0.02):
                connection.sendall(drip)

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        thread = threading.Thread(target=answer)
        thread.start()
        timer = threading.Timer(1.5, stop.set)  # so that even a probe without a limit comes back
        timer.start()
        start = time.perf_counter()
        assert builders._unreachable(f"http://127.0.0.1:{listening.getsockname()[1]}/a", 0.2)
        assert time.perf_counter() - start < 1
        timer.cancel()
        stop.set()
        thread.join()


def test_a_missing_archive_is_named(tmp_path, serve):
    (tmp_path / "server").mkdir()
    with pytest.raises(ConnectionError, match=r"gone.tar.gz can't be .* \(HTTP status 404\)"):
        write("cifar10", tmp_path, source("cifar10", f"{serve[0]}/gone.tar.gz", 1, "0" * 64))
    assert serve[1] == ["HEAD"] * len(serve[1])


def test_a_refused_download_leaves_nothing(tmp_path, serve, monkeypatch):
    path, size, sha256 = write_archive(tmp_path / "server", "cifar10")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "do_GET", lambda self: self.send_error(403))
    with pytest.raises(ConnectionError, match=r"binary.tar.gz can't be downloaded \(.*403"):
        entry = source("cifar10", f"{serve[0]}/{path.name}", size, sha256)
        write("cifar10", tmp_path / "data", entry)
    assert tree(tmp_path / "data") == []


def test_an_unwritable_folder_is_named_before_the_download(tmp_path, serve):
    path, size, sha256 = write_archive(tmp_path / "server", "cifar10")
    (tmp_path / "file").touch()
    entry = source("cifar10", f"{serve[0]}/{path.name}", size, sha256)
    with pytest.raises(PermissionError, match=r"file/data is not writable \(.*set TFDS_DATA_DIR"):
        write("cifar10", tmp_path / "file" / "data", entry)
    assert "GET" not in serve[1]


def test_the_table_agrees_with_the_loader_and_with_tfds():
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums

    # As TFDS has them on disk: what it holds in memory, other tests' downloads have added to.
    known = checksums.get_all_url_infos.__wrapped__()
    svhn = Path(tfds.__file__).parent / "datasets" / "svhn_cropped" / "checksums.tsv"
    known |= checksums.load_url_infos(svhn)
    assert set(SOURCES) == set(IMAGE_SETS)
    for name, entry in SOURCES.items():
        for url, size, sha256 in entry.archives:
            assert re.fullmatch("[0-9a-f]{64}", sha256)
            if name != "tiny_imagenet":  # TFDS has no such data set
                assert (known[url].size, known[url].checksum) == (size, sha256)
