"""Measured peak rates of a device, and the number of operations of a training step."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import DTypeLike

IN_FLIGHT, ROUNDS = 10, 5


def median_seconds(one: Callable[[Any], Any], start: Any, wait: Callable[[Any], object]) -> float:
    """Median seconds of x -> one(x), with several calls in flight; a first round compiles."""
    seconds, x = [], start
    for _ in range(ROUNDS + 1):
        wait(x)
        begin = time.perf_counter()
        for _ in range(IN_FLIGHT):
            x = one(x)
        wait(x)
        seconds.append((time.perf_counter() - begin) / IN_FLIGHT)
    return statistics.median(seconds[1:])


def sizes() -> tuple[int, int]:
    """Rows of the matrices, and bytes of the array: several times the size of a cache."""
    return (1024, 2**27) if jax.default_backend() == "cpu" else (8192, 2**29)


def matmul_rate(dtype: DTypeLike) -> float:
    """FLOP/s of square matrix products in JAX at its default precision, on one device."""
    n = sizes()[0]
    # Random entries, because zeros are multiplied faster; scaled so that products stay of order 1.
    a, b = (jr.normal(key, (n, n)) for key in jr.split(jr.key(0)))
    a, b = a.astype(dtype), (b / n**0.5).astype(dtype)
    product = jax.jit(lambda x: x @ b)
    return 2 * n**3 / median_seconds(product, a, jax.block_until_ready)


def torch_matmul_rate(bf16: bool, device: str) -> float:
    """FLOP/s of square matrix products in PyTorch."""
    import torch

    n, dtype = sizes()[0], torch.bfloat16 if bf16 else torch.float32
    a, b = torch.randn(2, n, n, device=device).unbind()
    a, b = a.to(dtype), (b / n**0.5).to(dtype)
    wait = lambda x: torch.cuda.synchronize() if device == "cuda" else None
    return 2 * n**3 / median_seconds(lambda x: x @ b, a, wait)


def memory_rate() -> float:
    """Bytes read plus bytes written per second, by x -> -x in place, on one device."""
    size = sizes()[1]
    x = jr.uniform(jr.key(0), (size // 4,), jnp.float32)
    negated = jax.jit(jnp.negative, donate_argnums=0)
    return 2 * size / median_seconds(negated, x, jax.block_until_ready)


def step_flop(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Operations of a step's convolutions and dense layers on inputs of `shape`, batch first.

    2 per multiplication, including those with padding. The backward pass has twice as many as the
    forward pass; for the first layer, whose input needs no gradient, as many.
    """
    forward: list[int] = []

    def count(layer: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        out = layer(*args, **kwargs)
        if isinstance(context.module, nn.Conv | nn.Dense):
            kernel = context.module.variables["params"]["kernel"]
            forward.append(2 * out.size * math.prod(kernel.shape[:-1]))
        return out

    with nn.intercept_methods(count):
        jax.eval_shape(model.init, jr.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    return 3 * sum(forward) - forward[0]
