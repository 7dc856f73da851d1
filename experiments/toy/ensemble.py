"""Many seeds of a few step-size schedules on one toy problem, with everything recorded.

`results` runs a plan into its folder (or reads it there) and returns one xarray.Dataset: variables
over seed, schedule and step, those of singular values over spectra_step.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.launch import hosts, lock
from experiments.launch.signals import Stopped, deferred
from experiments.storage import arrays, records
from experiments.toy import chunks
from experiments.toy.config import PLACE, Group, Plan
from experiments.toy.problems import Toy
from experiments.toy.run import make_run, parameters, seed_keys
from sgd_sparse_jax import train

if TYPE_CHECKING:
    import xarray

RUNS_AT_A_TIME = 64  # per device: what fills a core
SNAPSHOTS_AT_A_TIME = 256
Store = MutableMapping[str, dict[str, np.ndarray]]


def results(plan: Plan) -> "xarray.Dataset":
    """The data of the plan's run, computed unless its folder has them."""
    return in_folder(plan.folder, plan.place, plan.config, lambda *how: simulate(plan, *how))


def in_folder(
    folder: Path,
    place: tuple[str, str, str],
    config: Any,
    compute: Callable[[Store, Callable[[], None]], "xarray.Dataset"],
) -> "xarray.Dataset":
    """`compute(store, on_chunk)`, saved in the run's folder; read from there if it is finished.

    An interrupted run continues behind the chunks in `store`. After a signal, `on_chunk` raises
    Stopped: the chunks so far are on disk.
    """
    with hosts.together(folder), alone_in(folder), deferred() as signal:

        def stop_if_requested() -> None:
            if hosts.any_of(bool(signal)):
                raise Stopped(
                    f"{signal.name or 'Another host'}: stopped; {folder} has the finished chunks, "
                    "and the same command goes on behind them."
                )

        hosts.on_first(lambda: records.open_run(*place, config, may_change=PLACE))
        if records.is_finished(folder):
            print(
                f"{folder} is finished: its results are shown again. (--exp_name starts another.)"
            )
            hosts.on_first(lambda: chunks.drop(folder))
            return arrays.load_dataset(folder)
        devices = [f"{device.platform}:{device.device_kind}" for device in jax.devices()]
        hosts.on_first(
            lambda: records.start_manifest(
                folder, seed=config.seed, devices=devices, processes=jax.process_count()
            )
        )
        began = time.perf_counter()
        dataset = compute(chunks.Chunks(folder), stop_if_requested)

        def finish() -> None:
            arrays.save_dataset(folder, dataset)
            records.finish_manifest(folder, wall_seconds=round(time.perf_counter() - began, 1))
            chunks.drop(folder)

        hosts.on_first(finish)
    return dataset


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Locks the folder on process 0, unless the run is finished: reading it takes no lock."""
    with contextlib.ExitStack() as held:
        hosts.on_first(
            lambda: records.is_finished(folder) or held.enter_context(lock.holding(folder))
        )
        yield


def simulate(
    plan: Plan,
    store: Store | None = None,
    on_chunk: Callable[[], None] = lambda: None,
    *,
    runs_at_a_time: int = RUNS_AT_A_TIME,
) -> "xarray.Dataset":
    """All seeds x schedules, blocks of seeds at a time, a share of each on every device.

    Finished blocks are found in `store`, others are added; `on_chunk()` is called after each.
    """
    store = {} if store is None else store
    spectra = make_spectra(plan.toy)
    with progress_bar(plan.config.seeds * len(plan.labels)) as advance:

        def simulated(group: Group) -> dict[str, np.ndarray]:
            blocks = []
            for block in blocks_of(plan, group, spectra, store, runs_at_a_time):
                blocks.append(block)
                advance(block["end/theta"].shape[0] * len(group.members))
                on_chunk()
            return {
                name: np.concatenate([block[name] for block in blocks if name in block])
                for name in blocks[0]
            }

        parts = [simulated(group) for group in plan.groups]
    order = np.argsort(np.concatenate([group.members for group in plan.groups]))
    whole = {name: np.concatenate([p[name] for p in parts], 1)[:, order] for name in parts[0]}
    return _dataset(plan, whole)


def blocks_of(
    plan: Plan, group: Group, spectra: Callable, store: Store, runs_at_a_time: int
) -> Iterator[dict[str, np.ndarray]]:
    """The schedules of one batch size, in one compiled program: arrays [seeds, schedules, ...].

    Their names are AXIS/NAME, by the further axis: "step", "spectra_step", "end" (of the run); and
    "shown" for all records of one seed, in the first block.
    """
    config, at = plan.config, plan.record_steps
    run = make_run(
        plan.toy,
        num_steps=config.num_steps,
        batch_size=group.batch_size,
        at=at,
        snapshots_at=at,
        gd_jitter=config.gd_jitter,
        descent=plan.descent,
    )
    points = jax.tree.map(lambda leaf: leaf[group.members], plan.schedules)
    sweep = train.make_sweep(run, chunk=runs_at_a_time)
    keys = seed_keys(config.seed, config.seeds)
    size = min(config.seeds, max(1, runs_at_a_time * jax.device_count() // len(group.members)))

    def of_block(first: int) -> dict[str, np.ndarray]:
        seeds = np.arange(first, first + size) % config.seeds  # the last block repeats early seeds
        rows, snapshots = sweep(keys[seeds], points)
        sampled = spectra(snapshots[:, :, np.isin(at, plan.spectra_steps)])
        block = {f"step/{name}": values for name, values in rows.items()}
        block |= {f"spectra_step/{name}": values for name, values in sampled.items()}
        block |= {"end/theta": snapshots[:, :, [0, -1]]}
        block = {name: values[: config.seeds - first] for name, values in block.items()}
        if first > 0:
            return block
        finite = np.isfinite(rows["train_loss"]).all((1, 2))
        seed = int(np.argmax(finite))  # the first that diverged in no schedule, else seed 0
        shown = {"theta": snapshots[[seed]], **spectra(snapshots[[seed]])}
        shown["seed"] = np.full((1, len(group.members)), seed)
        return block | {f"shown/{name}": values for name, values in shown.items()}

    for first in range(0, config.seeds, size):
        name = f"{plan.fingerprint}-batch{group.batch_size}-seeds{first}-{first + size}"
        block = store.get(name)
        if block is None:
            block = store[name] = of_block(first)
        yield block


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


def _dataset(plan: Plan, whole: dict[str, np.ndarray]) -> "xarray.Dataset":
    """Labels the axes; records of a run that diverged are NaN from there on."""
    import xarray

    lost = diverged(whole["step/train_loss"])
    lost_at = {
        "step": lost,
        "spectra_step": lost[..., np.isin(plan.record_steps, plan.spectra_steps)],
    }
    variables: dict = {}
    for path, array in whole.items():
        axis, name = path.split("/")
        if axis == "shown":
            axes = ("schedule", "step", "parameter")[: array.ndim - 1]
            variables[f"shown_{name}"] = (axes, array[0])
        elif axis == "end":
            variables[name] = (("seed", "schedule", "end", "parameter"), array)
        else:
            variables[name] = (("seed", "schedule", axis), np.where(lost_at[axis], np.nan, array))
    coords = {
        "seed": np.arange(plan.config.seeds),
        "schedule": np.array(plan.labels),
        "step": plan.record_steps,
        "spectra_step": plan.spectra_steps,
        "end": np.array(["start", "end"]),
    }
    return xarray.Dataset(variables, coords)


def diverged(losses: np.ndarray) -> np.ndarray:
    """Which records [..., records] lie behind the point where a run diverged.

    It diverged if a loss isn't finite; and from the record on at which, before that, its loss
    exceeded a thousand times its first: the last finite values are as large as floats get.
    """
    finite = np.isfinite(losses)
    large = ~finite | (losses > 1e3 * losses[..., :1])
    return np.logical_or.accumulate(~finite.all(-1, keepdims=True) & large, axis=-1)


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar over runs; the function it yields advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("compiling, then running", total=total)
        yield lambda more: progress.update(task, advance=more, description="runs")
