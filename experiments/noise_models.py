"""Which noise is SGD's? SGD, its label-noise SDEs, noise in parameters, and gradient descent.

python -m experiments.noise_models                      # D1 of the paper
python -m experiments.noise_models --setting student    # or d2; two ReLU layers
python -m experiments.noise_models --setting weak       # weak errors by Monte Carlo

The noise level delta(t) of the SDE is measured on other seeds than those that are compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from experiments.figures import claims, plots, terminal
from experiments.launch import cli, devices, hosts, ranges
from experiments.launch.hosts import ALONE, Hosts
from experiments.launch.ranges import Count, NonNegative, Positive, Seed, TwoOrMore
from experiments.storage import records
from experiments.theory import weak_errors
from experiments.toy import ensemble, problems, run as toy_runs
from sgd_sparse_jax import measure, train
from sgd_sparse_jax.theory import flows
from sgd_sparse_jax.types import Params

if TYPE_CHECKING:
    import xarray

WINDOW = 64  # steps per average of the loss, and per draw of random numbers
SOURCE = "arXiv 2210.05337, Section 3 and Eq. 8"
PROBLEMS = {"d1": "diagonal", "d2": "diagonal-small", "student": "two-layer"}
MODELS = {
    "sgd": "SGD",
    "measured": "SDE, measured δ(t)",
    "constant": "SDE, constant δ",
    "own": "SDE, own δ = L(θ)",
    "exact": "SDE, exact covariance",
    "parameters": "noise in parameters",
    "gd": "GD",
}
OTHERS = "others"  # the seeds of SGD that measure delta(t)
LARGE = 1e-3  # entries of |u * v| above it count
FACTOR = claims.Expected("within × 1.5 of SGD", 1 / 1.5, 1.5)


@dataclass(frozen=True)
class Config:
    """Level of the loss and coordinates of SGD and of its surrogates, at constant step sizes."""

    setting: Literal["d1", "d2", "student", "weak"] = "d1"
    """D1, D2 (diagonal nets) or the two-layer student; weak: errors of expectations, n = d = 4."""
    step_sizes: tuple[Positive, ...] = (0.25, 0.27)
    """Step sizes of SGD."""
    windows: TwoOrMore = 313
    """Length of the runs, in windows of 64 steps."""
    refinement: Count = 1
    """Steps of the SDEs per step of SGD: dt = step size / refinement."""
    level: NonNegative = 0.0
    """Constant noise level δ; 0 for that of the second half of SGD."""
    seeds: TwoOrMore = 32
    """Seeds that are compared, and as many others that measure δ(t); thousands of paths (weak)."""
    seed: Seed = 0
    """Base seed."""
    exp_name: str = ""
    """Name of the run's folder (default: the setting)."""
    runs_dir: str = "runs"
    """Folder that contains the run folders."""
    hosts: Hosts = ALONE


