"""Official forms of archives, in small, all the way to arrays; and the sets made of others."""

import gzip
import hashlib
import io
import json
import struct
import zipfile
from functools import partial

import numpy as np
import pytest
from PIL import Image

from sgd_sparse_jax import data
from sgd_sparse_jax.data import builders, images as stored, variants
from sgd_sparse_jax.data.builders import SOURCES

N = {"train": 12, "test": 5}


def drawn(name, split):
    """Pixels and labels in the official order; of Tiny ImageNet smooth ones, which JPEG keeps."""
    rng = np.random.default_rng(N[split])
    shape, names, _ = stored.IMAGE_SETS[name]
    labels = rng.integers(0, len(names), N[split]).astype(np.int32)
    pixels = rng.integers(0, 256, (N[split], *shape), np.uint8)
    if name == "tiny_imagenet":
        pixels = np.broadcast_to(pixels[:, :1, :1], pixels.shape)
        labels = np.sort(labels) if split == "train" else labels
    return pixels, labels


def idx(array):
    header = struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def mat(pixels, labels):
    from scipy.io import savemat

    file = io.BytesIO()
    y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
    savemat(file, {"X": pixels.transpose(1, 2, 3, 0), "y": y})
    return file.getvalue()


def zipped():
    """As the official one: shuffled members, one grey image, annotations behind tabs."""
    wnids = stored.IMAGE_SETS["tiny_imagenet"].class_names
    root, members = "tiny-imagenet-200", {}
    for split in N:
        seen = {}
        for i, (pixels, label) in enumerate(zip(*drawn("tiny_imagenet", split), strict=True)):
            file = io.BytesIO()
            image = Image.fromarray(pixels)
            (image.convert("L") if i == 1 else image).save(file, "JPEG", quality=95)
            wnid = wnids[label]
            seen[wnid] = seen.get(wnid, 8) + 1  # 9, 10: as numbers, not as letters
            train = f"{root}/train/{wnid}/images/{wnid}_{seen[wnid]}.JPEG"
            place = train if split == "train" else f"{root}/val/images/val_{i}.JPEG"
            members[place] = file.getvalue()
    labels = drawn("tiny_imagenet", "test")[1]
    lines = [f"val_{i}.JPEG\t{wnids[label]}\t0\t1\t2\t3\n" for i, label in enumerate(labels)]
    members[f"{root}/val/val_annotations.txt"] = "".join(reversed(lines)).encode()
    members[f"{root}/wnids.txt"] = "\n".join(reversed(wnids)).encode()
    members["../../outside.JPEG"] = b"must not be unpacked"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for place in sorted(members, key=lambda place: hashlib.sha256(place.encode()).digest()):
            archive.writestr(place, members[place])
    return out.getvalue()


def archives(name):
    """The contents of a data set's archives, in the order of its source."""
    if name == "svhn":
        return [mat(*drawn(name, split)) for split in N]
    if name == "tiny_imagenet":
        return [zipped()]
    parts = [drawn(name, split) for split in N]
    return [idx(array) for pixels, labels in parts for array in (pixels[..., 0], labels)]


def by_hand(data_dir, name, contents=None):
    """Archives brought by hand, and the source that says what they have to be."""
    folder = data_dir / "downloads" / "manual" / name
    folder.mkdir(parents=True)
    entries = []
    for archive, content in zip(SOURCES[name].archives, contents or archives(name), strict=True):
        (folder / archive.url.rpartition("/")[2]).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        entries.append(archive._replace(size=len(content), sha256=digest))
    return SOURCES[name]._replace(archives=tuple(entries))


def load(name, split, data_dir, source):
    prepare = partial(builders.prepare, source=source)
    return stored.load_images(name, split, data_dir=data_dir, prepare=prepare)


@pytest.mark.parametrize("name", ["svhn", "mnist", "fashion_mnist", "tiny_imagenet"])
def test_from_the_archive_to_the_arrays(tmp_path, name):
    source = by_hand(tmp_path, name)
    for split in N:
        found, (pixels, labels) = load(name, split, tmp_path, source), drawn(name, split)
        np.testing.assert_array_equal(found.labels, labels)
        assert found.images.shape == pixels.shape and found.images.dtype == np.uint8
        if name != "tiny_imagenet":
            np.testing.assert_array_equal(found.images, pixels)
            continue
        off = np.abs(found.images.astype(int) - pixels).max((1, 2, 3))
        assert (np.delete(off, 1) <= 6).all()  # JPEG's rounding
        assert len(np.unique(found.images[1][0, 0])) == 1  # the grey one has equal channels
    assert not list(tmp_path.rglob("outside.JPEG"))


