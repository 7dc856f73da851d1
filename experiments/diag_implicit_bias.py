"""Large steps help SGD and hurt GD over diagonal nets: errors against the step size.

python -m experiments.diag_implicit_bias                     # 64 data sets x 30 step sizes
python -m experiments.diag_implicit_bias --data_sets 256 --exp_name many

Medians over the runs that remain beyond an edge would compare different data sets: all errors are
relative to that of the smallest step on the same data, at a share of the data set's own edge.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from experiments.figures import claims, plots, terminal
from experiments.launch import cli, devices, hosts, ranges
from experiments.launch.hosts import ALONE, Hosts
from experiments.launch.ranges import Count, Positive, Seed, TwoOrMore
from experiments.storage import records
from experiments.toy import ensemble, run as toy_runs
from sgd_sparse_jax import data, models, train
from sgd_sparse_jax.types import Batch

if TYPE_CHECKING:
    import xarray

SIZES = {"n": 20, "d": 30, "support": 3}
ALPHA = 0.1  # u at initialization; v = 0
CONVERGED, LOST = 1e-10, 1e4  # losses at which a run ends
WINDOW = 64  # steps between two looks at the loss
OUTCOMES = ("converged", "stuck", "diverged")
SHARES = (0.1, 0.25, 0.5, 0.7, 0.85, 0.95)  # of the edge
METHODS = ("GD", "SGD")
SOURCE = "Even, Pesme, Gunasekar, Flammarion, arXiv 2302.08982 (claim; own sizes)"


@dataclass(frozen=True)
class Config:
    """f = <u * v, x> with n = 20, d = 30, a 3-sparse target: gradient descent and SGD (b = 1)."""

    data_sets: TwoOrMore = 64
    """Data sets, drawn with the seeds 0, 1, ..."""
    step_sizes: TwoOrMore = 30
    """Step sizes of each method, equally spaced."""
    gd_smallest: Positive = 0.03
    """Smallest step size of gradient descent."""
    gd_largest: Positive = 3.5
    """Largest step size of gradient descent."""
    sgd_smallest: Positive = 0.02
    """Smallest step size of SGD."""
    sgd_largest: Positive = 0.6
    """Largest step size of SGD."""
    gd_steps: Count = 50_000
    """Steps of gradient descent at most."""
    sgd_steps: Count = 200_000
    """Steps of SGD at most."""
    seed: Seed = 0
    """Seed of SGD's order."""
    exp_name: str = "edge"
    """Name of the run's folder."""
    runs_dir: str = "runs"
    """Folder that contains the run folders."""
    hosts: Hosts = ALONE


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    devices.set_up_toys()
    cli.main(Config, run, argv)


def run(config: Config) -> claims.Finding:
    """Runs both methods, or loads them if finished; then judges the claims and draws."""
    hosts.join(config.hosts)
    ranges.check(config)
    for method in METHODS:
        smallest, largest = interval(config, method)
        if not smallest < largest:
            raise ValueError(
                f"--{method.lower()}_smallest is {smallest}; it must be less than "
                f"--{method.lower()}_largest, {largest}."
            )
    folder = records.run_folder(config.runs_dir, "diag_implicit_bias", config.exp_name)
    dataset = ensemble.in_folder(folder, config, lambda *how: simulate(config, *how))
    hosts.leave_the_rest_to_first()
    found = judge(dataset)
    claims.report(folder, found, title=f"Large steps, {config.data_sets} data sets")
    return claims.Finding(folder, found, draw(folder / "figures" / "diag_implicit_bias", dataset))


def interval(config: Config, method: str) -> tuple[float, float]:
    """Smallest and largest step size of a method."""
    name = method.lower()
    return getattr(config, f"{name}_smallest"), getattr(config, f"{name}_largest")


