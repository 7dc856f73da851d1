"""Image classifiers of the paper and its released code, by name."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import DTypeLike

from .densenet import DenseNet
from .layers import Layers
from .resnet import PreActResNet, ResNet
from .vgg import VGG

PRE_ACTIVATION: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(PreActResNet, (2, 2, 2, 2)),
    "resnet18_gn": partial(PreActResNet, (2, 2, 2, 2), group_norm=True),
    "resnet34preact": partial(PreActResNet, (3, 4, 6, 3)),
    "resnet34_gn": partial(PreActResNet, (3, 4, 6, 3), group_norm=True),
    "resnet_tiny": partial(PreActResNet, (1, 1, 1, 1)),
    "resnet_tiny_gn": partial(PreActResNet, (1, 1, 1, 1), group_norm=True),
    # `width` is the widening factor of the stages 16, 32 and 64.
    "wrn28": lambda width=10, **sizes: PreActResNet(
        (4, 4, 4), width=16 * width, stem=16, binary_logit=False, **sizes
    ),
}
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet18_plain": partial(ResNet, (2, 2, 2, 2)),
    # Two names of one network, as in the released code.
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
    """Builds the image classifier `name`, a key of `NETWORKS`.

    Args:
        name: Of the network.
        classes: Number of outputs.
        width: Width of the first stage (default: 64), widening factor of wrn28 (10) or growth rate
            of densenet100_12 (12).
        dtype: Of convolutions.
        dropout: Rate before the second convolution of a block, of pre-activation networks.
        softplus: beta of softplus in place of ReLU, of the same networks (0: ReLU).

    Raises:
        ValueError: For an unknown name, an option that the network doesn't have, or an odd width
            with GroupNorm.

    Example:
        >>> net = build("resnet18_gn", classes=10, width=16, dropout=0.1)
        >>> net.depths, net.width, net.layers.dropout
        ((2, 2, 2, 2), 16, 0.1)
    """
    known = PRE_ACTIVATION if dropout or softplus else NETWORKS
    if name not in known:
        problem = "has no dropout or softplus" if name in NETWORKS else "is unknown"
        raise ValueError(f"Model {name!r} {problem}; choose one of {', '.join(sorted(known))}.")
    if name.endswith("_gn") and width and width % 2:
        raise ValueError(f"width is {width}; GroupNorm with width/2 groups needs an even one.")
    layers = Layers(dtype, dropout=dropout, softplus=softplus)
    return NETWORKS[name](classes=classes, layers=layers, **({"width": width} if width else {}))
