"""Any toy problem over step size x a second axis x seeds: what is learned, and what becomes of it.

python -m experiments.phase_diagram                                    # D1 over step size x decay
python -m experiments.phase_diagram --problem two-layer --axis init_scale \\
    --values 0.25 0.5 1 2 --step_sizes 0.05 0.1 0.2 0.3 0.4
python -m experiments.phase_diagram --problem diagonal-small --axis batch_size --values 1 4 20 40
"""

import time
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
from experiments.launch.signals import deferred
from experiments.storage import npz, records
from experiments.toy import chunks, ensemble, problems, run as toy_runs
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
    """Seed of the seeds: seed i is fold_in(key(seed), i)."""
    num_steps: Count = 20_001
    """Steps of each run."""
    batch_size: Count = 1
    """Examples per step, unless the axis says; all of them is gradient descent."""
    init_scale: Positive = 1.0
    """Multiplies the paper's initial weights, unless the axis says."""
    decay_time: Share = 0.5
    """Share of the run after which the step size decays, unless the axis says; 1 is never."""
    decay_factor: Positive = 4.0
    """What the step size is divided by then, unless the axis says."""
    warmup_gain: AboveMinusOne = 0.0
    """Until it decays the step size grows as 1 + gain * step / num_steps, unless the axis says."""
    trend_records: Annotated[int, Range(8)] = 64
    """Losses taken before the decay to tell the outcome, evenly spaced."""
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
    if config.problem not in problems.PROBLEMS:
        known = ", ".join(problems.PROBLEMS)
        raise ValueError(f"Unknown --problem {config.problem!r}; known are {known}.")
    toy = problems.PROBLEMS[config.problem]()
    validate(config, toy)
    name = config.exp_name or f"{config.problem}-{config.axis}"
    folder = records.run_folder(config.runs_dir, "phase_diagram", name)
    with hosts.together(folder), ensemble.alone_in(folder), deferred() as asked:
        dataset = results(config, toy, folder, lambda: ensemble.stop_if_asked(asked, folder))
    hosts.leave_the_rest_to_first()
    shares = {
        name: float((dataset["outcome"].values == code).mean())
        for code, name in enumerate(measure.OUTCOMES)
    }
    records.write_json(folder / "summary.json", {"outcomes": shares})
    terminal.show(", ".join(f"{name} {share:.0%}" for name, share in shares.items()), folder)
    draw(folder, config, dataset)
    return dataset


def results(
    config: Config, toy: problems.Toy, folder: Path, on_chunk: Callable[[], None]
) -> "xarray.Dataset":
    """The run's data, computed unless the folder holds them; chunk by chunk, as they are kept."""
    place = (config.runs_dir, "phase_diagram", folder.name)
    hosts.on_first(lambda: records.open_run(*place, config, may_change=("runs_dir", "hosts")))
    if ensemble.is_finished(folder):
        return found(config, folder)
    hosts.on_first(lambda: ensemble.start(folder, config.seed))
    began = time.perf_counter()
    dataset = simulate(config, toy, lambda name: chunks.Chunks(folder, name), on_chunk)
    hosts.on_first(lambda: ensemble.finish(folder, dataset, began))
    return dataset


def found(config: Config, folder: Path) -> "xarray.Dataset":
    """The data of a finished run; ValueError where they aren't over the seeds and axes asked."""
    dataset = npz.load_dataset(folder)
    axes = {"step_size": config.step_sizes, config.axis: config.values}
    over = ("seed", *axes)
    drawn = {"outcome", "noise_level", "train_loss", "test_loss", "rank"}
    if (
        not all(dataset.get(name, dataset).dims == over for name in drawn | set(dataset))
        or dataset.sizes["seed"] != config.seeds
        or not all(np.array_equal(dataset[axis], asked) for axis, asked in axes.items())
    ):
        raise ValueError(
            f"{folder / 'arrays.npz'} isn't what this run gives; remove {folder} and run again."
        )
    return dataset


def validate(config: Config, toy: problems.Toy) -> None:
    """Raises ValueError, in the words of the flags, for what can't be run."""
    if config.axis not in AXES:
        raise ValueError(f"Unknown --axis {config.axis!r}; known are {', '.join(AXES)}.")
    if not config.values or not config.step_sizes:
        raise ValueError("--values and --step_sizes need one value or more.")
    ranges.check(config)
    for value in config.values:
        ranges.declared(Config)[config.axis].check(f"--values of --axis {config.axis}", value)
    flag, values = "--batch_size", (config.batch_size,)
    if config.axis == "batch_size":
        flag, values = "--values of --axis batch_size", config.values
    n = len(toy.train.y)
    for value in values:
        if value != int(value) or value > n:
            raise ValueError(
                f"{flag} is {value:g}; it must be a whole number from 1 to the {n} training "
                "examples."
            )
    first = min(config.values if config.axis == "decay_time" else (config.decay_time,))
    if int(first * config.num_steps) < config.trend_records + 8:
        raise ValueError(
            f"--num_steps {config.num_steps} has {int(first * config.num_steps)} steps before its "
            f"first decay, and --trend_records {config.trend_records} need a few more than that."
        )
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError('Float64 is off; call jax.config.update("jax_enable_x64", True) first.')