def simulate(
    config: Config, store: ensemble.Store, on_chunk: Callable[[], None]
) -> "xarray.Dataset":
    """error = |u * v - theta*|^2 and outcome [descent, data, step] of the last iterate."""
    import xarray

    drawn = [data.sparse_regression(seed, n_test=1, **SIZES) for seed in range(config.data_sets)]
    sizes = np.array([np.linspace(*interval(config, m), config.step_sizes) for m in METHODS])
    found: dict[str, list[np.ndarray]] = {"error": [], "outcome": [], "steps": []}
    for method, step_sizes in zip(METHODS, sizes, strict=True):
        points = train.grid(data=np.arange(config.data_sets), step_size=step_sizes)
        steps = config.gd_steps if method == "GD" else config.sgd_steps
        sweep = train.make_sweep(make_run(drawn, method, steps), chunk=240, vectorized=1)
        ran = sweep(
            toy_runs.seed_keys(config.seed, 1),
            points,
            store=store,
            fingerprint=f"{method} {steps}",
            on_chunk=lambda done: on_chunk(),
        )
        for name, values in ran.items():
            found[name].append(values.reshape(config.data_sets, config.step_sizes))
    dims = ("descent", "data", "step")
    variables: dict[str, Any] = {name: (dims, np.array(part)) for name, part in found.items()}
    variables["step_size"] = (("descent", "step"), sizes)
    return xarray.Dataset(variables, {"descent": list(METHODS)})


def make_run(drawn: Sequence[data.Problem], method: str, max_steps: int):
    """run(key, point) -> error, outcome and steps of one run to convergence or divergence."""
    x, y, target = (
        jnp.stack(list(map(jnp.asarray, parts)))
        for parts in zip(
            *((each.train.x, each.train.y, each.target) for each in drawn), strict=True
        )
    )
    network = models.from_linen(models.DiagonalNet(ALPHA))
    objective = train.make_objective(network, train.half_squared)
    n = x.shape[1]
    sampler = train.full_batch(n) if method == "GD" else train.with_replacement(n, 1)

    def run(key: jax.Array, point: dict[str, jax.Array]) -> dict[str, jax.Array]:
        i = point["data"]
        everything, order = Batch(x[i], y[i]), jr.fold_in(key, i)
        fetch = lambda key, idx: (
            everything if method == "GD" else Batch(everything.x[idx], everything.y[idx])
        )
        tx = optax.sgd(point["step_size"])
        segment = train.make_segment(train.make_step(objective, tx), fetch)
        loss = lambda state: objective(state.params, {}, everything)[0]

        def unfinished(state) -> jax.Array:
            now = loss(state)  # NaN ends a run
            return (state.step < max_steps) & (now > CONVERGED) & (now < LOST)

        def window(state):
            return segment(order, state, sampler(order, state.step, WINDOW))[0]

        state = train.init_state(order, network, tx, everything.x)
        state = jax.lax.while_loop(unfinished, window, state)
        final = loss(state)
        outcome = jnp.where(final <= CONVERGED, 0, jnp.where(final < LOST, 1, 2))
        error = ((state.params["u"] * state.params["v"] - target[i]) ** 2).sum()
        return {"error": error, "outcome": outcome, "steps": state.step}

    return run


def at_shares(dataset: "xarray.Dataset", method: str) -> np.ndarray:
    """Errors relative to the smallest step [data, shares], at shares of each data set's own edge.

    The edge is the last step size below the first that diverged; NaN if that is the smallest.
    """
    of = dataset.sel(descent=method)
    diverged, sizes = of["outcome"].values == 2, of["step_size"].values
    first = np.where(diverged.any(1), diverged.argmax(1), len(sizes))
    edges = sizes[np.maximum(first - 1, 0)]
    wanted = edges[:, None] * np.array(SHARES)
    place = np.abs(wanted[..., None] - sizes).argmin(-1)
    errors = of["error"].values
    ratios = np.take_along_axis(errors, place, 1) / errors[:, :1]
    return np.where(first[:, None] > 1, ratios, np.nan)


