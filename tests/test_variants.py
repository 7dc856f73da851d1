"""Image sets that are made of others, and those that are drawn."""

import numpy as np
import pytest

from sgd_sparse_jax import data


@pytest.mark.parametrize(
    ("name", "zero", "one"), [("cifar10_horse_car", 7, 1), ("cifar10_dog_cat", 5, 3)]
)
def test_two_classes_keep_their_images_and_order(small_cifar, name, zero, one):
    load = lambda which: data.load_images(which, "train", data_dir=small_cifar)
    whole, pair = load("cifar10"), load(name)
    chosen = [i for i, label in enumerate(whole.labels) if label in (zero, one)]
    np.testing.assert_array_equal(pair.images, whole.images[chosen])
    assert pair.labels.tolist() == [int(whole.labels[i] == one) for i in chosen]
    assert pair.class_names == (whole.class_names[zero], whole.class_names[one])


@pytest.mark.parametrize("name", ["cifar10", "cifar10_dog_cat"])
def test_grey_is_the_mean_of_the_channels_rounded_down(small_cifar, name):
    load = lambda which: data.load_images(which, "test", data_dir=small_cifar)
    colour, grey = load(name), load(f"{name}_gs")
    want = np.asarray(colour.images).mean(-1, keepdims=True).astype(np.uint8)
    np.testing.assert_array_equal(grey.images, want)
    np.testing.assert_array_equal(grey.labels, colour.labels)
    assert grey.images.max() > 200  # nothing has wrapped around


def test_gaussians_lie_at_plus_and_minus_a_unit_vector():
    train, test = (data.load_images("gaussians_binary", split) for split in ("train", "test"))
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
    train, test = (data.load_images("uniform_noise", split) for split in ("train", "test"))
    for part in (train, test):
        assert ((part.images >= 0) & (part.images < 1)).all()
        first = part.images[:, 0, 0, 0]
        assert (part.labels <= 10 * first).all() and (10 * first < part.labels + 1).all()
        np.testing.assert_allclose(part.images.mean(), 0.5, atol=0.002)
    assert (train.images != test.images).any()


def test_image_sets_give_the_shape_and_classes_of_what_is_loaded(small_cifar):
    for name, kind in data.IMAGE_SETS.items():
        if name.startswith(("cifar10_", "gauss", "uniform")):
            found = data.load_images(name, "train", data_dir=small_cifar)
            assert found.images.shape[1:] == kind.shape and found.class_names == kind.class_names
    assert data.IMAGE_SETS["tiny_imagenet_gs"].shape == (64, 64, 1)
    assert len(set(data.IMAGE_SETS["tiny_imagenet"].class_names)) == 200
    assert len(set(data.IMAGE_SETS["cifar100"].class_names)) == 100
