"""Do runs that sit longer or higher at the edge of stability learn sparser features?

python -m experiments.sparsity_meets_sharpness  # 1,332 runs of three toy problems
python -m experiments.sparsity_meets_sharpness --problems two-layer --seeds 64 --exp_name many
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np

from experiments.figures import plots, tables, terminal
from experiments.launch import cli, devices, hosts, ranges
from experiments.launch.hosts import ALONE, Hosts
from experiments.launch.ranges import Count, Positive, Seed, TwoOrMore
from experiments.storage import records
from experiments.toy import config as toys, ensemble, problems, run as toy_runs
from sgd_sparse_jax import train

if TYPE_CHECKING:
    import xarray

Problem = Literal["diagonal", "1d", "two-layer"]


class Grid(NamedTuple):
    """The runs of a problem: all combinations of step size, by batch size, and decay."""

    step_sizes: dict[int, tuple[float, ...]]  # up to those at which runs diverge
    num_steps: int
    warmup: float = 1.0  # the step size grows linearly by this factor until the decay


GRIDS: dict[str, Grid] = {
    "diagonal": Grid(
        {
            1: (0.1, 0.2, 0.25, 0.265, 0.275, 0.282),
            4: (0.2, 0.5, 0.7, 0.8),
            80: (0.2, 1.0, 2.0, 2.7),
        },
        40_001,
    ),
    "1d": Grid(
        {1: (0.005, 0.01, 0.02, 0.03), 3: (0.01, 0.02, 0.03, 0.05), 12: (0.02, 0.05, 0.1)},
        31_623,
        warmup=100.0,
    ),
    "two-layer": Grid(
        {1: (0.1, 0.2, 0.3, 0.4), 4: (0.2, 0.4, 0.6, 0.8), 15: (0.4, 0.6, 0.8, 1.2)}, 14_126
    ),
}
DECAYS = ((1.0, 1.0), (0.5, 4.0), (0.2, 4.0))  # share of the run, factor
RECORDS = 40
FITTED = 1e-24  # loss at which gradients of float64 become rounding errors: no gauges below
PREDICTORS = {
    "edge_time": "time at edge",
    "edge_level": "batch sharpness",
    "sharpness_level": "sharpness",
    "noise_level": "training loss",
}
OUTCOMES = {"sparsity": "features", "rank": "rank", "test_loss": "test loss"}
AXES = {"sparsity": "active features (%)", "rank": "Jacobian rank", "test_loss": "test loss"}
EDGE = "the edge"
CONTROLS = {
    "all runs": (),
    "given η": ("step_size",),
    "same settings": ("step_size", "batch_size", "decay_time"),
}


@dataclass(frozen=True)
class Config:
    """Relates curvature before the decay of the step size to sparsity, rank and test loss."""

    problems: tuple[Problem, ...] = ("diagonal", "two-layer", "1d")
    """Toy problems, each with a grid of step sizes, batch sizes and decays."""
    seeds: TwoOrMore = 12
    """Seeds of every combination."""
    seed: Seed = 0
    """Base seed: seed i is fold_in(key(seed), i)."""
    at_edge: Positive = 0.8
    """A run is at the edge where batch sharpness is at least this times 2 / step size."""
    resamples: Count = 500
    """Bootstrap resamples of the seeds."""
    exp_name: str = "toys"
    """Name of the run's folder."""
    runs_dir: str = "runs"
    """Folder that contains the run folders."""
    hosts: Hosts = ALONE


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    devices.set_up_toys()
    cli.main(Config, run, argv)


def run(config: Config) -> "xarray.Dataset":
    """Runs all grids, or loads them if finished; then prints the table and draws the figure."""
    hosts.join(config.hosts)
    ranges.check(config)
    folder = records.run_folder(config.runs_dir, "sparsity_meets_sharpness", config.exp_name)
    dataset = ensemble.in_folder(folder, config, lambda *how: simulate(config, *how))
    hosts.leave_the_rest_to_first()
    rows = correlate(config, dataset)
    records.write_json(folder / "summary.json", {"rows": rows})
    show(folder, config, dataset, rows)
    draw(folder / "figures" / "sparsity_meets_sharpness", config, dataset, rows)
    return dataset


