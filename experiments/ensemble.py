"""Many seeds of a few step-size schedules on one toy problem, with everything watched.

A Config says what runs; `results` runs it into its folder (or reads it there) and returns one
xarray.Dataset: variables over seed, schedule and step, those of singular values over spectra_step.
"""

import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from experiments import chunks, hosts, records
from experiments.hosts import ALONE, Hosts
from experiments.problems import Toy
from experiments.signals import Asked, Stopped, deferred
from sgd_sparse_jax import data, measure, train
from sgd_sparse_jax._types import Batch, Noise, Params, TrainState

if TYPE_CHECKING:
    import xarray

RUNS_AT_A_TIME = 64  # per device: what fills a core
SNAPSHOTS_AT_A_TIME = 256


@dataclass(frozen=True)
class Config:
    """One entry of each tuple per schedule."""

    setting: str = ""
    """Which of the paper's settings."""
    exp_name: str = ""
    """Name of the run's folder; empty: the setting's name."""
    seeds: int = 32
    """Seeds per schedule: of the initialization (where it is random) and of SGD."""
    seed: int = 0
    """Seed of the seeds: seed i of the ensemble is fold_in(key(seed), i)."""
    step_sizes: tuple[float, ...] = ()
    """Step size at the start of each schedule."""
    decay_times: tuple[float, ...] = ()
    """Share of the run after which each schedule decays; 1 is never."""
    decay_factors: tuple[float, ...] = ()
    """What each schedule divides its step size by."""
    warmup_gains: tuple[float, ...] = ()
    """Until it decays, each step size grows as 1 + gain * (step / num_steps) ** exponent."""
    warmup_exponent: float = 1.0
    """The exponent of the warm-up."""
    batch_sizes: tuple[int, ...] = ()
    """Examples per step, drawn with replacement; all of them is gradient descent."""
    num_steps: int = 100_001
    """Steps of each run."""
    init_scale: float = 1.0
    """Multiplies the paper's scale of the initial weights."""
    momentum: float = 0.0
    """Heavy-ball momentum."""
    weight_decay: float = 0.0
    """Adds WEIGHT_DECAY * weights to each gradient."""
    sam_rho: float = 0.0
    """Gradients are taken at weights + SAM_RHO * gradient (not normalized)."""
    sam_of: Literal["batch", "examples"] = "batch"
    """Whether that point is the batch's or each example's own."""
    label_noise: float = 0.0
    """Scale of Gaussian noise on each batch's labels; decays by the factor of the step size."""
    average: float = 0.0
    """What is watched is the moving average of the weights with this memory; 0 for the weights."""
    valley_steps: int = 0
    """What is watched is the valley floor: the weights after so many steps of GD of size 0.5."""
    gd_jitter: float = 1e-9
    """Gradient descent has no seed: its initial weights are multiplied by 1 + GD_JITTER N(0, 1)."""
    log_records: bool = False
    """Records at the first 500 steps, then spaced logarithmically; else 100, then evenly."""
    spectra_records: int = 40
    """At how many of the records singular values are taken for every seed (for one seed at all)."""
    runs_dir: str = "runs"
    """Where run folders go."""
    hosts: Hosts = ALONE


class Descent(NamedTuple):
    """What is not plain SGD, and which weights are watched: fields of Config."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    sam_rho: float = 0.0
    sam_of: str = "batch"
    label_noise: float = 0.0
    average: float = 0.0
    valley_steps: int = 0


PLAIN = Descent()
Kept = MutableMapping[int, dict[str, np.ndarray]]


class Schedule(NamedTuple):
    """eta (1 + gain t^exponent), t = step / num_steps, up to `decay_step`; then over the factor."""

    step_size: jax.Array
    warmup_gain: jax.Array
    warmup_exponent: jax.Array
    decay_step: jax.Array
    decay_factor: jax.Array
    init_scale: jax.Array


def results(experiment: str, config: Config, toy: Toy) -> "tuple[Path, xarray.Dataset]":
    """The run's folder and its data, computed unless the folder holds them already.

    A run that was cut goes on behind its finished blocks of seeds. Raises Stopped, with those on
    disk, where a signal asks for it.
    """
    validate(config, toy)
    name = config.exp_name or config.setting
    folder = records.run_folder(config.runs_dir, experiment, name)
    with hosts.together(folder), deferred() as asked:
        hosts.on_first(
            lambda: records.open_run(
                config.runs_dir, experiment, name, config, may_change=("runs_dir", "hosts")
            )
        )
        if records.is_finished(folder):
            print(
                f"{folder} is finished: its results are shown again. (--exp_name starts another.)"
            )
            return folder, records.load_dataset(folder)
        hosts.on_first(lambda: start(folder, config.seed))
        began = time.perf_counter()
        kept = lambda name: chunks.Chunks(folder, name)
        dataset = simulate(config, toy, kept, lambda: stop_if_asked(asked, folder))
        hosts.on_first(lambda: finish(folder, dataset, began))
    return folder, dataset


def start(folder: Path, seed: int) -> None:
    """Notes a start in the run's manifest."""
    devices = [f"{device.platform}:{device.device_kind}" for device in jax.devices()]
    records.start_manifest(folder, seed=seed, devices=devices, processes=jax.process_count())


