"""A toy problem over step size x a second axis x seeds: what is learned, and how runs end.

python -m experiments.phase_diagram                                    # D1 over step size x decay
python -m experiments.phase_diagram --problem two-layer --axis init_scale \\
    --values 0.25 0.5 1 2 --step_sizes 0.05 0.1 0.2 0.3 0.4
python -m experiments.phase_diagram --problem diagonal-small --axis batch_size --values 1 4 20 40
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.figures import maps, plots, terminal
from experiments.launch import cli, devices, hosts, ranges
from experiments.launch.hosts import ALONE, Hosts
from experiments.launch.ranges import AboveMinusOne, Count, Positive, Range, Seed, Share
from experiments.storage import records
from experiments.toy import chunks, config as toys, ensemble, problems, run as toy_runs
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


@dataclass(frozen=True)
class Config:
    """Every pair of a step size and a value of the axis, `seeds` times."""

    problem: Literal[
        "diagonal", "diagonal-small", "diagonal-plane", "1d", "two-layer", "three-layer"
    ] = "diagonal"
    """Which toy problem: data and network of the paper's settings."""
    axis: Literal["batch_size", "init_scale", "decay_time", "decay_factor", "warmup_gain"] = (
        "decay_time"
    )
    """What the second axis varies."""
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
    """Examples per step, unless that is the axis; all of them is gradient descent."""
    init_scale: Positive = 1.0
    """Multiplies the paper's initial weights, unless that is the axis."""
    decay_time: Share = 0.5
    """Share of the run after which the step size decays, unless that is the axis; 1 is never."""
    decay_factor: Positive = 4.0
    """What the step size is divided by then, unless that is the axis."""
    warmup_gain: AboveMinusOne = 0.0
    """Until it decays the step size grows as 1 + gain * step / num_steps; unless the axis."""
    trend_records: Annotated[int, Range(8)] = 64
    """Losses before the decay that classify the outcome, evenly spaced."""
    exp_name: str = ""
    """Name of the run's folder; empty: PROBLEM-AXIS."""
    runs_dir: str = "runs"
    """Where run folders go."""
    hosts: Hosts = ALONE


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    devices.set_up_toys()
    cli.main(Config, run, argv)


def run(config: Config) -> "xarray.Dataset":
    """Runs the grid into its folder, or reads it if finished; then prints and draws."""
    hosts.join(config.hosts)
    ranges.check(config)
    toy = problems.PROBLEMS[config.problem]()
    validate(config, toy)
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


def validate(config: Config, toy: problems.Toy) -> None:
    """Raises ValueError for flags that don't fit each other or the problem."""
    if not config.values or not config.step_sizes:
        raise ValueError("--values and --step_sizes need one value or more.")
    flag = f"--values of --axis {config.axis}"
    for value in config.values:
        ranges.declared(Config)[config.axis].check(flag, value)
    sizes, flag = (
        (config.values, flag)
        if config.axis == "batch_size"
        else ((config.batch_size,), "--batch_size")
    )
    for size in sizes:
        if size != int(size) or size > len(toy.train.y):
            examples = f"the {len(toy.train.y)} training examples"
            raise ValueError(f"{flag} is {size:g}; choose an integer up to {examples}.")
    times = config.values if config.axis == "decay_time" else (config.decay_time,)
    steps = int(min(times) * config.num_steps)
    if steps < config.trend_records + 8:
        raise ValueError(
            f"--num_steps {config.num_steps} has {steps} steps before the first decay; the outcome "
            f"needs --trend_records {config.trend_records} and 8 more."
        )


def simulate(
    config: Config,
    toy: problems.Toy,
    store: chunks.Store | None = None,
    on_chunk: Callable[[], None] = lambda: None,
) -> "xarray.Dataset":
    """One program per batch size and decay time, whose records are at fixed steps.

    Finished chunks are found in `store`, others are added; `on_chunk()` is called after each.
    """
    static = config.axis in ("batch_size", "decay_time")
    columns = [[value] for value in config.values] if static else [list(config.values)]
    keys = toy_runs.seed_keys(config.seed, config.seeds)
    parts = [_columns(config, toy, keys, values, store, on_chunk) for values in columns]
    results = {name: np.concatenate([part[name] for part in parts], axis=2) for name in parts[0]}
    flat = {name: array.reshape(len(keys), -1) for name, array in results.items()}
    axes = {"step_size": np.array(config.step_sizes), config.axis: np.array(config.values)}
    return train.labelled(flat, axes=axes)


