"""Curves of one run of a classifier, and of several runs. No JAX."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures import plots
from experiments.storage import records

Records = list[dict[str, Any]]
SHARPNESS = "curvature of the loss"
LOGARITHMIC = ("nats", "Euclidean norm", SHARPNESS)


def records_of(folder: Path) -> Records:
    """The records of a run; ValueError if there are none."""
    found = records.read_records(folder)
    if not found:
        raise ValueError(f"{folder} has no records in metrics.jsonl; remove it and run again.")
    return found


def blocks(record: Mapping[str, Any]) -> list[str]:
    """The blocks whose sparsity is in a record, in depth order."""
    head = "train/distinct/"
    return [name.removeprefix(head) for name in record if name.startswith(head)]


def one_run(folder: Path, title: str) -> list[Path]:
    """Draws loss, error, sparsity of every block, noise level, norms and curvature along a run."""
    runs = [records_of(folder)]
    of_blocks = lambda kind: {block: f"train/{kind}/{block}" for block in blocks(runs[0][0])}
    losses = {"training images": "train/loss", "test images": "test/loss"}
    errors = {"training images": "train/error", "test images": "test/error"}
    averaged = {"test images, averaged weights": "test_average/error"}
    norms = {"parameters": "param_norm", "gradient of a batch": "grad_norm"}
    table = [
        ("Cross-entropy", "nats", losses | {"training batches, δ": "window_loss"}),
        ("Error", "share of images", errors | averaged),
        ("Active units, without duplicates", "share", of_blocks("distinct")),
        ("Active units, all", "share", of_blocks("active")),
        ("Dead units", "share", of_blocks("dead")),
        ("Norms", "Euclidean norm", norms),
    ]
    if curved := [record for record in runs[0] if "curvature/edge" in record]:
        edges = {"2/η": "edge"}
        if curved[0]["curvature/edge"] != curved[0]["curvature/batch_edge"]:
            edges = {"2(1 + β)/η": "edge", "2(1 − β)/η": "batch_edge"}
        of = {"largest eigenvalue": "eigenvalue_1", "batch sharpness": "batch_sharpness"} | edges
        table += [
            ("Sharpness", SHARPNESS, {label: f"curvature/{name}" for label, name in of.items()}),
            ("Trace of the Hessian", "sum of eigenvalues", {"trace": "curvature/trace"}),
        ]
    panels = [
        _panel(heading, unit, {label: (runs, name) for label, name in names.items()})
        for heading, unit, names in table
    ]
    return plots.figure(folder / "figures" / "resnet_cifar", panels, title=title)


def several_runs(stem: Path, settings: Mapping[str, Sequence[Path]], title: str) -> list[Path]:
    """Draws training loss, test error, sparsity of every block and curvature, a curve per setting.

    `settings[label]` are the folders of its seeds; curves are their medians, bands 5-95 %.
    """
    read = {label: list(map(records_of, folders)) for label, folders in settings.items()}
    first = next(iter(read.values()))[0][0]
    table = [
        ("Training loss", "nats", "train/loss"),
        ("Test error", "share of images", "test/error"),
    ]
    for block in blocks(first):
        table.append((f"Active units, {block}", "share, no duplicates", f"train/distinct/{block}"))
    if "curvature/edge" in first:
        table.append(("Largest eigenvalue", SHARPNESS, "curvature/eigenvalue_1"))
        table.append(("Batch sharpness", SHARPNESS, "curvature/batch_sharpness"))
    panels = [
        _panel(heading, unit, {label: (runs, name) for label, runs in read.items()})
        for heading, unit, name in table
    ]
    return plots.figure(stem, panels, title=title)


def _panel(title: str, unit: str, curves: Mapping[str, tuple[list[Records], str]]) -> plots.Panel:
    """A metric over the epoch, for each label (runs, name); shares and sums are linear."""
    lines = {}
    for label, (runs, name) in curves.items():
        # Losses of windows and curvature are missing from some records, and a run that diverged
        # has fewer records.
        found = [{r["epoch"]: r[name] for r in run if name in r} for run in runs]
        if epochs := sorted(set().union(*found)):
            values = [[values.get(epoch, np.nan) for epoch in epochs] for values in found]
            lines[label] = np.array(epochs, float), np.array(values, float)
    return plots.Panel(title, unit, lines, "epoch", log_y=unit in LOGARITHMIC)
