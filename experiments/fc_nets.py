"""Fully connected ReLU nets: large steps learn few, sparse features (F1, F2, T1, T3 of the paper).

python -m experiments.fc_nets                                  # 1-D regression, 32 seeds
python -m experiments.fc_nets --setting 1d-overregularized     # a stronger warm-up
python -m experiments.fc_nets --setting two-layer              # teacher-student on the circle
python -m experiments.fc_nets --setting three-layer --seeds 128
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from experiments.figures import plots, tables
from experiments.launch import cli, devices, hosts
from experiments.launch.ranges import AboveMinusOne, Count, Positive, Share
from experiments.toy import config as toy_flags, ensemble, problems, run as toy_runs

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True)
class Config(toy_flags.Config):
    """ReLU nets on toy data, single-example SGD; defaults are those of the setting."""

    setting: Literal["1d", "1d-overregularized", "two-layer", "three-layer"] = "1d"
    """1d: 12 points, 100 units. two-layer, three-layer: teacher and student."""
    step_sizes: tuple[Positive, ...] = (2e-4, 2e-4)
    """Step size at the start of each schedule."""
    decay_times: tuple[Share, ...] = (0.02, 0.5)
    """Share of the run after which each schedule decays; 1 is never."""
    decay_factors: tuple[Positive, ...] = (2.5, 3.0)
    """What each schedule divides its step size by."""
    warmup_gains: tuple[AboveMinusOne, ...] = (400 * 0.02 - 1, 400 * 0.5 - 1)
    """Until it decays, each step size grows as 1 + gain * (step / num_steps) ** exponent."""
    batch_sizes: tuple[Count, ...] = (1, 1)
    """Examples per step, drawn with replacement; all of them is gradient descent."""
    num_steps: Count = 31_623
    """Steps of each run."""


SETTINGS = {
    "1d": Config(),
    "1d-overregularized": Config(
        setting="1d-overregularized", warmup_gains=(500 * 0.02 - 1, 500 * 0.5 - 1)
    ),
    "two-layer": Config(
        setting="two-layer",
        step_sizes=(0.13, 0.455, 0.455, 0.455),
        decay_times=(1.0, 0.1, 0.3, 0.5),
        decay_factors=(1.0, 2.0, 4.0, 5.0),
        warmup_gains=(0.0,) * 4,
        batch_sizes=(1,) * 4,
        num_steps=14_126,
    ),
    "three-layer": Config(
        setting="three-layer",
        step_sizes=(0.011, 0.04, 0.04, 0.04),
        decay_times=(1.0, 0.1, 0.3, 0.5),
        decay_factors=(1.0, 3.5, 2.5, 5.0),
        warmup_gains=(0.0, 5.0, 5.0, 5.0),
        warmup_exponent=0.5,
        batch_sizes=(1,) * 4,
        num_steps=10_001,
    ),
}
PROBLEM = {"1d-overregularized": "1d"}  # the others have the setting's name

# What the original's notebooks printed for one seed, a number per schedule (None: not printed).
PUBLISHED = {
    "1d": {
        "train_loss": (2.09e-4, 1.7e-4),
        "nuclear_norm": (540.0, 22.0),
        "active_1": (0.487, 0.267),
        "flips_1": (0.041, 0.254),
    },
    "1d-overregularized": {
        "train_loss": (None, 0.269),
        "nuclear_norm": (None, 12.7),
        "active_1": (None, 0.222),
    },
    "two-layer": {
        "test_loss": (6.1e-4, 1.6e-4, 1.4e-4, 5.4e-5),
        "flips_1": (0.073, 0.377, 0.370, 0.357),
    },
    "three-layer": {
        "test_loss": (0.0614, 0.0322, 0.0248, 0.0206),
        "effective_rank": (2.00, 2.03, 1.78, 1.27),
        "active_2": (0.466, 0.312, 0.252, 0.182),
    },
}
QUANTITIES = {
    "1d": {
        "train_loss": ("training loss", ".2g"),
        "nuclear_norm": ("Σ singular values of features", ".3g"),
        "active_1": ("active units", ".1%"),
        "flips_1": ("ReLUs flipped", ".3f"),
        "sparsity_1": ("feature sparsity", ".1%"),
        "rank": ("Jacobian rank", ".0f"),
        "gradient_dimension": ("gradient dimension", ".0f"),
    },
    "two-layer": {
        "test_loss": ("test loss", ".2g"),
        "flips_1": ("ReLUs flipped", ".3f"),
        "sparsity_1": ("feature sparsity", ".1%"),
        "rank": ("Jacobian rank", ".0f"),
    },
    "three-layer": {
        "test_loss": ("test loss", ".2g"),
        "effective_rank": ("effective rank of features", ".2f"),
        "active_2": ("active units, layer 2", ".1%"),
        "sparsity_1": ("feature sparsity, layer 1", ".1%"),
        "sparsity_2": ("feature sparsity, layer 2", ".1%"),
        "rank": ("Jacobian rank", ".0f"),
    },
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    devices.set_up_toys()
    cli.main(Config, run, argv, settings=SETTINGS)


def run(config: Config) -> tables.Finding:
    """Runs the ensemble into its folder, or reads it if finished; then prints and draws."""
    hosts.join(config.hosts)
    problem = PROBLEM.get(config.setting, config.setting)
    toy = problems.PROBLEMS[problem]()
    folder, dataset = ensemble.results("fc_nets", config, toy)
    hosts.leave_the_rest_to_first()
    rows = tables.rows(dataset, QUANTITIES[problem], published(config))
    tables.write(folder, rows)
    tables.show(folder, rows, title=f"{config.setting}, {config.seeds} seeds")
    stem = folder / "figures" / f"fc_nets_{config.setting}"
    figures = draw_curves(stem, config, toy, dataset)
    if problem == "1d":
        figures += draw_functions(stem.with_name(f"{stem.name}_functions"), config, toy, dataset)
    if problem == "two-layer":
        figures += draw_neurons(stem.with_name(f"{stem.name}_neurons"), toy, dataset)
    return tables.Finding(folder, dataset, rows, figures)


def published(config: Config) -> dict[str, tuple[float | None, ...]]:
    """The paper's numbers, where all but the seeds is the paper's setting."""
    asked = toy_flags.like(config, SETTINGS[config.setting])
    return PUBLISHED[config.setting] if asked == SETTINGS[config.setting] else {}


def draw_curves(
    stem: Path, config: Config, toy: problems.Toy, dataset: "xarray.Dataset"
) -> list[Path]:
    """Losses, Jacobian rank and feature sparsity of every record: median and 5-95 % band."""
    marks = toy_flags.decay_marks(config, toy)

    def panel(name: str, title: str, ylabel: str, log_y: bool = False, scale: float = 1.0):
        curves = tables.lines(dataset[name] * scale)
        return plots.Panel(title, ylabel, curves, log_y=log_y, marks=marks)

    layers = [n.removeprefix("sparsity_") for n in map(str, dataset) if n.startswith("sparsity_")]
    panels = [panel("train_loss", "Training loss", "mean squared error", log_y=True)]
    if config.setting in ("two-layer", "three-layer"):
        panels.append(panel("test_loss", "Test loss", "mean squared error", log_y=True))
    panels.append(panel("rank", "Rank of the Jacobian", "rank"))
    for layer in layers:
        which = f", layer {layer}" if len(layers) > 1 else ""
        panels.append(
            panel(f"sparsity_{layer}", f"Feature sparsity{which}", "active entries (%)", scale=100)
        )
    if "effective_rank" in dataset:
        panels.append(panel("effective_rank", "Effective rank of features", "entropy (nats)"))
    if "nuclear_norm" in dataset:
        panels.append(
            panel("nuclear_norm", "Nuclear norm of features", "Σ singular values", log_y=True)
        )
    if "gradient_dimension" in dataset:
        panels.append(panel("gradient_dimension", "Gradient-matrix dimension", "units"))
    panels.append(
        panel("flips_1", "ReLUs flipped since the start, layer 1", "share (%)", scale=100)
    )
    panels += tables.diverged_panel(dataset, marks)
    return plots.figure(stem, panels, columns=2, title=f"{config.setting}: {config.seeds} seeds")


def draw_functions(
    stem: Path, config: Config, toy: problems.Toy, dataset: "xarray.Dataset"
) -> list[Path]:
    """The predictor of one seed at six records, as in the paper's figure."""
    snapshots, steps = dataset["shown_theta"].values, dataset["step"].values
    x, y = np.asarray(toy.train.x)[:, 0], np.asarray(toy.train.y)
    grid = np.linspace(x.min() - 0.05, x.max() + 0.05, 400)
    shares = (0.003, 0.01, 0.05, 0.2, 0.5, 1.0)
    panels = []
    for record in [int(np.searchsorted(steps, share * steps[-1])) for share in shares]:
        lines = {}
        for j, label in enumerate(dataset["schedule"].values):
            params = toy_runs.parameters(toy, snapshots[j, record])
            lines[str(label)] = (grid, np.asarray(toy.predict(params, grid[:, None])))
        panels.append(
            plots.Panel(
                f"step {steps[record]:,}", "f(x)", lines, xlabel="x", points=(x, y), ylim=(-2.6, 3)
            )
        )
    return plots.figure(stem, panels, columns=3, title=f"{config.setting}: predictor of one seed")


def draw_neurons(stem: Path, toy: problems.Toy, dataset: "xarray.Dataset") -> list[Path]:
    """Where each unit's incoming weights moved, for the first seed that no schedule lost."""
    seed = int(dataset["shown_seed"].values[0])
    ends = dataset["theta"].values[seed]
    teacher = np.asarray(problems.data.CIRCLE_TEACHER[0].kernel).T
    panels = []
    for j, label in enumerate(dataset["schedule"].values):
        kernels = [
            np.asarray(toy_runs.parameters(toy, theta)["layer1"]["kernel"]).T for theta in ends[j]
        ]
        panels.append(plots.Moves(str(label), kernels[0], kernels[1], teacher))
    return plots.moves(stem, panels, title=f"Incoming weights of each unit, seed {seed}")


if __name__ == "__main__":
    main()
