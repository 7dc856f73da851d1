"""PyTorch side of `benchmarks.deep`: three image classifiers and their SGD step.

The layers are those of `sgd_sparse_jax.models` with the same names.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

BORDER = 4  # of zeros, inside which a crop is drawn


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """Convolution without bias, with equal zero padding on both sides."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """relu(s(x) + norm(conv(relu(norm(conv(x)))))); s is a projection where shapes differ."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            conv(inputs, width, 3, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv(width, width),
            nn.BatchNorm2d(width),
        )
        same = stride == 1 and inputs == width
        projection = (conv(inputs, width, 1, stride), nn.BatchNorm2d(width))
        self.shortcut = nn.Identity() if same else nn.Sequential(*projection)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.shortcut(x) + self.residual(x))


class PreActBlock(nn.Module):
    """x + conv(relu(norm(conv(a)))) with a = relu(norm(x)); where shapes differ, s(a) for x."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.residual = nn.Sequential(
            conv(inputs, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU(), conv(width, width)
        )
        same = stride == 1 and inputs == width
        self.projection = None if same else conv(inputs, width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.relu(self.norm(x))
        return (x if self.projection is None else self.projection(a)) + self.residual(a)


class Bottleneck(nn.Module):
    """[x, conv3(relu(norm(conv1(relu(norm(x))))))] along channels; conv1 is 4 growth wide."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.grown = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            conv(inputs, 4 * growth, 1),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            conv(4 * growth, growth),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.grown(x)], 1)


def head(width: int, classes: int) -> tuple[nn.Module, ...]:
    """The mean over a map, then the last layer."""
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)


def stages(
    block: Callable[[int, int, int], nn.Module], depth: int, inputs: int, widths: tuple[int, ...]
) -> list[nn.Module]:
    """`depth` blocks per width; each stage but the first begins with stride 2."""
    layers: list[nn.Module] = []
    for stage, width in enumerate(widths):
        for i in range(depth):
            layers.append(block(inputs, width, 2 if stage and not i else 1))
            inputs = width
    return layers


def resnet18_plain(classes: int, width: int = 64) -> nn.Module:
    """ResNet-18 for 32 x 32 images: 3 x 3 stem, no pooling, norms after the convolutions."""
    widths = (width, 2 * width, 4 * width, 8 * width)
    stem = (conv(3, width), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(*stem, *stages(BasicBlock, 2, width, widths), *head(widths[-1], classes))


def wrn28(classes: int, width: int = 10) -> nn.Module:
    """Wide ResNet 28-`width`: three stages of four pre-activation blocks."""
    widths = (16 * width, 32 * width, 64 * width)
    last = (nn.BatchNorm2d(widths[-1]), nn.ReLU(), *head(widths[-1], classes))
    return nn.Sequential(conv(3, 16), *stages(PreActBlock, 4, 16, widths), *last)


def densenet100_12(classes: int, width: int = 12) -> nn.Module:
    """DenseNet-BC of three blocks of 16 bottlenecks with growth `width`, compression 1/2."""
    channels = 2 * width
    layers: list[nn.Module] = [conv(3, channels)]
    for block in range(3):
        if block:
            half = channels // 2
            transition = (nn.BatchNorm2d(channels), nn.ReLU(), conv(channels, half, 1))
            layers += [*transition, nn.AvgPool2d(2)]
            channels = half
        for _ in range(16):
            layers.append(Bottleneck(channels, width))
            channels += width
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), *head(channels, classes))


NETWORKS = {"resnet18_plain": resnet18_plain, "wrn28": wrn28, "densenet100_12": densenet100_12}


def parameters(net: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())


def crop_and_flip(images: torch.Tensor) -> torch.Tensor:
    """A random window of each image [b, h, w, c] inside a border of zeros; half are mirrored."""
    b, h, w, _ = images.shape
    draw = partial(torch.randint, device=images.device)
    across = torch.arange(w, device=images.device).expand(b, w)
    across = torch.where(draw(2, (b, 1)) == 1, across.flip(1), across) + draw(
        2 * BORDER + 1, (b, 1)
    )
    down = torch.arange(h, device=images.device) + draw(2 * BORDER + 1, (b, 1))
    padded = F.pad(images, (0, 0, BORDER, BORDER, BORDER, BORDER))
    which = torch.arange(b, device=images.device)[:, None, None]
    return padded[which, down[:, :, None], across[:, None, :]]


def multiply_as_jax_does() -> None:
    """On GPUs, float32 products in tf32, and convolutions by the fastest algorithm tried."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def start_counting_memory(device: str) -> int:
    """Resets the peak of memory; returns the bytes already allocated."""
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def trainer(
    net: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    batch: int,
    bf16: bool,
    mode: str,
    lr: float,
    momentum: float,
    l2: float,
    average_decay: float,
) -> Callable[[int], torch.Tensor]:
    """steps -> the last loss: SGD on crops and flips of `images`, uint8 [n, h, w, c] on a device.

    The network is compiled by torch.compile in `mode`, unless that is "eager".
    """
    device = images.device
    net = net.to(device).to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    weights: list[torch.Tensor] = list(net.parameters())
    average = [p.detach().clone() for p in weights]
    lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
    fused = device.type == "cuda"
    tx = torch.optim.SGD(weights, lr, momentum, weight_decay=l2, fused=fused)
    predict = net if mode == "eager" else torch.compile(net, mode=mode)
    mixed = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)

    def step() -> torch.Tensor:
        # Drawn on the device: a step does not wait for the host.
        idx = torch.randint(len(labels), (batch,), device=device)
        # A view of [b, h, w, c] as [b, c, h, w] is what "channels last" means.
        x = crop_and_flip(images[idx]).permute(0, 3, 1, 2).float() / 255
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with mixed():
            loss = F.cross_entropy(predict(x).float(), labels[idx])
        tx.zero_grad(set_to_none=True)
        loss.backward()
        tx.step()
        with torch.no_grad():
            lerp(average, weights, 1 - average_decay)
        return loss.detach()

    def steps(count: int) -> torch.Tensor:
        loss = images.new_zeros(())
        for _ in range(count):
            loss = step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss

    return steps
