"""Image sets are the same arrays whichever form they are read from, or one clear error."""

import functools
import json
import logging
import resource
import struct
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgd_sparse_jax.data import images as module
from sgd_sparse_jax.data.images import IMAGE_SETS, load_images

CLASSES = IMAGE_SETS["cifar10"].class_names
N = {"train": 200, "test": 40}


@functools.cache
def arrays(split):
    """Pixels and labels in the official order."""
    rng = np.random.default_rng(N[split])
    pixels = rng.integers(0, 256, (N[split], 32, 32, 3), np.uint8)
    return pixels, rng.integers(0, 10, N[split]).astype(np.int32)


def examples(split, first_id=0):
    for i, (pixels, label) in enumerate(zip(*arrays(split), strict=True), first_id):
        yield {"id": f"{split}_{i:05d}", "image": Image.fromarray(pixels), "label": int(label)}


def write_tfds(data_dir, version="3.0.2", classes=CLASSES, shape=(32, 32, 3), with_id=True):
    """A data set prepared by TFDS itself, in array_record form."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    features = {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(names=classes),
    }
    if with_id:
        features["id"] = tfds.features.Text()

    with registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            name, VERSION = "cifar10", tfds.core.Version(version)

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in N}

            def _generate_examples(self, split):
                for i, example in enumerate(examples(split)):
                    example["image"] = example["image"].resize(shape[:2])
                    yield i, {key: example[key] for key in features}

    config = tfds.download.DownloadConfig(try_download_gcs=False)
    Builder(data_dir=str(data_dir), file_format="array_record").download_and_prepare(
        download_config=config
    )
    return data_dir / "cifar10" / version


def write_tfrecord(data_dir, first_id=0):
    """The same as stock TFDS writes it, in two shards; TFDS needs TensorFlow for that, we don't."""
    import tensorflow_datasets as tfds

    folder = write_tfds(data_dir)
    features = tfds.builder_from_directory(folder).info.features
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        name = split["name"]
        records = [
            features.serialize_example(features.encode_example(example))
            for example in examples(name, first_id)
        ]
        order = np.random.default_rng(0).permutation(len(records))
        cut = len(records) // 3
        split["shardLengths"] = [str(cut), str(len(records) - cut)]
        for shard, indices in enumerate((order[:cut], order[cut:])):
            with (folder / f"cifar10-{name}.tfrecord-{shard:05d}-of-00002").open("wb") as file:
                for i in indices:  # the checksums are not read
                    file.write(struct.pack("<QI", len(records[i]), 7) + records[i] + b"crc.")
    for path in folder.glob("*.array_record-*"):
        path.unlink()
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def write_cache(data_dir, split="train", images=None, labels=None):
    folder = Path(data_dir) / "cifar10"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{split}_images.npy", arrays(split)[0] if images is None else images)
    np.save(folder / f"{split}_labels.npy", arrays(split)[1] if labels is None else labels)
    return folder


def assert_official(data, split="train"):
    np.testing.assert_array_equal(data.images, arrays(split)[0])
    np.testing.assert_array_equal(data.labels, arrays(split)[1])
    assert data.images.dtype == np.uint8 and data.labels.dtype == np.int32
    assert data.class_names == CLASSES


@pytest.mark.parametrize("split", N)
@pytest.mark.parametrize("write", [write_tfds, write_tfrecord])
def test_every_form_gives_the_same_arrays(tmp_path, write, split):
    arrays_dir, tfds_dir = tmp_path / "arrays", tmp_path / "tfds"
    write_cache(arrays_dir, split)
    folder = write(tfds_dir)
    assert_official(load_images("cifar10", split, data_dir=arrays_dir), split)
    assert_official(load_images("cifar10", split, data_dir=tfds_dir), split)
    for kind in ("images", "labels"):  # the cache is the other form, byte for byte
        name = f"cifar10/{split}_{kind}.npy"
        assert (arrays_dir / name).read_bytes() == (tfds_dir / name).read_bytes()
    for path in folder.iterdir():
        path.unlink()
    again = load_images("cifar10", split, data_dir=tfds_dir)
    assert isinstance(again.images, np.memmap) and isinstance(again.labels, np.memmap)
    assert_official(again, split)


def test_tfds_stores_another_order(tmp_path):
    """Without this the tests of the order would be empty."""
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(write_tfds(tmp_path)).as_data_source("train")
    ids = [source[i]["id"] for i in range(len(source))]
    assert sorted(ids) != ids


def test_ids_are_ordered_as_numbers(tmp_path):
    write_tfrecord(tmp_path, first_id=99_900)  # train_99999 comes before train_100000
    assert_official(load_images("cifar10", "train", data_dir=tmp_path))


