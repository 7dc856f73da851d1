"""Networks small enough to vmap thousands of; every scale may be traced, hence swept."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float

from .layers import Features

Initializer: TypeAlias = Callable[..., jax.Array]  # (key, shape, dtype) -> array
Predicted: TypeAlias = tuple[Float[Array, " n"], Features]

gaussian = nn.initializers.normal  # (scale): independent entries scale N(0, 1)


class DiagonalNet(nn.Module):
    """f(x) = <u * v, x>; at initialization u = alpha and v = 0.

    `alpha` is a number, or one per coordinate [d]; `random` draws u and v from alpha N(0, 1).

    Example:
        >>> x = jnp.array([[1.0, 2.0]])
        >>> params = {"u": jnp.array([1.0, 3.0]), "v": jnp.array([2.0, 0.5])}
        >>> DiagonalNet(0.1).apply({"params": params}, x)[0].tolist()
        [5.0]
    """

    alpha: ArrayLike = 0.1
    random: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "n d"], train: bool = False) -> Predicted:
        first, second = nn.initializers.ones, nn.initializers.zeros
        if self.random:
            first = second = jr.normal
        u = self.param("u", _scaled(self.alpha, first), x.shape[-1:], x.dtype)
        v = self.param("v", _scaled(self.alpha, second), x.shape[-1:], x.dtype)
        return x @ (u * v), {}


class MLP(nn.Module):
    """f(x) = W_L h_{L-1} + b_L with h_l = activation(W_l h_{l-1} + b_l) and h_0 = x.

    `widths` are those of the hidden layers; without `outputs`, f is scalar: [n] and not [n, 1].
    `biases` and the two initializers are given for all layers or one per layer, last one included;
    an initializer that is None is torch's default, uniform on +-1/sqrt(fan_in). `balanced` makes
    the last layer +-|w_j| of the unit before it, w_j its incoming weights: the two layers of each
    unit have equal norm. Features are h_1 … h_{L-1}; `scaled` multiplies the last by its outgoing
    weights (scalar outputs only).

    Example:
        >>> net = MLP((5, 3), kernel_init=gaussian(0.8))
        >>> (out, features), variables = net.init_with_output(jr.key(0), jnp.ones((4, 2)))
        >>> out.shape, {name: phi.shape for name, phi in features.items()}
        ((4,), {'layer1': (4, 5), 'layer2': (4, 3)})
    """

    widths: Sequence[int]
    outputs: int | None = None
    biases: bool | Sequence[bool] = True
    kernel_init: Initializer | Sequence[Initializer | None] | None = None
    bias_init: Initializer | Sequence[Initializer | None] | None = None
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    balanced: bool = False
    scaled: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "n d"], train: bool = False) -> tuple[jax.Array, Features]:
        if self.scaled and self.outputs is not None:
            raise ValueError("scaled=True weights features by one output; leave outputs=None.")
        widths = (*self.widths, 1 if self.outputs is None else self.outputs)
        biases = _one_per_layer(self.biases, "biases", len(widths))
        kernel_inits = _one_per_layer(self.kernel_init, "kernel_init", len(widths))
        bias_inits = _one_per_layer(self.bias_init, "bias_init", len(widths))
        hidden, features, kernel = x, {}, x
        for layer, width in enumerate(widths, 1):
            default = _uniform(hidden.shape[-1] ** -0.5)
            kernel_init = kernel_inits[layer - 1] or default
            if self.balanced and layer == len(widths) > 1:
                kernel_init = _signed_norms(kernel)
            dense = nn.Dense(
                width,
                use_bias=biases[layer - 1],
                kernel_init=kernel_init,
                bias_init=bias_inits[layer - 1] or default,
                param_dtype=x.dtype,
                name=f"layer{layer}",
            )
            hidden = dense(hidden)
            kernel = dense.variables["params"]["kernel"]
            if layer < len(widths):
                hidden = features[f"layer{layer}"] = self.activation(hidden)
        if self.scaled and features:
            features[f"layer{len(self.widths)}"] *= kernel[:, 0][None]
        return (hidden if self.outputs is not None else hidden[:, 0]), features


class FactorizedLinear(nn.Module):
    """f(x) = <a, b> x for scalar inputs [n] or [n, 1]; a ~ N(0, scales[0]^2 I), b likewise.

    Example:
        >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 0.5])}
        >>> FactorizedLinear(width=2).apply({"params": params}, jnp.array([2.0]))[0].tolist()
        [8.0]
    """

    width: int = 5
    scales: tuple[ArrayLike, ArrayLike] = (1.2, 0.7)

    @nn.compact
    def __call__(self, x: Float[Array, " n *one"], train: bool = False) -> Predicted:
        a = self.param("a", gaussian(self.scales[0]), (self.width,), x.dtype)
        b = self.param("b", gaussian(self.scales[1]), (self.width,), x.dtype)
        return x.reshape(-1) * (a @ b), {}


def rademacher(scale: ArrayLike) -> Initializer:
    """Independent entries +-scale with equal probability: initializer(key, shape, dtype) -> array.

    Example:
        >>> set(abs(rademacher(2.0)(jr.key(0), (8,), float)).tolist())
        {2.0}
    """
    return _scaled(scale, jr.rademacher)


def _scaled(scale: ArrayLike, draw: Initializer) -> Initializer:
    return lambda key, shape, dtype: jnp.asarray(scale, dtype) * draw(key, shape, dtype)


def _uniform(bound: float) -> Initializer:
    return lambda key, shape, dtype=jnp.float32: jr.uniform(key, shape, dtype, -bound, bound)


def _signed_norms(kernel: Float[Array, "d m"]) -> Initializer:
    norms = jnp.linalg.norm(kernel, axis=0)[:, None]
    return lambda key, shape, dtype: norms * jr.rademacher(key, shape, dtype)


def _one_per_layer(value: Any, name: str, layers: int) -> tuple:
    """`value` for every layer, or as many values as layers."""
    if not isinstance(value, Sequence):
        return (value,) * layers
    if len(value) != layers:
        raise ValueError(f"{name} has {len(value)} values for {layers} layers; give one for each.")
    return tuple(value)
