"""Results of an ensemble: a table with the published numbers, and curves. No JAX."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.figures import plots, terminal

if TYPE_CHECKING:
    import xarray


class Quantity(NamedTuple):
    """How a variable is shown: name, format in tables, and axis label in figures."""

    name: str
    form: str
    unit: str  # with a %, shares are drawn in percent
    log: bool = False

    @property
    def title(self) -> str:
        """The capitalized name."""
        return self.name[0].upper() + self.name[1:]

    @property
    def scale(self) -> float:
        """The factor of the variable in figures."""
        return 100.0 if "%" in self.unit else 1.0


QUANTITIES = {
    "train_loss": Quantity("training loss", ".2g", "loss", log=True),
    "test_loss": Quantity("test loss", ".2g", "loss", log=True),
    "noise_level": Quantity("training loss before the decay", ".2g", "loss", log=True),
    "support": Quantity("‖u⊙v‖₀", ".0f", "non-zero entries"),
    "balancedness": Quantity("‖u² − v²‖₁", ".2g", "imbalance of the layers", log=True),
    "rank": Quantity("Jacobian rank", ".0f", "rank"),
    "gradient_dimension": Quantity("gradient dimension", ".0f", "units"),
    "nuclear_norm": Quantity("Σ singular values of features", ".3g", "nuclear norm", log=True),
    "effective_rank": Quantity("effective rank of features", ".2f", "entropy (nats)"),
    "active_1": Quantity("active units, layer 1", ".1%", "share (%)"),
    "active_2": Quantity("active units, layer 2", ".1%", "share (%)"),
    "sparsity_1": Quantity("feature sparsity, layer 1", ".1%", "active entries (%)"),
    "sparsity_2": Quantity("feature sparsity, layer 2", ".1%", "active entries (%)"),
    "flips_1": Quantity("ReLUs flipped, layer 1", ".3f", "share (%)"),
    "sharpness": Quantity("sharpness", ".3g", "λ_max", log=True),
    "batch_sharpness": Quantity("batch sharpness", ".3g", "E[gᵀHg / |g|²]", log=True),
}
CURVATURE = ("sharpness", "batch_sharpness")  # shown wherever they were recorded


class Finding(NamedTuple):
    """The result of an experiment: its folder, data, summary, and the paths of its figures."""

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
        """The row as JSON values, with number and percentiles of the values in place of them."""
        levels = {f"p{level}": self.percentile(level) for level in (1, 5, 50, 95, 99)}
        return self._asdict() | {"values": len(self.values)} | levels

    def show(self, value: float | None) -> str:
        """A value in the quantity's format; a dash for NaN, and nothing for None."""
        if value is None:
            return ""
        return "–" if np.isnan(value) else format(value, self.form)

    def interval(self) -> str:
        """The median, and the 5th and 95th percentiles in brackets."""
        low, middle, high = (self.show(self.percentile(level)) for level in (5, 50, 95))
        return f"{middle} [{low}, {high}]"

    def cells(self) -> tuple[str, ...]:
        """Schedule, quantity, published number, `interval` and share of diverged runs."""
        diverged = f"{self.share_diverged:.0%}"
        return self.schedule, self.quantity, self.show(self.published), self.interval(), diverged


def rows(
    dataset: "xarray.Dataset", names: Sequence[str], published: Mapping[str, Sequence[float | None]]
) -> list[Row]:
    """A row per schedule and variable, at the last record."""
    out = []
    # Diverged runs are excluded even if their other values are finite.
    diverged = ~np.isfinite(dataset["train_loss"].isel(step=-1).values)
    names = [*names, *(name for name in CURVATURE if name in dataset)]
    for j, schedule in enumerate(dataset["schedule"].values):
        for name in names:
            last = dataset[name].isel({dataset[name].dims[-1]: -1}).values[:, j]
            paper = published[name][j] if name in published else None
            values = last[np.isfinite(last) & ~diverged[:, j]]
            share = float(diverged[:, j].mean())
            quantity, form, *_ = QUANTITIES[name]
            out.append(Row(str(schedule), quantity, name, form, paper, values, share))
    return out


def show(folder: Path, rows: Sequence[Row], *, title: str) -> None:
    """Prints the table, a line per schedule and quantity, and the folder."""
    from rich.table import Table

    table = Table(
        *("schedule", "quantity", "paper", "median [5 %, 95 %]", "diverged"),
        title=f"{title}, at the last record",
    )
    for _, group in itertools.groupby(rows, lambda row: row.schedule):
        first, *others = (row.cells() for row in group)
        table.add_row(*first)
        for _, *numbers, _ in others:  # schedule and share in the first line only
            table.add_row("", *numbers)
    terminal.show(table, folder)


def draw(
    stem: Path,
    dataset: "xarray.Dataset",
    names: Sequence[str],
    marks: Mapping[str, Sequence[float]],
    title: str,
) -> list[Path]:
    """Draws a panel per variable [seed, schedule, record], with a label per schedule.

    Sharpness, if it was recorded, has panels with the edge. If runs diverged, a last panel shows
    their share.
    """

    def panel(array: "xarray.DataArray", title: str, unit: str, **look) -> plots.Panel:
        records, array = array[array.dims[-1]].values, array.transpose("schedule", "seed", ...)
        lines = {str(each["schedule"].values): (records, each.values) for each in array}
        return plots.Panel(title, unit, lines, marks=marks, **look)

    panels = []
    for name in [*names, *(name for name in CURVATURE if name in dataset)]:
        look, more = QUANTITIES[name], {}
        heading = look.title
        if name in CURVATURE:
            heading = f"{heading} (dashed: 2 / η)"
            records = dataset["spectra_step"].values
            edges = zip(dataset["schedule"].values, dataset["edge"].values, strict=True)
            more["levels"] = {str(label): (records, edge) for label, edge in edges}
        panels.append(panel(look.scale * dataset[name], heading, look.unit, log_y=look.log, **more))
    # A single seed has no band.
    diverged = 100 * dataset["train_loss"].isnull().mean("seed").expand_dims(seed=1)
    if bool((diverged > 0).any()):
        panels.append(panel(diverged, "Diverged runs", "share (%)", ylim=(-3, 103)))
    return plots.figure(stem, panels, title=title)
