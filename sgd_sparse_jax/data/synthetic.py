"""The paper's toy problems, drawn with NumPy's legacy generator to reproduce its data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Examples(NamedTuple):
    """Inputs `x` and targets `y`, in float64.

    >>> regression_1d().train.y.shape
    (12,)
    """

    x: Float[np.ndarray, "n d"]  #: inputs
    y: Float[np.ndarray, " n"]  #: targets


class Problem(NamedTuple):
    """Train and test `Examples`, and the generator of their targets: a vector, layers, or None.

    >>> sparse_regression(d=10, support=2).target.shape
    (10,)
    """

    train: Examples  #: for training
    test: Examples  #: for the test loss
    target: Any  #: a vector, layers, or None


class Layer(NamedTuple):
    """x -> x @ kernel + bias, a layer of a teacher network.

    Example:
        >>> DEEP_TEACHER[0].kernel.shape, DEEP_TEACHER[0].bias.shape
        ((5, 2), (2,))
    """

    kernel: Float[np.ndarray, "i o"]  #: weights
    bias: Float[np.ndarray, " o"]  #: of the outputs


def sparse_regression(
    seed: int = 0, *, n: int = 80, d: int = 200, support: int = 20, n_test: int = 1000
) -> Problem:
    """y = <theta*, x>, x ~ N(0, I); theta* = |N(0, 1)| on its first `support` entries, else 0.

    theta* is the `target` and has unit norm. Source: D1-D3 of the paper's diagonal nets, seed 0.

    Args:
        seed: Of the inputs and theta*.
        n: Number of training examples.
        d: Dimension of the inputs.
        support: Number of entries of theta* that aren't 0.
        n_test: Number of test examples.

    Example:
        >>> problem = sparse_regression(n=10, d=30, support=3)
        >>> problem.train.x.shape, (problem.target != 0).sum().item()
        ((10, 30), 3)
    """
    rng = np.random.RandomState(seed)  # drawn in the original's order
    x, x_test, target = rng.randn(n, d), rng.randn(n_test, d), np.abs(rng.randn(d))
    target[support:] = 0.0
    target /= np.linalg.norm(target)
    return Problem(Examples(x, x @ target), Examples(x_test, x_test @ target), target)


def regression_1d() -> Problem:
    """Twelve points (x, y) for both training and test: F1 and F2 of the paper's toys.

    Example:
        >>> regression_1d().train.x[:3, 0].round(3).tolist()
        [-1.305, -1.055, -0.805]
    """
    x = (np.arange(12) - 5.5) / 4 + 0.07
    y = 0.345 + np.array([-2, 1.5, 0, 0, 2, 1, 0, -1, 0, 1, 2, -1])
    points = Examples(x[:, None], y)
    return Problem(points, points, None)


def _teacher(name: str) -> tuple[Layer, ...]:
    layers = json.loads(Path(__file__).with_name("teachers.json").read_text("utf-8"))[name]
    # Drawn by torch in float32, exact in float64; torch stores weights as [out, in].
    exact = lambda values: np.asarray(values, np.float32).astype(np.float64)
    return tuple(Layer(exact(each["weights"]).T.copy(), exact(each["bias"])) for each in layers)


CIRCLE_TEACHER, DEEP_TEACHER = _teacher("circle"), _teacher("deep")  # of the paper's T1 and T3


def teacher_student(
    seed: int = 1, *, n: int = 15, teacher: Sequence[Layer] = CIRCLE_TEACHER, n_test: int = 1000
) -> Problem:
    """y = teacher(x) for a ReLU network, x uniform on the unit sphere (normalized N(0, I)).

    Defaults are T1 of the paper's toys; T3 is `teacher_student(6, n=50, teacher=DEEP_TEACHER)`.
    The `target` is the teacher.

    Args:
        seed: Of the inputs.
        n: Number of training examples.
        teacher: Layers of the network; the first kernel determines the dimension of the inputs.
        n_test: Number of test examples.

    Example:
        >>> teacher_student().train.x.shape
        (15, 2)
    """
    rng, d = np.random.RandomState(seed), len(teacher[0].kernel)

    def draw(count: int) -> Examples:
        x = rng.randn(count, d)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return Examples(x, relu_network(x, teacher))

    return Problem(draw(n), draw(n_test), tuple(teacher))


def relu_network(x: Float[np.ndarray, "n d"], layers: Sequence[Layer]) -> Float[np.ndarray, " n"]:
    """The scalar output of a ReLU network whose last layer is linear.

    Args:
        x: Inputs, [n, d].
        layers: Of the network; the last has one output.

    Example:
        >>> relu_network(np.eye(2), CIRCLE_TEACHER).round(3).tolist()
        [0.995, -0.361]
    """
    *hidden, last = layers
    for kernel, bias in hidden:
        x = np.maximum(x @ kernel + bias[None], 0.0)
    return (x @ last.kernel + last.bias[None])[:, 0]


def binary_gaussians(
    seed: int = 0, *, n: int = 100, d: int = 10, std: float = 0.1, n_test: int = 1000
) -> Problem:
    """x = y v + std N(0, I) with y = +-1 in equal numbers, shuffled, and v a random unit vector.

    The `target` is v.

    Args:
        seed: Of the inputs, their order and v.
        n: Number of training examples.
        d: Dimension of the inputs.
        std: Standard deviation within a class, along each axis.
        n_test: Number of test examples.

    Example:
        >>> binary_gaussians(n=4).train.y.tolist()
        [1.0, -1.0, 1.0, -1.0]
    """
    rng = np.random.RandomState(seed)
    v = rng.randn(d)
    v /= np.linalg.norm(v)

    def draw(count: int) -> Examples:
        y = np.where(np.arange(count) < count // 2, 1.0, -1.0)
        x = y[:, None] * v[None] + std * rng.randn(count, d)
        order = rng.permutation(count)
        return Examples(x[order], y[order])

    return Problem(draw(n), draw(n_test), v)
