"""The critical step size, momentum or batch size, by bisection, beside each gauge's edge."""

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
LABELS = {  # what is varied, and the ratio that is 1 for an exact test of the edge
    "step_size": ("factor", "factor · gauge / edge"),
    "momentum": ("factor", "factor · gauge / edge"),
    "batch_size": ("batch size", "gauge there / edge"),
}


def simulate(
    config: Config, toy: Toy, specs: Sequence[Spec], store: Any, on_chunk: Callable[[], None]
) -> "xarray.Dataset":
    """Critical factors and gauges at the last state of each run, with dims run, seed.

    "critical" is the factor of the step size above which the loss jumps, or the one that the edge
    is divided by as momentum changes; or the batch size below which it jumps, half-way between the
    largest that does and the next, at which gauges are then taken.
    """
    import xarray

    sweep = plateaus.run_sweep(toy, store, on_chunk, toys.fingerprint(config))
    gauges, found = plateaus.make_gauges(config, toy, sweep), {}
    for members, spec, program, points in plateaus.groups(config, toy, specs):
        ran = checkpoint(config, program, spec, points, sweep)
        rows = {"critical": critical(config, program, points, ran["snapshot"][:, :, 0], sweep)}
        if config.bisect == "batch_size":
            rows["critical"] = program.batch_size / rows["critical"]
            rows |= at_batch_sizes(program, ran["snapshot"], np.ceil(rows["critical"]), gauges)
        else:
            gauged = gauges(program, ran["snapshot"], ran.get("after"))
            rows |= {name: gauged[name][:, :, 0] for name in GAUGES if name in gauged}
        for name, values in rows.items():
            whole = found.setdefault(name, np.full((len(specs), config.seeds), np.nan))
            whole[members] = values.T
    variables = {name: (("run", "seed"), values) for name, values in found.items()}
    names = {"run": [spec.label for spec in specs]}
    return xarray.Dataset(variables, names, {"bisect": config.bisect})


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
        counts = None
        if config.bisect == "step_size":
            sizes = sizes * factors
        elif config.bisect == "momentum":
            momenta = sign * ((1 + sign * momenta) / factors - 1)
        else:
            counts = np.rint(program.batch_size / factors).ravel()
        start = starts.reshape(len(seed), -1)
        items = seed, Point(sizes.ravel(), momenta.ravel(), start, counts)
        name = f"{name} of {program.optimizer}, b = {program.batch_size}"
        losses = sweep(follow, seed_keys(config.seed, 1), items, name=name)["loss"][0]
        return np.where(np.isfinite(losses).all(1), losses.max(1), np.inf).reshape(shape)

    low, high = np.full(shape, LOW), np.full(shape, HIGH)
    if config.bisect == "momentum":  # down to 0 with full batches, else up to `MOST`
        end = 0.0 if program.full else MOST
        low = np.ones(shape)
        high = np.broadcast_to((1 + sign * points.momentum) / (1 + sign * end), shape)
    elif config.bisect == "batch_size":  # from all examples down to one
        low = np.full(shape, program.batch_size / len(program.toy.train.y))
        high = np.full(shape, float(program.batch_size))
    unchanged = peaks(np.ones(shape), "unchanged")
    return bisected(lambda f, name: peaks(f, name) > config.jump * unchanged, low, high)


def at_batch_sizes(
    program: Program, snapshots: np.ndarray, sizes: np.ndarray, gauges: Callable
) -> dict[str, np.ndarray]:
    """The gauges [seeds, points] of snapshots [..., 1, q] for batches of `sizes`; NaN for NaN."""
    found: dict[str, np.ndarray] = {}
    for size in np.unique(sizes[np.isfinite(sizes)]):
        gauged = gauges(program._replace(batch_size=int(size)), snapshots, None)
        for name in (name for name in GAUGES if name in gauged):
            whole = found.setdefault(name, np.full(sizes.shape, np.nan))
            whole[sizes == size] = gauged[name][:, :, 0][sizes == size]
    return found


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
    """Per run: what is critical, and for each gauge its ratio to the prediction, [seeds]."""
    rows, by_batch_size = [], dataset.attrs["bisect"] == "batch_size"
    for i, spec in enumerate(specs):
        critical = dataset["critical"].values[i]
        row: dict[str, Any] = {"run": spec.label, "critical": critical.tolist()}
        # Gauges of batches have the edge of mini-batches, and are those of the critical size.
        edge = spec._replace(full=False).edge if by_batch_size else spec.edge / critical
        for name in (name for name in GAUGES if name in dataset):
            row[name] = (dataset[name].values[i] / edge).tolist()
        rows.append(row)
    return rows


def summarize(folder: Path, dataset: "xarray.Dataset", specs: Sequence[Spec]) -> list[dict]:
    """Writes summary.json; prints factors beside the prediction of each gauge, and the best."""
    from rich.table import Table

    rows, verdicts = shares(dataset, specs), {}
    for row in rows:
        # The error of a prediction: seeds' mean of |log(measured / predicted)|.
        errors = {
            name: float(np.nanmean(np.abs(np.log(row[name]))))
            for name in GAUGES
            if np.isfinite(row.get(name, np.nan)).any()
        }
        best = min(errors, key=lambda name: errors[name], default=None)
        verdicts[row["run"]] = (
            f"{plateaus.GAUGES[best]} predicts best, to {np.expm1(errors[best]):.1%} on average"
            if best
            else "no jump, or always one, within the bracket"
        )
    records.write_json(folder / "summary.json", {"rows": rows, "verdicts": verdicts})
    of, ratio = LABELS[dataset.attrs["bisect"]]
    table = Table("run", "gauge", ratio, of, title=f"Critical {of}s")
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
    """Draws the ratio of each gauge to its prediction, a point per seed."""
    panels, (_, ratio) = [], LABELS[dataset.attrs["bisect"]]
    seeds = np.arange(dataset.sizes["seed"])
    for row in shares(dataset, specs):
        points = {
            plateaus.GAUGES[name]: (seeds, np.array(row[name]))
            for name in GAUGES
            if np.isfinite(row.get(name, np.nan)).any()
        }
        lines = {"edge": (seeds, np.ones(len(seeds)))}
        panels.append(plots.Panel(row["run"], ratio, lines, "seed", points=points))
    stem, colours = folder / "figures" / "edge_test", {"edge": "#8c8c8c"}
    return plots.figure(stem, panels, title=title, colours=colours)
