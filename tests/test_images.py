"""Image sets are the same arrays in every format, or a clear error."""

import json
import logging
import os
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from sgd_sparse_jax import data

CLASSES = data.IMAGE_SETS["cifar10"].class_names
N = {"train": 60, "test": 20}
RNG = np.random.default_rng(0)
PIXELS = {split: RNG.integers(0, 256, (n, 32, 32, 3), np.uint8) for split, n in N.items()}
LABELS = {split: np.arange(n, dtype=np.int32) * 7 % 10 for split, n in N.items()}
PIXEL, LABEL = PIXELS["train"], LABELS["train"]


def load(root, split="train"):
    return data.load_images("cifar10", split, data_dir=root)


def assert_official(root, split="train"):
    found = load(root, split)
    np.testing.assert_array_equal(found.images, PIXELS[split])
    np.testing.assert_array_equal(found.labels, LABELS[split])
    assert found.images.dtype == np.uint8 and found.labels.dtype == np.int32
    assert found.class_names == CLASSES
    return found


def refused(root):
    """The error in one line."""
    with pytest.raises((ValueError, OSError)) as error:
        load(root)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_arrays(root, name="cifar10", **train):
    """Arrays of a user; `train` replaces its images and labels."""
    (root / name).mkdir(parents=True, exist_ok=True)
    for split in N:
        arrays = {"images": PIXELS[split], "labels": LABELS[split]}
        for what, array in (arrays | train if split == "train" else arrays).items():
            np.save(root / name / f"{split}_{what}.npy", array)
    return root


def write_tfds(root, version="3.0.2", classes=CLASSES, size=(32, 32), ids=True):
    """A folder prepared by TFDS as array_record; ids are ordered numerically."""
    import tensorflow_datasets as tfds

    class Prepared(tfds.dataset_builders.AdhocBuilder, skip_registration=True):
        def _split_generators(self, dl_manager):  # the original needs TensorFlow
            return {split: self.examples(split) for split in self._split_datasets}

        def examples(self, split):
            for i, (pixels, label) in enumerate(zip(PIXELS[split], LABELS[split], strict=True)):
                example = {"image": Image.fromarray(pixels).resize(size), "label": int(label)}
                yield i, example | ({"id": f"{split}_{99_990 + i}"} if ids else {})

    features = {
        "image": tfds.features.Image(shape=(*size, 3)),
        "label": tfds.features.ClassLabel(names=classes),
    } | ({"id": tfds.features.Text()} if ids else {})
    Prepared(
        name="cifar10",
        version=version,
        features=tfds.features.FeaturesDict(features),
        split_datasets=N,
        data_dir=str(root),
        file_format="array_record",
    ).download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return root / "cifar10" / version


def as_tfrecord(folder):
    """The same as tfrecord in two shards, for which TFDS would need TensorFlow."""
    info = json.loads((folder / "dataset_info.json").read_text()) | {"fileFormat": "tfrecord"}
    for split in info["splits"]:
        path = folder / f"cifar10-{split['name']}.array_record-00000-of-00001"
        records = ArrayRecordReader(str(path)).read_all()
        path.unlink()
        cut = len(records) // 3
        split["shardLengths"] = [str(cut), str(len(records) - cut)]
        for shard, part in enumerate((records[:cut], records[cut:])):
            name = f"cifar10-{split['name']}.tfrecord-{shard:05d}-of-00002"
            framed = [struct.pack("<Q", len(each)) + b"crc." + each + b"crc." for each in part]
            (folder / name).write_bytes(b"".join(framed))
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """Data folders with a prepared folder in either format."""
    root = tmp_path_factory.mktemp("forms")
    write_tfds(root / "array_record")
    shutil.copytree(root / "array_record", root / "tfrecord")
    as_tfrecord(root / "tfrecord" / "cifar10" / "3.0.2")
    return root


@pytest.fixture(params=["array_record", "tfrecord"])
def prepared(request, forms, tmp_path):
    """A fresh data folder with a prepared folder."""
    return shutil.copytree(forms / request.param, tmp_path / "data")


# Arrays of a user.