def finish(folder: Path, dataset: "xarray.Dataset", began: float) -> None:
    """Writes the data; the blocks that they are made of go."""
    records.save_dataset(folder, dataset)
    records.finish_manifest(folder, wall_seconds=round(time.perf_counter() - began, 1))
    chunks.drop(folder)


def validate(config: Config, toy: Toy) -> None:
    """Raises ValueError, in the words of the flags, for what can't be run."""
    per_schedule = ("step_sizes", "decay_times", "decay_factors", "warmup_gains", "batch_sizes")
    lengths = {field: len(getattr(config, field)) for field in per_schedule}
    if len(set(lengths.values())) != 1 or not config.step_sizes:
        counts = ", ".join(f"--{field} {length}" for field, length in lengths.items())
        raise ValueError(f"Values per schedule: {counts}; give each schedule one of each.")
    for field in ("seeds", "num_steps", "spectra_records"):
        if getattr(config, field) < 1:
            raise ValueError(f"--{field} is {getattr(config, field)}; it must be 1 or more.")
    for field in ("step_sizes", "decay_factors"):
        for value in getattr(config, field):
            if not 0 < value < np.inf:
                raise ValueError(f"--{field} holds {value}; each must be positive and finite.")
    for value in config.warmup_gains:
        if not -1 < value < np.inf:
            raise ValueError(f"--warmup_gains holds {value}; each must be finite and above -1.")
    for value in config.decay_times:
        if not 0 <= value <= 1:
            raise ValueError(f"--decay_times holds {value}; each is a share of the run, 0 to 1.")
    for value in config.batch_sizes:
        if not 1 <= value <= len(toy.train.y):
            raise ValueError(
                f"--batch_sizes holds {value}; each is between 1 and the {len(toy.train.y)} "
                "training examples."
            )
    for field in ("warmup_exponent", "init_scale"):
        if not 0 < getattr(config, field) < np.inf:
            raise ValueError(f"--{field} is {getattr(config, field)}; it must be positive.")
    for field in ("weight_decay", "sam_rho", "label_noise", "valley_steps"):
        if not 0 <= getattr(config, field) < np.inf:
            raise ValueError(f"--{field} is {getattr(config, field)}; it must be 0 or more.")
    for field in ("momentum", "average"):
        if not 0 <= getattr(config, field) < 1:
            raise ValueError(f"--{field} is {getattr(config, field)}; it must be in [0, 1).")
    if not 0 <= config.gd_jitter < 1:
        raise ValueError(f"--gd_jitter is {config.gd_jitter}; give a small share, such as 1e-9.")
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError('Float64 is off; call jax.config.update("jax_enable_x64", True) first.')


ConfigT = TypeVar("ConfigT", bound=Config)


def like(config: ConfigT, setting: ConfigT) -> ConfigT:
    """`config` but for what says how often, where and how closely it is watched."""
    free = ("exp_name", "seeds", "seed", "spectra_records", "gd_jitter", "runs_dir", "hosts")
    return replace(config, **{field: getattr(setting, field) for field in free})


def schedules(config: Config) -> Schedule:
    """The sweep's points, one per schedule."""
    fill = lambda value: jnp.full(len(config.step_sizes), value)
    return Schedule(
        jnp.asarray(config.step_sizes),
        jnp.asarray(config.warmup_gains),
        fill(config.warmup_exponent),
        jnp.asarray([int(share * config.num_steps) for share in config.decay_times]),
        jnp.asarray(config.decay_factors),
        fill(config.init_scale),
    )


