"""Many seeds of a few step-size schedules on one toy problem, with everything watched.

A Config says what runs; `results` runs it into its folder (or reads it there) and returns one
xarray.Dataset: variables over seed, schedule and step, those of singular values over spectra_step.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from experiments.launch import hosts, lock
from experiments.launch.signals import Stopped, StopRequest, deferred
from experiments.storage import npz, records
from experiments.toy import chunks
from experiments.toy.config import Config, labels, record_steps, spectra_steps, validate
from experiments.toy.problems import Toy
from experiments.toy.run import Descent, make_run, parameters, schedules, seed_keys
from sgd_sparse_jax import train

if TYPE_CHECKING:
    import xarray

RUNS_AT_A_TIME = 64  # per device: what fills a core
SNAPSHOTS_AT_A_TIME = 256
Kept = MutableMapping[int, dict[str, np.ndarray]]
Described = dict[str, jax.ShapeDtypeStruct]


def results(experiment: str, config: Config, toy: Toy) -> "tuple[Path, xarray.Dataset]":
    """The run's folder and its data, computed unless the folder holds them already.

    A run that was cut goes on behind its finished blocks of seeds. Raises Stopped, with those on
    disk, where a signal asks for it.
    """
    validate(config, toy)
    name = config.exp_name or config.setting
    folder = records.run_folder(config.runs_dir, experiment, name)
    with hosts.together(folder), alone_in(folder), deferred() as asked:
        hosts.on_first(
            lambda: records.open_run(
                config.runs_dir, experiment, name, config, may_change=("runs_dir", "hosts")
            )
        )
        if is_finished(folder):
            dataset = npz.load_dataset(folder)
            assert_like(dataset, blank(config, toy), folder)
            return folder, dataset
        hosts.on_first(lambda: start(folder, config.seed))
        began = time.perf_counter()
        kept = lambda name: chunks.Chunks(folder, name)
        dataset = simulate(config, toy, kept, lambda: stop_if_asked(asked, folder))
        hosts.on_first(lambda: finish(folder, dataset, began))
    return folder, dataset


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Locks the folder on process 0, unless the run is finished: reading it takes no lock."""
    with contextlib.ExitStack() as held:
        hosts.on_first(
            lambda: records.is_finished(folder) or held.enter_context(lock.holding(folder))
        )
        yield


def is_finished(folder: Path) -> bool:
    """Whether the run is; if so it is said, and what a kill has left of its blocks goes."""
    finished = records.is_finished(folder)
    if finished:
        print(f"{folder} is finished: its results are shown again. (--exp_name starts another.)")
        hosts.on_first(lambda: chunks.drop(folder))
    return finished


def start(folder: Path, seed: int) -> None:
    """Notes a start in the run's manifest."""
    devices = [f"{device.platform}:{device.device_kind}" for device in jax.devices()]
    records.start_manifest(folder, seed=seed, devices=devices, processes=jax.process_count())


def finish(folder: Path, dataset: "xarray.Dataset", began: float) -> None:
    """Writes the data; the blocks that they are made of go."""
    npz.save_dataset(folder, dataset)
    records.finish_manifest(folder, wall_seconds=round(time.perf_counter() - began, 1))
    chunks.drop(folder)


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


def program(config: Config, toy: Toy, group: np.ndarray) -> tuple[Callable, Any]:
    """The run of the schedules of one batch size, and these schedules."""
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
    return run, jax.tree.map(lambda leaf: leaf[group], schedules(config))


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
    run, points = program(config, toy, group)
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

    due = functools.cache(lambda: of_each_seed(config, toy, run, points))
    first, blocks = 0, []
    while first < config.seeds:
        found = kept.get(first)
        if found is not None and (why := _misfit(found, due(), first, config.seeds)):
            told = "What is kept of seeds %d … is no use (%s); they run again."
            logging.getLogger(__name__).warning(told, first, why)
            found = None
        if found is None:
            found = kept[first] = chunks.flat(of_block(first))
        blocks.append(chunks.nested(found))
        count = len(blocks[-1]["end"]["theta"])
        first += count
        on_seeds(count)
    shown = blocks[0].pop("of_one")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *blocks) | {"of_one": shown}


def of_each_seed(config: Config, toy: Toy, run: Callable, points: Any) -> Described:
    """What a block holds of each of its seeds, and the first one of a single seed."""
    rows, thetas = jax.eval_shape(jax.vmap(run, (None, 0)), jr.key(0), points)
    names = jax.eval_shape(lambda theta: toy.spectra(parameters(toy, theta[0, 0])), thetas)
    count, every, size = thetas.shape
    shaped = lambda *shape: jax.ShapeDtypeStruct(shape, thetas.dtype)
    spectra = lambda records: {name: shaped(count, records) for name in names}
    of_one = {"theta": shaped(*thetas.shape), "seed": jax.ShapeDtypeStruct((count,), int)}
    tree = {
        "step": rows,
        "spectra_step": spectra(len(spectra_steps(config))),
        "end": {"theta": shaped(count, 2, size)},
        "of_one": spectra(every) | of_one,
    }
    return chunks.flat(tree)


def _misfit(found: Mapping[str, np.ndarray], due: Described, first: int, seeds: int) -> str | None:
    """Why a kept block isn't one of this run; else None."""
    part = lambda arrays, one: {n: a for n, a in arrays.items() if n.startswith("of_one/") == one}
    of_one = part(due, True) if first == 0 else {}
    return train.misfit(part(found, False), part(due, False), seeds - first) or train.misfit(
        part(found, True), of_one, 1
    )


def stop_if_asked(asked: StopRequest, folder: Path) -> None:
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


def blank(config: Config, toy: Toy) -> "xarray.Dataset":
    """What `simulate` gives, with zeros in the place of what it computes."""
    due = of_each_seed(config, toy, *program(config, toy, np.arange(len(config.step_sizes))))
    seeds = lambda name: 1 if name.startswith("of_one/") else config.seeds
    zeros = {name: np.zeros((seeds(name), *like.shape), like.dtype) for name, like in due.items()}
    return _dataset(config, toy, chunks.nested(zeros))


def assert_like(dataset: "xarray.Dataset", ours: "xarray.Dataset", folder: Path) -> None:
    """ValueError where the data found in `folder` have other names, sizes or labels than `ours`."""
    odd = sorted(map(str, ours.variables.keys() ^ dataset.variables.keys()))
    for name in ours.variables.keys() & dataset.variables.keys():
        mine, other = ours.variables[name], dataset.variables[name]
        same = (mine.dims, mine.shape) == (other.dims, other.shape)
        kinds = mine.dtype.kind == other.dtype.kind
        if not (same and kinds and (name not in ours.coords or mine.equals(other))):
            odd.append(str(name))
    if odd:
        raise ValueError(
            f"{folder / 'arrays.npz'} isn't what this run gives ({', '.join(odd[:5])}); remove "
            f"{folder} and run again."
        )


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
