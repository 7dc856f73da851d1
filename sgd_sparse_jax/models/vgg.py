"""VGG: plain stacks of 3 x 3 convolutions, without any norm."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VGG(nn.Module):
    """Stages of relu(conv(x)) and max-pooling, widths w, 2w, 4w, 8w, 8w; then two hidden layers.

    Features: the pooled output of every stage, then the hidden layers. Images [b, h, w, 1 or 3]
    with values in [0, 1], normalized with ImageNet's mean and deviation (grey ones as three equal
    channels). Pooling rounds sizes up, so that 28 x 28 and 32 x 32 both end at 1 x 1; what is
    larger is averaged there. `depths` (2, 2, 3, 3, 3) is VGG-16. Source: Simonyan & Zisserman, 2015
    (arXiv 1409.1556), in the released code's form for CIFAR.
    """

    depths: Sequence[int]
    classes: int
    layers: Any  # models.Layers
    width: int = 64

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> tuple[Float[Array, "b classes"], dict[str, jax.Array]]:
        if x.shape[-1] not in (1, 3):
            raise ValueError(f"VGG takes grey or RGB images; these have {x.shape[-1]} channels.")
        mean, std = (jnp.array([[[each]]], x.dtype) for each in (IMAGENET_MEAN, IMAGENET_STD))
        x = (x - mean) / std
        features = {}
        for stage, depth in enumerate(self.depths, 1):
            width = self.width * min(2 ** (stage - 1), 8)
            for _ in range(depth):
                x = nn.relu(self.layers.conv(width, bias=True)(x))
            up: Any = [(0, size % 2) for size in x.shape[1:3]]
            x = features[f"block{stage}"] = nn.max_pool(x, (2, 2), (2, 2), padding=up)
        x = self.layers.pool(x)
        for hidden in (1, 2):
            x = nn.relu(self.layers.dense(x.shape[-1])(x))
            features[f"block{len(self.depths) + hidden}"] = x
        return self.layers.dense(self.classes)(x), features
