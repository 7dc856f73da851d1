"""What the image classifiers are made of, in one precision; every network is given its layers."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, DTypeLike, Float

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Torch's default for a linear layer: uniform on +-1 / sqrt(fan_in).
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Layers(NamedTuple):
    """Convolutions in `dtype`; norms, the last layers and all parameters in float32 (float64 nets:
    float64).
    """

    dtype: DTypeLike = jnp.float32
    norm_momentum: float = 0.9  # of BatchNorm's running moments; 0 keeps those of the last batch
    dropout: float = 0.0  # share of entries dropped, by the networks that drop any
    softplus: int = 0  # beta of log(1 + exp(beta x)) / beta in place of ReLU; 0: ReLU
    # Axis of pmap or shard_map that batch statistics are averaged over. None under jit, where the
    # batch is whole, whatever devices it lies on.
    norm_axis: str | None = None

    @property
    def stored(self) -> DTypeLike:
        """The dtype of parameters, norms and logits."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def conv(self, width: int, kernel: int = 3, stride: int = 1, *, bias: bool = False) -> nn.Conv:
        """Convolution, zero-padded alike on both sides ("SAME" isn't, at stride 2)."""
        return nn.Conv(
            width,
            (kernel, kernel),
            stride,
            padding=kernel // 2,
            use_bias=bias,
            kernel_init=he_normal,
            dtype=self.dtype,
            param_dtype=self.stored,
        )

    def stem(self, width: int, x: Float[Array, "b h w c"]) -> nn.Conv:
        """The first convolution: 3 x 3, of stride 2 for images of 64 x 64 (Tiny ImageNet) or more.

        So every later stage is as large as for CIFAR's 32 x 32, as is usual for Tiny ImageNet.
        """
        return self.conv(width, 3, 2 if min(x.shape[1:3]) >= 64 else 1)

    def batch_norm(self, train: bool) -> nn.BatchNorm:
        """Batch statistics in training, else running moments."""
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=self.norm_momentum,
            epsilon=1e-5,
            use_fast_variance=False,
            axis_name=self.norm_axis,
            dtype=self.dtype,
            param_dtype=self.stored,
            # Else flax keeps the running moments of float64 networks in float32.
            force_float32_reductions=self.stored == jnp.float32,
        )

    def group_norm(self, groups: int) -> nn.GroupNorm:
        """Mean 0 and variance 1 over each group of channels of each example."""
        return nn.GroupNorm(
            groups,
            epsilon=1e-5,
            use_fast_variance=False,
            dtype=self.dtype,
            param_dtype=self.stored,
            force_float32_reductions=self.stored == jnp.float32,
        )

    def dense(self, width: int) -> nn.Dense:
        """Linear layer."""
        return nn.Dense(
            width, kernel_init=uniform_fan_in, dtype=self.stored, param_dtype=self.stored
        )

    def activate(self, x: jax.Array) -> jax.Array:
        """ReLU, or softplus."""
        return jax.nn.softplus(self.softplus * x) / self.softplus if self.softplus else nn.relu(x)

    def pool(self, x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
        """The mean over a map, in the dtype of logits."""
        return x.astype(self.stored).mean((1, 2))


class Dropout(nn.Module):
    """In training, zeroes a share `rate` of the entries and divides the others by 1 - rate.

    Its key is a variable of the collection "dropout", drawn at initialization and split at every
    use: masks are a function of the state, so a run that is cut and resumed draws the same ones.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not self.rate:
            return x
        key = self.variable("dropout", "key", lambda: jr.key_data(self.make_rng("params")))
        if not train or self.is_initializing():
            return x
        use, after = jr.split(jr.wrap_key_data(key.value))
        key.value = jr.key_data(after)
        kept = jr.bernoulli(use, 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0)
