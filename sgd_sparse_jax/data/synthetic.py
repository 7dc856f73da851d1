"""Toy problems, drawn from NumPy's legacy generator so that they equal the paper's."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Examples(NamedTuple):
    """Inputs and targets, in float64."""

    x: Float[np.ndarray, "n d"]
    y: Float[np.ndarray, " n"]


class Problem(NamedTuple):
    """Train and test examples, and what generated their targets (a vector, a teacher's layers)."""

    train: Examples
    test: Examples
    target: Any


class Layer(NamedTuple):
    """x -> x @ kernel + bias, of a teacher."""

    kernel: Float[np.ndarray, "i o"]
    bias: Float[np.ndarray, " o"]


def examples(x: Any, y: Any) -> Examples:
    """Your own data as float64 `Examples`; ValueError where they aren't finite or don't fit."""
    x, y = _finite("x", x), _finite("y", y)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(
            f"x has shape {x.shape} and y {y.shape}; give inputs [n, d] and one target each, [n]."
        )
    return Examples(x, y)


def sparse_regression(
    seed: int = 0, *, n: int = 80, d: int = 200, support: int = 20, n_test: int = 1000
) -> Problem:
    """y = <theta*, x>, no noise, x ~ N(0, I); theta* = |N(0, 1)| on its first `support` entries.

    theta* has unit norm. Source: D1-D3 of the paper's diagonal nets, whose data seed is 0.
    """
    if not 1 <= support <= d:
        raise ValueError(f"The support is {support}; choose one between 1 and d = {d}.")
    _at_least_one(n=n, n_test=n_test)
    rng = np.random.RandomState(seed)
    x, x_test, target = rng.randn(n, d), rng.randn(n_test, d), np.abs(rng.randn(d))
    target[support:] = 0.0
    target /= np.linalg.norm(target)
    return Problem(Examples(x, x @ target), Examples(x_test, x_test @ target), target)


def regression_1d() -> Problem:
    """Twelve points on a line, with no test set of their own: F1 and F2 of the paper's toys."""
    x = (np.arange(12) - 5.5) / 4 + 0.07
    y = 0.345 + np.array([-2, 1.5, 0, 0, 2, 1, 0, -1, 0, 1, 2, -1])
    points = Examples(x[:, None], y)
    return Problem(points, points, None)


# The paper's teachers, which torch's generator drew.
CIRCLE_TEACHER = (
    Layer(
        np.array(
            [
                [-0.9979376196861267, -0.932516872882843, 0.9949642419815063],
                [-0.0641915574669838, 0.36112648248672485, -0.1002306416630745],
            ]
        ),
        np.zeros(3),
    ),
    Layer(np.array([[-1.0], [-1.0], [1.0]]), np.zeros(1)),
)
DEEP_TEACHER = (
    Layer(
        np.array(
            [
                [-0.1546226292848587, 0.36082857847213745],
                [1.480986475944519, 0.062117695808410645],
                [0.9988394379615784, -1.3084733486175537],
                [1.1867660284042358, 0.8431695699691772],
                [-0.7107561230659485, -0.43355607986450195],
            ]
        ),
        np.array([-0.14907442033290863, -0.03152653947472572]),
    ),
    Layer(
        np.array(
            [
                [1.7495790719985962, -0.6115028858184814],
                [0.14782261848449707, 1.0940831899642944],
            ]
        ),
        np.array([0.5153526663780212, 0.1487373262643814]),
    ),
    Layer(
        np.array([[-0.09140991419553757], [1.2611759901046753]]), np.array([-0.4748874306678772])
    ),
)


def teacher_student(
    seed: int = 1,
    *,
    n: int = 15,
    teacher: Sequence[Layer] = CIRCLE_TEACHER,
    n_test: int = 1000,
) -> Problem:
    """y = teacher(x) for a ReLU network, x uniform on the unit sphere (N(0, I) over its norm).

    Defaults are T1 of the paper's toys; T3 is `teacher_student(6, n=50, teacher=DEEP_TEACHER)`.
    """
    _at_least_one(n=n, n_test=n_test)
    rng, d = np.random.RandomState(seed), len(teacher[0].kernel)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    x, x_test = unit(rng.randn(n, d)), unit(rng.randn(n_test, d))
    label = lambda x: relu_network(x, teacher)
    return Problem(Examples(x, label(x)), Examples(x_test, label(x_test)), tuple(teacher))


def random_teacher(
    seed: int, widths: Sequence[int], *, normalized: bool = False, biases: bool = False
) -> tuple[Layer, ...]:
    """Layers of N(0, 1) weights and biases, from `widths` = inputs, hidden layers, 1 output.

    `normalized` makes incoming weights of hidden units unit vectors and outgoing ones their signs.
    """
    if len(widths) < 2 or min(widths) < 1 or widths[-1] != 1:
        raise ValueError(f"widths are {tuple(widths)}; give inputs, hidden layers and 1 output.")
    rng, layers = np.random.RandomState(seed), []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        kernel = rng.randn(inputs, outputs)
        if normalized:
            last = i == len(widths) - 2
            kernel = np.sign(kernel) if last else kernel / np.linalg.norm(kernel, axis=0)
        layers.append(Layer(kernel, rng.randn(outputs) if biases else np.zeros(outputs)))
    return tuple(layers)


def relu_network(x: Float[np.ndarray, "n d"], layers: Sequence[Layer]) -> Float[np.ndarray, " n"]:
    """The scalar output of ReLU layers, the last of them linear."""
    *hidden, last = layers
    for kernel, bias in hidden:
        x = np.maximum(x @ kernel + bias[None], 0.0)
    return (x @ last.kernel + last.bias[None])[:, 0]


def binary_gaussians(
    seed: int = 0, *, n: int = 100, d: int = 10, std: float = 0.1, n_test: int = 1000
) -> Problem:
    """x = y v + std N(0, I) with y = +-1 in equal numbers, shuffled, and v a random unit vector."""
    _at_least_one(n=n, d=d, n_test=n_test)
    rng = np.random.RandomState(seed)
    v = rng.randn(d)
    v /= np.linalg.norm(v)

    def draw(count: int) -> Examples:
        y = np.where(np.arange(count) < count // 2, 1.0, -1.0)
        x = y[:, None] * v[None] + std * rng.randn(count, d)
        order = rng.permutation(count)
        return Examples(x[order], y[order])

    return Problem(draw(n), draw(n_test), v)


def _finite(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is no array ({error}); give rows of equal length.") from error
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} of shape {array.shape} holds {array.dtype}; give real numbers.")
    array = array.astype(np.float64)
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; give one row per example.")
    bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))
    if bad.size:
        raise ValueError(
            f"{name} of shape {array.shape} holds NaN or infinity in {bad.size} rows, the first "
            f"of them row {bad[0]}; leave those examples out."
        )
    return array


def _at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; ask for 1 or more.")