def test_without_ids_the_stored_order_stays(tmp_path):
    import tensorflow_datasets as tfds

    folder = write_tfds(tmp_path, with_id=False)
    stored = tfds.builder_from_directory(folder).as_data_source("test")
    data = load_images("cifar10", "test", data_dir=tmp_path)
    np.testing.assert_array_equal(data.images, [stored[i]["image"] for i in range(len(stored))])


def test_where_the_data_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    sizes = {}
    for n, root in enumerate(("home/tensorflow_datasets", "environment", "argument"), 3):
        write_cache(tmp_path / root, "train", arrays("train")[0][:n], arrays("train")[1][:n])
        sizes[root] = n
    load = functools.partial(load_images, "cifar10", "train")
    assert len(load().labels) == 3
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "environment"))
    assert len(load().labels) == 4
    assert len(load(data_dir=tmp_path / "argument").labels) == 5
    monkeypatch.chdir(tmp_path)
    assert len(load(data_dir="argument").labels) == 5


def test_the_newest_whole_version_is_read(tmp_path):
    newest = write_tfds(tmp_path, "10.0.0")
    for version in ("9.0.0", "incomplete.ABC_11.0.0", "config/9.9.9"):
        other = tmp_path / "cifar10" / version
        other.mkdir(parents=True)
        (other / "dataset_info.json").write_text("not this one")
    assert_official(load_images("cifar10", "test", data_dir=tmp_path), "test")
    config = tmp_path / "cifar10" / "config" / "11.0.0"
    newest.rename(config)
    assert_official(load_images("cifar10", "train", data_dir=tmp_path))


def broken_caches():
    images, labels = arrays("test")
    yield "labels missing", {"labels": labels[:-1]}, ["39 labels", "train_images.npy"]
    yield "float images", {"images": images / 255}, ["float64", "train_images.npy"]
    yield "flat images", {"images": images.reshape(40, -1)}, ["[40, 3072]", "train_images.npy"]
    yield "channels first", {"images": images.transpose(0, 3, 1, 2)}, ["[40, 3, 32, 32]"]
    yield "long labels", {"labels": labels.astype(np.int64)}, ["int64", "train_labels.npy"]
    yield "one-hot labels", {"labels": np.eye(10, dtype=np.int32)[labels]}, ["[40, 10]"]
    yield "label 10", {"labels": np.where(labels == 3, np.int32(10), labels)}, ["[0, 10)"]
    yield "label -1", {"labels": np.where(labels == 3, np.int32(-1), labels)}, ["-1"]
    yield "nothing", {"images": images[:0], "labels": labels[:0]}, ["empty"]
    yield "pickle", {"labels": labels.astype(object)}, ["train_labels.npy", "truncated or no"]


@pytest.mark.parametrize(
    ("files", "words"), [pytest.param(*c[1:], id=c[0]) for c in broken_caches()]
)
def test_a_wrong_cache_is_named(tmp_path, files, words):
    images, labels = arrays("test")
    write_cache(tmp_path, "train", **{"images": images, "labels": labels, **files})
    with pytest.raises(ValueError, match="delete") as error:
        load_images("cifar10", "train", data_dir=tmp_path)
    for word in [*words, str(tmp_path)]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["images", "labels"])
@pytest.mark.parametrize("size", [0, 3, 60, 128, 270])
def test_a_truncated_cache_is_named_and_rebuilt(tmp_path, kind, size):
    write_tfds(tmp_path)
    path = write_cache(tmp_path) / f"train_{kind}.npy"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"{path} .*delete it and run again"):
        load_images("cifar10", "train", data_dir=tmp_path)
    path.unlink()
    assert_official(load_images("cifar10", "train", data_dir=tmp_path))


@pytest.mark.parametrize("form", [write_tfds, write_tfrecord])
@pytest.mark.parametrize("cut", [0.0, 0.5, -1])
def test_a_damaged_directory_is_named(tmp_path, form, cut):
    folder = form(tmp_path)
    path = max(folder.glob("cifar10-train*"))
    content = path.read_bytes()
    path.write_bytes(content[: cut if cut < 0 else int(cut * len(content))])
    with pytest.raises(ValueError, match=rf"{folder} can't be read .*: move it away") as error:
        load_images("cifar10", "train", data_dir=tmp_path)
    assert "\n" not in str(error.value)
    assert not list(folder.parent.glob("*.npy"))


