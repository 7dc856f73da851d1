"""Toy problems, drawn from NumPy's legacy generator so that they equal the paper's to the bit."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Examples(NamedTuple):
    """Inputs and targets, in float64."""

    x: Float[np.ndarray, "n d"]
    y: Float[np.ndarray, " n"]


class Problem(NamedTuple):
    """Train and test examples of a regression problem, and what generated their targets."""

    train: Examples
    test: Examples
    target: Float[np.ndarray, " d"]


def sparse_regression(
    seed: int = 0, *, n: int = 80, d: int = 200, support: int = 20, n_test: int = 1000
) -> Problem:
    """y = <theta*, x>, no noise, x ~ N(0, I); theta* = |N(0, 1)| on its first `support` entries.

    theta* has unit norm. Float64 NumPy arrays; source: D1-D3 of the paper's diagonal nets.
    """
    if not 1 <= support <= d:
        raise ValueError(f"The support is {support}; choose one between 1 and d = {d}.")
    if n < 1 or n_test < 1:
        raise ValueError(f"There are {n} train and {n_test} test examples; ask for 1 or more.")
    rng = np.random.RandomState(seed)
    x, x_test, target = rng.randn(n, d), rng.randn(n_test, d), np.abs(rng.randn(d))
    target[support:] = 0.0
    target /= np.linalg.norm(target)
    return Problem(Examples(x, x @ target), Examples(x_test, x_test @ target), target)
