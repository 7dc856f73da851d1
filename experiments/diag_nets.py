"""Diagonal nets f(x) = <u * v, x>: large steps find sparser predictors (D1, D2 of the paper).

python -m experiments.diag_nets                          # D1: four schedules, 32 seeds
python -m experiments.diag_nets --setting d2             # gradient descent and SGD
python -m experiments.diag_nets --seeds 256 --exp_name many
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from experiments.figures import tables
from experiments.launch import cli, devices, hosts, ranges
from experiments.launch.ranges import Count, Finite, Seed
from experiments.toy import config as toys, ensemble, problems


@dataclass(frozen=True)
class Config(toys.Config):
    """Sparse regression, n examples in d dimensions."""

    setting: Literal["d1", "d2"] = "d1"
    """d1: n=80, d=200, single-example SGD. d2: n=40, d=100, gradient descent and SGD."""
    n: Count = 80
    """Training examples."""
    d: Count = 200
    """Input dimension."""
    support: Count = 20
    """Non-zero entries of the target."""
    data_seed: Seed = 0
    """Seed of the data (NumPy's legacy generator)."""
    alpha: Finite = 0.1
    """u at initialization; v is 0."""


# The step sizes and decays of the released notebooks.
SETTINGS = {
    "d1": Config(
        step_sizes=(0.25, 0.282, 0.282, 0.282),
        decay_times=(1.0, 0.1, 0.3, 0.5),
        decay_factors=(1.0, 4.8, 3.4, 1.5),
        warmup_gains=(0.0,) * 4,
        batch_sizes=(1,) * 4,
    ),
    "d2": Config(
        setting="d2",
        n=40,
        d=100,
        step_sizes=(2.0, 3.53, 3.53, 3.53, 0.272),
        decay_times=(1.0, 0.1, 0.3, 0.5, 0.5),
        decay_factors=(1.0, 4.8, 3.4, 1.5, 20.0),
        warmup_gains=(0.0,) * 5,
        batch_sizes=(40,) * 4 + (1,),
    ),
}

# Printed by the original's notebook for one seed: a number per schedule.
PUBLISHED = {
    "d1": {
        "test_loss": (3.5286e-3, 6.6e-4, 2.8e-4, 1.5e-4),
        "train_loss": (1.4216e-6, 6.3e-5, 6.0e-5, 6.7e-5),
        "support": (200, 156, 89, 71),
    },
    "d2": {
        "test_loss": (0.16824, 0.449, 0.438, 0.497, 0.0385),
        "support": (100, 86, 80, 78, 33),
    },
}
COLUMNS = ("test_loss", "train_loss", "support", "rank")
PANELS = ("train_loss", "test_loss", "support", "rank", "balancedness")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    devices.set_up_toys()
    cli.main(Config, run, argv, settings=SETTINGS)


def run(config: Config) -> tables.Finding:
    """Runs the ensemble, or loads it if finished; then prints its table and draws figures."""
    hosts.join(config.hosts)
    ranges.check(config)
    if config.support > config.d:
        raise ValueError(f"--support is {config.support}, more than --d {config.d}.")
    problem = {name: getattr(config, name) for name in ("n", "d", "support", "data_seed", "alpha")}
    plan = toys.resolve("diag_nets", config, problems.diagonal(**problem))
    published = toys.published(config, SETTINGS, PUBLISHED)
    title = f"Diagonal nets, {config.seeds} seeds"
    dataset, rows = ensemble.summarized(plan, COLUMNS, published, title)
    title = (
        f"Diagonal nets, n = {config.n}, d = {config.d}: {config.seeds} seeds, ½ mean squared error"
    )
    stem = plan.folder / "figures" / f"diag_nets_{config.setting}"
    figures = tables.draw(stem, dataset, PANELS, plan.marks, title)
    return tables.Finding(plan.folder, dataset, rows, figures)


if __name__ == "__main__":
    main()
