"""PyTorch side of `benchmarks.curvature`: double-backward products, and curvlinops as an oracle.

Networks have the weights of those of this library; vectors are lists of tensors in the order of
`net.parameters()`.
"""

import itertools
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

Vector = list[torch.Tensor]
# Flax sorts by name; PyTorch's modules are in the order of use, each with its bias last.
LATER = {"BasicBlock": 1, "Dense": 2, "bias": 1}


class Found(NamedTuple):
    """An eigenvalue, |H v - lambda v| / |lambda|, and the products it took."""

    value: float
    residual: float
    products: int


def mlp(*widths: int, dtype: torch.dtype) -> nn.Module:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def vector(tree: Mapping[str, Any]) -> Vector:
    """Parameters of a network, or a vector like them, in PyTorch's order and layout."""
    return [torch.tensor(leaf.copy()) for leaf in _ordered(tree)]


def _ordered(tree: Mapping[str, Any]) -> Iterator[np.ndarray]:
    def place(name: str) -> tuple:
        kind, _, number = name.partition("_")
        return LATER.get(kind, 0), int(number or 0), kind == "BatchNorm", name

    axes = {4: (3, 2, 0, 1), 2: (1, 0)}  # of Flax's kernels; PyTorch has the outputs first
    for name in sorted(tree, key=place):
        if isinstance(tree[name], Mapping):
            yield from _ordered(tree[name])
        else:
            leaf = np.asarray(tree[name])
            yield leaf.transpose(axes[leaf.ndim]) if name == "kernel" else leaf


def load(net: nn.Module, params: Mapping[str, Any]) -> nn.Module:
    """`net`, in training mode, with the parameters of a network of this library."""
    with torch.no_grad():
        for mine, given in zip(net.parameters(), vector(params), strict=True):
            mine.copy_(given)
    return net.train()


def half_squared(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1/2 squared error, summed over outputs, averaged over examples."""
    return 0.5 * ((out - y) ** 2).sum() / len(y)


class Hessian:
    """Products H v by differentiating (gradient, v), whose graph is built once."""

    def __init__(self, net: nn.Module, x: torch.Tensor, y: torch.Tensor):
        self.params = list(net.parameters())
        loss = half_squared(net(x), y)
        self.gradient = torch.autograd.grad(loss, self.params, create_graph=True)

    def __call__(self, v: Vector) -> Vector:
        grads = torch.autograd.grad(self.gradient, self.params, v, retain_graph=True)
        return list(grads)


def dot(v: Vector, w: Vector) -> float:
    """(v, w)."""
    return float(sum((a * b).sum() for a, b in zip(v, w, strict=True)))


def power_iteration(hessian: Hessian, start: Vector, *, tol: float, most: int) -> Found:
    """The eigenvalue of largest magnitude, to a relative residual of `tol` or `most` products."""
    length = dot(start, start) ** 0.5
    v = [each / length for each in start]
    products = 0
    while True:
        w = hessian(v)
        products += 1
        value = dot(v, w)
        rest = [b - value * a for a, b in zip(v, w, strict=True)]
        residual = dot(rest, rest) ** 0.5 / abs(value)
        if residual <= tol or products == most:
            return Found(value, residual, products)
        length = dot(w, w) ** 0.5
        v = [each / length for each in w]


def step_sharpness(net: nn.Module, xs: torch.Tensor, ys: torch.Tensor) -> list[float]:
    """g^T H g / |g|^2 of every batch, one after the other."""
    found = []
    for x, y in zip(xs, ys, strict=True):
        hessian = Hessian(net, x, y)
        g = [each.detach() for each in hessian.gradient]
        found.append(dot(g, hessian(g)) / dot(g, g))
    return found


def oracle(net: nn.Module, x: torch.Tensor, y: torch.Tensor, tol: float = 1e-5) -> Found | str:
    """The largest eigenvalue by curvlinops and SciPy, or the reason why there is none."""
    if find_spec("curvlinops") is None:
        return "curvlinops is not installed (pip install -e .[bench])"
    counted, settings = [], {"k": 1, "which": "LA", "tol": tol}
    try:  # it has no rule for some layers, such as BatchNorm that updates running moments
        from curvlinops import HessianLinearOperator
        from scipy.sparse.linalg import LinearOperator, eigsh

        # Of its losses the mean over examples and outputs is closest: outputs / 2 times smaller.
        parts = (net, nn.MSELoss(), list(net.parameters()), [(x, y)])
        matrix = HessianLinearOperator(*parts, check_deterministic=False).to_scipy()

        def product(v: np.ndarray) -> np.ndarray:
            counted.append(1)
            return matrix @ v

        operator: Any = LinearOperator(matrix.shape, product)
        operator.dtype = matrix.dtype
        values, vectors = eigsh(operator, **settings)
        rest = np.linalg.norm(matrix @ vectors[:, 0] - values[0] * vectors[:, 0])
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return Found(float(values[0]) * y.shape[1] / 2, float(rest / values[0]), len(counted))
