"""Diagonal nets f(x) = <u * v, x>: large steps find sparser predictors (D1 of the paper's toys).

python -m experiments.diag_nets                 # four schedules, 32 seeds, under a minute
python -m experiments.diag_nets --seeds 256 --exp_name many
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from experiments import cli, plots, records
from sgd_sparse_jax import data, measure
from sgd_sparse_jax._types import Batch, TrainState
from sgd_sparse_jax.models import DiagonalNet
from sgd_sparse_jax.train import (
    Gauge,
    half_squared,
    init_state,
    make_segment,
    make_step,
    make_sweep,
    piecewise_decay,
    record_run,
    with_replacement,
)

SUPPORT_THRESHOLD = 1e-50  # the definitions of the paper's page: float64 is part of them
RANK_TOLERANCE = 1e-15


@dataclass(frozen=True)
class Config:
    """D1: n=80 examples in d=200 dimensions, a 20-sparse target, single-example SGD."""

    exp_name: str = "d1"
    """Name of the run's folder, runs/diag_nets/EXP_NAME."""
    seeds: int = 32
    """SGD seeds per schedule; the data are the same for all."""
    seed: int = 0
    """Seed of the SGD keys: seed i of the ensemble is fold_in(key(seed), i)."""
    step_sizes: tuple[float, ...] = (0.25, 0.282, 0.282, 0.282)
    """One step size per schedule."""
    decay_times: tuple[float, ...] = (1.0, 0.1, 0.3, 0.5)
    """Share of the run after which each schedule decays; 1 is never."""
    decay_factors: tuple[float, ...] = (1.0, 4.8, 3.4, 1.5)
    """What each schedule divides its step size by."""
    num_steps: int = 100_001
    """SGD steps of each run."""
    n: int = 80
    """Training examples."""
    d: int = 200
    """Input dimension."""
    support: int = 20
    """Non-zero entries of the target."""
    data_seed: int = 0
    """Seed of the data (NumPy's legacy generator)."""
    batch_size: int = 1
    """Examples per step, drawn with replacement."""
    init_scale: float = 0.1
    """u at initialization; v is 0."""
    rank_records: int = 35
    """At how many of the records the Jacobian's rank is taken, spread evenly."""
    runs_dir: str = "runs"
    """Where run folders go."""


# Printed by the original's notebook for one seed: (test loss, train loss, support size).
PUBLISHED = (
    (3.5286e-3, 1.4216e-6, 200),
    (6.6e-4, 6.3e-5, 156),
    (2.8e-4, 6.0e-5, 89),
    (1.5e-4, 6.7e-5, 71),
)


class Schedule(NamedTuple):
    """Constant `step_size` up to and with step `decay_step`, then divided by `decay_factor`."""

    step_size: jax.Array
    decay_step: jax.Array
    decay_factor: jax.Array


class Result(NamedTuple):
    """Leaves have axes [seeds, schedules, records]; diverged runs are NaN from there on."""

    train_loss: np.ndarray
    test_loss: np.ndarray
    support: np.ndarray
    balancedness: np.ndarray
    rank: np.ndarray
    u: np.ndarray
    v: np.ndarray


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; one CPU device per core, or the accelerators that are there."""
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    jax.config.update("jax_enable_x64", True)
    cli.main(Config, run, argv)


def run(config: Config) -> Result:
    """Runs the sweep into its folder, or reads it where it is finished; draws and prints."""
    validate(config)
    folder = records.open_run(
        config.runs_dir, "diag_nets", config.exp_name, config, may_change=("runs_dir",)
    )
    if records.is_finished(folder):
        print(f"{folder} is finished: its results are shown again. (--exp_name starts another.)")
        result = Result(**{name: records.load_arrays(folder)[name] for name in Result._fields})
    else:
        devices = [f"{device.platform}:{device.device_kind}" for device in jax.devices()]
        records.start_manifest(folder, seed=config.seed, devices=devices)
        start = time.perf_counter()
        result = simulate(config)
        records.save_arrays(folder, result._asdict() | axes(config))
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # of a start that was killed
        for row in summary_rows(config, result):
            records.append_row(folder, row)
        records.finish_manifest(folder, wall_seconds=round(time.perf_counter() - start, 1))
    draw(folder, config, result)
    print_table(config, result)
    print(f"{folder}")
    return result


def validate(config: Config) -> None:
    """Raises ValueError, in the words of the flags, for what can't be run."""
    lengths = {len(config.step_sizes), len(config.decay_times), len(config.decay_factors)}
    if len(lengths) != 1 or not config.step_sizes:
        raise ValueError(
            f"--step_sizes has {len(config.step_sizes)} values, --decay_times "
            f"{len(config.decay_times)} and --decay_factors {len(config.decay_factors)}; "
            "give each schedule one of each."
        )
    at_least_one = ("seeds", "num_steps", "n", "d", "support", "batch_size", "rank_records")
    for field in at_least_one:
        if getattr(config, field) < 1:
            raise ValueError(f"--{field} is {getattr(config, field)}; it must be 1 or more.")
    for field in ("step_sizes", "decay_factors"):
        for value in getattr(config, field):
            if not 0 < value < np.inf:
                raise ValueError(f"--{field} holds {value}; each must be positive and finite.")
    for value in config.decay_times:
        if not 0 <= value <= 1:
            raise ValueError(f"--decay_times holds {value}; each is a share of the run, 0 to 1.")
    if config.support > config.d:
        raise ValueError(f"--support is {config.support}, more than --d {config.d}.")
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError('Float64 is off; call jax.config.update("jax_enable_x64", True) first.')


