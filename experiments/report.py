"""An interactive page of runs of any experiments, finished or not, in one HTML file.

    python -m experiments.report runs/diag_nets/d1                 # writes report.html
    python -m experiments.report 'runs/resnet_cifar/*' --out grid.html --watch 60
    python -m experiments.report runs --csv all.csv                # or --parquet

The file opens from disk, without a network: curves of any quantity against steps, epochs or
seconds, medians and 5-95 % bands by any setting, sliders over settings, a map and a table of final
values.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments.figures import interactive, terminal
from experiments.launch import cli, ranges
from experiments.launch.ranges import CountOrNone
from experiments.storage import series


@dataclass(frozen=True)
class Config:
    """Runs to show, and where."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, folders that contain them, or glob patterns."""
    out: Path = Path("report.html")
    """The page."""
    csv: Path | None = None
    """Also write all curves as a long table, with one row per run, quantity and step."""
    parquet: Path | None = None
    """The same table as a Parquet file; needs the package pyarrow."""
    points: ranges.TwoOrMore = 500
    """Most points of a curve in the page; tables have all."""
    watch: CountOrNone = 0
    """Write everything again every so many seconds, until Ctrl-C; 0: once."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(Config, run, argv)


def run(config: Config) -> Path:
    """Writes the page and the tables; returns the page's path."""
    ranges.check(config)
    while True:
        runs = series.read(config.runs)
        interactive.write(config.out, runs, points=config.points)
        for path, method in ((config.csv, "to_csv"), (config.parquet, "to_parquet")):
            if path:
                getattr(series.table(runs), method)(path, index=False)
        terminal.show(f"{len(runs)} runs", config.out)
        if not config.watch:
            return config.out
        time.sleep(config.watch)


if __name__ == "__main__":
    main()