def step_size(schedule: Schedule, toy: Toy, num_steps: int) -> optax.Schedule:
    """The optax schedule that `schedule` describes."""
    return train.piecewise_decay(
        train.power_warmup(
            schedule.step_size, schedule.warmup_gain, schedule.warmup_exponent, num_steps
        ),
        [schedule.decay_step + toy.decay_after_step],
        [schedule.decay_factor],
    )


def optimizer(schedule: Schedule, toy: Toy, descent: Descent, num_steps: int):
    """SGD with the schedule's step sizes, momentum and weight decay."""
    decay = [optax.add_decayed_weights(descent.weight_decay)] if descent.weight_decay else []
    sizes = step_size(schedule, toy, num_steps)
    return optax.chain(*decay, optax.sgd(sizes, momentum=descent.momentum or None))


def ascent(descent: Descent) -> Callable | None:
    """The gradient maker of `make_step`: SAM's, or None for the plain one."""
    makers = {"batch": train.sharpness_aware, "examples": train.example_sharpness_aware}
    return makers[descent.sam_of](descent.sam_rho) if descent.sam_rho else None


def label_noise(schedule: Schedule, toy: Toy, descent: Descent) -> Noise | None:
    """Noise on labels that decays with the step size; None for none."""
    if not descent.label_noise:
        return None
    boundary = [schedule.decay_step + toy.decay_after_step]
    constant = lambda step: jnp.asarray(descent.label_noise)
    return data.gaussian_label_noise(
        train.piecewise_decay(constant, boundary, [schedule.decay_factor])
    )


def make_run(
    toy: Toy,
    *,
    num_steps: int,
    batch_size: int,
    at: np.ndarray,
    snapshots_at: np.ndarray,
    gd_jitter: float = 0.0,
    watched: bool = True,
    descent: Descent = PLAIN,
):
    """(key, schedule) -> (rows at `at`, parameters [snapshots, p] at `snapshots_at`) of one run."""
    n = len(toy.train.y)
    everything = batch_size == n

    def run(key: jax.Array, schedule: Schedule):
        drawing, running = jr.split(key)
        model = toy.network(schedule.init_scale)
        tx = optimizer(schedule, toy, descent, num_steps)
        initial = model.init(drawing, toy.train.x)["params"]
        if everything:
            initial = _jittered(drawing, initial, gd_jitter)
        averaged = bool(descent.average)
        state = train.init_state(drawing, model, tx, toy.train.x, averaged=averaged, params=initial)
        step = train.make_step(
            model,
            toy.loss,
            tx,
            ema_decay=descent.average if averaged else None,
            gradient=ascent(descent),
        )

        def seen(state: TrainState) -> Params:
            if descent.valley_steps:
                loss = lambda params: toy.mean_loss(params, toy.train)
                return measure.valley_floor(loss, state.params, num_steps=descent.valley_steps)
            return state.average if descent.average else state.params

        def row(state: TrainState) -> dict:
            params = seen(state)
            losses = {
                "train_loss": toy.mean_loss(params, toy.train),
                "test_loss": toy.mean_loss(params, toy.test),
            }
            return losses | (toy.watch(initial, params) if watched else {})

        def fetch(key, idx) -> Batch:
            return toy.train if everything else Batch(toy.train.x[idx], toy.train.y[idx])

        _, rows = train.record_run(
            running,
            train.cyclic(1, 1) if everything else train.with_replacement(n, batch_size),
            train.make_segment(step, fetch, noise=label_noise(schedule, toy, descent)),
            state,
            [
                train.Gauge(row, at),
                train.Gauge(lambda state: ravel_pytree(seen(state))[0], snapshots_at),
            ],
            num_steps,
        )
        return rows

    return run


def simulate(
    config: Config,
    toy: Toy,
    kept: Callable[[str], Kept] = lambda name: {},
    on_block: Callable[[], None] = lambda: None,
) -> "xarray.Dataset":
    """All seeds x schedules, blocks of seeds at a time, a share of each on every device.

    `kept(name)` has the finished blocks, by their first seed, and gets the others; `on_block()` is
    called after each.
    """
    groups = [
        np.flatnonzero(np.equal(config.batch_sizes, size)) for size in set(config.batch_sizes)
    ]
    with progress_bar(config.seeds * len(config.step_sizes)) as on_runs:
        spectra = make_spectra(toy)
        parts = []
        for group in groups:
            of_group = kept(f"batch{config.batch_sizes[group[0]]}")

            def on_seeds(count: int, runs: int = len(group)) -> None:
                on_runs(count * runs)
                on_block()

            parts.append(_simulate_group(config, toy, group, spectra, of_group, on_seeds))
    order = np.argsort(np.concatenate(groups))
    return _dataset(config, toy, jax.tree.map(lambda *p: np.concatenate(p, 1)[:, order], *parts))


