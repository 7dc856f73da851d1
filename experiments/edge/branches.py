"""In and out of the edge: runs continued from one state with smaller and larger step sizes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.edge import plateaus, runs
from experiments.edge.config import Config, Spec, last_third, record_steps
from experiments.edge.edge_test import checkpoint, interval
from experiments.edge.runs import Point, Program
from experiments.figures import plots, terminal
from experiments.storage import records
from experiments.toy import config as toys
from experiments.toy.problems import Toy
from experiments.toy.run import seed_keys

if TYPE_CHECKING:
    import xarray

WHEN = ("end", "annealed")  # of the branch; after as many steps at the smallest step size


def simulate(
    config: Config, toy: Toy, specs: Sequence[Spec], store: Any, on_chunk: Callable[[], None]
) -> "xarray.Dataset":
    """Branches of the last state of each run, with dims run, factor, seed, record.

    Metrics have dims run, factor, seed, when: all branches are annealed at one small step size
    before they are compared, since a large one by itself keeps the loss high.
    """
    import xarray

    found: dict[tuple[str, str], list] = {}
    sweep = plateaus.run_sweep(toy, store, on_chunk, toys.fingerprint(config))
    gauges = plateaus.make_gauges(config, toy, sweep)
    for spec in specs:
        for name, values in branches(config, toy, spec, sweep, gauges).items():
            found.setdefault(name, []).append(np.moveaxis(values, 1, 0))
    coords = {"run": [spec.label for spec in specs], "factor": list(config.factors)}
    return xarray.Dataset(
        {
            name: (("run", "factor", "seed", last), np.array(rows))
            for (name, last), rows in found.items()
        },
        coords
        | {"when": list(WHEN), "step": ("record", record_steps(config.horizon, config.records))},
    )


def branches(
    config: Config, toy: Toy, spec: Spec, sweep: Callable, gauges: Callable
) -> dict[tuple[str, str], np.ndarray]:
    """(name, last dimension) -> values [seeds, factors, records or 2] of one run's branches."""
    program = Program(toy, spec.optimizer, spec.batch_size, config.with_replacement)
    factors = np.array(config.factors)
    point = Point(np.array([spec.step_size]), np.array([spec.momentum]))
    snapshots = checkpoint(config, program, spec, point, sweep)["snapshot"]
    shape = config.seeds, len(factors)
    seed, sizes = np.repeat(np.arange(shape[0]), shape[1]), np.tile(factors, shape[0])
    momenta = np.full(len(seed), spec.momentum)

    def follow(sizes: np.ndarray, starts: np.ndarray, at: np.ndarray, name: str):
        run = runs.continued(runs.make_run(program, at))
        items = seed, Point(spec.step_size * sizes, momenta, starts)
        ran = sweep(run, seed_keys(config.seed, 1), items, name=f"{name} of {spec}")
        return {key: leaf[0].reshape(*shape, *leaf.shape[2:]) for key, leaf in ran.items()}

    at, last = record_steps(config.horizon, config.records), np.array([config.horizon])
    along = follow(sizes, snapshots[seed, 0, 0], np.concatenate([at, last]), "branches")
    ends = along["snapshot"][:, :, -1]
    smallest = np.full(len(seed), factors.min())
    annealed = follow(smallest, ends.reshape(len(seed), -1), last, "annealed")["snapshot"][:, :, 0]
    of_records = {name: values[:, :, :-1] for name, values in along.items()}
    gauged = gauges(program, of_records["snapshot"], of_records.get("after"))
    measured = metrics(config, program, np.stack([ends, annealed], axis=2), sweep)
    return {("loss", "record"): of_records["loss"]} | {
        (name, last): values
        for last, parts in (("record", gauged), ("when", measured))
        for name, values in parts.items()
    }