SETTINGS = {
    "d1": Config(),
    "d2": Config("d2", step_sizes=(0.1, 0.25), windows=157),
    "student": Config("student", step_sizes=(0.32, 0.45), windows=125, seeds=16),
    "weak": Config("weak", step_sizes=(0.1, 0.05, 0.025), windows=2, seeds=200),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    devices.set_up_toys()
    cli.main(Config, run, argv, settings=SETTINGS)


def run(config: Config) -> claims.Finding:
    """Runs all models, or loads them if finished; then judges the claims and draws the figure."""
    hosts.join(config.hosts)
    ranges.check(config)
    folder = records.run_folder(config.runs_dir, "noise_models", config.exp_name or config.setting)
    weak = config.setting == "weak"
    toy = (
        problems.diagonal(n=4, d=4, support=2, alpha=0.7)
        if weak
        else (problems.PROBLEMS[PROBLEMS[config.setting]]())
    )
    if not records.is_finished(folder):
        check(config, toy)
    paths = 1000 * config.seeds
    compute = lambda store, on_chunk: (
        weak_errors.simulate(toy, config.step_sizes, paths, config.seed, on_chunk)
        if weak
        else simulate(config, toy, store, on_chunk)
    )
    dataset = ensemble.in_folder(folder, config, compute)
    hosts.leave_the_rest_to_first()
    found = weak_errors.judge(dataset) if weak else judge(config, toy, dataset)
    claims.report(folder, found, title=f"Noise models, {config.setting}")
    stem = folder / "figures" / "noise_models"
    return claims.Finding(folder, found, (weak_errors.draw if weak else draw)(stem, dataset))


def start(config: Config, toy: problems.Toy) -> Params:
    """The initialization, the same for all runs: step sizes of divergence depend on it."""
    return toy.network(1.0).init(jr.key(config.seed), toy.train.x)[0]


def check(config: Config, toy: problems.Toy) -> None:
    """Raises ValueError if Euler's method is unstable at the solution of gradient flow."""
    loss, time = lambda params: toy.mean_loss(params, toy.train), jnp.array([1e3])
    path = jax.jit(lambda params: flows.gradient_flow(loss, params, time, tol=1e-6))
    end = jax.tree.map(lambda leaf: leaf[0], path(start(config, toy)))
    dt = max(config.step_sizes) / config.refinement
    flows.check_dt(toy.predict, end, toy.train.x, dt, scale=scale(toy))


def scale(toy: problems.Toy) -> float:
    """L = scale / (2n) |r|^2."""
    return 1.0 if toy.loss is train.half_squared else 2.0


def coordinates(toy: problems.Toy, params: Params) -> jax.Array:
    """|u * v| of diagonal nets [d]; norms of the columns of the Jacobian of others [p]."""
    if "u" in params:
        return jnp.abs(params["u"] * params["v"])
    return jnp.linalg.norm(measure.jacobian(toy.predict, params, toy.train.x), axis=0)


def make_model(
    kind: str, toy: problems.Toy, step_size: jax.Array, level: jax.Array, refinement: int = 1
) -> tuple[flows.FlowStep, Callable[[jax.Array], jax.Array], int]:
    """The step of a model, its draw(key) of a window of random numbers, and steps per window.

    `level` is delta(t) of "measured" [steps], and a constant for "constant".
    """
    n, common = len(toy.train.y), {"step_size": step_size, "scale": scale(toy)}
    if kind in ("sgd", OTHERS):
        step = flows.make_step(toy.predict, toy.train, flows.sampled, **common)
        return step, lambda key: jr.randint(key, (WINDOW, 1), 0, n), WINDOW
    steps, width, common = WINDOW * refinement, n, common | {"dt": step_size / refinement}
    if kind == "parameters":
        step = flows.make_parameter_noise_step(toy.predict, toy.train, **common)
        width += sum(leaf.size for leaf in jax.tree.leaves(start(Config(), toy)))
    else:
        noise = {
            "gd": flows.no_noise,
            "exact": flows.exact_gaussian,
            "own": flows.isotropic(scale=scale(toy)),
        }.get(kind) or flows.isotropic(level, scale=scale(toy), num_steps=len(level))
        step = flows.make_step(toy.predict, toy.train, noise, **common)
    return step, lambda key: jr.normal(key, (steps, width)), steps


def make_run(config: Config, toy: problems.Toy, kind: str):
    """run(key, point) -> mean loss of each window, and the final coordinates."""

    def run(key: jax.Array, point: dict[str, jax.Array]) -> dict[str, jax.Array]:
        level = jnp.repeat(point["level"], WINDOW * config.refinement)
        step, draw, steps = make_model(kind, toy, point["step_size"], level, config.refinement)

        def one(params: Params, drawn):
            z, t = drawn
            return step(z, params, t), toy.mean_loss(params, toy.train)

        def window(params: Params, i: jax.Array):
            times = i * steps + jnp.arange(steps)
            params, losses = jax.lax.scan(one, params, (draw(jr.fold_in(key, i)), times))
            return params, losses.mean()

        end, losses = jax.lax.scan(window, start(config, toy), jnp.arange(config.windows))
        return {"loss": losses, "coordinates": coordinates(toy, end)}

    return run


def simulate(
    config: Config, toy: problems.Toy, store: ensemble.Store, on_chunk: Callable[[], None]
) -> "xarray.Dataset":
    """loss_MODEL [seed, step size, window], coordinates_MODEL, and delta(t) as measured."""
    import xarray

    sizes, shape = jnp.array(config.step_sizes), (len(config.step_sizes), config.windows)
    keys = toy_runs.seed_keys(config.seed, 2 * config.seeds)
    compared, others = keys[: config.seeds], keys[config.seeds :]
    found = {}

    def follow(kind: str, keys: jax.Array, level: np.ndarray) -> dict:
        points = {"step_size": sizes, "level": level}
        sweep = train.make_sweep(make_run(config, toy, kind), **toy.sweep_options)
        ran = sweep(keys, points, on_chunk=lambda done: on_chunk(), store=store, fingerprint=kind)
        axes = f"seed_{kind}", "step_size"
        for key, values in ran.items():
            found[f"{key}_{kind}"] = (*axes, "window" if key == "loss" else "coordinate"), values
        return ran

    losses = follow(OTHERS, others, np.zeros(shape))["loss"]
    alive = ~ensemble.diverged(losses)[..., -1:]
    with np.errstate(invalid="ignore"):  # if all runs diverged
        measured = np.where(alive, losses, 0).sum(0) / alive.sum(0)
    constant = measured[:, config.windows // 2 :].mean(1, keepdims=True)
    constant = np.broadcast_to(config.level or constant, shape)
    for kind in MODELS:
        # Gradient descent has one path; noise of all parameters takes most of the time.
        few = {"gd": 1, "parameters": max(config.seeds // 4, 2)}.get(kind, config.seeds)
        follow(kind, compared[:few], constant if kind == "constant" else measured)
    found["delta"] = ("step_size", "window"), measured
    return xarray.Dataset(found, {"step_size": np.array(config.step_sizes)})


def summary(config: Config, toy: problems.Toy, dataset: "xarray.Dataset", j: int) -> dict:
    """Per model at step size j: level, size, rank correlation, share of diverged runs.

    Levels and sizes [survivors]: mean loss of the second half; entries above 1e-3, or the sum of
    the column norms. The correlation of log coordinates, means over survivors, is with SGD on the
    other seeds for SGD itself, else with SGD; diagonal nets: over the irrelevant coordinates.
    """
    from scipy.stats import spearmanr

    support = 20 if config.setting in ("d1", "d2") else 0
    seen, logs = {}, {}
    for name in (OTHERS, *MODELS):
        losses = dataset[f"loss_{name}"].values[:, j]
        alive = ~ensemble.diverged(losses)[:, -1]
        ends = dataset[f"coordinates_{name}"].values[alive, j]
        size = (ends > LARGE).sum(1) if support else ends.sum(1)
        logs[name] = np.log(np.maximum(ends[:, support:], 1e-300)).mean(0) if alive.any() else None
        seen[name] = {
            "level": losses[alive, losses.shape[1] // 2 :].mean(1),
            "size": size.astype(float),
            "diverged": 1 - alive.mean(),
        }
    for name in MODELS:
        other = logs[OTHERS if name == "sgd" else "sgd"]
        known = logs[name] is not None and other is not None
        seen[name]["rank"] = spearmanr(logs[name], other)[0] if known else np.nan
    return seen


def ratio(values: np.ndarray, reference: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Ratio of medians, and its 95 % bootstrap interval; NaN without survivors."""
    if not (len(values) and len(reference)):
        return np.nan, (np.nan, np.nan)
    rng = np.random.default_rng(0)
    drawn = [claims.resampled_medians(rng, each) for each in (values, reference)]
    low, high = np.percentile(drawn[0] / drawn[1], (2.5, 97.5))
    return float(np.median(values) / np.median(reference)), (float(low), float(high))


def compared(setting: str) -> list[tuple[str, str, str, claims.Expected, str]]:
    """Claims, each with its model, statistic, prediction and condition."""
    measured, ten = "δ(t) measured on SGD", claims.Expected("within 10 % of SGD", 0.9, 1.1)
    same = [
        ("the SDE has SGD's level", "measured", "level", FACTOR, measured),
        ("the SDE has SGD's sparsity", "measured", "size", ten, measured),
        ("the SDE sets SGD's level itself", "own", "level", FACTOR, ""),
        ("with SGD's covariance it does", "exact", "level", FACTOR, ""),
    ]
    if setting == "student":  # ranks of the columns don't separate the models
        above = claims.Expected("≥ 1.1 × SGD", 1.1, np.inf)
        return [
            *same,
            ("gradient descent is less sparse", "gd", "size", above, ""),
            ("noise in parameters is less sparse", "parameters", "size", above, ""),
        ]
    return [
        *same,
        ("the SDE shrinks SGD's coordinates", "measured", "rank", claims.at_least(0.92), measured),
        ("gradient descent does not", "gd", "rank", claims.at_most(0.7), ""),
        ("noise in parameters does not", "parameters", "rank", claims.at_most(0.5), ""),
    ]


def judge(config: Config, toy: problems.Toy, dataset: "xarray.Dataset") -> list[claims.Claim]:
    """Prints the table of all models, and compares the surrogates with SGD."""
    from rich.table import Table

    found = []
    size = "entries > 1e-3" if config.setting != "student" else "Σ column norms"
    form = lambda x: f"{np.median(x):.3g}" if len(x) else "–"
    for j, step_size in enumerate(config.step_sizes):
        seen = summary(config, toy, dataset, j)
        title = f"{config.setting}, η = {step_size:g}, medians over runs that did not diverge"
        table = Table("model", "level", size, "rank correlation", "diverged", title=title)
        for name, label in MODELS.items():
            row = seen[name]
            rank, share = f"{row['rank']:.3f}", f"{row['diverged']:.0%}"
            table.add_row(label, form(row["level"]), form(row["size"]), rank, share)
        terminal.show(table)

        for claim, name, key, expected, under in compared(config.setting):
            value, interval = seen[name]["rank"], None
            if key != "rank":
                value, interval = ratio(seen[name][key], seen["sgd"][key])
            statistic = {"rank": "Spearman's ρ", "size": f"ratio of medians, {size}"}
            survivors = f"{len(seen[name]['level'])} survivors"
            found.append(
                claims.judged(
                    claim,
                    value=value,
                    interval=interval,
                    expected=expected,
                    under=under,
                    source=SOURCE,
                    setting=f"{config.setting}, η = {step_size:g}",
                    statistic=f"{statistic.get(key, 'ratio of median levels')}, {survivors}",
                    figure="noise_models",
                )
            )
    return found


def draw(stem: Path, dataset: "xarray.Dataset") -> list[Path]:
    """Draws the loss over time, and final coordinates along the order of SGD's."""
    panels, last = [], [*list(MODELS)[1:], "sgd"]  # SGD on top
    for j, step_size in enumerate(dataset["step_size"].values):
        steps = np.log10(WINDOW * (np.arange(dataset.sizes["window"]) + 0.5))
        lines, ends = {}, {}
        for name in last:
            losses = dataset[f"loss_{name}"].values[:, j]
            lines[MODELS[name]] = steps, np.where(ensemble.diverged(losses), np.nan, losses)
            alive = ~ensemble.diverged(losses)[:, -1]
            if alive.any():
                ends[name] = np.median(dataset[f"coordinates_{name}"].values[alive, j], axis=0)
        panels.append(
            plots.Panel(
                f"η = {step_size:g}",
                "training loss",
                lines,
                xlabel="log₁₀ of the SGD step",
                log_y=True,
                ylim=(1e-12, 10),  # the loss of gradient descent falls to rounding errors
            )
        )
        order = np.argsort(ends.get("sgd", np.zeros(0)))
        groups = np.array_split(order, max(min(len(order) // 5, 40), 1))  # else lines are jagged
        places = np.cumsum([len(group) for group in groups]) - len(groups[0]) / 2
        curves = {
            MODELS[name]: (places, [np.median(end[group]) for group in groups])
            for name, end in ends.items()
            if len(order)
        }
        panels.append(
            plots.Panel(
                f"η = {step_size:g}: end of the runs",
                "median coordinate",
                curves,
                xlabel="coordinates in SGD's order, in groups",
                log_y=True,
            )
        )
    title, colours = "SGD, its SDEs, and noise without its structure", {MODELS["sgd"]: "black"}
    colours |= {MODELS["gd"]: "grey"}
    return plots.figure(stem, panels, title=title, colours=colours)


if __name__ == "__main__":
    main()
