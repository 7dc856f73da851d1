"""Trains image classifiers, and records loss, error and the sparsity of every block.

    python -m experiments.resnet_cifar --dataset=cifar10 --lr_init=0.75 \\
        --lr_schedule=piecewise_05epochs --warmup_exp=1.05 --model=resnet18_plain \\
        --model_width=64 --epochs=100 --batch_size=256 --momentum=0.0 --l2_reg=0.0 \\
        --no_data_augm --eval_iter_freq=200 --exp_name=no_explicit_reg

Flags are named as in the released code. The same command continues from the newest checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.deep import curves, training
from experiments.deep.config import Config as Config
from experiments.figures import terminal
from experiments.launch import cli, devices, hosts


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(Config, run, argv)


def run(config: Config) -> Path:
    """Trains, prints the last record and draws curves; returns the run's folder."""
    devices.set_up_deep(deterministic=config.deterministic)
    hosts.join(config.hosts)
    folder = training.run(config)
    hosts.leave_the_rest_to_first()
    last = curves.records_of(folder)[-1]
    sparsity = " / ".join(f"{last[f'train/distinct/{block}']:.1%}" for block in curves.blocks(last))
    terminal.show(
        f"step {last['step']}: train loss {last['train/loss']:.4f}, train error "
        f"{last['train/error']:.2%}, test error {last['test/error']:.2%} (averaged weights "
        f"{last['test_average/error']:.2%})\n"
        f"active units without duplicates, block by block: {sparsity}",
        folder,
    )
    network = f"{config.dataset}, {config.model} of width {config.model_width}"
    curves.one_run(folder, f"{network}, η₀ = {config.lr_init:g}, {config.lr_schedule}")
    return folder


if __name__ == "__main__":
    main()
