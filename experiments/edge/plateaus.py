"""Where curvature settles under large steps, beside the predicted edges."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.edge import runs
from experiments.edge.config import Config, Spec, last_third, record_steps
from experiments.edge.runs import Point, Program
from experiments.figures import plots, terminal
from experiments.storage import records
from experiments.toy import config as toys
from experiments.toy.problems import Toy
from experiments.toy.run import seed_keys
from sgd_sparse_jax import measure, train

if TYPE_CHECKING:
    import xarray

LANCZOS_RECORDS = 3  # with eigenvalues of mini-batches, which cost 20 times as much as the rest
WITHIN = 0.06  # relative distance from the edge that counts as being there
GAUGES = {
    "sharpness": "λ_max(H)",
    "midpoint": "λ_max(H) at midpoints",
    "preconditioned": "λ_max(P^-½ H P^-½)",
    "batch_sharpness": "batch sharpness",
    "ratio_of_means": "its ratio of means",
    "minibatch_sharpness": "E λ_max(H_B)",
}


def simulate(
    config: Config, toy: Toy, specs: Sequence[Spec], store: Any, on_chunk: Callable[[], None]
) -> "xarray.Dataset":
    """Runs every spec for every seed; gauges have dims run, seed, record."""
    import xarray

    keys, found = seed_keys(config.seed, config.seeds), {}
    shape = (len(specs), config.seeds, config.records)
    sweep = run_sweep(toy, store, on_chunk, toys.fingerprint(config))
    gauges = make_gauges(config, toy, sweep)
    for members, spec, program, points in groups(config, toy, specs):
        at = record_steps(spec.num_steps, config.records)
        ran = sweep(runs.make_run(program, at), keys, points, name=f"runs {spec}")
        gauged = gauges(program, ran["snapshot"], ran.get("after"))
        for name, values in ({"loss": ran["loss"]} | gauged).items():
            whole = found.setdefault(name, np.full(shape, np.nan))
            whole[members] = np.moveaxis(values, 1, 0)
    dims = ("run", "seed", "record")
    steps = [record_steps(spec.num_steps, config.records) for spec in specs]
    return xarray.Dataset(
        {name: (dims, values) for name, values in found.items()},
        {"run": [spec.label for spec in specs], "step": (("run", "record"), np.array(steps))},
    )


def groups(
    config: Config, toy: Toy, specs: Sequence[Spec]
) -> Iterator[tuple[list[int], Spec, Program, Point]]:
    """The runs that share a program: their places, the first of them, the program, their points."""
    for group in sorted({spec[2:] for spec in specs}, key=str):
        members = [i for i, spec in enumerate(specs) if spec[2:] == group]
        spec = specs[members[0]]
        program = Program(toy, spec.optimizer, spec.batch_size, config.with_replacement)
        pairs = [specs[i][:2] for i in members]  # step sizes and momenta
        yield members, spec, program, Point(*map(np.array, zip(*pairs, strict=True)))


def run_sweep(toy: Toy, store: Any, on_chunk: Callable[[], None], fingerprint: str) -> Callable:
    """sweep(run, keys, points, name) with chunks in `store`; compiles each `run` once."""
    small = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    # One run of a larger network fills a core: vmapped, its weights would leave the cache.
    options: dict[str, Any] = {"chunk": 64, **toy.sweep_options} if small else {"chunk": 1}
    compiled = functools.cache(lambda run: train.make_sweep(run, **options))

    def sweep(run: Callable, keys: jax.Array, points: Any, *, name: str) -> Any:
        how = {"store": store, "fingerprint": f"{fingerprint} {name}"}
        return compiled(run)(keys, points, on_chunk=lambda done: on_chunk(), **how)

    return sweep


def make_gauges(config: Config, toy: Toy, sweep: Callable) -> Callable[..., dict[str, np.ndarray]]:
    """gauges(program, snapshots, after), [seeds, points, records] each, of snapshots [..., q].

    - "sharpness": lambda_max(H) of the full-batch loss, with its relative "residual".
    - With full batches, half-way between a snapshot and that after the next step: iterates jump
      across the valley every step, and every second record would see one side of it. "midpoint" is
      lambda_max(H) there; for RMSProp and Adam, "preconditioned" is lambda_max(P^-1/2 H P^-1/2).
    - With mini-batches, "batch_sharpness" and "ratio_of_means" with their errors; in the last
      records "minibatch_sharpness". The batches of a record are drawn for it alone: means over
      records have independent errors.

    Each is compiled once, for all programs.
    """
    template = jax.eval_shape(toy.network(1.0).init, jax.random.key(0), toy.train.x[:1])[0]
    key, size = seed_keys(config.seed, 1), sum(leaf.size for leaf in jax.tree.leaves(template))
    of_all = runs.make_sharpness(toy, config.lanczos_steps)

    @functools.cache
    def of_batches(batch_size: int, batches: int, steps: int) -> Callable:
        program = Program(toy, "sgd", batch_size)
        return runs.continued(runs.make_batch_gauges(program, batches, steps))

    def largest(theta: np.ndarray, scale: np.ndarray | None = None) -> dict[str, np.ndarray]:
        scale = np.ones_like(theta) if scale is None else scale.reshape(theta.shape)
        shape, each = (theta.shape[0], theta.shape[2]), []
        for i in range(theta.shape[1]):  # one shape for all groups of runs, hence one program
            items = theta[:, i].reshape(-1, size), scale[:, i].reshape(-1, size)
            each.append(sweep(of_all, key, items, name="sharpness"))
        join = lambda *parts: np.stack([part.reshape(shape) for part in parts], 1)
        return jax.tree.map(join, *each)

    def of_mini_batches(program: Program, theta: np.ndarray) -> dict[str, np.ndarray]:
        numbers = np.arange(theta[..., 0].size).reshape(theta.shape[:-1])  # for keys

        def samples(batches: int, steps: int, where: slice) -> dict[str, np.ndarray]:
            some = numbers[:, :, where]
            items = some.ravel(), theta[:, :, where].reshape(-1, size)
            function = of_batches(program.batch_size, batches, steps)
            name = f"b = {program.batch_size}, {batches} batches, {steps} steps"
            results = sweep(function, key, items, name=name).items()
            return {name: values[0].reshape(*some.shape, -1) for name, values in results}

        drawn = samples(config.gauge_batches, 0, slice(None))
        rayleigh, g2 = drawn["rayleigh"], drawn["g2"]
        found = {}
        for name, (value, error) in {
            "batch_sharpness": measure.mean_and_error(rayleigh),
            "ratio_of_means": measure.ratio_and_error(rayleigh * g2, g2),
        }.items():
            found |= {name: value, f"{name}_error": error}
        if config.lanczos_batches:
            last = slice(max(theta.shape[2] - LANCZOS_RECORDS, 0), theta.shape[2])
            steps = 3 * config.lanczos_steps // 4  # of a lower bound, which lies above the edge
            found["minibatch_sharpness"] = np.full(theta.shape[:-1], np.nan)
            tops = samples(config.lanczos_batches, steps, last)["top"]
            found["minibatch_sharpness"][:, :, last] = tops.mean(-1)
        return found

    def gauges(
        program: Program, snapshots: np.ndarray, after: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        theta = snapshots[..., :size]
        found = largest(theta)
        if after is None:
            return found | of_mini_batches(program, theta)
        middle = (theta + after[..., :size]) / 2
        if program.optimizer == "sgd":
            return found | {"midpoint": largest(middle)["sharpness"]}
        scale = jax.jit(jax.vmap(program.scale))(after.reshape(-1, after.shape[-1]))
        return found | {"preconditioned": largest(middle, np.asarray(scale))["sharpness"]}

    return gauges


def levels(dataset: "xarray.Dataset", specs: Sequence[Spec]) -> list[dict[str, Any]]:
    """Per run: the edge, and each gauge's median over the last third, [seeds], as shares of it."""
    last, rows = last_third(dataset.sizes["record"]), []
    for i, spec in enumerate(specs):
        row: dict[str, Any] = {"run": spec.label, "edge": spec.edge, "gauge": spec.gauge}
        for name in GAUGES:
            values = dataset[name].values[i][:, last] if name in dataset else np.nan
            # Gauges of other kinds of runs are missing; that of the edge is NaN if all diverged.
            if np.isfinite(values).any() or name == spec.gauge:
                (middle,) = plots.percentiles(np.transpose(values), (50,)) / spec.edge
                row[name] = [float(share) for share in middle]
        rows.append(row)
    return rows