@pytest.mark.parametrize("name", ["svhn", "mnist", "tiny_imagenet"])
@pytest.mark.parametrize("part", [0, -1])
def test_an_archive_that_is_not_whole_leaves_nothing(tmp_path, name, part):
    contents = archives(name)
    contents[part] = contents[part][: len(contents[part]) // 2]
    source = by_hand(tmp_path, name, contents)
    with pytest.raises(ValueError, match=r"(no whole|not whole).*delete it and download"):
        load(name, "train", tmp_path, source)
    assert not (tmp_path / name).exists() and not list(tmp_path.glob("incomplete*"))


def test_images_and_labels_of_unequal_number_are_refused(tmp_path):
    contents = archives("mnist")
    contents[1] = idx(np.zeros(3))
    source = by_hand(tmp_path, "mnist", contents)
    with pytest.raises(ValueError, match=r"has 12 images but .* 3 labels"):
        load("mnist", "train", tmp_path, source)


def test_a_directory_that_tfds_prepared_under_its_own_name_is_read(tmp_path):
    source = by_hand(tmp_path, "svhn")
    load("svhn", "train", tmp_path, source)
    prepared = tmp_path / "svhn" / "3.1.0"
    info = prepared / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"name": "svhn_cropped"}))
    for path in prepared.iterdir():
        path.rename(path.with_name(path.name.replace("svhn-", "svhn_cropped-")))
    (tmp_path / "stock" / "svhn_cropped").mkdir(parents=True)
    prepared.rename(tmp_path / "stock" / "svhn_cropped" / "3.1.0")
    found = stored.load_images("svhn", "test", data_dir=tmp_path / "stock")
    np.testing.assert_array_equal(found.images, drawn("svhn", "test")[0])


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (root / "cifar10").mkdir()
    for split in N:
        pixels = rng.integers(0, 256, (50, 32, 32, 3), np.uint8)
        np.save(root / "cifar10" / f"{split}_images.npy", pixels)
        np.save(root / "cifar10" / f"{split}_labels.npy", (np.arange(50) % 10).astype(np.int32))
    return root


@pytest.mark.parametrize(
    ("name", "zero", "one"), [("cifar10_horse_car", 7, 1), ("cifar10_dog_cat", 5, 3)]
)
def test_two_classes_keep_their_images_and_order(cifar, name, zero, one):
    whole, pair = (data.load_images(each, "train", data_dir=cifar) for each in ("cifar10", name))
    kept = [i for i, label in enumerate(whole.labels) if label in (zero, one)]
    np.testing.assert_array_equal(pair.images, whole.images[kept])
    assert pair.labels.tolist() == [int(whole.labels[i] == one) for i in kept]
    assert pair.class_names == (whole.class_names[zero], whole.class_names[one])


@pytest.mark.parametrize("name", ["cifar10", "cifar10_dog_cat"])
def test_grey_is_the_mean_of_the_channels_rounded_down(cifar, name):
    colour, grey = (data.load_images(each, "test", data_dir=cifar) for each in (name, f"{name}_gs"))
    want = np.asarray(colour.images).mean(-1, keepdims=True).astype(np.uint8)
    np.testing.assert_array_equal(grey.images, want)
    np.testing.assert_array_equal(grey.labels, colour.labels)
    assert grey.images.max() > 200  # nothing has wrapped around


def test_gaussians_lie_at_plus_and_minus_a_unit_vector():
    train, test = (data.load_images("gaussians_binary", split) for split in N)
    means = []
    for part in (train, test):
        assert part.images.shape == (1000, 1, 100, 1) and part.images.dtype == np.float32
        x = part.images.reshape(1000, 100)
        centres = [x[part.labels == label].mean(0) for label in (0, 1)]
        np.testing.assert_allclose(np.linalg.norm(centres[0]), 1, atol=0.02)
        np.testing.assert_allclose(centres[0], -centres[1], atol=0.03)
        means.append(centres[0])
        assert np.bincount(part.labels).tolist() == [500, 500]
    np.testing.assert_allclose(*means, atol=0.03)  # one vector, other examples
    assert not np.isin(train.images[:, 0, 0, 0], test.images[:, 0, 0, 0]).any()


def test_the_class_of_noise_is_its_first_pixel():
    train, test = (data.load_images("uniform_noise", split) for split in N)
    for part in (train, test):
        assert ((part.images >= 0) & (part.images < 1)).all()
        first = part.images[:, 0, 0, 0]
        assert (part.labels <= 10 * first).all() and (10 * first < part.labels + 1).all()
        np.testing.assert_allclose(part.images.mean(), 0.5, atol=0.002)
    assert (train.images != test.images).any()


def test_every_name_says_the_shape_and_classes_that_loading_gives(cifar):
    for name, kind in data.IMAGE_SETS.items():
        if name.startswith(("cifar10_", "gauss", "uniform")):
            found = data.load_images(name, "train", data_dir=cifar)
            assert found.images.shape[1:] == kind.shape and found.class_names == kind.class_names
    assert data.IMAGE_SETS["tiny_imagenet_gs"].shape == (64, 64, 1)
    assert len(data.IMAGE_SETS["tiny_imagenet"].class_names) == 200
    assert set(variants.TWO_CLASSES) <= set(data.IMAGE_SETS)
    for name in ("cifar10_horse", "mnist_gs", "uniform_noise_gs"):
        with pytest.raises(ValueError, match=f"Unknown data set '{name}'; known are cifar10, "):
            data.load_images(name, "train", data_dir=cifar)
    with pytest.raises(ValueError, match="'val' of gaussians_binary; it has train and test"):
        data.load_images("gaussians_binary", "val")
