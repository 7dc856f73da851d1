"""Finished and running runs of any experiment as one table of curves. Imports no JAX."""

import glob
import itertools
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.storage import arrays, records

if TYPE_CHECKING:
    import pandas as pd
    import xarray

# Dims of curves, of which a quantity has at most one.
ALONG = ("step", "spectra_step", "record", "window")
SHOWN = "shown_"  # prefix of arrays of a single seed, which are also under their name


class Run(NamedTuple):
    """The curves of one run: settings, and for each quantity its values over `along`."""

    name: str
    settings: dict[str, Any]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]  # quantity -> (step, value)
    axes: dict[str, np.ndarray]  # other abscissas, such as epochs and seconds, over the steps
    finished: bool
    folder: Path


def read(patterns: Sequence[str]) -> list[Run]:
    """All runs in folders or glob patterns, and in folders below them; ValueError if none is found.

    An ensemble has a run for each seed and schedule.
    """
    found: dict[Path, list[Run]] = {}
    for pattern in patterns:
        given = os.path.expanduser(pattern)
        places = [given] if os.path.isdir(given) else sorted(glob.glob(given, recursive=True))
        for place in places:
            for config in sorted(Path(place).rglob("config.json")):
                found.setdefault(config.parent.absolute(), [])
    for folder in found:
        found[folder] = in_folder(folder)
    runs = list(itertools.chain(*found.values()))
    if not runs:
        raise ValueError(
            f"No run with records is in {', '.join(patterns)}; give run folders, such as "
            "runs/resnet_cifar/NAME, or folders that contain them, such as runs."
        )
    return runs


def in_folder(folder: Path) -> list[Run]:
    """The runs in a run folder; none if nothing is recorded yet."""
    settings = records.read_json(folder / "config.json")
    finished = records.is_finished(folder)
    if (folder / "metrics.jsonl").exists():
        rows = records.read_records(folder)
        return [_of_rows(folder, settings, rows, finished)] if rows else []
    if (folder / "results.nc").exists():
        return _of_dataset(folder, settings, arrays.load_dataset(folder), finished)
    return []


def _of_rows(folder: Path, settings: dict, rows: list[dict], finished: bool) -> Run:
    names = list(dict.fromkeys(name for row in rows for name in row))
    column = lambda name: np.array([row.get(name, np.nan) for row in rows], float)
    steps = column("step")
    seconds = np.nan_to_num(np.diff(steps, prepend=steps[0]) * column("step_seconds")).cumsum()
    axes = {"epoch": column("epoch"), "seconds of training": seconds}
    curves = {name: (steps, column(name)) for name in names if name not in ("step", "epoch")}
    return Run(folder.name, settings, curves, axes, finished, folder)


def _of_dataset(folder: Path, settings: dict, data: "xarray.Dataset", finished: bool) -> list[Run]:
    along = lambda name: [dim for dim in data[name].dims if dim in ALONG]
    names = [name for name in map(str, data.data_vars) if not name.startswith(SHOWN)]
    names = [name for name in names if len(along(name)) <= 1 and data[name].dtype.kind in "biuf"]
    # Curves have a value per run and step; where there are none, quantities have one per run. Other
    # dims than those of most curves are of other parts of a study.
    curved = [name for name in names if along(name)] or names
    of_runs = [tuple(str(dim) for dim in data[name].dims if dim not in ALONG) for name in curved]
    dims = statistics.mode(of_runs) if of_runs else ()
    values_at = lambda dim: data[dim].values if dim in data.coords else np.arange(data.sizes[dim])
    places = {dim: values_at(dim) for dim in (*dims, *ALONG) if dim in data.sizes}
    # Others, such as vectors of parameters, have further dims.
    chosen = [data[name] for name in names if set(data[name].dims) <= places.keys()]
    chosen = [array.transpose(*(dim for dim in dims if dim in array.dims), ...) for array in chosen]
    runs = []
    for place in itertools.product(*(range(data.sizes[dim]) for dim in dims)):
        at = dict(zip(dims, place, strict=True))
        curves = {}
        for array in chosen:
            values = array.values[tuple(at[dim] for dim in dims if dim in array.dims)]
            steps = next((places[dim] for dim in array.dims if dim in ALONG), 0)
            curves[str(array.name)] = (np.atleast_1d(steps) * 1.0, np.atleast_1d(values) * 1.0)
        label = {dim: _plain(places[dim][i]) for dim, i in at.items()}
        text = ", ".join(f"{dim} {value}" for dim, value in label.items())
        runs.append(Run(f"{folder.name}: {text}", settings | label, curves, {}, finished, folder))
    return runs


def table(runs: Sequence[Run]) -> "pd.DataFrame":
    """One row per run, quantity and step: run, settings that differ, step, quantity, value."""
    import pandas as pd

    differing = different(runs)
    parts = []
    for run in runs:
        for quantity, (steps, values) in run.curves.items():
            part = pd.DataFrame({"step": steps, "quantity": quantity, "value": values})
            parts.append(
                part.assign(run=run.name, **{k: str(run.settings.get(k)) for k in differing})
            )
    columns = ["run", *differing, "step", "quantity", "value"]
    return pd.concat(parts, ignore_index=True).reindex(columns=columns)


def different(runs: Sequence[Run]) -> list[str]:
    """Names of the settings in which the runs differ; not their names and folders."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = lambda name: {repr(run.settings.get(name)) for run in runs}
    return [n for n in names if n not in ("exp_name", "runs_dir") and len(values(n)) > 1]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
