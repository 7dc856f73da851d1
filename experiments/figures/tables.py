"""The summary of an ensemble next to the published numbers, as JSON and as a table. No JAX."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.figures import plots, terminal
from experiments.storage import records

if TYPE_CHECKING:
    import xarray


class Finding(NamedTuple):
    """What an experiment returns: its folder, all data, the summary, and the figures' paths."""

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
        """Over the finite runs; NaN if there are none."""
        return float(np.percentile(self.values, level)) if len(self.values) else float("nan")

    def entry(self) -> dict[str, Any]:
        """The row for JSON: the number of values and their percentiles in place of the values."""
        levels = {f"p{level}": self.percentile(level) for level in (1, 5, 50, 95, 99)}
        return self._asdict() | {"values": len(self.values)} | levels

    def show(self, value: float) -> str:
        """A value in the quantity's format; a dash for NaN."""
        return "–" if np.isnan(value) else format(value, self.form)

    def interval(self) -> str:
        """The median, and the 5th and 95th percentiles in brackets."""
        low, middle, high = (self.show(self.percentile(level)) for level in (5, 50, 95))
        return f"{middle} [{low}, {high}]"


def rows(
    dataset: "xarray.Dataset",
    quantities: Mapping[str, tuple[str, str]],
    published: Mapping[str, Sequence[float | None]],
) -> list[Row]:
    """A row per schedule and quantity (variable -> name and format) that the dataset has."""
    out = []
    diverged = ~np.isfinite(dataset["train_loss"].isel(step=-1).values)
    for j, schedule in enumerate(dataset["schedule"].values):
        for name, (quantity, form) in quantities.items():
            if name in dataset:
                last = dataset[name].isel({dataset[name].dims[-1]: -1}).values[:, j]
                paper = published[name][j] if name in published else None
                values = last[np.isfinite(last) & ~diverged[:, j]]
                share = float(diverged[:, j].mean())
                out.append(Row(str(schedule), quantity, name, form, paper, values, share))
    return out


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Writes summary.json: every row with its percentiles and the number of its values."""
    records.write_json(folder / "summary.json", {"rows": [row.entry() for row in rows]})


def show(folder: Path, rows: Sequence[Row], *, title: str) -> None:
    """Prints a line per schedule and quantity, and the folder."""
    from rich.table import Table

    table = Table(
        *("schedule", "quantity", "paper", "median [5 %, 95 %]", "diverged"),
        title=f"{title}, at the last record",
    )
    for row, before in zip(rows, [None, *rows], strict=False):
        new = before is None or before.schedule != row.schedule
        table.add_row(
            row.schedule if new else "",
            row.quantity,
            "" if row.published is None else row.show(row.published),
            row.interval(),
            f"{row.share_diverged:.0%}" if new else "",
        )
    terminal.show(table, folder)


def diverged_panel(
    dataset: "xarray.Dataset", marks: Mapping[str, Sequence[float]]
) -> list[plots.Panel]:
    """The share of diverged runs at each record; no panel if none diverges."""
    share = 100 * dataset["train_loss"].isnull().mean(dim="seed").expand_dims(seed=1)
    panel = plots.Panel("Diverged runs", "share (%)", lines(share), marks=marks, ylim=(-3, 103))
    return [panel] if bool((share > 0).any()) else []


def lines(array: "xarray.DataArray") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Curves for `plots.Panel`: by schedule, (records, values [seeds, records])."""
    axis = array.dims[-1]
    return {
        str(schedule): (array[axis].values, array.values[:, j])
        for j, schedule in enumerate(array["schedule"].values)
    }