def _simulate_group(
    config: Config,
    toy: Toy,
    group: np.ndarray,
    spectra: Callable,
    kept: Kept,
    on_seeds: Callable[[int], None],
) -> dict:
    """The schedules of one batch size, in one compiled program: arrays [seeds, schedules, …].

    By what their further axes are: records, records with singular values, ends of the run, and all
    records of one seed.
    """
    at = record_steps(config)
    run = make_run(
        toy,
        num_steps=config.num_steps,
        batch_size=config.batch_sizes[group[0]],
        at=at,
        snapshots_at=at,
        gd_jitter=config.gd_jitter,
        descent=Descent(*(getattr(config, field) for field in Descent._fields)),
    )
    points = jax.tree.map(lambda leaf: leaf[group], schedules(config))
    block = min(config.seeds, max(1, RUNS_AT_A_TIME * jax.device_count() // len(group)))
    sweep = train.make_sweep(run, chunk=RUNS_AT_A_TIME)
    keys = seed_keys(config.seed, config.seeds)

    def of_block(first: int) -> dict:
        ours = np.arange(first, first + block) % config.seeds  # the last block repeats early seeds
        rows, snapshots = sweep(keys[ours], points)
        found = {
            "step": rows,
            "spectra_step": spectra(snapshots[:, :, np.isin(at, spectra_steps(config))]),
            "end": {"theta": snapshots[:, :, [0, -1]]},
        }
        found = jax.tree.map(lambda leaf: leaf[: config.seeds - first], found)
        return found | ({"of_one": of_one(rows, snapshots)} if first == 0 else {})

    def of_one(rows: dict, snapshots: np.ndarray) -> dict:
        alive = np.isfinite(rows["train_loss"]).all((1, 2))
        shown = int(np.argmax(alive))  # the first seed that no schedule lost, else seed 0
        theta = snapshots[shown][None]
        return spectra(theta) | {"theta": theta, "seed": np.full((1, len(group)), shown)}

    first, blocks = 0, []
    while first < config.seeds:
        found = kept.get(first)
        if found is None:
            found = kept[first] = chunks.flat(of_block(first))
        blocks.append(chunks.nested(found))
        count = len(blocks[-1]["end"]["theta"])
        first += count
        on_seeds(count)
    shown = blocks[0].pop("of_one")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *blocks) | {"of_one": shown}


def stop_if_asked(asked: Asked, folder: Path) -> None:
    """Raises Stopped, on all hosts at once, where a signal has asked for it."""
    if hosts.any_of(bool(asked)):
        raise Stopped(
            f"{asked.name or 'Another host'}: stopped; {folder} has what is finished, and the same "
            "command goes on behind it."
        )


def make_spectra(toy: Toy) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Snapshots [seeds, schedules, records, p] -> `toy.spectra` of each; NaN where not finite.

    Compiled once, for `SNAPSHOTS_AT_A_TIME` of them, whatever their number.
    """
    chunk = -(-SNAPSHOTS_AT_A_TIME // jax.device_count())
    sweep = train.make_sweep(lambda _, theta: toy.spectra(parameters(toy, theta)), chunk=chunk)
    no_key = seed_keys(0, 1)

    def spectra(snapshots: np.ndarray) -> dict[str, np.ndarray]:
        flat = snapshots.reshape(-1, snapshots.shape[-1])
        finite = np.flatnonzero(np.isfinite(flat).all(1))
        out: dict[str, np.ndarray] = {}
        for first in range(0, max(len(finite), 1), SNAPSHOTS_AT_A_TIME):
            some = finite[first : first + SNAPSHOTS_AT_A_TIME]
            padded = np.ones((SNAPSHOTS_AT_A_TIME, flat.shape[1]))
            padded[: len(some)] = flat[some]
            for name, values in sweep(no_key, jnp.asarray(padded)).items():
                out.setdefault(name, np.full(len(flat), np.nan))[some] = values[0, : len(some)]
        return {name: values.reshape(snapshots.shape[:-1]) for name, values in out.items()}

    return spectra


def parameters(toy: Toy, theta: jax.Array | np.ndarray) -> Params:
    """The network's parameters from a snapshot [p]."""
    template = toy.network(1.0).init(jr.key(0), toy.train.x[:1])["params"]
    return ravel_pytree(template)[1](jnp.asarray(theta))


def seed_keys(seed: int, seeds: int) -> jax.Array:
    """Key i is fold_in(key(seed), i), whatever the number of seeds."""
    return jax.vmap(lambda i: jr.fold_in(jr.key(seed), i))(jnp.arange(seeds))


def record_steps(config: Config) -> np.ndarray:
    """The first 100 steps, then points spread over the whole run (the reference's cadence).

    With `log_records`: the first 500, then 200 spaced logarithmically.
    """
    if config.log_records:
        spread = np.geomspace(1, config.num_steps - 1, 201).astype(int)
        return np.unique(np.concatenate([np.arange(min(500, config.num_steps)), spread]))
    intervals = 249 if config.num_steps > 50_000 else 150
    spread = np.rint(np.arange(intervals) * config.num_steps / intervals).astype(int)
    return np.unique(np.concatenate([np.arange(min(100, config.num_steps)), spread]))


def spectra_steps(config: Config) -> np.ndarray:
    """`spectra_records` of the record steps, the first and the last among them."""
    at = record_steps(config)
    return at[np.unique(np.rint(np.linspace(0, len(at) - 1, config.spectra_records)).astype(int))]


def labels(config: Config, toy: Toy) -> list[str]:
    """`η = 0.282, /3.4 at 30 %`, one per schedule."""
    out = []
    for j, size in enumerate(config.batch_sizes):
        share, gain, factor = (
            config.decay_times[j],
            config.warmup_gains[j],
            config.decay_factors[j],
        )
        kind = {1: "", len(toy.train.y): "GD, "}.get(size, f"b = {size}, ")
        reached = config.step_sizes[j] * (1 + gain * share**config.warmup_exponent)
        warm = f" → {reached:.2g}" if gain else ""
        decay = f", /{factor:g} at {share:.0%}" if factor != 1 else ", constant"
        out.append(f"{kind}η = {config.step_sizes[j]:g}{warm}{decay}")
    return out


def decay_marks(config: Config, toy: Toy) -> dict[str, list[float]]:
    """Where each schedule's step size decays, for figures."""
    decays = zip(labels(config, toy), config.decay_times, config.decay_factors, strict=True)
    return {label: [share * config.num_steps] for label, share, factor in decays if factor != 1}


def _jittered(key: jax.Array, params: Params, jitter: float) -> Params:
    flat, unravel = ravel_pytree(params)
    return unravel(flat * (1 + jitter * jr.normal(jr.fold_in(key, 1), flat.shape, flat.dtype)))


def _dataset(config: Config, toy: Toy, found: dict) -> "xarray.Dataset":
    """Names for axes; a run that diverged is NaN from where its loss left for good."""
    import xarray

    at, sampled_at = record_steps(config), spectra_steps(config)
    gone = departed(found["step"]["train_loss"])
    gone_at = {"step": gone, "spectra_step": gone[..., np.isin(at, sampled_at)]}
    variables: dict = {
        name: (("seed", "schedule", axis), np.where(gone_at[axis], np.nan, array))
        for axis in gone_at
        for name, array in found[axis].items()
    }
    variables["theta"] = (("seed", "schedule", "end", "parameter"), found["end"]["theta"])
    for name, array in found["of_one"].items():
        axes = ("schedule", "step", "parameter")[: array.ndim - 1]
        variables[f"shown_{name}"] = (axes, array[0])
    coords = {
        "seed": np.arange(config.seeds),
        "schedule": np.array(labels(config, toy)),
        "step": at,
        "spectra_step": sampled_at,
        "end": np.array(["start", "end"]),
    }
    return xarray.Dataset(variables, coords)


def departed(losses: np.ndarray) -> np.ndarray:
    """Which records [..., records] lie behind the point where a run diverged.

    It diverged if a loss isn't finite; and from the record on at which, before that, its loss
    exceeded a thousand times its first: the last finite values are as large as floats get.
    """
    finite = np.isfinite(losses)
    large = ~finite | (losses > 1e3 * losses[..., :1])
    lost = ~finite.all(-1, keepdims=True)
    return np.logical_or.accumulate(lost & large, axis=-1)


def progress_bar(total: int):
    """A bar over runs; `on_runs(more)` moves it."""
    import contextlib

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    @contextlib.contextmanager
    def bar():
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            task = progress.add_task("compiling, then running", total=total)
            yield lambda more: progress.update(task, advance=more, description="runs")

    return bar()
