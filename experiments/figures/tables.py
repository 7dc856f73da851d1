"""Our numbers beside the published ones: rows of a summary, on the terminal and as JSON. No JAX."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiments.figures import plots
from experiments.storage import records

if TYPE_CHECKING:
    import xarray


class Finding(NamedTuple):
    """What an experiment returns: its folder, all data, the summary and the figures in it."""

    folder: Path
    dataset: "xarray.Dataset"
    rows: "list[Row]"
    figures: list[Path]


class Row(NamedTuple):
    """One quantity of one schedule at the last record; `values` are those of the finite runs."""

    schedule: str
    quantity: str
    name: str
    form: str
    published: float | None
    values: np.ndarray
    share_diverged: float

    def percentile(self, level: float) -> float:
        """Over the finite runs; NaN where there is none."""
        return float(np.percentile(self.values, level)) if len(self.values) else float("nan")

    def show(self, value: float) -> str:
        """A value in the quantity's format; a dash for NaN."""
        return "–" if np.isnan(value) else format(value, self.form)


def rows(
    dataset: "xarray.Dataset",
    quantities: Mapping[str, tuple[str, str]],
    published: Mapping[str, Sequence[float | None]],
) -> list[Row]:
    """Per schedule and quantity (name -> words and format), what the seeds ended with."""
    out = []
    gone = ~np.isfinite(dataset["train_loss"].isel(step=-1).values)
    for j, schedule in enumerate(dataset["schedule"].values):
        for name, (words, form) in quantities.items():
            if name in dataset:
                last = dataset[name].isel({dataset[name].dims[-1]: -1}).values[:, j]
                paper = published[name][j] if name in published else None
                values = last[np.isfinite(last) & ~gone[:, j]]
                share = float(gone[:, j].mean())
                out.append(Row(str(schedule), words, name, form, paper, values, share))
    return out


def write(folder: Path, rows: Sequence[Row]) -> None:
    """summary.json: percentiles of every row."""
    entries = [
        row._asdict()
        | {"values": len(row.values)}
        | {f"p{level}": row.percentile(level) for level in (1, 5, 50, 95, 99)}
        for row in rows
    ]
    records.write_json(folder / "summary.json", {"rows": entries})


def show(rows: Sequence[Row], *, title: str) -> None:
    """On the terminal, a line per schedule and quantity."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}, at the last record")
    for heading in ("schedule", "quantity", "paper", "median [5 %, 95 %]", "diverged"):
        table.add_column(heading)
    for row, before in zip(rows, [None, *rows], strict=False):
        new = before is None or before.schedule != row.schedule
        low, middle, high = (row.show(row.percentile(level)) for level in (5, 50, 95))
        table.add_row(
            row.schedule if new else "",
            row.quantity,
            "" if row.published is None else row.show(row.published),
            f"{middle} [{low}, {high}]",
            f"{row.share_diverged:.0%}" if new else "",
        )
    Console(markup=False, emoji=False).print(table)  # a name may well have brackets in it


def diverged_panel(
    dataset: "xarray.Dataset", marks: Mapping[str, Sequence[float]]
) -> list[plots.Panel]:
    """The share of runs that are gone at each record, where one is."""
    gone = dataset["train_loss"].isnull().mean(dim="seed").expand_dims(seed=1)
    panel = plots.Panel(
        "Diverged runs", "share (%)", lines(100 * gone), marks=marks, ylim=(-3, 103)
    )
    return [panel] if bool((gone > 0).any()) else []


def lines(array: "xarray.DataArray") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Curves for `plots.Panel`: by schedule, (records, values [seeds, records])."""
    axis = array.dims[-1]
    return {
        str(schedule): (array[axis].values, array.values[:, j])
        for j, schedule in enumerate(array["schedule"].values)
    }