def test_unambiguous_arrays_are_read(tmp_path):
    labels = [LABEL.astype(dtype) for dtype in (np.int64, np.uint8, np.uint64, ">i4", float)]
    images = [np.asfortranarray(PIXEL), PIXEL.transpose(0, 3, 1, 2)]
    changes = [{"labels": each} for each in (*labels, LABEL[:, None])]
    for change in (*changes, *({"images": each} for each in images)):
        found = assert_official(write_arrays(tmp_path, **change))
        assert isinstance(found.images, np.memmap) and found.source == ""
    write_arrays(tmp_path, "mnist", images=PIXEL[:, :28, :28, 0])  # one channel without an axis
    found = data.load_images("mnist", "train", data_dir=tmp_path)
    np.testing.assert_array_equal(found.images, PIXEL[:, :28, :28, :1])


def test_other_arrays_are_refused_and_not_modified(tmp_path):
    one_hot, huge = np.eye(10, dtype=np.int32)[LABEL], LABEL.astype(np.int64) + 2**32
    others = [LABEL[:-1], one_hot, huge, LABEL + 1, LABEL - 1, LABEL + 0.5]
    others += [np.where(LABEL, LABEL, np.nan), LABEL.astype("U1"), LABEL.astype(object)]
    cases = [{"labels": labels} for labels in others]
    cases += [{"images": PIXEL / 255}, {"images": PIXEL.reshape(60, -1)}]
    for arrays in (*cases, {"images": PIXEL[:0], "labels": LABEL[:0]}):
        write_arrays(tmp_path, **arrays)
        path = tmp_path / "cifar10" / f"train_{list(arrays)[-1]}.npy"
        before, message = path.read_bytes(), refused(tmp_path)
        assert str(path) in message and "elete" not in message and path.read_bytes() == before
    path = write_arrays(tmp_path) / "cifar10" / "train_labels.npy"
    for size in (150, 60, 0):
        path.write_bytes(path.read_bytes()[:size])
        assert str(path) in refused(tmp_path)
    path.unlink()  # the rest isn't completed by other data
    assert str(path) in refused(tmp_path)


# Folders prepared by TFDS.


def test_a_prepared_folder_is_decoded_once_until_it_changes(prepared):
    for split in N:
        found = assert_official(prepared, split)
        assert isinstance(found.images, np.memmap) and found.source == "cifar10 3.0.2"
    decoded, folder = (prepared / "cifar10" / name for name in ("decoded", "3.0.2"))
    before = decoded.stat().st_ino
    assert_official(prepared)
    assert decoded.stat().st_ino == before
    os.utime(max(folder.glob("*train*")), (1, 1))
    assert_official(prepared)
    assert decoded.stat().st_ino != before
    (decoded / "train_images.npy").write_bytes(b"\x93NUMPY")
    assert f"Delete {decoded}" in refused(prepared)
    shutil.rmtree(decoded)
    assert_official(prepared)
    shutil.rmtree(folder)
    assert_official(prepared)
    assert "tensorflow" not in sys.modules


def test_the_newest_version_is_read_and_without_ids_in_the_order_of_its_records(tmp_path):
    newest = write_tfds(tmp_path, "10.0.0", ids=False)
    for version in ("9.0.0", "incomplete.ABC_11.0.0", "config/9.9.9"):
        other = tmp_path / "cifar10" / version
        other.mkdir(parents=True)
        (other / "dataset_info.json").write_text("not this one")
    found = load(tmp_path)
    assert sorted(found.labels) == sorted(LABEL) and list(found.labels) != list(LABEL)
    newest.rename(tmp_path / "cifar10" / "config" / "10.0.1")
    assert found.source == "cifar10 10.0.0" and load(tmp_path).source == "cifar10 10.0.1"


def test_a_folder_that_vanishes_while_it_is_searched_is_ignored(prepared, monkeypatch):
    """Such as the one in which another process decodes."""
    scandir, vanishing = os.scandir, prepared / "cifar10" / "incomplete.0"

    def scanned(path):
        if vanishing.exists() and str(path).endswith(vanishing.name):
            vanishing.rmdir()
        return scandir(path)

    vanishing.mkdir()
    monkeypatch.setattr(os, "scandir", scanned)
    assert_official(prepared)


