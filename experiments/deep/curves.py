"""Curves of one classifier's run, and of several beside each other. No JAX."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures import plots
from experiments.storage import records

NEEDED = (
    *("step", "epoch", "train/loss", "train/error", "test/loss", "test/error"),
    *("test_average/loss", "test_average/error"),
)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run; ValueError where there is none, or one is not all numbers."""
    rows = records.read_rows(folder)
    if not rows:
        raise ValueError(f"{folder} has lost its metrics.jsonl; remove that folder and run again.")
    for number, row in enumerate(rows, 1):
        for name in (*NEEDED, *row):
            if not isinstance(row.get(name), int | float):
                raise ValueError(
                    f"{folder / 'metrics.jsonl'}, line {number}: {name} is {row.get(name)!r} and "
                    "not a number; remove that folder and run again."
                )
    return rows


def blocks(row: Mapping[str, Any]) -> list[str]:
    """The blocks that a row has the sparsity of, in depth order."""
    head = "train/distinct/"
    return [name.removeprefix(head) for name in row if name.startswith(head)]


def one_run(folder: Path, title: str) -> list[Path]:
    """Loss, error, sparsity of every block, noise level and norms along a run."""
    rows = rows_of(folder)
    every = lambda name: np.array([row.get(name, np.nan) for row in rows], float)
    epochs = every("epoch")
    of = lambda kind: {b: (epochs, every(f"train/{kind}/{b}")) for b in blocks(rows[0])}
    curves = lambda names: {label: (epochs, every(name)) for label, name in names.items()}
    losses = {
        "training images": "train/loss",
        "test images": "test/loss",
        "training batches, δ": "window_loss",
    }
    errors = {
        "training images": "train/error",
        "test images": "test/error",
        "test images, averaged weights": "test_average/error",
    }
    panels = [
        plots.Panel("Cross-entropy", "nats", curves(losses), xlabel="epoch", log_y=True),
        plots.Panel("Error", "share of images", curves(errors), xlabel="epoch"),
        plots.Panel("Active units, without duplicates", "share", of("distinct"), xlabel="epoch"),
        plots.Panel("Active units, all", "share", of("active"), xlabel="epoch"),
        plots.Panel("Dead units", "share", of("dead"), xlabel="epoch"),
        plots.Panel(
            "Norms",
            "Euclidean norm",
            curves({"parameters": "param_norm", "gradient of a batch": "grad_norm"}),
            xlabel="epoch",
            log_y=True,
        ),
    ]
    return plots.figure(folder / "figures" / "resnet_cifar", panels, columns=2, title=title)


def several_runs(stem: Path, settings: Mapping[str, Sequence[Path]], title: str) -> list[Path]:
    """Training loss, test error and the sparsity of every block: a curve per setting.

    `settings[label]` are the folders of its seeds: the median is drawn, and the band of 90 %.
    """
    read = {label: [rows_of(folder) for folder in folders] for label, folders in settings.items()}
    first = next(iter(read.values()))[0][0]

    def lines(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        out = {}
        for label, runs in read.items():
            longest = max(runs, key=len)  # a run that diverged has fewer rows
            epochs = np.array([row["epoch"] for row in longest], float)
            values = np.full((len(runs), len(longest)), np.nan)
            for i, rows in enumerate(runs):
                values[i, : len(rows)] = [row.get(name, np.nan) for row in rows]
            out[label] = epochs, values
        return out

    panel = lambda title, unit, name, log_y=False: plots.Panel(
        title, unit, lines(name), xlabel="epoch", log_y=log_y
    )
    panels = [
        panel("Training loss", "nats", "train/loss", log_y=True),
        panel("Test error", "share of images", "test/error"),
        *(
            panel(f"Active units, {block}", "share, no duplicates", f"train/distinct/{block}")
            for block in blocks(first)
        ),
    ]
    return plots.figure(stem, panels, columns=2, title=title)