def metrics(
    config: Config, program: Program, snapshots: np.ndarray, sweep: Callable
) -> dict[str, np.ndarray]:
    """Losses, sparsity and ranks of the toy at snapshots [..., q]; NaN where a run diverged."""
    toy, shape = program.toy, snapshots.shape[:-1]
    flat = snapshots.reshape(-1, snapshots.shape[-1])

    def measure_one(key: jax.Array, start: jax.Array) -> dict[str, jax.Array]:
        params = program.state(key, Point(1.0, 0.0, start)).params
        return toy.measure(params, params) | toy.spectra(params)

    found = sweep(
        measure_one, seed_keys(config.seed, 1), flat, name=f"metrics of {program.optimizer}"
    )
    finite = np.isfinite(flat).all(1)
    return {name: np.where(finite, leaf[0], np.nan).reshape(shape) for name, leaf in found.items()}


def compared(dataset: "xarray.Dataset", specs: Sequence[Spec]) -> list[dict[str, Any]]:
    """Per run and factor, [seeds]: medians of gauges over the branch's last third, and metrics."""
    rows = []
    names = [name for name in ("sharpness", "midpoint", "batch_sharpness") if name in dataset]
    last = last_third(dataset.sizes["record"])
    for i, spec in enumerate(specs):
        for j, factor in enumerate(dataset["factor"].values):
            row: dict[str, Any] = {"run": spec.label, "factor": float(factor)}
            for name in names:
                row[name] = np.median(dataset[name].values[i, j][:, last], axis=1).tolist()
            for name in dataset:
                if "when" in dataset[name].dims:
                    for k, when in enumerate(WHEN):
                        row[f"{name}, {when}"] = dataset[name].values[i, j, :, k].tolist()
            rows.append(row)
    return rows


def summarize(folder: Path, dataset: "xarray.Dataset", specs: Sequence[Spec]) -> list[dict]:
    """Writes summary.json; prints levels and metrics with their 95 % intervals over seeds."""
    from rich.table import Table

    rows = compared(dataset, specs)
    records.write_json(folder / "summary.json", {"rows": rows})
    for spec in specs:
        mine = [row for row in rows if row["run"] == spec.label]
        heads = [f"× {row['factor']:g}" for row in mine]
        title = f"{spec.label}, continued with other step sizes, {plateaus.seeds(dataset)}"
        table = Table("mean and 95 % interval", *heads, title=title)
        for name in mine[0]:
            shown = name not in ("run", "factor") and not name.endswith(", end")
            if shown and np.isfinite([row[name] for row in mine]).any():
                table.add_row(
                    plateaus.GAUGES.get(name, name), *(interval(row[name]) for row in mine)
                )
        terminal.show(table)
        for line in differences(mine):
            terminal.show(line)
    terminal.show(folder)
    return rows


def differences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What each factor changes in the annealed metrics, seed by seed, relative to factor 1."""
    lines = []
    for unchanged in (row for row in rows if row["factor"] == 1):
        for row in (row for row in rows if row["factor"] != 1):
            changes = {
                name.removesuffix(", annealed"): np.subtract(row[name], unchanged[name]).tolist()
                for name in row
                if name.endswith(", annealed")
            }
            parts = [f"{name} {interval(change)}" for name, change in changes.items()]
            lines.append(f"× {row['factor']:g} minus × 1, annealed: {'; '.join(parts)}")
    return lines


def draw(folder: Path, dataset: "xarray.Dataset", specs: Sequence[Spec], title: str) -> list[Path]:
    """Draws gauges and loss along the branches, one figure row per run."""
    names = [name for name in ("sharpness", "batch_sharpness", "loss") if name in dataset]
    panels = []
    for i, spec in enumerate(specs):
        for name in names:
            lines = {
                f"× {factor:g}": (dataset["step"].values, dataset[name].values[i, j])
                for j, factor in enumerate(dataset["factor"].values)
            }
            heading = f"{spec.label}: {plateaus.GAUGES.get(name, 'training loss')}"
            panels.append(
                plots.Panel(heading, name.replace("_", " "), lines, "steps", log_y=name == "loss")
            )
    stem = folder / "figures" / "branches"
    return plots.figure(stem, panels, columns=len(names), title=title)