def rises(dataset: "xarray.Dataset", method: str) -> np.ndarray:
    """Whether the error rises from a step size to the next, where both runs converged."""
    of = dataset.sel(descent=method)
    converged, errors = of["outcome"].values == 0, of["error"].values
    both = converged[:, 1:] & converged[:, :-1]
    return (errors[:, 1:] > errors[:, :-1])[both]


def judge(dataset: "xarray.Dataset") -> list[claims.Claim]:
    """Prints ratios and outcomes, and compares the two methods at shares of their edges."""
    from rich.table import Table

    found, count = [], dataset.sizes["data"]
    table = Table("share of the edge", "GD: ratio", "larger", "SGD: ratio", "larger")
    table.title = f"Error relative to the smallest step, medians [95 %], {count} data sets"
    ratios = {method: at_shares(dataset, method) for method in METHODS}
    for k, share in enumerate(SHARES):
        cells = []
        for method in METHODS:
            value, low, high = median(ratios[method][:, k])
            larger = np.mean(ratios[method][:, k] > 1)
            cells += [f"{value:.3g} [{low:.3g}, {high:.3g}]", f"{larger:.0%}"]
        table.add_row(f"{share:g}", *cells)
    terminal.show(table)
    common: dict[str, Any] = {"source": SOURCE, "figure": "diag_implicit_bias"}
    half, most = SHARES.index(0.5), SHARES.index(0.7)
    for method, word, share, bound, neighbours in (
        ("GD", "worse", 0.9, claims.at_least(50), claims.at_least(0.95)),
        ("SGD", "better", 0.97, claims.at_most(0.3), claims.at_most(0.03)),
    ):
        common["setting"] = method
        values = ratios[method]
        agree = values[:, half] > 1 if method == "GD" else values[:, half] < 1
        value, low, high = median(values[:, most])
        pairs = rises(dataset, method)
        for claim, number, expected, statistic, between in (
            (
                f"large steps are {word}",
                agree.mean(),
                claims.at_least(share),
                f"share of {count} data sets, at half of the edge",
                None,
            ),
            (
                f"large steps are much {word}",
                value,
                bound,
                "median ratio of errors, at .7 of the edge",
                (low, high),
            ),
            (
                "the error rises with the step size" if method == "GD" else "it falls",
                pairs.mean() if len(pairs) else np.nan,
                neighbours,
                f"share of {len(pairs)} neighbours that converged whose error rises",
                None,
            ),
        ):
            found.append(
                claims.judged(
                    claim,
                    value=number,
                    expected=expected,
                    statistic=statistic,
                    interval=between,
                    **common,
                )
            )
    return found


def median(values: np.ndarray) -> tuple[float, float, float]:
    """Median of the finite values and its 95 % bootstrap interval; NaN if there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, np.nan, np.nan
    drawn = claims.resampled_medians(np.random.default_rng(0), values)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(np.median(values)), float(low), float(high)


def draw(stem: Path, dataset: "xarray.Dataset") -> list[Path]:
    """Draws ratios over shares of the edge, and error and outcomes over the step size."""
    ratios = {method: (SHARES, at_shares(dataset, method)) for method in METHODS}
    share = "step size / edge of the data set"
    panels = [
        plots.Panel("Relative to the smallest step", "ratio of errors", ratios, share, log_y=True)
    ]
    for method in METHODS:
        of = dataset.sel(descent=method)
        sizes, outcome = of["step_size"].values, of["outcome"].values
        shares = {name: (sizes, 100 * (outcome == k).mean(0)) for k, name in enumerate(OUTCOMES)}
        panels.append(plots.Panel(f"{method}: outcomes", "runs (%)", shares, "step size"))
    return plots.figure(stem, panels, columns=3, title="Diagonal nets up to the edge")


if __name__ == "__main__":
    main()