def summarize(folder: Path, dataset: "xarray.Dataset", specs: Sequence[Spec]) -> list[dict]:
    """Writes summary.json; prints the levels, and the claims that they bear out or don't."""
    from rich.table import Table

    rows = levels(dataset, specs)
    claims = verdicts(rows, specs)
    records.write_json(folder / "summary.json", {"rows": rows, "claims": claims})
    table = Table("run", "gauge", "level / edge", "edge", title=f"Levels, {seeds(dataset)}")
    for row in rows:
        names = [name for name in GAUGES if name in row]
        for name in names:
            run, edge = (row["run"], f"{row['edge']:.4g}") if name == names[0] else ("", "")
            table.add_row(run, GAUGES[name], interval(row[name]), edge)
    note = (
        "Medians over the last third of each run: mean over seeds ± standard error. Mini-batches "
        "are drawn anew for each record."
    )
    terminal.show(
        table, note, *(f"{claim}: {verdict}" for claim, verdict in claims.items()), folder
    )
    return rows


def seeds(dataset: "xarray.Dataset") -> str:
    """`3 seeds`, for titles."""
    return f"{dataset.sizes['seed']} seeds"


def interval(values: Sequence[float]) -> str:
    """`mean ± standard error` over seeds; a dash without finite values."""
    finite = np.array(values)[np.isfinite(values)]
    if not len(finite):
        return "–"
    error = finite.std(ddof=1) / np.sqrt(len(finite)) if len(finite) > 1 else np.nan
    lost = f" ({len(finite)} of {len(values)} seeds)" if len(finite) < len(values) else ""
    return f"{finite.mean():.3f} ± {error:.3f}{lost}"


