"""Fully connected ReLU nets: large steps learn few, sparse features (F1, F2, T1, T3 of the paper).

python -m experiments.fc_nets                                  # 1-D regression, 32 seeds
python -m experiments.fc_nets --setting 1d-overregularized     # a stronger warm-up
python -m experiments.fc_nets --setting two-layer              # teacher-student on the circle
python -m experiments.fc_nets --setting three-layer --seeds 128
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from experiments.figures import plots, tables
from experiments.launch import cli, devices, hosts, ranges
from experiments.toy import config as toys, ensemble, problems, run as toy_runs

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True)
class Config(toys.Config):
    """ReLU nets on toy data, single-example SGD."""

    setting: Literal["1d", "1d-overregularized", "two-layer", "three-layer"] = "1d"
    """1d: 12 points, 100 units. two-layer, three-layer: teacher and student."""


ONE_D = Config(
    step_sizes=(2e-4, 2e-4),
    decay_times=(0.02, 0.5),
    decay_factors=(2.5, 3.0),
    warmup_gains=(400 * 0.02 - 1, 400 * 0.5 - 1),
    batch_sizes=(1, 1),
    num_steps=31_623,
)
SETTINGS = {
    "1d": ONE_D,
    "1d-overregularized": replace(
        ONE_D, setting="1d-overregularized", warmup_gains=(500 * 0.02 - 1, 500 * 0.5 - 1)
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


# Variable -> title, label of the axis, whether that is logarithmic: drawn where the problem has it.
PANELS = {
    "train_loss": ("Training loss", "mean squared error", True),
    "test_loss": ("Test loss", "mean squared error", True),
    "rank": ("Rank of the Jacobian", "rank", False),
    "sparsity_1": ("Feature sparsity, layer 1", "active entries (%)", False),
    "sparsity_2": ("Feature sparsity, layer 2", "active entries (%)", False),
    "effective_rank": ("Effective rank of features", "entropy (nats)", False),
    "nuclear_norm": ("Nuclear norm of features", "Σ singular values", True),
    "gradient_dimension": ("Gradient-matrix dimension", "units", False),
    "flips_1": ("ReLUs flipped since the start, layer 1", "share (%)", False),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    devices.set_up_toys()
    cli.main(Config, run, argv, settings=SETTINGS)


def run(config: Config) -> tables.Finding:
    """Runs the ensemble into its folder, or reads it if finished; then prints and draws."""
    hosts.join(config.hosts)
    ranges.check(config)
    problem = PROBLEM.get(config.setting, config.setting)
    plan = toys.resolve("fc_nets", config, problems.PROBLEMS[problem]())
    dataset = ensemble.results(plan)
    hosts.leave_the_rest_to_first()
    rows = tables.rows(dataset, QUANTITIES[problem], published(config))
    tables.write(plan.folder, rows)
    tables.show(plan.folder, rows, title=f"{config.setting}, {config.seeds} seeds")
    figures = draw_curves(plan, dataset)
    if problem == "1d":
        figures += draw_functions(plan, dataset)
    if problem == "two-layer":
        figures += draw_neurons(plan, dataset)
    return tables.Finding(plan.folder, dataset, rows, figures)


def published(config: Config) -> dict[str, tuple[float | None, ...]]:
    """The paper's numbers, if the configuration is the paper's setting."""
    setting = config.setting
    return PUBLISHED[setting] if toys.like(config, SETTINGS[setting]) == SETTINGS[setting] else {}


def draw_curves(plan: toys.Plan, dataset: "xarray.Dataset") -> list[Path]:
    """Median and 5-95 % band over seeds at every record, decay times marked."""
    panels, one_d = [], plan.config.setting.startswith("1d")
    for name, (title, ylabel, log_y) in PANELS.items():
        if name in dataset and not (one_d and name == "test_loss"):  # 1-D: tested where trained
            curves = tables.lines(dataset[name] * (100 if "%" in ylabel else 1))
            panels.append(plots.Panel(title, ylabel, curves, log_y=log_y, marks=plan.marks))
    panels += tables.diverged_panel(dataset, plan.marks)
    title = f"{plan.config.setting}: {plan.config.seeds} seeds"
    return plots.figure(_stem(plan), panels, columns=2, title=title)


def draw_functions(plan: toys.Plan, dataset: "xarray.Dataset") -> list[Path]:
    """The predictor of one seed at six records, as in the paper's figure."""
    toy, snapshots, steps = plan.toy, dataset["shown_theta"].values, plan.record_steps
    x, y = np.asarray(toy.train.x)[:, 0], np.asarray(toy.train.y)
    grid = np.linspace(x.min() - 0.05, x.max() + 0.05, 400)
    panels = []
    for share in (0.003, 0.01, 0.05, 0.2, 0.5, 1.0):
        record = int(np.searchsorted(steps, share * steps[-1]))
        of = lambda theta: np.asarray(toy.predict(toy_runs.parameters(toy, theta), grid[:, None]))
        lines = {label: (grid, of(snapshots[j, record])) for j, label in enumerate(plan.labels)}
        look = {"xlabel": "x", "points": (x, y), "ylim": (-2.6, 3)}
        panels.append(plots.Panel(f"step {steps[record]:,}", "f(x)", lines, **look))
    title = f"{plan.config.setting}: predictor of one seed"
    return plots.figure(_stem(plan, "_functions"), panels, columns=3, title=title)


def draw_neurons(plan: toys.Plan, dataset: "xarray.Dataset") -> list[Path]:
    """Where each unit's incoming weights moved, for the first seed that diverged nowhere."""
    seed = int(dataset["shown_seed"].values[0])
    teacher = np.asarray(problems.data.CIRCLE_TEACHER[0].kernel).T
    kernel = lambda theta: np.asarray(toy_runs.parameters(plan.toy, theta)["layer1"]["kernel"]).T
    panels = [
        plots.Moves(label, kernel(start), kernel(end), teacher)
        for label, (start, end) in zip(plan.labels, dataset["theta"].values[seed], strict=True)
    ]
    title = f"Incoming weights of each unit, seed {seed}"
    return plots.moves(_stem(plan, "_neurons"), panels, title=title)


def _stem(plan: toys.Plan, suffix: str = "") -> Path:
    return plan.folder / "figures" / f"fc_nets_{plan.config.setting}{suffix}"


if __name__ == "__main__":
    main()
