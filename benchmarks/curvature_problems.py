"""The trained networks of `benchmarks.curvature`, in this library and in PyTorch."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import torch

from benchmarks import curvature_torch as peer, torch_nets
from sgd_sparse_jax import data, measure, models, train
from sgd_sparse_jax.types import Batch, Network, Objective, Outputs, Params, PRNGKey, Stats

EARLIER = 20  # steps between the eigenvector of a warm start and the checkpoint
# Of CIFAR-10's channels, as in arXiv 2412.20553.
MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
STD = np.array([0.2023, 0.1994, 0.2010], np.float32)


class Problem(NamedTuple):
    """A network at a checkpoint, on both sides, and its data."""

    checkpoint: str
    objective: Objective
    params: Params
    earlier: Params  # `EARLIER` steps before
    stats: Stats
    batch: Batch
    net: torch.nn.Module

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs, channels first, and targets."""
        x, y = np.array(self.batch.x), np.array(self.batch.y)
        # A copy in this order: PyTorch 2.13 crashes on narrow networks in order [n, h, w, c].
        x = np.moveaxis(x, -1, 1).copy() if x.ndim == 4 else x
        return torch.tensor(x), torch.tensor(y)


def chebyshev(steps: int = 2000) -> Problem:
    """MLP 1-30-20-1 on 20 points of the sixth Chebyshev polynomial, float64."""
    x = jnp.linspace(-1, 1, 20, dtype=jnp.float64)[:, None]
    batch = Batch(x, jnp.cos(6 * jnp.arccos(x)))
    net = peer.mlp(1, 30, 20, 1, dtype=torch.float64)
    return _trained("MLP 1-30-20-1", tanh_mlp((1, 30, 20, 1), 1.0), batch, net, 0.2, steps)


def cifar_mlp(images: data.Images, count: int, steps: int) -> Problem:
    """MLP 3072-64-64-4 on the first `count` images of classes 0 to 3."""
    rows = np.flatnonzero(images.labels < 4)[:count]
    pixels = (images.images[rows] / np.float32(255) - MEAN) / STD
    batch = Batch(jnp.asarray(pixels.reshape(len(rows), -1)), jnp.eye(4)[images.labels[rows]])
    batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), batch)
    net = peer.mlp(3072, 64, 64, 4, dtype=torch.float32)
    return _trained("MLP 3072-64-64-4", tanh_mlp((3072, 64, 64, 4), 2.0), batch, net, 0.05, steps)


def cifar_resnet(images: data.Images, count: int, width: int, steps: int) -> Problem:
    """ResNet-18 on the first `count` images, BatchNorm in training mode."""
    pixels = images.images[:count] / np.float32(255)
    batch = Batch(jnp.asarray(pixels), jnp.eye(10, dtype=jnp.float32)[images.labels[:count]])
    network = models.from_linen(models.build("resnet18_plain", classes=10, width=width))
    net = torch_nets.resnet18_plain(10, width)
    return _trained(f"ResNet-18, width {width}", network, batch, net, 0.05, steps, size=128)


def tanh_mlp(widths: tuple[int, ...], gain: float) -> Network:
    """tanh network, weights N(0, gain / fan-in), biases 0.

    Weights are [outputs, inputs], as PyTorch's and Equinox's: on CPUs a Hessian-vector product
    takes three quarters of the time that it takes with Flax's [inputs, outputs], because XLA
    multiplies d^T x, [outputs, inputs], in half the time of x^T d.
    """
    shapes = {f"layer{i}": pair for i, pair in enumerate(itertools.pairwise(widths), 1)}

    def init(key: PRNGKey, x: jax.Array) -> tuple[Params, Stats]:
        params = {}
        for name, (inputs, outputs) in shapes.items():
            key, this = jr.split(key)
            weight = (gain / inputs) ** 0.5 * jr.normal(this, (outputs, inputs), x.dtype)
            params[name] = {"weight": weight, "bias": jnp.zeros(outputs, x.dtype)}
        return params, {}

    def apply(params: Params, stats: Stats, x: jax.Array, *, train: bool = False) -> Outputs:
        for name, layer in sorted(params.items()):
            x = (x if name == "layer1" else jnp.tanh(x)) @ layer["weight"].T + layer["bias"][None]
        return Outputs(x, {}, stats)

    return Network(init, apply)


def _trained(
    name: str,
    network: Network,
    batch: Batch,
    net: torch.nn.Module,
    step_size: float,
    steps: int,
    size: int | None = None,
) -> Problem:
    """After steps of gradient descent, or of SGD over consecutive batches of `size`."""
    objective = train.make_objective(measure.in_mode(network, "train"), train.half_squared)
    params, stats = network.init(jr.key(0), batch.x[:1])
    size = min(size or len(batch.x), len(batch.x))

    @jax.jit
    def step(params: Params, stats: Stats, batch: Batch) -> tuple[Params, Stats]:
        grads, stats = jax.grad(objective, has_aux=True)(params, stats, batch)
        down = lambda p, g: p - jnp.asarray(step_size, p.dtype) * g
        return jax.tree.map(down, params, grads), stats

    earlier = params
    for i in range(steps):
        earlier = params if i == steps - EARLIER else earlier
        rows = np.arange(i * size, (i + 1) * size) % len(batch.x)
        params, stats = step(params, stats, Batch(batch.x[rows], batch.y[rows]))
    checkpoint = f"{name}, key 0, {steps} steps of {step_size} on batches of {size}"
    return Problem(checkpoint, objective, params, earlier, stats, batch, peer.load(net, params))