def simulate(config: Config) -> Result:
    """All seeds x schedules in one compiled program, a share of it on every device."""
    sweep = make_sweep(make_run(config), chunk=chunk_size(config))
    keys = jax.vmap(lambda i: jr.fold_in(jr.key(config.seed), i))(jnp.arange(config.seeds))
    with progress_bar(config.seeds * len(config.step_sizes)) as on_chunk:
        state, (losses, rank) = sweep(keys, schedules(config), on_chunk)
    diverged = ~np.isfinite(losses["train_loss"])
    masked = {name: np.where(diverged, np.nan, leaf) for name, leaf in losses.items()}
    where_rank = np.isin(record_steps(config), rank_steps(config))
    rank = np.where(diverged[..., where_rank], np.nan, rank)
    return Result(**masked, rank=rank, u=state.params["u"], v=state.params["v"])


def make_run(config: Config):
    """(key, schedule) -> final state, and the records of one run."""
    problem = data.sparse_regression(
        config.data_seed, n=config.n, d=config.d, support=config.support
    )
    train, test = jax.tree.map(jnp.asarray, (problem.train, problem.test))
    # The singular values of the Jacobian need R of X = QR alone: half the matrix, factored once.
    rank_input = jnp.linalg.qr(test.x[: min(2 * config.d, 1000)], mode="r")
    model = DiagonalNet(config.init_scale)

    def losses(state: TrainState):
        u, v = state.params["u"], state.params["v"]
        loss = lambda batch: half_squared(
            model.apply({"params": state.params}, batch.x)[0], batch.y
        ).mean()
        return {
            "train_loss": loss(train),
            "test_loss": loss(test),
            "support": measure.support_size(u, v, SUPPORT_THRESHOLD),
            "balancedness": measure.balancedness(u, v),
        }

    def rank(state: TrainState):
        jacobian = measure.diagonal_net_jacobian(rank_input, state.params["u"], state.params["v"])
        return measure.numerical_rank(jacobian, RANK_TOLERANCE)

    def run(key: jax.Array, schedule: Schedule):
        # The reference divides once step `decay_step` has been taken: the one after is the first.
        tx = optax.sgd(
            piecewise_decay(
                lambda step: schedule.step_size, [schedule.decay_step + 1], [schedule.decay_factor]
            )
        )
        segment = make_segment(
            make_step(model, half_squared, tx), lambda key, idx: Batch(train.x[idx], train.y[idx])
        )
        return record_run(
            key,
            with_replacement(config.n, config.batch_size),
            segment,
            init_state(key, model, tx, train.x),
            [Gauge(losses, record_steps(config)), Gauge(rank, rank_steps(config))],
            config.num_steps,
        )

    return run


def schedules(config: Config) -> Schedule:
    """The sweep's points, one per schedule."""
    return Schedule(
        jnp.asarray(config.step_sizes),
        jnp.asarray([int(share * config.num_steps) for share in config.decay_times]),
        jnp.asarray(config.decay_factors),
    )


def record_steps(config: Config) -> np.ndarray:
    """The first 100 steps, then 250 points over the whole run."""
    spread = np.rint(np.arange(249) * config.num_steps / 249).astype(int)
    return np.unique(np.concatenate([np.arange(min(100, config.num_steps)), spread]))


def rank_steps(config: Config) -> np.ndarray:
    """`rank_records` of the record steps, the first and the last among them."""
    at = record_steps(config)
    return at[np.unique(np.rint(np.linspace(0, len(at) - 1, config.rank_records)).astype(int))]


