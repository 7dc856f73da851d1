"""The step size or momentum at which the loss jumps, by bisection, beside each gauge's edge."""

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
MOST = 0.99  # momentum
GAUGES = tuple(plateaus.GAUGES)


def simulate(
    config: Config, toy: Toy, specs: Sequence[Spec], store: Any, on_chunk: Callable[[], None]
) -> "xarray.Dataset":
    """Critical factors and gauges at the last state of each run, with dims run, seed.

    "critical" is the factor of the step size above which the loss jumps, or the one that the edge
    is divided by as momentum changes.
    """
    import xarray

    sweep = plateaus.run_sweep(toy, store, on_chunk, toys.fingerprint(config))
    gauges, found = plateaus.make_gauges(config, toy, sweep), {}
    for members, spec, program, points in plateaus.groups(config, toy, specs):
        ran = checkpoint(config, program, spec, points, sweep)
        gauged = gauges(program, ran["snapshot"], ran.get("after"))
        rows = {name: gauged[name][:, :, 0] for name in GAUGES if name in gauged}
        rows["critical"] = critical(config, program, points, ran["snapshot"][:, :, 0], sweep)
        for name, values in rows.items():
            whole = found.setdefault(name, np.full((len(specs), config.seeds), np.nan))
            whole[members] = values.T
    variables = {name: (("run", "seed"), values) for name, values in found.items()}
    return xarray.Dataset(variables, {"run": [spec.label for spec in specs]})


def critical(
    config: Config, program: Program, points: Point, starts: np.ndarray, sweep: Callable
) -> np.ndarray:
    """The critical factors [seeds, points] of runs that continue from `starts` [..., q]."""
    at = np.arange(0, config.horizon + 1, max(config.horizon // 100, 1))
    follow = runs.continued(runs.make_run(program, at, snapshots=False))
    shape = starts.shape[:2]
    seed = np.repeat(np.arange(shape[0]), shape[1])
    sign = 1 if program.full else -1  # momentum raises the edge of full batches, lowers others

    def peaks(factors: np.ndarray, name: str) -> np.ndarray:
        sizes, momenta = (np.broadcast_to(leaf, shape) for leaf in points[:2])
        if config.bisect == "step_size":
            sizes = sizes * factors
        else:
            momenta = sign * ((1 + sign * momenta) / factors - 1)
        items = seed, Point(sizes.ravel(), momenta.ravel(), starts.reshape(len(seed), -1))
        name = f"{name} of {program.optimizer}, b = {program.batch_size}"
        losses = sweep(follow, seed_keys(config.seed, 1), items, name=name)["loss"][0]
        return np.where(np.isfinite(losses).all(1), losses.max(1), np.inf).reshape(shape)

    low, high = np.full(shape, LOW), np.full(shape, HIGH)
    if config.bisect == "momentum":  # down to 0 with full batches, else up to `MOST`
        end = 0.0 if program.full else MOST
        low = np.ones(shape)
        high = np.broadcast_to((1 + sign * points.momentum) / (1 + sign * end), shape)
    unchanged = peaks(np.ones(shape), "unchanged")
    return bisected(lambda f, name: peaks(f, name) > config.jump * unchanged, low, high)


def checkpoint(
    config: Config, program: Program, spec: Spec, points: Point, sweep: Callable
) -> dict[str, np.ndarray]:
    """The last "snapshot" of each seed and point, [seeds, points, 1, q]; see `runs.make_run`."""
    run = runs.make_run(program, np.array([spec.num_steps]))
    return sweep(run, seed_keys(config.seed, config.seeds), points, name=f"checkpoint {spec}")


def bisected(
    jumps: Callable[[np.ndarray, str], np.ndarray], low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The smallest factors between `low` and `high` that jump; NaN where there are none.

    `jumps(factors, name)` is a mask of the same shape. Bisects in logarithms.
    """
    holds = ~jumps(low, "low") & jumps(high, "high")
    for i in range(ROUNDS):
        middle = np.sqrt(low * high)
        up = jumps(middle, f"round {i}")
        low, high = np.where(up, low, middle), np.where(up, middle, high)
    return np.where(holds, np.sqrt(low * high), np.nan)


def shares(dataset: "xarray.Dataset", specs: Sequence[Spec]) -> list[dict[str, Any]]:
    """Per run: the critical factor, and for each gauge its ratio to the prediction, [seeds]."""
    rows = []
    for i, spec in enumerate(specs):
        critical = dataset["critical"].values[i]
        row: dict[str, Any] = {"run": spec.label, "critical": critical.tolist()}
        for name in (name for name in GAUGES if name in dataset):
            row[name] = (critical * dataset[name].values[i] / spec.edge).tolist()
        rows.append(row)
    return rows


def summarize(folder: Path, dataset: "xarray.Dataset", specs: Sequence[Spec]) -> list[dict]:
    """Writes summary.json; prints factors beside the prediction of each gauge, and the best."""
    from rich.table import Table

    rows, verdicts = shares(dataset, specs), {}
    for row in rows:
        # The error of a prediction: seeds' mean of |log(eta_c / predicted)|.
        errors = {
            name: float(np.nanmean(np.abs(np.log(row[name]))))
            for name in GAUGES
            if np.isfinite(row.get(name, np.nan)).any()
        }
        best = min(errors, key=lambda name: errors[name], default=None)
        verdicts[row["run"]] = (
            f"{plateaus.GAUGES[best]} predicts best, to {np.expm1(errors[best]):.1%} on average"
            if best
            else "no jump within the bracket"
        )
    records.write_json(folder / "summary.json", {"rows": rows, "verdicts": verdicts})
    table = Table("run", "gauge", "factor · gauge / edge", "factor", title="Critical factors")
    for row in rows:
        names = [name for name in GAUGES if np.isfinite(row.get(name, np.nan)).any()]
        for name in names:
            first = (row["run"], interval(row["critical"])) if name == names[0] else ("", "")
            table.add_row(first[0], plateaus.GAUGES[name], interval(row[name]), first[1])
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
    """Draws critical factors over the prediction of each gauge, a point per seed."""
    panels = []
    for i, spec in enumerate(specs):
        critical, points = dataset["critical"].values[i], {}
        for name in (name for name in GAUGES if name in dataset):
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
                "critical factor",
                {"equal": (line, line)},
                "edge / gauge",
                points=points,
            )
        )
    return plots.figure(folder / "figures" / "edge_test", panels, title=title)
