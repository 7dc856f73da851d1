"""Residual image classifiers. Each returns (logits [b, c], features by block, in depth order)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class BasicBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), with a projected x where shapes differ."""

    width: int
    stride: int
    layers: Any  # models.Layers
    norm: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        y = nn.relu(self.norm()(self.layers.conv(self.width, 3, self.stride)(x)))
        y = self.norm()(self.layers.conv(self.width)(y))
        if x.shape != y.shape:
            x = self.norm()(self.layers.conv(self.width, 1, self.stride)(x))
        return nn.relu(x + y)


class PreActBlock(nn.Module):
    """x + conv(drop(act(norm(conv(a))))) with a = act(norm(x)); where shapes differ, a projection
    of a (not of x) takes the place of x.
    """

    width: int
    stride: int
    layers: Any
    norm: Callable[[], nn.Module]
    dropout: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        activated = self.layers.activate(self.norm()(x))
        y = self.layers.conv(self.width, 3, self.stride)(activated)
        y = self.layers.activate(self.norm()(y))
        y = self.layers.conv(self.width)(self.dropout(y))
        if x.shape != y.shape:
            x = self.layers.conv(self.width, 1, self.stride)(activated)
        return x + y


class ResNet(nn.Module):
    """Stages of residual blocks, each stage twice as wide and half as large as the one before.

    Features: the output of every stage, then the pooled features that the last layer reads.
    Images [b, h, w, c] of any size and number of channels, values in [0, 1]; `width` is the first
    stage's. The stem has stride 2 from 64 x 64 on (`Layers.stem`).
    """

    depths: Sequence[int]
    classes: int
    layers: Any
    width: int = 64

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> tuple[Float[Array, "b classes"], dict[str, jax.Array]]:
        norm = partial(self.layers.batch_norm, train)
        features = {}
        x = nn.relu(norm()(self.layers.stem(self.width, x)(x)))
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                stride = 2 if stage and not i else 1
                x = BasicBlock(self.width * 2**stage, stride, self.layers, norm)(x)
            features[f"block{stage + 1}"] = x
        x = features[f"block{len(self.depths) + 1}"] = self.layers.pool(x)
        return self.layers.dense(self.classes)(x), features


class PreActResNet(nn.Module):
    """Stages of pre-activation blocks: norm and activation stand before each convolution.

    Features: the output of every stage, the last one after the final norm and ReLU, then the
    pooled features that the last layer reads. With `groups`, GroupNorm takes BatchNorm's place.
    `stem` is the width of the first convolution, `width` that of the first stage. A single
    `binary_logit` z stands for the logits (0, z) of two classes, as in the released code.
    Source: He et al., 2016 (arXiv 1603.05027); Zagoruyko & Komodakis, 2016 (1605.07146).
    """

    depths: Sequence[int]
    classes: int
    layers: Any
    dropped: Callable[..., nn.Module]  # models.Dropout
    width: int = 64
    stem: int | None = None  # `width`
    groups: int = 0
    binary_logit: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> tuple[Float[Array, "b classes"], dict[str, jax.Array]]:
        layers = self.layers
        norm = partial(layers.group_norm, self.groups) if self.groups else None
        norm = norm or partial(layers.batch_norm, train)
        drop = lambda x: self.dropped(layers.dropout)(x, train)
        features = {}
        x = layers.stem(self.stem or self.width, x)(x)
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                stride = 2 if stage and not i else 1
                x = PreActBlock(self.width * 2**stage, stride, layers, norm, drop)(x)
            features[f"block{stage + 1}"] = x
        x = features[f"block{len(self.depths)}"] = nn.relu(norm()(x))
        x = features[f"block{len(self.depths) + 1}"] = layers.pool(x)
        if self.classes == 2 and self.binary_logit:
            z = layers.dense(1)(x)
            return jnp.concatenate([jnp.zeros_like(z), z], 1), features
        return layers.dense(self.classes)(x), features