def simulate(
    config: Config, store: ensemble.Store, on_chunk: Callable[[], None]
) -> "xarray.Dataset":
    """All runs of all problems along one dim, "run": settings, predictors and outcomes.

    Reads finished chunks from `store`, adds others to it, and calls `on_chunk()` after each.
    """
    import xarray

    parts = []
    for name in config.problems:
        for batch_size in GRIDS[name].step_sizes:
            chunk = f"{toys.fingerprint(config)}-{name}-{batch_size}"
            part = store.get(chunk)
            if part is None:
                part = simulate_one(config, name, batch_size, on_chunk)
                store[chunk] = part
            parts.append(part)
    whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return xarray.Dataset({key: ("run", values) for key, values in whole.items()})


def simulate_one(
    config: Config, name: str, batch_size: int, on_chunk: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Settings, predictors and outcomes [runs] of all runs of a problem with one batch size.

    Runs that diverged have no predictors and outcomes: NaN.
    """
    toy, grid = problems.PROBLEMS[name](), GRIDS[name]
    axes = train.grid(step_size=grid.step_sizes[batch_size], decay=np.arange(len(DECAYS)))
    share, factor = np.transpose(DECAYS)[:, axes["decay"]]
    decay_step = (share * grid.num_steps).astype(int)
    points = toy_runs.Schedule(
        step_size=np.asarray(axes["step_size"]) / grid.warmup,
        warmup_gain=(grid.warmup - 1) / share,
        warmup_exponent=np.ones_like(share),
        decay_step=decay_step,
        decay_factor=factor,
        init_scale=np.ones_like(share),
    )
    at = np.rint(np.linspace(0, grid.num_steps - 1, RECORDS)).astype(int)
    run = toy_runs.make_run(
        toy,
        num_steps=grid.num_steps,
        batch_size=batch_size,
        probes=[(toy.measure, at), (toy_runs.snapshot, at)],
        gd_jitter=1e-9,  # as in the other experiments
    )
    measured, snapshots = train.sweep(
        run,
        toy_runs.seed_keys(config.seed, config.seeds),
        points,
        **toy.sweep_options,
        on_chunk=lambda done: on_chunk(),
    )
    diverged = ensemble.diverged(measured["train_loss"])[..., -1]
    rank = ensemble.of_snapshots(toy, toy.spectra)(snapshots[:, :, -1:])["rank"][..., 0]
    before = at < decay_step[:, None]  # [points, records]
    used = before & ~diverged[..., None] & (measured["train_loss"] > FITTED)
    curvature = ensemble.curvature_of_snapshots(toy, batch_size)(
        np.where(used[..., None], snapshots, np.nan)  # others are not measured
    )
    sizes = jax.vmap(lambda point: jax.vmap(toy_runs.step_size(point, toy, grid.num_steps))(at))
    half = np.asarray(sizes(points)) / 2
    batch, full = half * curvature["batch_sharpness"], half * curvature["sharpness"]
    end = {key: values[..., -1] for key, values in measured.items()}
    sparsity = end["support"] / toy.train.x.shape[1] if "support" in end else end["sparsity_1"]
    tested = not np.array_equal(toy.train.x, toy.test.x)
    found = {
        "edge_time": ((batch >= config.at_edge) & used).mean(-1),
        "edge_level": mean(batch, used),
        "sharpness_level": mean(full, used),
        # The first half has the descent to the level.
        "noise_level": mean(measured["train_loss"], before & (2 * at >= decay_step[:, None])),
        "sparsity": sparsity,
        "rank": rank,
        "test_loss": end["test_loss"] if tested else np.nan,
    }
    settings = {
        "problem": name,
        "batch_size": batch_size,
        "step_size": axes["step_size"],
        "decay_time": share,
        "seed": np.arange(config.seeds)[:, None],
    }
    found = {key: np.where(diverged, np.nan, values) for key, values in found.items()}
    return {
        key: np.broadcast_to(values, diverged.shape).ravel()
        for key, values in (settings | found).items()
    }


def mean(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Over the last axis, `where` true and finite; NaN if there are none."""
    where = where & np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(where, values, 0.0).sum(-1) / where.sum(-1)


def partial_correlations(columns: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Correlations [k, k] of columns [runs, k] after subtracting the mean of each group.

    `groups` [runs] are codes from 0 on. These are the partial correlations given the group, as a
    category; of ranks, and with one group, they are Spearman's.
    """
    members = np.eye(groups.max() + 1)[groups]
    means = (members.T @ columns) / np.maximum(members.sum(0), 1)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN for columns that don't vary
        return np.corrcoef((columns - means[groups]).T)


def correlate(config: Config, dataset: "xarray.Dataset") -> list[dict[str, Any]]:
    """A row per problem, predictor and outcome: rank correlations with bootstrap intervals.

    Seeds are resampled, with all of their runs: those of one seed are not independent.
    """
    from scipy.stats import rankdata

    rows = []
    for problem in config.problems:
        runs = dataset.isel(run=np.flatnonzero(dataset["problem"] == problem))
        # The test points of 1d are those of training.
        outcomes = [name for name in OUTCOMES if np.isfinite(runs[name]).any()]
        columns = np.stack([runs[name].values for name in [*PREDICTORS, *outcomes]], 1)
        finite = np.isfinite(columns).all(1)
        runs, columns = runs.isel(run=np.flatnonzero(finite)), columns[finite]
        codes = {}
        for control, keys in CONTROLS.items():
            settings = np.stack([runs["seed"] * 0, *(runs[key] for key in keys)], 1)
            codes[control] = np.unique(settings, axis=0, return_inverse=True)[1].ravel()
        members = [np.flatnonzero(runs["seed"] == seed) for seed in range(config.seeds)]
        drawn = np.random.default_rng(config.seed).integers(
            config.seeds, size=(config.resamples, config.seeds)
        )
        samples = [np.arange(len(columns))]
        samples += [np.concatenate([members[seed] for seed in seeds]) for seeds in drawn]
        found: dict[str, list] = {control: [] for control in CONTROLS}
        for sample in samples:
            ranks = rankdata(columns[sample], axis=0)
            for control, groups in codes.items():
                found[control].append(partial_correlations(ranks, groups[sample]))
        for i, predictor in enumerate(PREDICTORS):
            for j, outcome in enumerate(outcomes, len(PREDICTORS)):
                row: dict[str, Any] = {
                    "problem": problem,
                    "predictor": predictor,
                    "outcome": outcome,
                }
                for control, matrices in found.items():
                    value, *others = (matrix[i, j] for matrix in matrices)
                    low, high = plots.percentiles(np.array(others)[:, None], (2.5, 97.5)).ravel()
                    row[control] = {"value": value, "low": low, "high": high}
                rows.append(row)
    return rows


def show(folder: Path, config: Config, dataset: "xarray.Dataset", rows: Sequence[dict]) -> None:
    """Prints the number of runs, the table, and the folder."""
    from rich.table import Table

    table = Table(
        *("problem", "before the decay", "at the end", *CONTROLS),
        title=f"Rank correlations [95 % intervals over {config.seeds} seeds]",
        caption="Sharpness is relative to 2 / η; features are the share that is active.",
    )
    for row in rows:
        found = [row[control] for control in CONTROLS]
        cells = [f"{x['value']:+.2f} [{x['low']:+.2f}, {x['high']:+.2f}]" for x in found]
        names = PREDICTORS[row["predictor"]], OUTCOMES[row["outcome"]]
        table.add_row(row["problem"], *names, *cells)
    for name in config.problems:
        missing = np.isnan(dataset["rank"].values[dataset["problem"] == name])
        share = f"{missing.mean():.0%} diverged and are left out"
        terminal.show(f"{name}: {missing.size} runs; {share}.")
    terminal.show(table, folder)


def draw(stem: Path, config: Config, dataset: "xarray.Dataset", rows: Sequence[dict]) -> list[Path]:
    """Draws every outcome over the level of batch sharpness, a point per run, by batch size."""
    panels = []
    order = lambda row: list(OUTCOMES).index(row["outcome"])  # a column per problem
    for row in sorted((row for row in rows if row["predictor"] == "edge_level"), key=order):
        outcome = row["outcome"]
        look = tables.QUANTITIES["sparsity_1" if outcome == "sparsity" else outcome]
        runs = dataset.isel(run=np.flatnonzero(dataset["problem"] == row["problem"]))
        points = {}
        kinds = {1: "b = 1", len(problems.PROBLEMS[row["problem"]]().train.y): "all examples"}
        for size in np.unique(runs["batch_size"]):
            of = runs.isel(run=np.flatnonzero(runs["batch_size"] == size))
            here = (of["edge_level"].values, look.scale * of[outcome].values)
            points[kinds.get(int(size), "small batches")] = here
        raw, given = (row[control]["value"] for control in ("all runs", "given η"))
        panels.append(
            plots.Panel(
                f"{row['problem']}: ρ = {raw:+.2f}, given η {given:+.2f}",
                AXES[outcome],
                {},
                xlabel="batch sharpness · η / 2 before the decay",
                points=points,
                marks={EDGE: [1.0]},
                log_y=look.log,
            )
        )
    title, columns = "Every point is a run", len(config.problems)
    return plots.figure(stem, panels, columns=columns, title=title, colours={EDGE: "black"})


if __name__ == "__main__":
    main()
