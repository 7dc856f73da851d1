"""Phase diagrams: outcomes and metrics of a toy problem over step size x a second axis.

    python -m experiments.phase_diagram  # D1 over step size x decay
    python -m experiments.phase_diagram --problem two-layer --axis init_scale \\
        --values 0.25 0.5 1 2 --step_sizes 0.05 0.1 0.2 0.3 0.4
    python -m experiments.phase_diagram --problem diagonal-small --axis batch_size --values 1 4
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.figures import maps, plots, tables, terminal
from experiments.launch import cli, devices, hosts, ranges
from experiments.launch.hosts import ALONE, Hosts
from experiments.launch.ranges import AboveMinusOne, Count, Positive, Range, Seed, Share
from experiments.storage import records
from experiments.toy import config as toys, ensemble, problems, run as toy_runs
from sgd_sparse_jax import measure, train

if TYPE_CHECKING:
    import xarray

AXES = {
    "batch_size": "batch size",
    "init_scale": "scale of the initialization / paper's",
    "decay_time": "share of the run before the decay",
    "decay_factor": "factor of the decay",
    "warmup_gain": "gain of the warm-up",
}
TAIL = 8  # consecutive losses before the decay, for the detection of period 2
MAPS = ("noise_level", "test_loss", "rank", "support", "sparsity_1", "sparsity_2")


@dataclass(frozen=True)
class Config:
    """Runs a toy problem for every pair of a step size and a value of a second axis."""

    problem: Literal[
        "diagonal", "diagonal-small", "diagonal-plane", "1d", "two-layer", "three-layer"
    ] = "diagonal"
    """Toy problem: data and network of one of the paper's settings."""
    axis: Literal["batch_size", "init_scale", "decay_time", "decay_factor", "warmup_gain"] = (
        "decay_time"
    )
    """Parameter on the second axis."""
    values: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    """Values of the second axis."""
    step_sizes: tuple[Positive, ...] = (0.05, 0.1, 0.15, 0.2, 0.23, 0.25, 0.265, 0.28, 0.29, 0.3)
    """Values of the first axis."""
    seeds: Count = 16
    """Seeds of every pair."""
    seed: Seed = 0
    """Base seed: seed i is fold_in(key(seed), i)."""
    num_steps: Count = 20_001
    """Steps of each run."""
    batch_size: Count = 1
    """Examples per step, unless on the axis; all examples: gradient descent."""
    init_scale: Positive = 1.0
    """Multiplies the paper's initial weights, unless on the axis."""
    decay_time: Share = 0.5
    """Share of the run after which the step size decays, unless on the axis; 1: never."""
    decay_factor: Positive = 4.0
    """Factor that divides the step size at the decay, unless on the axis."""
    warmup_gain: AboveMinusOne = 0.0
    """Until the decay, the step size grows as 1 + gain * step / num_steps; unless on the axis."""
    trend_records: Annotated[int, Range(8)] = 64
    """Number of evenly spaced losses before the decay that classify the outcome."""
    exp_name: str = ""
    """Name of the run's folder; empty: PROBLEM-AXIS."""
    runs_dir: str = "runs"
    """Folder that contains the run folders."""
    hosts: Hosts = ALONE


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    devices.set_up_toys()
    cli.main(Config, run, argv)


def run(config: Config) -> "xarray.Dataset":
    """Runs the grid, or loads it if finished; then prints outcomes and draws maps."""
    hosts.join(config.hosts)
    ranges.check(config)
    toy = problems.PROBLEMS[config.problem]()
    validate(config, len(toy.train.y))
    name = config.exp_name or f"{config.problem}-{config.axis}"
    folder = records.run_folder(config.runs_dir, "phase_diagram", name)
    dataset = ensemble.in_folder(folder, config, lambda *how: simulate(config, toy, *how))
    hosts.leave_the_rest_to_first()
    outcomes = dataset["outcome"].values
    shares = {name: float((outcomes == code).mean()) for code, name in enumerate(measure.OUTCOMES)}
    records.write_json(folder / "summary.json", {"outcomes": shares})
    terminal.show(", ".join(f"{name} {share:.0%}" for name, share in shares.items()), folder)
    draw(folder, config, dataset)
    return dataset


def validate(config: Config, examples: int) -> None:
    """Raises ValueError for flags that contradict each other or the number of examples."""
    for value in config.values:
        declared = ranges.declared(Config)[config.axis]
        declared.check(f"--values of --axis {config.axis}", value)
    of = lambda name: config.values if name == config.axis else (getattr(config, name),)
    for size in of("batch_size"):
        if size != int(size) or size > examples:
            raise ValueError(
                f"--batch_size (with --axis batch_size one of --values) is {size:g}; choose an "
                f"integer up to {examples}, the training examples."
            )
    steps = int(min(of("decay_time")) * config.num_steps)
    if steps < config.trend_records + TAIL:
        raise ValueError(
            f"--num_steps {config.num_steps} has {steps} steps before the first decay; the outcome "
            f"needs --trend_records {config.trend_records} and {TAIL} more."
        )