def chunk_size(config: Config) -> int:
    """Runs per device at a time: at most the 64 that fill a core, at least four turns a sweep."""
    total = config.seeds * len(config.step_sizes)
    return max(1, min(64, -(-total // (4 * jax.device_count()))))


def axes(config: Config) -> dict[str, np.ndarray]:
    """What the axes of the arrays mean, saved beside them."""
    return {
        "step": record_steps(config),
        "rank_step": rank_steps(config),
        "schedule": np.array(labels(config)),
        "seed": np.arange(config.seeds),
    }


def labels(config: Config) -> list[str]:
    """`η = 0.282, /3.4 at 30 %`, one per schedule."""
    return [
        f"η = {eta:g}, constant" if factor == 1 else f"η = {eta:g}, /{factor:g} at {time:.0%}"
        for eta, time, factor in zip(
            config.step_sizes, config.decay_times, config.decay_factors, strict=True
        )
    ]


def summary_rows(config: Config, result: Result) -> list[dict]:
    """Per schedule: the published numbers, and over seeds the 5th, 50th and 95th percentile."""
    published = PUBLISHED if is_the_papers(config) else [(None,) * 3] * len(config.step_sizes)
    rows = []
    for j, label in enumerate(labels(config)):
        row: dict = {"schedule": label, "seeds": config.seeds}
        row["share_diverged"] = float(np.mean(~np.isfinite(result.train_loss[:, j, -1])))
        for name, paper in zip(("test_loss", "train_loss", "support"), published[j], strict=True):
            low, middle, high = plots.percentiles(getattr(result, name)[:, j, -1:])[:, 0]
            row[name] = {"published": paper, "median": middle, "p5": low, "p95": high}
        low, middle, high = plots.percentiles(result.rank[:, j, -1:])[:, 0]
        row["rank"] = {"published": None, "median": middle, "p5": low, "p95": high}
        rows.append(row)
    return rows


def is_the_papers(config: Config) -> bool:
    """Whether all but the seeds is the paper's setting, so that its numbers stand beside ours."""
    asked = ("exp_name", "seeds", "seed", "rank_records", "runs_dir")
    return replace(config, **{name: getattr(Config, name) for name in asked}) == Config()


def print_table(config: Config, result: Result) -> None:
    """The summary on the terminal, beside the published numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{config.seeds} seeds: median [5 %, 95 %] of the last record")
    for heading in ("schedule", "test loss", "train loss", "‖u⊙v‖₀", "Jacobian rank", "diverged"):
        table.add_column(heading)

    def cell(entry: dict, form: str) -> str:
        show = lambda value: "–" if np.isnan(value) else format(value, form)
        ours = f"{show(entry['median'])} [{show(entry['p5'])}, {show(entry['p95'])}]"
        paper = entry["published"]
        return ours if paper is None else f"{ours}\npaper {format(paper, form)}"

    for row in summary_rows(config, result):
        forms = (("test_loss", ".2g"), ("train_loss", ".2g"), ("support", ".0f"), ("rank", ".0f"))
        cells = [cell(row[name], form) for name, form in forms]
        table.add_row(row["schedule"], *cells, f"{row['share_diverged']:.0%}")
    Console().print(table)


def draw(folder: Path, config: Config, result: Result) -> list[Path]:
    """Median and 5-95 % band over seeds of every record, decay times marked."""
    steps, names = record_steps(config), labels(config)
    marks = {
        label: [time * config.num_steps]
        for label, time, factor in zip(names, config.decay_times, config.decay_factors, strict=True)
        if factor != 1
    }

    def panel(title: str, ylabel: str, y: np.ndarray, x=steps, log_y: bool = False):
        lines = {label: (x, y[:, j]) for j, label in enumerate(names)}
        return plots.Panel(title, ylabel, lines, log_y=log_y, marks=marks)

    panels = [
        panel("Training loss", "½ mean squared error", result.train_loss, log_y=True),
        panel("Test loss", "½ mean squared error", result.test_loss, log_y=True),
        panel("Support of the predictor", "‖u⊙v‖₀ (entries)", result.support),
        panel("Rank of the Jacobian", "rank", result.rank, x=rank_steps(config)),
        panel("Imbalance of the layers", "‖u² − v²‖₁", result.balancedness, log_y=True),
        panel("Diverged runs", "share of runs", np.isnan(result.train_loss).mean(0, keepdims=True)),
    ]
    title = f"Diagonal nets, n = {config.n}, d = {config.d}: {config.seeds} seeds"
    return plots.figure(folder / "figures" / "diag_nets", panels, columns=2, title=title)


def progress_bar(total: int):
    """A bar over runs; `on_chunk(done)` moves it."""
    import contextlib

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    @contextlib.contextmanager
    def bar():
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            task = progress.add_task("compiling, then running", total=total)
            yield lambda done: progress.update(task, completed=done, description="runs")

    return bar()


if __name__ == "__main__":
    main()
