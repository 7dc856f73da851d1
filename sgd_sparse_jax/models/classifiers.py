"""The image classifiers of the paper and its code, by name."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import DTypeLike

from .densenet import DenseNet
from .layers import Layers
from .resnet import PreActResNet, ResNet
from .vgg import VGG


def _grouped(depths: tuple[int, ...], *, width: int = 64, **sizes) -> nn.Module:
    """GroupNorm with width/2 groups: each has two channels of the first stage."""
    if width % 2:
        raise ValueError(f"width is {width}; GroupNorm with width/2 groups needs an even one.")
    return PreActResNet(depths, width=width, groups=width // 2, **sizes)


def _wide(depths: tuple[int, ...], *, width: int = 10, **sizes) -> nn.Module:
    """`width` is the widening factor of the stages 16, 32 and 64."""
    return PreActResNet(depths, width=16 * width, stem=16, binary_logit=False, **sizes)


PRE_ACTIVATION: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(PreActResNet, (2, 2, 2, 2)),
    "resnet18_gn": partial(_grouped, (2, 2, 2, 2)),
    "resnet34preact": partial(PreActResNet, (3, 4, 6, 3)),
    "resnet34_gn": partial(_grouped, (3, 4, 6, 3)),
    "resnet_tiny": partial(PreActResNet, (1, 1, 1, 1)),
    "resnet_tiny_gn": partial(_grouped, (1, 1, 1, 1)),
    "wrn28": partial(_wide, (4, 4, 4)),
}
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet18_plain": partial(ResNet, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, (3, 4, 6, 3)),
    "resnet34_plain": partial(ResNet, (3, 4, 6, 3)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "densenet100_12": lambda width=12, **sizes: DenseNet((16, 16, 16), growth=width, **sizes),
} | PRE_ACTIVATION


def build(
    name: str,
    *,
    classes: int,
    width: int | None = None,
    dtype: DTypeLike = jnp.float32,
    dropout: float = 0.0,
    softplus: int = 0,
) -> nn.Module:
    """The image classifier `name`, one of `NETWORKS`, with convolutions in `dtype`.

    `width` is that of the first stage (default 64), for wrn28 the widening factor (10), for
    densenet100_12 the growth (12). Pre-activation networks also take `dropout`, the share dropped
    before the second convolution of a block, and `softplus`, the beta of softplus in place of ReLU
    (0: ReLU). Raises ValueError for an unknown name and for values out of range.

    Example:
        >>> net = build("resnet18_gn", classes=10, width=16, dropout=0.1)
        >>> net.depths, net.groups, net.layers.dropout
        ((2, 2, 2, 2), 8, 0.1)
    """
    if name not in NETWORKS:
        raise ValueError(f"Unknown model {name!r}; known are {', '.join(sorted(NETWORKS))}.")
    least = {"width": (width, 1), "classes": (classes, 1), "softplus": (softplus, 0)}
    for argument, (value, bound) in least.items():
        if value is not None and value < bound:
            raise ValueError(f"{argument} is {value}; choose {bound} or more.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; choose a share in [0, 1).")
    if (dropout or softplus) and name not in PRE_ACTIVATION:
        known = ", ".join(sorted(PRE_ACTIVATION))
        raise ValueError(f"{name} has neither dropout nor softplus; choose one of {known}.")
    layers = Layers(dtype, dropout=dropout, softplus=softplus)
    return NETWORKS[name](classes=classes, layers=layers, **({"width": width} if width else {}))
