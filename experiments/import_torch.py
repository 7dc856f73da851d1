"""Weights of a PyTorch network as a run folder.

    python -m experiments.import_torch net.pth --model=resnet18_plain --out=runs/imported
    python -m experiments.resnet_cifar --model_path=runs/imported --lr_init=0.1

The file is a state dict, alone or under the name state_dict, model or last (as in files of the
paper's code), saved by torch.save or as .safetensors. Layers are matched in order, and each shape
is checked. Nothing in the file is executed. `experiments.export_torch` is the way back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import jax.random as jr
import tyro

from experiments.deep import setup, torch_files
from experiments.deep.config import Config as Training
from experiments.figures import terminal
from experiments.launch import cli, devices, ranges
from experiments.storage import records
from sgd_sparse_jax import train
from sgd_sparse_jax.models import state_dict


@dataclass(frozen=True)
class Config:
    """The file, the network it is of, and the folder to create."""

    file: Annotated[str, tyro.conf.Positional]
    """State dict: .pth, .pt (needs torch) or .safetensors (needs safetensors)."""
    model: str = "resnet18_plain"
    """Network, as in resnet_cifar."""
    model_width: ranges.Count = 64
    """Width, as in resnet_cifar."""
    dataset: str = "cifar10"
    """Data set, which decides the number of classes and channels."""
    order: str = ""
    """Text file with the names of the arrays of a .safetensors file, which sorts them, in the order
    of net.state_dict(), a name per line. Files of export_torch contain it."""
    step: ranges.CountOrNone = 0
    """Steps that the weights were trained for: --fork_from OUT --fork_step STEP continues there."""
    out: str = "runs/imported"
    """Run folder to create."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(Config, run, argv)


def run(config: Config) -> Path:
    """Writes a run folder with the weights as its only state; returns its path."""
    ranges.check(config)
    devices.set_up_deep(deterministic=False)
    flags = Training(model=config.model, model_width=config.model_width, dataset=config.dataset)
    network, shape = setup.network_of(flags)
    file, order = (Path(name).expanduser() for name in (config.file, config.order))
    tensors = torch_files.read(file, order if config.order else None)
    try:
        params, stats = state_dict.from_state_dict(network, shape, tensors)
    except ValueError as error:
        cure = " The file sorts its arrays: give their order by --order FILE."
        raise ValueError(f"{error}{cure if file.suffix == '.safetensors' else ''}") from error
    tx = setup.optimizer(lambda step: jnp.zeros(()), flags.momentum or None, flags.l2_reg or None)
    x = jnp.zeros((1, *shape), jnp.float32)
    begin = partial(train.init_state, jr.key(0), network, tx, x, averaged=True)
    state = jax.jit(begin)(params=params)  # without the random weights, which nothing needs
    state = state._replace(stats=stats, step=jnp.asarray(config.step, state.step.dtype))
    folder = Path(config.out).expanduser().absolute()
    records.open_run(folder, flags)
    with train.open_checkpoints(folder / "checkpoints") as checkpoints:
        train.save(checkpoints, train.replicate(state, train.data_mesh()))
    terminal.show(f"{len(tensors)} arrays", folder)
    return folder


if __name__ == "__main__":
    main()