def _columns(
    config: Config,
    toy: problems.Toy,
    keys: jax.Array,
    values: Sequence[float],
    store: chunks.Store | None,
    on_chunk: Callable[[], None],
) -> dict:
    """Some values of the second axis: arrays [seeds, step sizes, values]."""
    of = lambda name: values if name == config.axis else [getattr(config, name)]
    decay_step = int(of("decay_time")[0] * config.num_steps)
    end = min(decay_step, config.num_steps - 1)
    trend = np.rint(np.linspace(0, end - 8, config.trend_records)).astype(int)
    at = np.unique(np.concatenate([trend, np.arange(end - 8, end), [config.num_steps - 1]]))
    batch_size = int(of("batch_size")[0])
    run = toy_runs.make_run(
        toy,
        num_steps=config.num_steps,
        batch_size=batch_size,
        at=at,
        snapshots_at=np.array([0, config.num_steps - 1]),
        gd_jitter=1e-9,
        watched=False,
    )
    scanned = ("warmup_gain", "decay_factor", "init_scale")
    grid = train.grid(step_size=config.step_sizes, **{name: of(name) for name in scanned})
    fill = lambda value: jnp.full(len(grid["step_size"]), value)
    points = toy_runs.Schedule(warmup_exponent=fill(1.0), decay_step=fill(decay_step), **grid)
    losses, snapshots = train.sweep(
        run,
        keys,
        points,
        on_chunk=lambda done: on_chunk(),
        store=store,
        fingerprint=f"{toys.fingerprint(config)} {batch_size}",
    )
    ends = _observe(toy, snapshots) | ensemble.make_spectra(toy)(snapshots[:, :, 1:])
    last = {name: array[..., -1] for name, array in (ends | losses).items()}
    trend_losses = jnp.asarray(losses["train_loss"][..., np.isin(at, trend)])
    tail = jnp.asarray(losses["train_loss"][..., -9:-1])
    twice = lambda function: jax.vmap(jax.vmap(function))
    last["noise_level"] = twice(measure.noise_level)(trend_losses[..., config.trend_records // 2 :])
    diverged = ~np.isfinite(last["train_loss"])
    last = {name: np.where(diverged, np.nan, array) for name, array in last.items()}
    outcome = np.asarray(twice(measure.outcome)(trend_losses, tail))
    last["outcome"] = np.where(diverged, measure.OUTCOMES.index("diverged"), outcome)
    shape = (len(keys), len(config.step_sizes), len(values))
    return {name: array.reshape(shape) for name, array in last.items()}


def _observe(toy: problems.Toy, snapshots: np.ndarray) -> dict[str, np.ndarray]:
    """`toy.watch` at the end of each run, [seeds, points, 1]; of zeros where it diverged."""
    flat = jnp.nan_to_num(snapshots.reshape(-1, *snapshots.shape[2:]), posinf=0.0, neginf=0.0)
    params = lambda theta: toy_runs.parameters(toy, theta)
    watch = lambda key, ends: toy.watch(params(ends[0]), params(ends[1]))
    seen = train.sweep(watch, toy_runs.seed_keys(0, 1), flat)
    return {name: array.reshape(*snapshots.shape[:2], 1) for name, array in seen.items()}


def draw(folder: Path, config: Config, dataset: "xarray.Dataset") -> list[Path]:
    """Medians over the seeds that did not diverge, and the outcome most of them had."""
    x, y = np.array(config.step_sizes), np.array(config.values)

    def panel(title: str, z: np.ndarray, zlabel: str = "", **look) -> maps.Map:
        return maps.Map(title, "step size", AXES[config.axis], x, y, z, zlabel, **look)

    def middle(name: str) -> np.ndarray:
        values = dataset[name].values.reshape(config.seeds, -1)
        return plots.percentiles(values, (50,))[0].reshape(len(x), len(y)).T

    codes = dataset["outcome"].values
    counts = np.stack([(codes == code).sum(0) for code in range(len(measure.OUTCOMES))])
    panels = [
        panel("Outcome of most seeds", counts.argmax(0).T, classes=measure.OUTCOMES),
        panel("Diverged runs", 100 * (counts[-1] / config.seeds).T, "share (%)"),
        panel("Loss before the decay", middle("noise_level"), "training loss", log_z=True),
        panel("Test loss at the end", middle("test_loss"), "test loss", log_z=True),
        panel("Rank of the Jacobian", middle("rank"), "rank"),
    ]
    if "support" in dataset:
        panels.append(panel("Support of the predictor", middle("support"), "entries"))
    for name in sorted(str(name) for name in dataset if str(name).startswith("sparsity_")):
        title = f"Feature sparsity, layer {name.removeprefix('sparsity_')}"
        panels.append(panel(title, 100 * middle(name), "active entries (%)"))
    title = f"{config.problem}: medians over {config.seeds} seeds"
    return maps.figure(folder / "figures" / "phase_diagram", panels, columns=3, title=title)


if __name__ == "__main__":
    main()
