"""Many seeds of a few step-size schedules on one toy problem, with everything recorded.

`results` runs a plan into its folder (or reads it there) and returns one xarray.Dataset: variables
over seed, schedule and step, those of singular values over spectra_step.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.figures import progress, terminal
from experiments.launch import hosts, lock
from experiments.launch.signals import Stopped, deferred
from experiments.storage import arrays, records
from experiments.toy import chunks
from experiments.toy.config import PLACE, Plan
from experiments.toy.problems import Toy
from experiments.toy.run import make_run, parameters, seed_keys
from sgd_sparse_jax import train

if TYPE_CHECKING:
    import xarray

RUNS_AT_A_TIME = 64  # per device: what fills a core
SNAPSHOTS_AT_A_TIME = 256


def results(plan: Plan) -> "xarray.Dataset":
    """The data of the plan's run, computed unless its folder has them."""
    return in_folder(plan.folder, plan.config, lambda *how: simulate(plan, *how))


def in_folder(
    folder: Path,
    config: Any,
    compute: Callable[[chunks.Store, Callable[[], None]], "xarray.Dataset"],
) -> "xarray.Dataset":
    """`compute(store, on_chunk)`, saved in the run's folder; read from there if it is finished.

    An interrupted run continues behind the chunks in `store`. After a signal, `on_chunk` raises
    Stopped: the chunks so far are on disk.
    """
    # Reading a finished run takes no lock.
    alone = lock.alone_in(folder, unless=records.is_finished)
    with hosts.together(folder), alone, deferred() as signal:

        def stop_if_requested() -> None:
            if hosts.any_of(bool(signal)):
                raise Stopped(
                    f"{signal.name or 'Another host'}: stopped; {folder} has the finished chunks, "
                    "and the same command goes on behind them."
                )

        def start() -> None:
            about = {"seed": config.seed, "processes": jax.process_count()}
            devices = [f"{device.platform}:{device.device_kind}" for device in jax.devices()]
            records.start_manifest(folder, devices=devices, **about)

        def finish() -> None:
            arrays.save_dataset(folder, dataset)
            records.finish_manifest(folder)
            chunks.drop(folder)

        hosts.on_first(lambda: records.open_run(folder, config, may_change=PLACE))
        if records.is_finished(folder):
            terminal.show(f"{folder} is finished: its results are shown again.")
            hosts.on_first(lambda: chunks.drop(folder))
            return arrays.load_dataset(folder)
        hosts.on_first(start)
        dataset = compute(chunks.Chunks(folder), stop_if_requested)
        hosts.on_first(finish)
    return dataset