def simulate(
    config: Config,
    toy: problems.Toy,
    kept: Callable[[str], ensemble.Kept] = lambda name: {},
    on_chunk: Callable[[], None] = lambda: None,
) -> "xarray.Dataset":
    """One program per batch size and decay time, whose records are at fixed steps.

    `kept(name)` has a program's finished chunks and gets the others.
    """
    static = config.axis in ("batch_size", "decay_time")
    columns = [[value] for value in config.values] if static else [list(config.values)]
    keys = toy_runs.seed_keys(config.seed, config.seeds)
    parts = [
        _columns(config, toy, keys, values, kept(f"column{number}"), on_chunk)
        for number, values in enumerate(columns)
    ]
    results = {name: np.concatenate([part[name] for part in parts], axis=2) for name in parts[0]}
    flat = {name: array.reshape(len(keys), -1) for name, array in results.items()}
    axes = {"step_size": np.array(config.step_sizes), config.axis: np.array(config.values)}
    return train.labelled(flat, axes=axes)


def _columns(
    config: Config,
    toy: problems.Toy,
    keys: jax.Array,
    values: Sequence[float],
    kept: ensemble.Kept,
    on_chunk: Callable[[], None],
) -> dict:
    """Some values of the second axis: arrays [seeds, step sizes, values]."""
    of = lambda name: values if name == config.axis else [getattr(config, name)]
    decay_step = int(of("decay_time")[0] * config.num_steps)
    end = min(decay_step, config.num_steps - 1)
    trend = np.rint(np.linspace(0, end - 8, config.trend_records)).astype(int)
    at = np.unique(np.concatenate([trend, np.arange(end - 8, end), [config.num_steps - 1]]))
    one_run = toy_runs.make_run(
        toy,
        num_steps=config.num_steps,
        batch_size=int(of("batch_size")[0]),
        at=at,
        snapshots_at=np.array([0, config.num_steps - 1]),
        gd_jitter=1e-9,
        watched=False,
    )
    grid = train.grid(
        step_size=config.step_sizes,
        warmup_gain=of("warmup_gain"),
        decay_factor=of("decay_factor"),
        init_scale=of("init_scale"),
    )
    count = len(grid["step_size"])
    fixed = {"warmup_exponent": jnp.ones(count), "decay_step": jnp.full(count, decay_step)}
    points = toy_runs.Schedule(**(grid | fixed))
    rows, snapshots = train.sweep(
        one_run, keys, points, on_chunk=lambda done: on_chunk(), kept=kept
    )
    seen = _observe(toy, snapshots) | ensemble.make_spectra(toy)(snapshots[:, :, 1:])
    last = {name: values[..., -1] for name, values in seen.items()}
    before_decay = rows["train_loss"][..., np.isin(at, trend)], rows["train_loss"][..., -9:-1]
    twice = lambda function: jax.vmap(jax.vmap(function))
    last["outcome"] = np.asarray(twice(measure.outcome)(*map(jnp.asarray, before_decay)))
    half = jnp.asarray(before_decay[0][..., config.trend_records // 2 :])
    last["noise_level"] = np.asarray(twice(measure.noise_level)(half))
    last["train_loss"], last["test_loss"] = (rows[f"{w}_loss"][..., -1] for w in ("train", "test"))
    gone = ~np.isfinite(last["train_loss"])
    last["outcome"] = np.where(gone, len(measure.OUTCOMES) - 1, last["outcome"])
    masked = {name: np.where(gone, np.nan, value) for name, value in last.items()}
    masked["outcome"] = last["outcome"]
    shape = (len(keys), len(config.step_sizes), len(values))
    return {name: value.reshape(shape) for name, value in masked.items()}


def _observe(toy: problems.Toy, snapshots: np.ndarray) -> dict[str, np.ndarray]:
    """What the problem watches, at the end of each run [seeds, points, 1]; of lost runs, 0s."""
    flat = jnp.nan_to_num(snapshots.reshape(-1, *snapshots.shape[2:]), posinf=0.0, neginf=0.0)

    def watch(key, ends):
        return toy.watch(toy_runs.parameters(toy, ends[0]), toy_runs.parameters(toy, ends[1]))

    seen = train.sweep(watch, toy_runs.seed_keys(0, 1), flat)
    return {name: value.reshape(*snapshots.shape[:2], 1) for name, value in seen.items()}


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
