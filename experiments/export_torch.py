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

import tyro

from experiments.deep import config as flags, setup, torch_files
from experiments.figures import terminal
from experiments.launch import cli, devices
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
    network, shape = setup.network_of(flags.of_folder(folder))
    params, stats = setup.load_weights(folder, network, shape)
    named = torch_files.read(Path(config.names).expanduser()) if config.names else None
    arrays = state_dict.to_state_dict(network, shape, params, stats, named)
    out = Path(config.out).expanduser()
    torch_files.write(out, arrays)
    terminal.show(f"{len(arrays)} arrays", out)
    return out


if __name__ == "__main__":
    main()
