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
    # The notebook's warm-up grows as 1 + (400 f - 1) t up to the decay at f.
    warmup_gains=(400 * 0.02 - 1, 400 * 0.5 - 1),
    batch_sizes=(1, 1),
    num_steps=31_623,  # 10 ** 4.5
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

# Printed by the original's notebooks for one seed: a number per schedule (None: not printed).
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
COLUMNS = {
    "1d": [
        *("train_loss", "nuclear_norm", "active_1", "flips_1", "sparsity_1", "rank"),
        "gradient_dimension",
    ],
    "two-layer": ["test_loss", "flips_1", "sparsity_1", "rank"],
    "three-layer": ["test_loss", "effective_rank", "active_2", "sparsity_1", "sparsity_2", "rank"],
}
PANELS = {  # 1d has no test loss: its test points are its training points
    "1d": ["train_loss", "rank", "sparsity_1", "nuclear_norm", "gradient_dimension", "flips_1"],
    "two-layer": ["train_loss", "test_loss", "rank", "sparsity_1", "nuclear_norm", "flips_1"],
    "three-layer": [
        *("train_loss", "test_loss", "rank", "sparsity_1", "sparsity_2", "effective_rank"),
        "flips_1",
    ],
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    devices.set_up_toys()
    cli.main(Config, run, argv, settings=SETTINGS)


def run(config: Config) -> tables.Finding:
    """Runs the ensemble, or loads it if finished; then prints its table and draws figures."""
    hosts.join(config.hosts)
    ranges.check(config)
    problem = PROBLEM.get(config.setting, config.setting)
    plan = toys.resolve("fc_nets", config, problems.PROBLEMS[problem]())
    published = toys.published(config, SETTINGS, PUBLISHED)
    title = f"{config.setting}, {config.seeds} seeds"
    dataset, rows = ensemble.summarized(plan, COLUMNS[problem], published, title)
    stem = plan.folder / "figures" / f"fc_nets_{config.setting}"
    title = f"{config.setting}: {config.seeds} seeds, mean squared error"
    figures = tables.draw(stem, dataset, PANELS[problem], plan.marks, title)
    if problem == "1d":
        figures += draw_functions(stem.with_name(f"{stem.name}_functions"), plan, dataset)
    if problem == "two-layer":
        figures += draw_neurons(stem.with_name(f"{stem.name}_neurons"), plan, dataset)
    return tables.Finding(plan.folder, dataset, rows, figures)


def draw_functions(stem: Path, plan: toys.Plan, dataset: "xarray.Dataset") -> list[Path]:
    """Draws the predictor of one seed at six records, as in the paper's figure."""
    toy, snapshots, steps = plan.toy, dataset["shown_theta"].values, plan.record_steps
    x, y = np.asarray(toy.train.x)[:, 0], np.asarray(toy.train.y)
    grid = np.linspace(x.min() - 0.05, x.max() + 0.05, 400)
    of = lambda theta: np.asarray(toy.predict(toy_runs.parameters(toy, theta), grid[:, None]))
    panels = []
    for record in np.searchsorted(steps, steps[-1] * np.array([0.003, 0.01, 0.05, 0.2, 0.5, 1])):
        lines = {label: (grid, of(snapshots[j, record])) for j, label in enumerate(plan.labels)}
        look = {"xlabel": "x", "points": {"training examples": (x, y)}, "ylim": (-2.6, 3)}
        panels.append(plots.Panel(f"step {steps[record]:,}", "f(x)", lines, **look))
    title, colours = f"{plan.config.setting}: predictor of one seed", {"training examples": "black"}
    return plots.figure(stem, panels, columns=3, title=title, colours=colours)


def draw_neurons(stem: Path, plan: toys.Plan, dataset: "xarray.Dataset") -> list[Path]:
    """Draws each unit's incoming weights before and after training, for the shown seed."""
    seed = int(dataset["shown_seed"].values[0])
    kernel = lambda theta: np.asarray(toy_runs.parameters(plan.toy, theta)["layer1"]["kernel"])
    ends = [[kernel(theta) for theta in pair] for pair in dataset["theta"].values[seed]]
    finite = [each[np.isfinite(each)] for pair in ends for each in pair]  # NaN of diverged runs
    teacher = np.asarray(problems.data.CIRCLE_TEACHER[0].kernel)
    # NaN leaves a gap between two segments.
    segments = lambda start, end: np.stack([start, end, np.nan * end], -1).reshape(2, -1)
    panels = [
        plots.Panel(
            label,
            "second weight",
            {"path": segments(start, end), "teacher": segments(0 * teacher, teacher)},
            xlabel="first weight",
            points={"at initialization": start, "after training": end},
            square=1.1 * np.abs(np.concatenate(finite)).max(),
        )
        for label, (start, end) in zip(plan.labels, ends, strict=True)
    ]
    title = f"Incoming weights of each unit, seed {seed}"
    colours = {"path": "0.7", "teacher": "black"}
    return plots.figure(stem, panels, title=title, colours=colours)


if __name__ == "__main__":
    main()
