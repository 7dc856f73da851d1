"""VGG: plain stacks of 3 x 3 convolutions, without normalization."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from .layers import Classified, Images, Layers

# Used for every data set, as in the released code.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VGG(nn.Module):
    """Stages of relu(conv(x)) and max-pooling, widths w, 2w, 4w, 8w, 8w; then two hidden layers.

    `depths` are the numbers of convolutions, (2, 2, 3, 3, 3) for VGG-16; `width` is w. Images
    [b, h, w, 1 or 3] have values in [0, 1] and are normalized with ImageNet's mean and deviation,
    which broadcasts grey ones to three channels. Features: the pooled output of every stage, then
    the hidden layers. Source: Simonyan & Zisserman, 2015 (arXiv 1409.1556), as in the released code
    for CIFAR.
    """

    depths: Sequence[int]
    classes: int
    layers: Layers = Layers()
    width: int = 64

    @nn.compact
    def __call__(self, x: Images, train: bool = False) -> Classified:
        mean, std = (jnp.array([[[each]]], x.dtype) for each in (IMAGENET_MEAN, IMAGENET_STD))
        x, features = (x - mean) / std, {}
        for stage, depth in enumerate(self.depths, 1):
            for _ in range(depth):
                width = self.width * min(2 ** (stage - 1), 8)
                x = nn.relu(self.layers.conv(width, bias=True)(x))
            # Odd sizes round up: both 28 x 28 and 32 x 32 end at 1 x 1 after five stages.
            up: Any = [(0, size % 2) for size in x.shape[1:3]]
            x = features[f"block{stage}"] = nn.max_pool(x, (2, 2), (2, 2), padding=up)
        x = self.layers.pool(x)
        for block in (len(self.depths) + 1, len(self.depths) + 2):
            x = features[f"block{block}"] = nn.relu(self.layers.dense(x.shape[-1])(x))
        return self.layers.dense(self.classes)(x), features
