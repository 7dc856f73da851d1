"""Residual image classifiers. Each returns (logits [b, c], features by block, in depth order)."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Torch's default for a linear layer: uniform on +-1 / sqrt(fan_in).
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def stored_dtype(dtype: DTypeLike) -> DTypeLike:
    """Parameters are stored in float32 or, for float64 networks, in float64."""
    return jnp.promote_types(dtype, jnp.float32)


def conv(width: int, kernel: int, stride: int, dtype: DTypeLike) -> nn.Conv:
    """Convolution without bias, zero-padded alike on both sides ("SAME" isn't, at stride 2)."""
    return nn.Conv(
        width,
        (kernel, kernel),
        stride,
        padding=kernel // 2,
        use_bias=False,
        kernel_init=he_normal,
        dtype=dtype,
        param_dtype=stored_dtype(dtype),
    )


def batch_norm(train: bool, dtype: DTypeLike, momentum: float) -> nn.BatchNorm:
    """Batch statistics in training, else running moments, which keep `momentum` of their past."""
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=momentum,
        epsilon=1e-5,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=stored_dtype(dtype),
        # Else flax keeps the running moments of float64 networks in float32.
        force_float32_reductions=stored_dtype(dtype) == jnp.float32,
    )


class BasicBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), with a projected x where shapes differ."""

    width: int
    stride: int
    norm: Callable[[], nn.Module]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        y = nn.relu(self.norm()(conv(self.width, 3, self.stride, self.dtype)(x)))
        y = self.norm()(conv(self.width, 3, 1, self.dtype)(y))
        if x.shape != y.shape:
            x = self.norm()(conv(self.width, 1, self.stride, self.dtype)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Stages of residual blocks, each stage twice as wide and half as large as the one before.

    Features: the output of every stage, then the pooled features that the last layer reads.
    Images of any size and number of channels, values in [0, 1]; logits in float32 or float64.
    """

    depths: Sequence[int]
    classes: int
    width: int = 64
    dtype: DTypeLike = jnp.float32
    norm_momentum: float = 0.9  # 0 keeps the moments of the last batch alone

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> tuple[Float[Array, "b classes"], dict[str, jax.Array]]:
        norm = partial(batch_norm, train, self.dtype, self.norm_momentum)
        features = {}
        x = conv(self.width, 3, 1, self.dtype)(x.astype(self.dtype))
        x = nn.relu(norm()(x))
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                stride = 2 if stage and not i else 1
                x = BasicBlock(self.width * 2**stage, stride, norm, self.dtype)(x)
            features[f"block{stage + 1}"] = x
        wide = stored_dtype(self.dtype)
        x = features[f"block{len(self.depths) + 1}"] = x.astype(wide).mean((1, 2))
        head = nn.Dense(self.classes, kernel_init=uniform_fan_in, dtype=wide, param_dtype=wide)
        return head(x), features


ResNet18 = partial(ResNet, (2, 2, 2, 2))
