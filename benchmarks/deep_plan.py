"""The flags of `benchmarks.deep`, and their defaults on the available device."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sgd_sparse_jax import data, models

CLASSES, SHAPE = 10, (32, 32, 3)

STEP_SIZE, MOMENTUM, L2, AVERAGE_DECAY = 0.01, 0.9, 5e-4, 0.999

EVAL_BATCH = 512

TORCH_NETS = ("resnet18_plain", "wrn28", "densenet100_12")

TORCH_MODES = (
    "eager",
    "default",
    "reduce-overhead",
    "max-autotune",
    "max-autotune-no-cudagraphs",
)

LISTS = ("nets", "steps_per_call", "torch_modes")  # flags that take several values


@dataclass(frozen=True)
class Config:
    """Times training steps, epochs and evaluations of image classifiers in JAX and PyTorch."""

    nets: tuple[str, ...] = TORCH_NETS
    """Networks by name; these three have a PyTorch counterpart."""
    width: int = 0
    """Width of the networks (0: resnet18_plain 64, wrn28 10, densenet100_12 12)."""
    batch_size: int = 256
    """Examples per step, over all devices."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of convolutions; parameters are float32 in both."""
    steps_per_call: tuple[int, ...] = (1, 5, 25)
    """Numbers of steps in one compiled call of JAX; on CPUs always 1."""
    torch_modes: tuple[str, ...] = ()
    """PyTorch modes: eager, or a mode of torch.compile (default: eager on CPUs, else default and
    reduce-overhead)."""
    steps: int = 0
    """Steps per round, rounded up to whole calls (0: 10 on CPUs, else 25)."""
    rounds: int = 5
    """Number of timings of each side."""
    images: int = 0
    """Training images, one epoch (0: 20 batches on CPUs, else 50,000)."""
    eval_images: int = 0
    """Images per evaluation (0: 512 on CPUs, else 10,000)."""
    out: Path | None = None
    """Where to write the JSON, after every network."""


class Plan(NamedTuple):
    """A config completed with everything that depends on the device."""

    config: Config
    dtype: Any
    calls: tuple[int, ...]
    torch_modes: tuple[str, ...]
    no_torch: str  # reason why PyTorch is missing, or ""
    steps: int
    images: data.Images
    test_images: data.Images


def validate(config: Config) -> None:
    """Raises ValueError, naming the flag, for flags that can't be run."""
    for field, least in {"batch_size": 1, "rounds": 1, "width": 0, "steps": 0}.items():
        if getattr(config, field) < least:
            raise ValueError(f"--{field} is {getattr(config, field)}; it must be {least} or more.")
    for field, least in {"images": config.batch_size, "eval_images": 1}.items():
        value = getattr(config, field)
        if value and value < least:
            raise ValueError(f"--{field} is {value}; it must be {least} or more (0: a default).")
    if not config.nets or min(config.steps_per_call, default=0) < 1:
        raise ValueError("--nets needs a name, and --steps_per_call numbers of 1 or more.")
    for name in config.nets:
        models.build(name, classes=CLASSES, width=config.width or None)
    if config.batch_size % jax.device_count():
        raise ValueError(
            f"--batch_size is {config.batch_size}, which can't be split over "
            f"{jax.device_count()} devices; choose a multiple of {jax.device_count()}."
        )
    unknown = sorted(set(config.torch_modes) - set(TORCH_MODES))
    if unknown:
        known = ", ".join(TORCH_MODES)
        raise ValueError(f"Unknown --torch_modes {', '.join(unknown)}; known are {known}.")
    if config.torch_modes and (reason := why_no_torch()):
        raise ValueError(f"--torch_modes is given, but {reason}")


def why_no_torch() -> str:
    """The reason why PyTorch can't be timed here; "" if it can."""
    if find_spec("torch") is None:
        return "PyTorch is not installed (pip install -e .[bench])."
    import torch

    if jax.default_backend() not in ("cpu", "gpu"):
        return f"PyTorch is not timed on a {jax.default_backend()}."
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return "this PyTorch sees no GPU, and JAX runs on one."
    return ""


def complete(config: Config) -> Plan:
    """Sizes for the available device, and random images."""
    on_cpu = jax.default_backend() == "cpu"
    rng = np.random.default_rng(0)

    def draw(n: int) -> data.Images:
        pixels = rng.integers(0, 256, (n, *SHAPE), dtype=np.uint8)
        labels = rng.integers(0, CLASSES, n).astype(np.int32)
        return data.Images(pixels, labels, tuple(map(str, range(CLASSES))))

    modes = ("eager",) if on_cpu else ("default", "reduce-overhead")
    return Plan(
        config=config,
        dtype=jnp.bfloat16 if config.precision == "bf16" else jnp.float32,
        # Convolutions inside a compiled loop are 16-29 times slower on CPUs (jax issue 12868).
        calls=(1,) if on_cpu else tuple(dict.fromkeys(config.steps_per_call)),
        torch_modes=tuple(dict.fromkeys(config.torch_modes)) or modes,
        no_torch=why_no_torch(),
        steps=config.steps or (10 if on_cpu else 25),
        images=draw(config.images or (20 * config.batch_size if on_cpu else 50_000)),
        test_images=draw(config.eval_images or (512 if on_cpu else 10_000)),
    )


def command(config: Config) -> str:
    """The command line that runs `config` again."""
    words = [f"--{name} {value}" for name, value in vars(config).items() if name not in LISTS]
    lists = {name: getattr(config, name) for name in LISTS if getattr(config, name)}
    words += [f"--{name} {' '.join(map(str, values))}" for name, values in lists.items()]
    return f"python -m benchmarks.deep {' '.join(words)}"
