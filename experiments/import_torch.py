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
    """Text file with the names of the arrays in the order of net.state_dict(), a name per line, for
    a .safetensors file, which sorts them. Files of export_torch contain their order."""
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
    tensors = torch_files.read(Path(config.file).expanduser())
    if config.order:
        names = Path(config.order).expanduser().read_text().split()
        tensors = torch_files.in_order(tensors, names)
    try:
        params, stats = state_dict.from_state_dict(network, shape, tensors)
    except ValueError as error:
        is_sorted = list(tensors) == sorted(tensors)
        hint = " The file sorts its arrays: give their order by --order FILE." if is_sorted else ""
        raise ValueError(f"{error}{hint}") from error
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