def verdicts(rows: Sequence[dict[str, Any]], specs: Sequence[Spec]) -> dict[str, str]:
    """Claim -> `yes` or `no`, with the numbers it rests on."""
    found = {}
    for row, spec in zip(rows, specs, strict=True):
        mean = float(np.mean(row[spec.gauge]))
        claim = f"{spec.label}: {GAUGES[spec.gauge]} within {WITHIN:.0%} of {spec.edge:.4g}"
        found[claim] = f"{'yes' if abs(mean - 1) <= WITHIN else 'no'} ({mean - 1:+.1%})"
        if not spec.full and "sharpness" in row:
            below = np.less(row["sharpness"], row["batch_sharpness"])
            claim = f"{spec.label}: λ_max(H) below the batch sharpness for every seed"
            found[claim] = f"{'yes' if below.all() else 'no'} ({below.sum()} of {len(below)} seeds)"
    finite = [i for i, row in enumerate(rows) if "sharpness" in row]
    plain = [i for i in finite if not specs[i].full and not specs[i].momentum]
    for size in sorted({specs[i].step_size for i in plain}):
        batches = sorted((specs[i].batch_size, i) for i in plain if specs[i].step_size == size)
        if len(batches) > 1:
            rises = np.diff([rows[i]["sharpness"] for _, i in batches], axis=0) > 0
            names = ", ".join(str(b) for b, _ in batches)
            claim = f"η = {size:g}: λ_max(H) rises with b = {names} for every seed"
            found[claim] = f"{'yes' if rises.all() else 'no'}"
    return found


def draw(folder: Path, dataset: "xarray.Dataset", specs: Sequence[Spec], title: str) -> list[Path]:
    """Draws each gauge as a multiple of the edge, and the training loss, along all runs."""

    def panel(heading: str, name: str, members: Sequence[int]) -> plots.Panel:
        lines: dict[str, Any] = {}
        for i in members:
            y = dataset[name].values[i]
            lines[specs[i].label] = (
                dataset["step"].values[i] / specs[i].num_steps,
                (y if name == "loss" else y / specs[i].edge),
            )
        if name != "loss":
            lines["edge"] = np.array([0.0, 1.0]), np.ones(2)
        unit = "loss" if name == "loss" else "multiple of the edge"
        look: dict[str, Any] = {"log_y": True} if name == "loss" else {"ylim": (0, 2)}
        return plots.Panel(heading, unit, lines, "share of the run", **look)

    every = range(len(specs))
    full = [i for i in every if specs[i].full and specs[i].optimizer == "sgd"]
    batches = [i for i in every if not specs[i].full]
    adaptive = [i for i in every if specs[i].optimizer != "sgd"]
    panels = [
        panel(f"{heading}: {GAUGES[name]}", name, members)
        for heading, name, members in (
            ("Full batches", "midpoint", full),
            ("Adaptive, full batches", "preconditioned", adaptive),
            ("Mini-batches", "batch_sharpness", batches),
            ("Mini-batches", "sharpness", batches),
        )
        if members and name in dataset
    ]
    panels.append(panel("Training loss", "loss", every))
    colours = {"edge": "#8c8c8c"}
    return plots.figure(folder / "figures" / "plateaus", panels, title=title, colours=colours)