def simulate(
    plan: Plan, store: chunks.Store | None = None, on_chunk: Callable[[], None] = lambda: None
) -> "xarray.Dataset":
    """All seeds x schedules, blocks of seeds at a time, a share of each on every device.

    Finished blocks are found in `store`, others are added; `on_chunk()` is called after each.
    """
    store = {} if store is None else store
    seeds, spectra, parts = plan.config.seeds, make_spectra(plan.toy), []
    with progress.of_runs(seeds * len(plan.labels)) as advance:
        for batch_size, members in plan.groups.items():
            width = min(seeds, max(1, RUNS_AT_A_TIME * jax.device_count() // len(members)))
            compute, blocks = make_block(plan, batch_size, width, spectra), []
            for first in range(0, seeds, width):
                name = f"{plan.fingerprint}-batch{batch_size}-seeds{first}-{first + width}"
                block = store.get(name)
                if block is None:
                    block = store[name] = compute(first)
                blocks.append(block)
                advance(len(block["end/theta"]) * len(members))
                on_chunk()
            found = {name: [b[name] for b in blocks if name in b] for name in blocks[0]}
            parts.append({name: np.concatenate(each) for name, each in found.items()})
    order = np.argsort(np.concatenate(list(plan.groups.values())))
    whole = {name: np.concatenate([p[name] for p in parts], 1)[:, order] for name in parts[0]}
    return _dataset(plan, whole)


def make_block(
    plan: Plan, batch_size: int, width: int, spectra: Callable
) -> Callable[[int], chunks.Chunk]:
    """The schedules of one batch size, in one program: first of `width` seeds -> arrays.

    These are [seeds, schedules, ...] under AXIS/NAME, by their further axis: "step",
    "spectra_step", "end" (of the run); "shown" are all records of one seed, in the first block.
    """
    config, at, members = plan.config, plan.record_steps, plan.groups[batch_size]
    steps = {"num_steps": config.num_steps, "at": at, "snapshots_at": at}
    batches = {"batch_size": batch_size, "gd_jitter": config.gd_jitter}
    run = make_run(plan.toy, **steps, **batches, descent=plan.descent)
    points = jax.tree.map(lambda leaf: leaf[members], plan.schedules)
    sweep = train.make_sweep(run, chunk=RUNS_AT_A_TIME)
    keys = seed_keys(config.seed, config.seeds)

    def block_from(first: int) -> chunks.Chunk:
        places = np.arange(first, first + width) % config.seeds  # the last repeats early seeds
        measured, snapshots = sweep(keys[places], points)
        sampled = spectra(snapshots[:, :, np.isin(at, plan.spectra_steps)])
        block = {f"step/{name}": values for name, values in measured.items()}
        block |= {f"spectra_step/{name}": values for name, values in sampled.items()}
        block |= {"end/theta": snapshots[:, :, [0, -1]]}
        block = {name: values[: config.seeds - first] for name, values in block.items()}
        if first == 0:
            finite = np.isfinite(measured["train_loss"]).all((1, 2))
            seed = int(np.argmax(finite))  # the first that diverged in no schedule, else seed 0
            shown = {"theta": snapshots[[seed]], **spectra(snapshots[[seed]])}
            shown["seed"] = np.full((1, len(members)), seed)
            block |= {f"shown/{name}": values for name, values in shown.items()}
        return block

    return block_from


def make_spectra(toy: Toy) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Snapshots [seeds, schedules, records, p] -> `toy.spectra` of each; NaN where not finite.

    Compiled once, for `SNAPSHOTS_AT_A_TIME` of them, whatever their number.
    """
    chunk = -(-SNAPSHOTS_AT_A_TIME // jax.device_count())
    sweep = train.make_sweep(lambda _, theta: toy.spectra(parameters(toy, theta)), chunk=chunk)
    no_key = seed_keys(0, 1)

    def spectra(snapshots: np.ndarray) -> dict[str, np.ndarray]:
        flat = snapshots.reshape(-1, snapshots.shape[-1])
        finite = np.isfinite(flat).all(1)
        todo, shape = flat[finite], (SNAPSHOTS_AT_A_TIME, flat.shape[1])
        starts = range(0, max(len(todo), 1), SNAPSHOTS_AT_A_TIME)
        parts = [np.resize(todo[i : i + SNAPSHOTS_AT_A_TIME], shape) for i in starts]  # repeats
        results = [sweep(no_key, part) for part in parts]
        out = {name: np.full(len(flat), np.nan) for name in results[0]}
        for name, values in out.items():
            values[finite] = np.concatenate([r[name][0] for r in results])[: len(todo)]
        return {name: values.reshape(snapshots.shape[:-1]) for name, values in out.items()}

    return spectra


def _dataset(plan: Plan, whole: chunks.Chunk) -> "xarray.Dataset":
    """Labels the axes; records of a run that diverged are NaN from there on."""
    import xarray

    lost = diverged(whole["step/train_loss"])
    sampled = np.isin(plan.record_steps, plan.spectra_steps)
    lost_at = {"step": lost, "spectra_step": lost[..., sampled]}
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
    steps = {"step": plan.record_steps, "spectra_step": plan.spectra_steps}
    coords = {
        "seed": np.arange(plan.config.seeds),
        "schedule": plan.labels,
        "end": ["start", "end"],
    }
    return xarray.Dataset(variables, coords | steps)


def diverged(losses: np.ndarray) -> np.ndarray:
    """Which records [..., records] lie behind the point where a run diverged.

    It diverged if a loss isn't finite; and from the record on at which, before that, its loss
    exceeded a thousand times its first: the last finite values are as large as floats get.
    """
    finite = np.isfinite(losses)
    large = ~finite | (losses > 1e3 * losses[..., :1])
    return np.logical_or.accumulate(~finite.all(-1, keepdims=True) & large, axis=-1)
