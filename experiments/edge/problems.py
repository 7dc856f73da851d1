"""Small problems that reach the edge of stability, as toy problems."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from experiments.toy.problems import Toy, diagonal
from sgd_sparse_jax import data, measure, models
from sgd_sparse_jax.train import half_squared
from sgd_sparse_jax.types import Batch, Network, Params

CLASSES, PER_CHANNEL = 4, ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def chebyshev() -> Toy:
    """T_6 at 20 points of [-1, 1], by a tanh network 1-30-20-1; float64."""
    x = np.linspace(-1, 1, 20)[:, None]
    test = np.linspace(-1, 1, 200)[:, None]
    target = lambda x: np.polynomial.chebyshev.Chebyshev.basis(6)(x[:, 0])
    fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    net = models.MLP(
        (30, 20), kernel_init=fan_in, bias_init=nn.initializers.zeros, activation=nn.tanh
    )
    return _toy(models.from_linen(net), (x, target(x)), (test, target(test)))


def cifar_mlp(data_dir: str) -> Toy:
    """1,000 images of CIFAR-10's classes 0-3, by a tanh network 3072-64-64-4; float32.

    Inputs are rotated into the 1,000 dimensions that they span, which leaves runs from Gaussian
    weights, their losses and all nonzero eigenvalues as they are, at a third of the operations.
    """
    (x, y), (x_test, y_test) = (_images(data_dir, split) for split in ("train", "test"))
    basis, _ = np.linalg.qr(x.reshape(len(x), -1).T.astype(np.float64))  # [3072, 1000]
    project = lambda x: (x.reshape(len(x), -1) @ basis).astype(np.float32)
    he = lambda fan_in: models.gaussian((2 / fan_in) ** 0.5)
    net = models.MLP(
        (64, 64),
        outputs=CLASSES,
        kernel_init=(he(len(basis)), he(64), he(64)),
        bias_init=nn.initializers.zeros,
        activation=nn.tanh,
    )
    return _toy(models.from_linen(net), (project(x), y), (project(x_test), y_test))


def cifar_net(data_dir: str, model: str, width: int) -> Toy:
    """The same images, by a convolutional network of `models.build`; for accelerators."""
    net = models.build(model, classes=CLASSES, width=width)
    return _toy(models.from_linen(net), _images(data_dir, "train"), _images(data_dir, "test"))


def _images(data_dir: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The first 1,000 images of classes 0-3 of a split, normalized, and one-hot targets."""
    images = data.load_images("cifar10", split, data_dir=data_dir or None)
    labels = np.asarray(images.labels)
    first = np.flatnonzero(labels < CLASSES)[:1000]
    mean, std = np.array(PER_CHANNEL, np.float32)
    pixels = (np.asarray(images.images[first], np.float32) / 255 - mean) / std
    return pixels, np.eye(CLASSES, dtype=np.float32)[labels[first]]


def _toy(network: Network, train: tuple, test: tuple) -> Toy:
    batch, held_out = (Batch(jnp.asarray(x), jnp.asarray(y)) for x, y in (train, test))
    last = lambda params: list(network.apply(params, {}, batch.x).features.values())[-1]

    def spectra(params: Params) -> dict:
        features = measure.unit_rows(last(params)).T
        return {"effective_rank": measure.effective_rank(measure.singular_values(features))}

    watch = lambda initial, params: {}
    return Toy(batch, held_out, lambda scale: network, half_squared, watch, spectra, False)


PROBLEMS: dict[str, Callable[[str], Toy]] = {
    "chebyshev": lambda data_dir: chebyshev(),
    "diagonal": lambda data_dir: diagonal(n=80, d=200, support=20),
    "cifar-mlp": cifar_mlp,
    "cifar-cnn": lambda data_dir: cifar_net(data_dir, "resnet_tiny_gn", 16),
    "resnet": lambda data_dir: cifar_net(data_dir, "resnet18_gn", 64),
}
