"""Toy networks, whose initialization scales may be traced, hence vmapped."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float

from .layers import Features

Initializer: TypeAlias = Callable[..., jax.Array]  # (key, shape, dtype) -> array

# (scale): independent entries scale N(0, 1)
gaussian: Callable[..., Initializer] = nn.initializers.normal


class DiagonalNet(nn.Module):
    """f(x) = <u * v, x>; at initialization u = `alpha` and v = 0.

    Example:
        >>> x = jnp.array([[1.0, 2.0]])
        >>> params = {"u": jnp.array([1.0, 3.0]), "v": jnp.array([2.0, 0.5])}
        >>> DiagonalNet(0.1).apply({"params": params}, x)[0].tolist()
        [5.0]
    """

    alpha: ArrayLike = 0.1  #: a scalar, or [d]

    @nn.compact
    def __call__(self, x: Float[Array, "n d"], train: bool = False) -> tuple[jax.Array, Features]:
        start = lambda key, shape: jnp.broadcast_to(jnp.asarray(self.alpha, x.dtype), shape)
        u = self.param("u", start, x.shape[1:])
        v = self.param("v", nn.initializers.zeros, x.shape[1:], x.dtype)
        return x @ (u * v), {}


class MLP(nn.Module):
    """f(x) = W_L h_{L-1} + b_L with h_l = activation(W_l h_{l-1} + b_l) and h_0 = x.

    `biases`, `kernel_init` and `bias_init` are a value for all layers or a sequence of one per
    layer; an initializer None is torch's default, uniform on +-1/sqrt(fan_in). Features are h_1 …
    h_{L-1}.

    Example:
        >>> net = MLP((5, 3), kernel_init=gaussian(0.8))
        >>> (out, features), variables = net.init_with_output(jr.key(0), jnp.ones((4, 2)))
        >>> out.shape, {name: phi.shape for name, phi in features.items()}
        ((4,), {'layer1': (4, 5), 'layer2': (4, 3)})
    """

    widths: Sequence[int]  #: of the hidden layers
    outputs: int | None = None  #: their number; None makes f scalar: [n], not [n, 1]
    biases: bool | Sequence[bool] = True  #: whether a layer has one
    kernel_init: Initializer | Sequence[Initializer | None] | None = None  #: of W_l
    bias_init: Initializer | Sequence[Initializer | None] | None = None  #: of b_l
    activation: Callable[[jax.Array], jax.Array] = nn.relu  #: of the hidden layers

    @nn.compact
    def __call__(self, x: Float[Array, "n d"], train: bool = False) -> tuple[jax.Array, Features]:
        widths = (*self.widths, 1 if self.outputs is None else self.outputs)
        given = (self.biases, self.kernel_init, self.bias_init)
        per_layer = [v if isinstance(v, Sequence) else (v,) * len(widths) for v in given]
        hidden, features = x, {}
        for layer, (width, bias, *inits) in enumerate(zip(widths, *per_layer, strict=True), 1):
            bound = hidden.shape[-1] ** -0.5
            uniform = partial(jr.uniform, minval=-bound, maxval=bound)
            options: Any = {"kernel_init": inits[0] or uniform, "bias_init": inits[1] or uniform}
            options |= {"param_dtype": x.dtype, "name": f"layer{layer}"}
            hidden = nn.Dense(width, bias, **options)(hidden)
            if layer < len(widths):
                hidden = features[f"layer{layer}"] = self.activation(hidden)
        return (hidden if self.outputs is not None else hidden[:, 0]), features


def rademacher(scale: ArrayLike) -> Initializer:
    """Independent entries +-scale with equal probability: initializer(key, shape, dtype) -> array.

    Example:
        >>> set(abs(rademacher(2.0)(jr.key(0), (8,), float)).tolist())
        {2.0}
    """
    return lambda key, shape, dtype: jnp.asarray(scale, dtype) * jr.rademacher(key, shape, dtype)
