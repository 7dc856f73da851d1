"""Networks small enough to vmap thousands of."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float


class DiagonalNet(nn.Module):
    """f(x) = <u * v, x>, with u = alpha and v = 0 at initialization."""

    alpha: float = 0.1

    @nn.compact
    def __call__(
        self, x: Float[Array, "n d"], train: bool = False
    ) -> tuple[Float[Array, " n"], dict[str, jax.Array]]:
        u = self.param("u", nn.initializers.constant(self.alpha), x.shape[-1:], x.dtype)
        v = self.param("v", nn.initializers.zeros, x.shape[-1:], x.dtype)
        return x @ (u * v), {}
