"""Layer constructors shared by the image classifiers."""

from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, DTypeLike, Float

Images: TypeAlias = Float[Array, "b h w c"]
Maps: TypeAlias = Float[Array, "b h2 w2 c2"]  # output of a layer that changes sizes
Features: TypeAlias = dict[str, jax.Array]  # by block, in depth order
Classified: TypeAlias = tuple[Float[Array, "b classes"], Features]

EPSILON = 1e-5  # of norms, added to the variance
he_normal: nn.initializers.Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Torch's default for a linear layer: uniform on +-1 / sqrt(fan_in).
uniform_fan_in: nn.initializers.Initializer = nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform"
)


class Layers(NamedTuple):
    """Constructors of layers, whose convolutions compute in `dtype`.

    Parameters, statistics of norms and logits are float64 if `dtype` is, else float32.

    Example:
        >>> Layers(jnp.bfloat16).conv(8).dtype.dtype.name, Layers(jnp.bfloat16).dense(8).dtype.name
        ('bfloat16', 'float32')
    """

    dtype: DTypeLike = jnp.float32  #: of convolutions
    norm_momentum: float = 0.9  #: decay of BatchNorm's moments (0 for the last batch's)
    dropout: float = 0.0  #: rate, in networks with dropout
    softplus: int = 0  #: beta of log(1 + exp(beta x)) / beta (0 for ReLU)
    #: Axis of pmap or shard_map over which batch statistics are averaged; None under jit, where a
    #: sharded batch is still one batch.
    norm_axis: str | None = None

    @property
    def stored(self) -> Any:
        """The dtype of parameters, statistics and logits."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def conv(self, width: int, kernel: int = 3, stride: int = 1, *, bias: bool = False) -> nn.Conv:
        """Convolution with equal zero padding on both sides."""
        shape: Any = ((kernel, kernel), stride, kernel // 2)  # "SAME" pads differently at stride 2
        dtypes: Any = {"dtype": self.dtype, "param_dtype": self.stored}
        return nn.Conv(width, *shape, use_bias=bias, kernel_init=he_normal, **dtypes)

    def stem(self, width: int, x: Images) -> nn.Conv:
        """3 x 3 convolution; stride 2 for 64 x 64 and more, so that stages have CIFAR's sizes."""
        return self.conv(width, 3, 2 if min(x.shape[1:3]) >= 64 else 1)

    def norm(self, train: bool, groups: int = 0) -> nn.Module:
        """GroupNorm if `groups`, else BatchNorm, which uses running moments unless `train`."""
        if groups:
            return nn.GroupNorm(
                groups,
                epsilon=EPSILON,
                use_fast_variance=False,  # E x^2 - (E x)^2 loses digits and can be negative
                dtype=self.dtype,
                param_dtype=self.stored,
                force_float32_reductions=self.stored == jnp.float32,
            )
        return BatchNorm(train, self.norm_momentum, self.norm_axis)

    def dense(self, width: int) -> nn.Dense:
        """Linear layer, initialized as in torch."""
        return nn.Dense(width, True, self.stored, self.stored, kernel_init=uniform_fan_in)

    def activate(self, x: jax.Array) -> jax.Array:
        """ReLU, or softplus."""
        return jax.nn.softplus(self.softplus * x) / self.softplus if self.softplus else nn.relu(x)

    def pool(self, x: Images) -> Float[Array, "b c"]:
        """The mean over each map, in the dtype of logits."""
        return x.astype(self.stored).mean((1, 2))


class BatchNorm(nn.Module):
    """scale (x - m) / sqrt(v + 1e-5) + bias for each channel; m, v its mean and biased variance.

    These are moments of the batch in training, else running moments with decay `momentum`. `axis`
    is the axis of pmap or shard_map over which they are averaged (None: no average). They are
    computed in float32 or more; the result has the dtype of x. Source: Ioffe & Szegedy, 2015 (arXiv
    1502.03167).

    Example:
        >>> x, norm = jnp.array([[0.0], [2.0]]), BatchNorm(train=True)
        >>> norm.init_with_output(jr.key(0), x)[0].round(2).tolist()
        [[-1.0], [1.0]]
    """

    train: bool
    momentum: float = 0.9
    axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, stored = x.shape[-1:], jnp.promote_types(x.dtype, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, size, stored)
        bias = self.param("bias", nn.initializers.zeros, size, stored)
        running = self.variable("batch_stats", "mean", jnp.zeros, size, stored)
        running_var = self.variable("batch_stats", "var", jnp.ones, size, stored)
        wide, channels = x.astype(stored), (*[1] * (x.ndim - 1), *size)
        mean, var = running.value.reshape(channels), running_var.value.reshape(channels)
        # One pass over x: Flax's two passes move a seventh more bytes per step of ResNet-18 on GPUs
        # (benchmarks/compiled_gpu). E d^2 - (E d)^2 of d = x - running mean loses fewer digits than
        # that of x, whose mean may be large; the same holds for the sums of gradients.
        centred, shift = wide - mean, jnp.zeros_like(mean)
        if self.train:
            places = tuple(range(x.ndim - 1))
            moments = centred.mean(places, keepdims=True), (centred**2).mean(places, keepdims=True)
            shift, square = jax.lax.pmean(moments, self.axis) if self.axis else moments
            var = jnp.maximum(square - shift**2, 0.0)
            if not self.is_initializing():
                for moment, new in ((running, mean + shift), (running_var, var)):
                    decayed = self.momentum * moment.value
                    moment.value = decayed + (1 - self.momentum) * new.reshape(size)
        # One product and one sum: the gradient needs two sums over x, in one pass.
        slope = scale.reshape(channels) * jax.lax.rsqrt(var + EPSILON)
        return (centred * slope + (bias.reshape(channels) - shift * slope)).astype(x.dtype)


class Dropout(nn.Module):
    """x_i m_i / (1 - rate) in training, where m_i is 0 with probability `rate`, else 1; else x.

    Its key is a variable in the collection "dropout", created by `init` and split at every use, so
    that masks are a function of the state and a resumed run draws the same ones.

    Example:
        >>> stats = Dropout(0.5).init(jr.key(0), jnp.ones(6))
        >>> y, stats = Dropout(0.5).apply(stats, jnp.ones(6), train=True, mutable=["dropout"])
        >>> sorted(set(y.tolist()))
        [0.0, 2.0]
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if not self.rate:
            return x
        # Key data, not a key: checkpoints and digests take plain arrays.
        key = self.variable("dropout", "key", lambda: jr.key_data(self.make_rng("params")))
        if not train or self.is_initializing():
            return x
        use, after = jr.split(jr.wrap_key_data(key.value))
        key.value = jr.key_data(after)
        mask = jr.bernoulli(use, 1 - self.rate, x.shape)
        return jnp.where(mask, x / (1 - self.rate), 0)