def simulate(
    config: Config, toy: problems.Toy, store: ensemble.Store, on_chunk: Callable[[], None]
) -> "xarray.Dataset":
    """Runs every step size x value of the axis x seed, in one program per batch size.

    Reads finished chunks from `store`, adds others to it, and calls `on_chunk()` after each.
    """
    axes = {"step_size": config.step_sizes, config.axis: config.values}
    grid = {name: np.asarray(values) for name, values in train.grid(**axes).items()}
    count = len(grid["step_size"])
    of = lambda name: grid.get(name, np.full(count, getattr(config, name)))
    decay_steps = (of("decay_time") * config.num_steps).astype(int)
    points = toy_runs.Schedule(
        step_size=grid["step_size"],
        warmup_gain=of("warmup_gain"),
        warmup_exponent=np.ones(count),
        decay_step=decay_steps,
        decay_factor=of("decay_factor"),
        init_scale=of("init_scale"),
    )
    # Steps of the losses before each point's decay, [points, records]: evenly spaced, then
    # consecutive. Runs record those of all decay times, which thus share a program.
    ends, last = np.minimum(decay_steps, config.num_steps - 1), np.array([config.num_steps - 1])
    trend = np.rint(np.linspace(0, ends - TAIL, config.trend_records, axis=1)).astype(int)
    held = np.concatenate([trend, ends[:, None] - np.arange(TAIL, 0, -1)], axis=1)
    at = np.unique(held)
    train_loss = lambda initial, params: toy.mean_loss(params, toy.train)
    keys = toy_runs.seed_keys(config.seed, config.seeds)
    spectra = ensemble.of_snapshots(toy, toy.spectra)
    results: dict[str, np.ndarray] = {}
    for batch_size in map(int, np.unique(of("batch_size"))):
        members = np.flatnonzero(of("batch_size") == batch_size)
        run = toy_runs.make_run(
            toy,
            num_steps=config.num_steps,
            batch_size=batch_size,
            probes=[(train_loss, at), (toy.measure, last), (toy_runs.snapshot, last)],
            gd_jitter=1e-9,  # as in the other experiments
        )
        losses, found, snapshots = train.sweep(
            run,
            keys,
            toy_runs.Schedule(*(leaf[members] for leaf in points)),
            **toy.sweep_options,
            on_chunk=lambda done: on_chunk(),
            store=store,
            fingerprint=f"{toys.fingerprint(config)} {batch_size}",
        )
        found = {name: values[..., 0] for name, values in (found | spectra(snapshots)).items()}
        places = np.searchsorted(at, held[members])[None]
        found["held"] = np.take_along_axis(losses, places, axis=-1)
        for name, values in found.items():
            shape = (config.seeds, count, *values.shape[2:])
            results.setdefault(name, np.empty(shape))[:, members] = values
    return train.labelled(_with_outcomes(results, config.trend_records), axes=axes)


def _with_outcomes(results: dict[str, np.ndarray], trend_records: int) -> dict[str, np.ndarray]:
    """Replaces losses by noise level and outcome; metrics of diverged runs are NaN."""
    twice = lambda function: jax.vmap(jax.vmap(function))
    trend, tail = np.split(jnp.asarray(results.pop("held")), [trend_records], axis=-1)
    # The first half of the trend contains the descent to the level.
    results["noise_level"] = twice(measure.noise_level)(trend[..., trend_records // 2 :])
    diverged = ~np.isfinite(results["train_loss"])
    outcome = np.asarray(twice(measure.outcome)(trend, tail))
    results = {name: np.where(diverged, np.nan, values) for name, values in results.items()}
    return results | {"outcome": np.where(diverged, measure.OUTCOMES.index("diverged"), outcome)}


def draw(folder: Path, config: Config, dataset: "xarray.Dataset") -> list[Path]:
    """Draws medians over the seeds that did not diverge, and the most frequent outcome."""
    x, y = np.array(config.step_sizes), np.array(config.values)

    def panel(title: str, z: np.ndarray, zlabel: str = "", **look) -> maps.Map:
        return maps.Map(title, "step size", AXES[config.axis], x, y, z.T, zlabel, **look)

    # Not the median of codes: between converged and period-2, that is stabilized.
    codes = dataset["outcome"].values
    counts = np.stack([(codes == code).sum(0) for code in range(len(measure.OUTCOMES))])
    panels = [
        panel("Outcome of most seeds", counts.argmax(0), classes=measure.OUTCOMES),
        panel("Diverged runs", 100 * (counts[-1] / config.seeds), "share (%)"),
    ]
    for name in MAPS:
        if name in dataset:
            look = tables.QUANTITIES[name]
            (median,) = look.scale * plots.percentiles(dataset[name].values, (50,))
            panels.append(panel(look.title, median, look.unit, log_z=look.log))
    title = f"{config.problem}: medians over {config.seeds} seeds"
    return maps.figure(folder / "figures" / "phase_diagram", panels, columns=3, title=title)


if __name__ == "__main__":
    main()
