"""DenseNet-BC: each layer takes the outputs of all earlier layers of its block."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from .layers import Classified, Images, Layers


class DenseNet(nn.Module):
    """DenseNet-BC: blocks of bottlenecks; transitions halve channels and resolution.

    `depths` are the numbers of bottlenecks per block, `growth` is the number of channels that each
    adds: (16, 16, 16) and 12 are DenseNet-BC-100-12. Images [b, h, w, c] have values in [0, 1]; the
    stem is `Layers.stem`. Features: the output of every block (of the last one after the final norm
    and ReLU), then the pooled input of the last layer.
    Source: Huang et al., 2017 (arXiv 1608.06993).
    """

    depths: Sequence[int]
    classes: int
    layers: Layers = Layers()
    growth: int = 12

    @nn.compact
    def __call__(self, x: Images, train: bool = False) -> Classified:
        layers, features = self.layers, {}
        activate = lambda x: nn.relu(layers.norm(train)(x))
        x = layers.stem(2 * self.growth, x)(x)
        for block, depth in enumerate(self.depths, 1):
            for _ in range(depth):
                # The bottleneck of 4 growth channels bounds the cost of the 3 x 3 convolution.
                y = layers.conv(4 * self.growth, 1)(activate(x))
                x = jnp.concatenate([x, layers.conv(self.growth)(activate(y))], -1)
            features[f"block{block}"] = x
            if block < len(self.depths):
                x = layers.conv(x.shape[-1] // 2, 1)(activate(x))
                window = tuple(min(2, size) for size in x.shape[1:3])  # not of one pixel
                x = nn.avg_pool(x, window, window)
        x = features[f"block{len(self.depths)}"] = activate(x)
        x = features[f"block{len(self.depths) + 1}"] = layers.pool(x)
        return layers.dense(self.classes)(x), features
