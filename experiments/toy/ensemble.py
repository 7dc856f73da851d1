"""Ensembles: many seeds of a few step-size schedules on one toy problem.

`results` runs a plan, or loads its finished run, and returns an xarray.Dataset with dims seed,
schedule and step; spectra_step for singular values.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.figures import progress, tables, terminal
from experiments.launch import hosts, lock
from experiments.launch.signals import Stopped, deferred
from experiments.storage import arrays, records
from experiments.toy.config import PLACE, Plan, Published
from experiments.toy.curvature import make_curvature
from experiments.toy.problems import Toy
from experiments.toy.run import make_run, parameters, seed_keys, snapshot, step_size
from sgd_sparse_jax import train
from sgd_sparse_jax.types import Params

if TYPE_CHECKING:
    import xarray

RUNS_AT_A_TIME = 64  # per device: enough to fill a core
SNAPSHOTS_AT_A_TIME = 256
Chunk = dict[str, np.ndarray]


class Chunks:
    """The store of a sweep: from names of chunks to dicts of arrays, in FOLDER/chunks/NAME.npz.

    A name must identify everything that its arrays depend on. A damaged file counts as missing, and
    a warning is logged. With several hosts, process 0 writes and decides which chunks exist.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "chunks"

    def get(self, name: str) -> Chunk | None:
        """The arrays of a chunk; None if it is missing."""
        path, found = self.folder / f"{name}.npz", None
        if hosts.is_first() and path.exists():
            try:
                found = arrays.read_npz(path)
            except ValueError as error:
                logging.getLogger(__name__).warning("%s; it is computed again.", error)
        if hosts.agreed(found is not None) and found is None:
            found = arrays.read_npz(path)
        return found

    def __setitem__(self, name: str, chunk: Chunk) -> None:
        if hosts.is_first():
            self.folder.mkdir(exist_ok=True)
            arrays.write_npz(self.folder / f"{name}.npz", chunk)


Store = Chunks | dict[str, Chunk]


def results(plan: Plan) -> "xarray.Dataset":
    """The results of a plan, loaded if its run is finished."""
    return in_folder(plan.folder, plan.config, lambda *how: simulate(plan, *how))


def summarized(
    plan: Plan, names: Sequence[str], published: Published, title: str
) -> tuple["xarray.Dataset", list[tables.Row]]:
    """Results and their summary, which process 0 prints and writes to summary.json."""
    dataset = results(plan)
    hosts.leave_the_rest_to_first()
    rows = tables.rows(dataset, names, published)
    records.write_json(plan.folder / "summary.json", {"rows": [row.entry() for row in rows]})
    tables.show(plan.folder, rows, title=title)
    return dataset, rows


def in_folder(
    folder: Path,
    config: Any,
    compute: Callable[[Store, Callable[[], None]], "xarray.Dataset"],
) -> "xarray.Dataset":
    """`compute(store, on_chunk)`, saved in the run's folder; loaded if the run is finished.

    An interrupted run continues after the chunks in `store`. After a signal, `on_chunk` raises
    Stopped.
    """
    # Reading a finished run takes no lock.
    alone = lock.alone_in(folder, unless=records.is_finished)
    with hosts.together(folder), alone, deferred() as signal:

        def stop_if_requested() -> None:
            if hosts.any_of(bool(signal)):
                by = signal[0] if signal else "Another host"
                hint = "has the finished chunks; run the same command to continue"
                raise Stopped(f"{by}: stopped; {folder} {hint}.")

        def start() -> None:
            about = {"seed": config.seed, "processes": jax.process_count()}
            devices = [f"{device.platform}:{device.device_kind}" for device in jax.devices()]
            records.start_manifest(folder, devices=devices, **about)

        def finish() -> None:
            arrays.save_dataset(folder, dataset)
            records.finish_manifest(folder)  # before chunks are removed, in case of a kill
            drop_chunks()

        drop_chunks = lambda: shutil.rmtree(folder / "chunks", ignore_errors=True)
        hosts.on_first(lambda: records.open_run(folder, config, may_change=PLACE))
        if records.is_finished(folder):
            terminal.show(f"{folder} is finished; these are its results.")
            hosts.on_first(drop_chunks)
            return arrays.load_dataset(folder)
        hosts.on_first(start)
        dataset = compute(Chunks(folder), stop_if_requested)
        hosts.on_first(finish)
    return dataset


