"""DenseNet-BC: every layer reads the outputs of all layers before it in its block."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from .layers import Classified, Images, Layers, Maps


class Bottleneck(nn.Module):
    """[x, conv3(relu(norm(conv1(relu(norm(x))))))] along channels; conv1 is 4 growth wide."""

    growth: int
    layers: Layers
    norm: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x: Images) -> Maps:
        y = self.layers.conv(4 * self.growth, 1)(nn.relu(self.norm()(x)))
        y = self.layers.conv(self.growth)(nn.relu(self.norm()(y)))
        return jnp.concatenate([x, y], -1)


class DenseNet(nn.Module):
    """DenseNet-BC: blocks of bottlenecks; in between, channels and sides are halved.

    `depths` are the numbers of bottlenecks of each block, `growth` the channels that each of them
    adds: (16, 16, 16) and 12 are DenseNet-BC-100-12. Images [b, h, w, c] have values in [0, 1]; the
    stem has stride 2 from 64 x 64 on (`Layers.stem`). Features: the output of every block, the last
    one after the final norm and ReLU, then the pooled features that the last layer reads.
    Source: Huang et al., 2017 (arXiv 1608.06993).
    """

    depths: Sequence[int]
    classes: int
    layers: Layers = Layers()
    growth: int = 12

    @nn.compact
    def __call__(self, x: Images, train: bool = False) -> Classified:
        norm = lambda: self.layers.batch_norm(train)
        features = {}
        x = self.layers.stem(2 * self.growth, x)(x)
        for block, depth in enumerate(self.depths, 1):
            for _ in range(depth):
                x = Bottleneck(self.growth, self.layers, norm)(x)
            features[f"block{block}"] = x
            if block < len(self.depths):
                x = self.layers.conv(x.shape[-1] // 2, 1)(nn.relu(norm()(x)))
                window = tuple(min(2, size) for size in x.shape[1:3])  # one pixel stays one
                x = nn.avg_pool(x, window, window)
        x = features[f"block{len(self.depths)}"] = nn.relu(norm()(x))
        x = features[f"block{len(self.depths) + 1}"] = self.layers.pool(x)
        return self.layers.dense(self.classes)(x), features
