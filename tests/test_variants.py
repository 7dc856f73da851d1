"""Derived and random image sets."""

import numpy as np
import pytest

from sgd_sparse_jax import data


@pytest.mark.parametrize(
    ("name", "zero", "one"), [("cifar10_horse_car", 7, 1), ("cifar10_dog_cat", 5, 3)]
)
def test_two_classes_keep_their_images_and_order_and_grey_is_the_mean(small_cifar, name, zero, one):
    whole, pair, grey = (
        data.load_images(each, "train", data_dir=small_cifar)
        for each in ("cifar10", name, f"{name}_gs")
    )
    chosen = [i for i, label in enumerate(whole.labels) if label in (zero, one)]
    np.testing.assert_array_equal(pair.images, whole.images[chosen])
    assert pair.labels.tolist() == [int(whole.labels[i] == one) for i in chosen]
    assert pair.class_names == (whole.class_names[zero], whole.class_names[one])
    rounded_down = np.asarray(pair.images).mean(-1, keepdims=True).astype(np.uint8)
    np.testing.assert_array_equal(grey.images, rounded_down)
    np.testing.assert_array_equal(grey.labels, pair.labels)


def test_gaussians_are_images_of_one_row():
    problem = data.binary_gaussians(0, n=1000, d=100)
    for split, (x, y) in (("train", problem.train), ("test", problem.test)):
        found = data.load_images("gaussians_binary", split)
        np.testing.assert_array_equal(found.images, x.astype(np.float32)[:, None, :, None])
        np.testing.assert_array_equal(found.labels, y < 0)


def test_the_class_of_noise_is_its_first_pixel():
    train, test = (data.load_images("uniform_noise", split) for split in ("train", "test"))
    for part in (train, test):
        assert ((part.images >= 0) & (part.images < 1)).all()
        np.testing.assert_array_equal(part.labels, np.floor(10 * part.images[:, 0, 0, 0]))
        np.testing.assert_allclose(part.images.mean(), 0.5, atol=0.002)
    assert (train.images != test.images).any()


def test_image_sets_give_the_shape_and_classes_of_what_is_loaded(small_cifar):
    for name, kind in data.IMAGE_SETS.items():
        if name.startswith(("cifar10_", "gauss", "uniform")):
            found = data.load_images(name, "train", data_dir=small_cifar)
            assert found.images.shape[1:] == kind.shape and found.class_names == kind.class_names
    assert data.IMAGE_SETS["tiny_imagenet_gs"].shape == (64, 64, 1)
    assert len(set(data.IMAGE_SETS["tiny_imagenet"].class_names)) == 200
