"""PyTorch side of `benchmarks.curvature`: double-backward products, and curvlinops as an oracle.

Networks have the weights of those of this library; vectors are lists of tensors in the order of
`net.parameters()`.
"""

import itertools
from collections.abc import Iterator, Mapping
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


def oracle(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[str, Found]:
    """The largest eigenvalue by SciPy's eigsh, over curvlinops' Hessian if it has one."""
    from scipy.sparse import linalg

    params, counted = list(net.parameters()), []
    like = torch.cat([p.detach().flatten() for p in params])

    def double_backward(v: np.ndarray) -> np.ndarray:
        parts = torch.tensor(v, dtype=like.dtype).flatten().split([p.numel() for p in params])
        grads = hessian([part.view_as(p) for part, p in zip(parts, params, strict=True)])
        return torch.cat([grad.flatten() for grad in grads]).numpy()

    try:  # it has no rule for some layers, such as BatchNorm that updates running moments
        from curvlinops import HessianLinearOperator

        # Of its losses the mean over examples and outputs is closest: outputs / 2 times smaller.
        data = [(x, y)]
        matrix = HessianLinearOperator(net, nn.MSELoss(), params, data, check_deterministic=False)
        product, scale, name = matrix.to_scipy().__matmul__, y.shape[1] / 2, "curvlinops and eigsh"
        product(like.numpy())
    except Exception:
        hessian = Hessian(net, x, y)
        product, scale, name = double_backward, 1.0, "double backward and eigsh"
    scipy: Any = linalg
    matvec = lambda v: counted.append(1) or product(v)
    operator = scipy.LinearOperator(2 * like.shape, matvec, dtype=like.numpy().dtype)
    values, vectors = scipy.eigsh(operator, k=1, which="LA", tol=1e-5)
    rest = np.linalg.norm(product(vectors[:, 0]) - values[0] * vectors[:, 0])
    return name, Found(float(values[0]) * scale, float(rest / values[0]), len(counted))