def test_a_tfrecord_is_cut_between_records_or_truncated(tmp_path):
    path, records = tmp_path / "file", [b"a", b"", b"long record"]
    content = b"".join(struct.pack("<Q", len(r)) + b"crc." + r + b"crc." for r in records)
    whole = {0: 0, 17: 1, 33: 2, 60: 3}
    assert len(content) == 60
    for size in range(61):
        path.write_bytes(content[:size])
        with path.open("rb") as file:
            if size in whole:
                assert list(module._tfrecords(file)) == records[: whole[size]]
            else:
                with pytest.raises(ValueError, match=f"{path} is truncated"):
                    list(module._tfrecords(file))


def test_another_data_set_in_the_directory_is_named(tmp_path):
    write_tfds(tmp_path / "classes", classes=CLASSES[::-1])
    with pytest.raises(ValueError, match="has other classes, truck"):
        load_images("cifar10", "train", data_dir=tmp_path / "classes")
    write_tfds(tmp_path / "shape", shape=(16, 16, 3))
    with pytest.raises(ValueError, match=r"shape \(16, 16, 3\)"):
        load_images("cifar10", "train", data_dir=tmp_path / "shape")


def test_unknown_names_list_the_known(tmp_path):
    with pytest.raises(ValueError, match="'cifar11'; known are cifar10, cifar100"):
        load_images("cifar11", "train", data_dir=tmp_path)
    with pytest.raises(ValueError, match="'validation' of cifar10; it has train and test"):
        load_images("cifar10", "validation", data_dir=tmp_path)


def test_an_empty_directory_names_the_cure(tmp_path):
    def offline(*_):
        raise ConnectionError("https://example.org can't be reached (no answer)")

    for prepare, reason in (
        (None, "no builder"),
        (offline, "https://example.org can't be reached"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            load_images("cifar10", "test", data_dir=tmp_path / "a b", prepare=prepare)
        folder = tmp_path / "a b"
        command = f"TFDS_DATA_DIR='{folder}' python -c 'from sgd_sparse_jax.data import"
        for word in (str(folder / "cifar10"), reason, command, 'load_images("cifar10", "train")'):
            assert word in str(error.value)
        assert "\n" not in str(error.value) and not folder.exists()


@pytest.mark.parametrize("missing", ["images", "labels"])
def test_half_a_cache_is_none(tmp_path, missing):
    write_tfds(tmp_path)
    folder = write_cache(tmp_path, images=arrays("train")[0] // 2)
    (folder / f"train_{missing}.npy").unlink()
    assert_official(load_images("cifar10", "train", data_dir=tmp_path))


def test_a_full_disk_means_memory(tmp_path, caplog):
    folder = write_tfds(tmp_path).parent
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the images need 600 kB
    try:
        with caplog.at_level(logging.WARNING):
            data = load_images("cifar10", "train", data_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_official(data)
    assert not isinstance(data.images, np.memmap)
    assert f"{folder} can't be written" in caplog.text and "into memory" in caplog.text
    left = {path.name for path in folder.iterdir()}
    assert left == {"3.0.2", "train_labels.npy"}  # half a cache, which the next call completes
    assert isinstance(load_images("cifar10", "train", data_dir=tmp_path).images, np.memmap)


def test_a_read_only_directory_means_memory(tmp_path, caplog):
    folder = write_tfds(tmp_path).parent
    folder.chmod(0o555)
    try:
        (folder / "probe").touch()
        pytest.skip("this user writes where it may not")
    except PermissionError:
        with caplog.at_level(logging.WARNING):
            assert_official(load_images("cifar10", "train", data_dir=tmp_path))
    finally:
        folder.chmod(0o755)
    assert f"{folder} can't be written" in caplog.text
    assert not list(folder.glob("*.npy"))


def test_many_at_once_are_as_good_as_one(tmp_path):
    folder = write_tfds(tmp_path).parent
    found, barrier = [], threading.Barrier(4)

    def load():
        barrier.wait()
        found.append(load_images("cifar10", "train", data_dir=tmp_path))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for data in found:
        assert_official(data)
    names = {path.name for path in folder.iterdir()}
    assert names == {"3.0.2", "train_images.npy", "train_labels.npy"}


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, done = tmp_path / "array.npy", threading.Event()
    module._save(path, np.zeros(300_000))

    def overwrite():
        for i in range(40):
            module._save(path, np.full(300_000, float(i)))
        done.set()

    writer = threading.Thread(target=overwrite)
    writer.start()
    while not done.is_set():
        array = module._open_array(path)
        assert array[0] == array[-1]
    writer.join()
    assert [p.name for p in tmp_path.iterdir()] == ["array.npy"]


def test_loading_warns_of_nothing_and_imports_no_tensorflow(tmp_path):
    import sys

    write_tfds(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_images("cifar10", "train", data_dir=tmp_path)
    assert "tensorflow" not in sys.modules