def simulate(plan: Plan, store: Store, on_chunk: Callable[[], None]) -> "xarray.Dataset":
    """Runs all seeds x schedules, in chunks of seeds that are split over the devices.

    Reads finished chunks from `store`, adds others to it, and calls `on_chunk()` after each.
    """
    config, at, parts = plan.config, plan.record_steps, []
    seeds, keys = config.seeds, seed_keys(config.seed, config.seeds)
    spectra = of_snapshots(plan.toy, plan.toy.spectra)
    with progress.of_runs(seeds * len(plan.labels)) as advance:
        for batch_size, members in plan.groups.items():
            run = make_run(
                plan.toy,
                num_steps=config.num_steps,
                batch_size=batch_size,
                probes=[(plan.toy.measure, at), (snapshot, at)],
                gd_jitter=config.gd_jitter,
                descent=plan.descent,
            )
            sweep = train.make_sweep(run, chunk=RUNS_AT_A_TIME, **plan.toy.sweep_options)
            metrics = [spectra]
            if config.curvature:  # programs of their own: runs and ranks are the same without them
                metrics.append(curvature_of_snapshots(plan.toy, batch_size))
            points = jax.tree.map(itemgetter(members), plan.schedules)
            done, width = [], max(1, RUNS_AT_A_TIME * jax.device_count() // len(members))
            width = min(seeds, width)
            for first in range(0, seeds, width):
                name = f"{plan.fingerprint}-batch{batch_size}-seeds{first}-{first + width}"
                chunk = store.get(name)
                if chunk is None:
                    # The last chunk is padded with early seeds: another width would be another
                    # program, whose rounding changes chaotic runs.
                    places = np.arange(first, first + width) % seeds
                    chunk = _reduced(plan, first, metrics, *sweep(keys[places], points))
                    store[name] = chunk
                done.append(chunk)
                advance(len(chunk["end/theta"]) * len(members))
                on_chunk()
            # Only the first chunk has the records of the shown seed.
            found = {name: [c[name] for c in done if name in c] for name in done[0]}
            parts.append({name: np.concatenate(each) for name, each in found.items()})
    order = np.argsort(np.concatenate(list(plan.groups.values())))
    whole = {name: np.concatenate([p[name] for p in parts], 1)[:, order] for name in parts[0]}
    return _dataset(plan, whole)


def _reduced(
    plan: Plan, first: int, metrics: Sequence, measured: Chunk, snapshots: np.ndarray
) -> Chunk:
    """A chunk of seeds from `first` on, without most of the snapshots, which are large.

    Arrays [seeds, schedules, ...] are named AXIS/NAME by their third axis: "step", "spectra_step"
    or "end" (both ends of the run); "shown" are all records of one seed, in the first chunk.
    """
    of = lambda some: {name: x for metric in metrics for name, x in metric(some).items()}
    sampled = of(snapshots[:, :, np.isin(plan.record_steps, plan.spectra_steps)])
    chunk = {f"step/{name}": values for name, values in measured.items()}
    chunk |= {f"spectra_step/{name}": values for name, values in sampled.items()}
    chunk |= {"end/theta": snapshots[:, :, [0, -1]]}
    chunk = {name: values[: plan.config.seeds - first] for name, values in chunk.items()}
    if first == 0:
        finite = np.isfinite(measured["train_loss"]).all((1, 2))
        seed = int(np.argmax(finite))  # the first that diverged in no schedule, else seed 0
        shown = {"theta": snapshots[[seed]], **of(snapshots[[seed]])}
        shown["seed"] = np.full((1, snapshots.shape[1]), seed)
        chunk |= {f"shown/{name}": values for name, values in shown.items()}
    return chunk


def of_snapshots(
    toy: Toy, metrics: Callable[[Params], dict[str, jax.Array]], *, vectorized: int | None = None
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Snapshots [seeds, schedules, records, p] -> `metrics(params)` of each; NaN if not finite.

    Compiled once, for `SNAPSHOTS_AT_A_TIME` snapshots; for `vectorized`, see `train.make_sweep`.
    """
    chunk = -(-SNAPSHOTS_AT_A_TIME // jax.device_count())
    run = lambda _, theta: metrics(parameters(toy, theta))
    options: dict[str, Any] = toy.sweep_options | {"vectorized": vectorized}
    sweep = train.make_sweep(run, chunk=chunk, **options)
    no_key = seed_keys(0, 1)

    def measured(snapshots: np.ndarray) -> dict[str, np.ndarray]:
        flat = snapshots.reshape(-1, snapshots.shape[-1])
        finite = np.isfinite(flat).all(1)
        todo, shape = flat[finite], (SNAPSHOTS_AT_A_TIME, flat.shape[1])
        starts = range(0, max(len(todo), 1), SNAPSHOTS_AT_A_TIME)
        parts = [np.resize(todo[i : i + SNAPSHOTS_AT_A_TIME], shape) for i in starts]  # padded
        results = [sweep(no_key, part) for part in parts]
        out = {name: np.full(len(flat), np.nan) for name in results[0]}
        for name, values in out.items():
            values[finite] = np.concatenate([r[name][0] for r in results])[: len(todo)]
        return {name: values.reshape(snapshots.shape[:-1]) for name, values in out.items()}

    return measured


def curvature_of_snapshots(toy: Toy, batch_size: int) -> Callable[..., dict[str, np.ndarray]]:
    """`of_snapshots` with the metrics of `make_curvature`."""
    # The gradients of more snapshots leave the cache of CPUs: twice as slow.
    return of_snapshots(toy, make_curvature(toy, batch_size), vectorized=8)


def _dataset(plan: Plan, whole: Chunk) -> "xarray.Dataset":
    """Labels the axes; records of a run are NaN from its divergence on."""
    import xarray

    axes = {  # of the arrays under AXIS/
        "step": ("seed", "schedule", "step"),
        "spectra_step": ("seed", "schedule", "spectra_step"),
        "end": ("seed", "schedule", "end", "parameter"),
        "shown": ("schedule", "step", "parameter"),
    }
    missing = diverged(whole["step/train_loss"])
    missing_at = {
        "step": missing,
        "spectra_step": missing[..., np.isin(plan.record_steps, plan.spectra_steps)],
    }
    variables: dict = {}
    for path, array in whole.items():
        axis, name = path.split("/")
        if axis == "shown":
            name, array = f"shown_{name}", array[0]
        elif axis in missing_at:
            array = np.where(missing_at[axis], np.nan, array)
        variables[name] = (axes[axis][: array.ndim], array)
    if plan.config.curvature:
        of = lambda schedule: step_size(schedule, plan.toy, plan.config.num_steps)
        sizes = jax.vmap(lambda schedule: jax.vmap(of(schedule))(plan.spectra_steps))
        variables["edge"] = (("schedule", "spectra_step"), 2 / np.asarray(sizes(plan.schedules)))
    coords = {
        "seed": np.arange(plan.config.seeds),
        "schedule": plan.labels,
        "step": plan.record_steps,
        "spectra_step": plan.spectra_steps,
        "end": ["start", "end"],
    }
    return xarray.Dataset(variables, coords)


def diverged(losses: np.ndarray) -> np.ndarray:
    """A mask of the records [..., records] from the divergence of a run on.

    A run diverges if a loss isn't finite, and does so at the first loss that is not finite or above
    a thousand times the initial one: its last finite values are meaningless.
    """
    finite = np.isfinite(losses)
    large = ~finite | (losses > 1e3 * losses[..., :1])
    return np.logical_or.accumulate(~finite.all(-1, keepdims=True) & large, axis=-1)