def test_a_module_that_a_prepared_folder_names_is_not_imported(prepared, monkeypatch):
    """TFDS would import it, so that reading an untrusted folder could execute code."""
    sprung, module = prepared / "sprung", prepared / "trapped.py"
    module.write_text(f"open({str(sprung)!r}, 'w').close()\nclass Feature: pass")
    monkeypatch.syspath_prepend(prepared)
    named = json.dumps({"pythonClassName": "trapped.Feature", "text": {}})
    (prepared / "cifar10" / "3.0.2" / "features.json").write_text(named)
    assert_official(prepared)
    assert not sprung.exists()


@pytest.mark.parametrize("cut", [0, 0.5, -100, None])
def test_a_damaged_prepared_folder_is_an_error_and_leaves_no_files(prepared, cut):
    folder = prepared / "cifar10" / "3.0.2"
    path = max(folder.glob("*train*")) if cut is not None else folder / "dataset_info.json"
    content = path.read_bytes()
    if cut is None:  # fewer examples than announced
        content = content.replace(b'"60"', b'"61"').replace(b'"40"', b'"41"')
    else:
        content = content[: cut if cut < 0 else int(cut * len(content))]
    path.write_bytes(content)
    assert str(folder) in refused(prepared)
    assert [path.name for path in (prepared / "cifar10").iterdir()] == ["3.0.2"]


@pytest.mark.parametrize("other", [{"classes": CLASSES[::-1]}, {"size": (16, 16)}])
def test_another_data_set_in_a_prepared_folder_is_an_error(tmp_path, other):
    assert str(write_tfds(tmp_path, **other)) in refused(tmp_path)
    (tmp_path / "cifar10").rename(tmp_path / "svhn_cropped")  # as TFDS calls it
    with pytest.raises(ValueError, match="svhn_cropped"):
        data.load_images("svhn", "train", data_dir=tmp_path)


def test_on_a_full_disk_data_are_decoded_in_memory(prepared, no_room, caplog):
    with no_room(100_000), caplog.at_level(logging.WARNING):  # the images need 184 kB
        found = assert_official(prepared)
    assert not isinstance(found.images, np.memmap) and f"{prepared}/cifar10" in caplog.text
    assert [path.name for path in (prepared / "cifar10").iterdir()] == ["3.0.2"]
    assert data.fingerprint(found) == data.fingerprint(assert_official(prepared))


def test_concurrent_calls_decode_without_conflict(prepared):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(assert_official, [prepared] * 4))
    assert all(isinstance(each.images, np.memmap) for each in found)
    assert {path.name for path in (prepared / "cifar10").iterdir()} == {"3.0.2", "decoded"}


# Location of the data.


def test_data_dir_precedes_the_environment_which_precedes_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    for n, root in enumerate(("home/tensorflow_datasets", "environment", "argument"), 3):
        write_arrays(tmp_path / root, images=PIXEL[:n], labels=LABEL[:n])
    assert len(load(None).labels) == 3
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "environment"))
    assert len(load(None).labels) == len(load("").labels) == 4
    assert len(load(tmp_path / "argument").labels) == 5


@pytest.mark.parametrize("name", ["a b", "η[1:2]*?", "back\\slash", "~tilde", "'\"$HOME"])
@pytest.mark.parametrize("prepared", ["array_record"], indirect=True)
def test_unusual_paths_work(prepared, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    prepared.rename(tmp_path / name)
    os.symlink(name, "link")
    for path in (tmp_path / name, "link", f"./{name}", f"{name}/../{name}/"):
        assert_official(path)
    write_arrays(tmp_path / name)
    assert_official("link")


@pytest.mark.parametrize("url", ["gs://bucket/data", "http://a.b/c", "gs:/a/Path"])
def test_urls_are_refused_and_no_folder_is_made(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    assert url in refused(url)
    monkeypatch.setenv("TFDS_DATA_DIR", url)
    assert url in refused(None)
    assert not list(tmp_path.iterdir())


def test_unknown_names_and_splits_are_refused_with_a_list(tmp_path):
    for name, split in (("cifar11", "train"), ("mnist_gs", "test"), ("gaussians_binary", "val")):
        with pytest.raises(ValueError, match="uniform_noise") as error:
            data.load_images(name, split, data_dir=tmp_path)
        assert name in str(error.value) and split in str(error.value)
