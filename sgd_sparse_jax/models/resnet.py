"""Residual image classifiers."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from .layers import Classified, Dropout, Images, Layers, Maps


class BasicBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))); x is projected (1 x 1) where shapes differ."""

    width: int
    stride: int
    layers: Layers
    norm: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x: Images) -> Maps:
        y = nn.relu(self.norm()(self.layers.conv(self.width, 3, self.stride)(x)))
        y = self.norm()(self.layers.conv(self.width)(y))
        if x.shape != y.shape:
            x = self.norm()(self.layers.conv(self.width, 1, self.stride)(x))
        return nn.relu(x + y)


class PreActBlock(BasicBlock):
    """x + conv(drop(act(norm(conv(a))))) with a = act(norm(x))."""

    dropout: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: Images) -> Maps:
        activated = self.layers.activate(self.norm()(x))
        y = self.layers.conv(self.width, 3, self.stride)(activated)
        y = self.layers.activate(self.norm()(y))
        y = self.layers.conv(self.width)(self.dropout(y))
        if x.shape != y.shape:  # the projection is of `activated`, not of x
            x = self.layers.conv(self.width, 1, self.stride)(activated)
        return x + y


class ResNet(nn.Module):
    """Residual network: each stage doubles the width and halves the resolution.

    Images [b, h, w, c] have any size and number of channels, values in [0, 1]; the stem has stride
    2 from 64 x 64 on. Features: the output of every stage (with `pre_activation`, of the last one
    after the final norm and ReLU), then the pooled input of the last layer. Sources: He et al.,
    2015 (arXiv 1512.03385) and 2016 (1603.05027); Zagoruyko & Komodakis, 2016 (1605.07146).

    Example:
        >>> net, images = ResNet((1, 1), classes=3, width=4), jnp.zeros((2, 8, 8, 3))
        >>> (logits, features), _ = jax.eval_shape(net.init_with_output, jax.random.key(0), images)
        >>> logits.shape, [phi.shape for phi in features.values()]
        ((2, 3), [(2, 8, 8, 4), (2, 4, 4, 8), (2, 8)])
    """

    depths: Sequence[int]  #: blocks per stage
    classes: int  #: number of outputs
    layers: Layers = Layers()  #: constructors of layers, with their dtype
    width: int = 64  #: of the first stage
    stem: int | None = None  #: width of the first convolution (None: `width`)
    group_norm: bool = False  #: GroupNorm with width/2 groups in place of BatchNorm
    pre_activation: bool = False  #: norm and activation precede each convolution
    binary_logit: bool = False  #: logits of two classes are (0, z), as in the released code

    @nn.compact
    def __call__(self, x: Images, train: bool = False) -> Classified:
        layers, features = self.layers, {}
        norm = partial(layers.norm, train, self.width // 2 if self.group_norm else 0)
        drop = lambda x: Dropout(layers.dropout)(x, train)
        block = partial(PreActBlock, dropout=drop) if self.pre_activation else BasicBlock
        x = layers.stem(self.stem or self.width, x)(x)
        x = x if self.pre_activation else nn.relu(norm()(x))
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                stride = 2 if stage and not i else 1
                x = block(self.width * 2**stage, stride, layers, norm)(x)
            features[f"block{stage + 1}"] = x
        if self.pre_activation:
            x = features[f"block{len(self.depths)}"] = nn.relu(norm()(x))
        x = features[f"block{len(self.depths) + 1}"] = layers.pool(x)
        if self.classes == 2 and self.binary_logit:
            z = layers.dense(1)(x)
            return jnp.concatenate([jnp.zeros_like(z), z], 1), features
        return layers.dense(self.classes)(x), features


PreActResNet: partial[ResNet] = partial(ResNet, pre_activation=True, binary_logit=True)
