"""The step size at which the loss jumps, found by bisection, beside 2 / gauge for each gauge."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.edge import plateaus, runs
from experiments.edge.config import Config, Spec
from experiments.edge.runs import Point, Program
from experiments.figures import plots, terminal
from experiments.storage import records
from experiments.toy import config as toys
from experiments.toy.problems import Toy
from experiments.toy.run import seed_keys

if TYPE_CHECKING:
    import xarray

LOW, HIGH, ROUNDS = 0.25, 16.0, 9  # the bracket in step sizes of the run; the last is 0.8 % wide
GAUGES = tuple(plateaus.GAUGES)


def simulate(
    config: Config, toy: Toy, specs: Sequence[Spec], store: Any, on_chunk: Callable[[], None]
) -> "xarray.Dataset":
    """Critical step sizes and gauges at the last state of each run, with dims run, seed."""
    import xarray

    rows = []
    for spec in specs:
        sweep = plateaus.run_sweep(store, on_chunk, f"{toys.fingerprint(config)} {spec}")
        rows.append(critical(config, toy, spec, sweep))
    variables = {name: (("run", "seed"), np.array([row[name] for row in rows])) for name in rows[0]}
    return xarray.Dataset(variables, {"run": [spec.label for spec in specs]})


def critical(config: Config, toy: Toy, spec: Spec, sweep: Callable) -> dict[str, np.ndarray]:
    """The critical step size of one run, and its gauges at the checkpoint, each [seeds]."""
    program = Program(toy, spec.optimizer, spec.batch_size, config.with_replacement)
    point, snapshots = checkpoint(config, program, spec, sweep)
    gauged = plateaus.gauges(config, program, point, snapshots, sweep)
    starts = snapshots[:, 0, 0]
    at = np.arange(0, config.horizon + 1, max(config.horizon // 100, 1))
    follow = runs.continued(runs.make_run(program, config.horizon, at, snapshots=False))

    def peaks(sizes: np.ndarray, name: str) -> np.ndarray:
        items = np.arange(len(sizes)), Point(sizes, np.full(len(sizes), spec.momentum), starts)
        losses = sweep(follow, seed_keys(config.seed, 1), items, name=name)["loss"][0]
        return np.where(np.isfinite(losses).all(1), losses.max(1), np.inf)

    unchanged = peaks(np.full(config.seeds, spec.step_size), "unchanged")
    jumps = lambda sizes, name: peaks(sizes, name) > config.jump * unchanged
    missing = np.full(config.seeds, np.nan)
    return {
        "critical_step_size": bisected(jumps, spec.step_size, config.seeds),
        **{name: gauged[name][:, 0, 0] if name in gauged else missing for name in GAUGES},
    }


def checkpoint(
    config: Config, program: Program, spec: Spec, sweep: Callable
) -> tuple[Point, np.ndarray]:
    """The point of a run, and the last snapshot of each seed, [seeds, 1, 1, q]."""
    point = Point(np.array([spec.step_size]), np.array([spec.momentum]))
    run = runs.make_run(program, spec.num_steps, [spec.num_steps])
    keys = seed_keys(config.seed, config.seeds)
    return point, sweep(run, keys, point, name="runs")["snapshot"]


def bisected(
    jumps: Callable[[np.ndarray, str], np.ndarray], step_size: float, seeds: int
) -> np.ndarray:
    """The smallest step size that jumps, for each seed; NaN where the bracket doesn't hold it.

    `jumps(sizes, name)` is a mask [seeds]. Bisects in logarithms.
    """
    low, high = (np.full(seeds, np.log(end * step_size)) for end in (LOW, HIGH))
    holds = ~jumps(np.exp(low), "low") & jumps(np.exp(high), "high")
    for i in range(ROUNDS):
        middle = (low + high) / 2
        up = jumps(np.exp(middle), f"round {i}")
        low, high = np.where(up, low, middle), np.where(up, middle, high)
    return np.where(holds, np.exp((low + high) / 2), np.nan)


def shares(dataset: "xarray.Dataset", specs: Sequence[Spec]) -> list[dict[str, Any]]:
    """Per run: eta_c / eta, and for each gauge eta_c over its prediction, [seeds]."""
    rows = []
    for i, spec in enumerate(specs):
        critical = dataset["critical_step_size"].values[i]
        row: dict[str, Any] = {"run": spec.label, "critical": list(critical / spec.step_size)}
        for name in GAUGES:
            predicted = spec.edge * spec.step_size / dataset[name].values[i]
            row[name] = [float(share) for share in critical / predicted]
        rows.append(row)
    return rows


def summarize(folder: Path, dataset: "xarray.Dataset", specs: Sequence[Spec]) -> list[dict]:
    """Writes summary.json; prints eta_c beside the prediction of each gauge, and the tightest."""
    from rich.table import Table

    rows, verdicts = shares(dataset, specs), {}
    for row in rows:
        # The error of a prediction: seeds' mean of |log(eta_c / predicted)|.
        errors = {
            name: float(np.nanmean(np.abs(np.log(row[name]))))
            for name in GAUGES
            if np.isfinite(row[name]).any()
        }
        best = min(errors, key=lambda name: errors[name], default=None)
        verdicts[row["run"]] = (
            f"{plateaus.GAUGES[best]} predicts best, to {np.expm1(errors[best]):.1%} on average"
            if best
            else "no jump within the bracket"
        )
    records.write_json(folder / "summary.json", {"rows": rows, "verdicts": verdicts})
    table = Table(
        "run", "gauge", "η_c · gauge / (η · edge)", "η_c / η", title="Critical step sizes"
    )
    for row in rows:
        for i, name in enumerate(name for name in GAUGES if np.isfinite(row[name]).any()):
            start = (row["run"], interval(row["critical"])) if i == 0 else ("", "")
            table.add_row(start[0], plateaus.GAUGES[name], interval(row[name]), start[1])
    terminal.show(table, *(f"{run}: {verdict}." for run, verdict in verdicts.items()), folder)
    return rows


def interval(values: Sequence[float]) -> str:
    """The mean over seeds ± half of its 95 % interval (Student's t)."""
    from scipy import stats

    finite = np.array(values)[np.isfinite(values)]
    if len(finite) < 2:
        return "–"
    half = stats.sem(finite) * stats.t.ppf(0.975, len(finite) - 1)
    lost = f" ({len(finite)} of {len(values)})" if len(finite) < len(values) else ""
    return f"{finite.mean():.3g} ± {half:.2g}{lost}"


def draw(folder: Path, dataset: "xarray.Dataset", specs: Sequence[Spec], title: str) -> list[Path]:
    """Draws eta_c over the prediction of each gauge, a point per seed."""
    panels = []
    for i, spec in enumerate(specs):
        critical, points = dataset["critical_step_size"].values[i] / spec.step_size, {}
        for name in GAUGES:
            predicted = spec.edge / dataset[name].values[i]
            if np.isfinite(predicted).any():
                points[plateaus.GAUGES[name]] = predicted, critical
        top = np.nanmax(
            [np.nanmax(critical, initial=1), *(np.nanmax(x) for x, _ in points.values())]
        )
        line = np.array([0.0, 1.1 * top])
        panels.append(
            plots.Panel(
                spec.label,
                "critical step size / η",
                {"equal": (line, line)},
                "edge / gauge",
                points=points,
            )
        )
    return plots.figure(folder / "figures" / "edge_test", panels, title=title)
