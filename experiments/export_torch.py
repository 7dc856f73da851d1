"""Weights of a run as a state dict of PyTorch.

    python -m experiments.export_torch runs/resnet_cifar/NAME --out=net.pth
    python -m experiments.export_torch runs/imported --names=net.pth --out=net.safetensors

Layers are in the order of creation. With --names, the arrays have the names of another state dict,
such as that of the PyTorch network that shall load them; else those of our layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import jax.random as jr
import tyro

from experiments.deep import setup, torch_files
from experiments.deep.config import Config as Training
from experiments.figures import terminal
from experiments.launch import cli, devices
from experiments.storage import records
from sgd_sparse_jax import train
from sgd_sparse_jax.models import state_dict


@dataclass(frozen=True)
class Config:
    """The run, and the file to write."""

    folder: Annotated[str, tyro.conf.Positional]
    """Run folder of resnet_cifar or import_torch; its newest state is read."""
    names: str = ""
    """A state dict whose names are taken."""
    out: str = "net.pth"
    """File to write: .pth, .pt (needs torch) or .safetensors (needs safetensors)."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(Config, run, argv)


def run(config: Config) -> Path:
    """Writes the newest weights of a run; returns the path of the file."""
    devices.set_up_deep(deterministic=False)
    folder = Path(config.folder).expanduser()
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json; give a run folder of resnet_cifar.")
    saved = records.read_json(folder / "config.json")
    names = ("model", "model_width", "dataset", "half_prec", "droprate", "softplus")
    network, shape = torch_files.network_of(Training(**{n: saved[n] for n in names if n in saved}))
    like = jax.eval_shape(network.init, jr.key(0), jnp.zeros((1, *shape)))
    params, stats = train.load_weights(folder, *setup.on_all_devices(like))
    named = torch_files.read(Path(config.names).expanduser()) if config.names else None
    arrays = state_dict.to_state_dict(network, shape, params, stats, named)
    out = Path(config.out).expanduser()
    torch_files.write(out, arrays)
    terminal.show(f"{len(arrays)} arrays", out)
    return out


if __name__ == "__main__":
    main()
