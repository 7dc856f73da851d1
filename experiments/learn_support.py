"""Does SGD learn the support of a target at the rate eta / b? Deep linear nets, and a ReLU net.

python -m experiments.learn_support                     # minutes on two cores
python -m experiments.learn_support --steps 20000 --seeds 2 --exp_name short

Of 15 inputs 5 matter. The norm of the first layer's weights of the others decays under label noise,
which is fresh at every step, with examples drawn with replacement.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from experiments.figures import claims, plots, terminal
from experiments.launch import cli, devices, hosts, ranges
from experiments.launch.hosts import ALONE, Hosts
from experiments.launch.ranges import Seed, TwoOrMore
from experiments.storage import records
from experiments.theory.decay_rates import collapse, ends, law, rates
from experiments.toy import ensemble, run as toy_runs
from experiments.toy.problems import sweep_options
from sgd_sparse_jax import models, train
from sgd_sparse_jax.types import Batch, Network, Params

if TYPE_CHECKING:
    import xarray

N, INPUTS, RELEVANT, WIDTHS = 5000, 15, 5, (15, 15, 15)
KAPPAS, BATCHES = (1e-6, 2e-6, 5e-6), (1, 2, 4, 8, 16, 32, 64)  # kappa = eta^2 / b
CLIPPED_SIZES, CLIPPED_BATCHES = (0.02, 0.05, 0.1, 0.2), (1, 4, 16, 64)  # clipped, sigma = 1e-3
RELU_KAPPAS, RELU_BATCHES = (1e-6, 3e-6, 9e-6), (1, 4, 16)
LEVELS = ((0.9, 0.8), (0.88, 0.7), (0.8, 0.6), (0.8, 0.5), (0.7, 0.5), (0.6, 0.3))
WINDOW = (0.88, 0.7)  # of the norm relative to its start, decided before the fit
WIDE = (0.8, 0.5)  # of the clipped runs and the ReLU net
SOURCE = "Beneventano, Pinto, Poggio, arXiv 2406.11110"


class Point(NamedTuple):
    """A run's step size, label noise, largest gradient norm (inf: no clipping), weight decay."""

    step_size: Any
    sigma: Any
    clip: Any
    decay: Any


@dataclass(frozen=True)
class Config:
    """n = 5,000, x in R^15, y = sum of 5 inputs + noise; f = W4 W3 W2 W1 x, loss (f - y)^2."""

    steps: TwoOrMore = 200_000
    """Steps of SGD."""
    gd_steps: TwoOrMore = 20_000
    """Steps of gradient descent."""
    records: TwoOrMore = 400
    """Records of the norm."""
    seeds: TwoOrMore = 4
    """Seeds of initialization and order; half as many for the ReLU net."""
    seed: Seed = 0
    """Base seed."""
    exp_name: str = "support"
    """Name of the run's folder."""
    runs_dir: str = "runs"
    """Folder that contains the run folders."""
    hosts: Hosts = ALONE


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    devices.set_up_toys()
    cli.main(Config, run, argv)


def run(config: Config) -> claims.Finding:
    """Runs all regimes, or loads them if finished; then fits rates, judges and draws."""
    hosts.join(config.hosts)
    ranges.check(config)
    if min(config.steps, config.gd_steps) < config.records:
        raise ValueError(
            f"--records is {config.records}; it must not exceed --steps and --gd_steps."
        )
    folder = records.run_folder(config.runs_dir, "learn_support", config.exp_name)
    dataset = ensemble.in_folder(folder, config, lambda *how: simulate(config, *how))
    hosts.leave_the_rest_to_first()
    found = judge(dataset)
    claims.report(folder, found, title="The decay of irrelevant weights")
    return claims.Finding(folder, found, draw(folder / "figures" / "learn_support", dataset))


def examples() -> Batch:
    """x ~ N(0, I) with centred irrelevant columns, and y = sum of the relevant ones."""
    x = np.random.RandomState(0).randn(N, INPUTS)
    x[:, RELEVANT:] -= x[:, RELEVANT:].mean(0)
    return Batch(jnp.asarray(x), jnp.asarray(x[:, :RELEVANT].sum(1)))


def network(relu: bool) -> Network:
    """15-15-15-15-1 without biases, He-normal (fan-in)."""
    he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    activation = nn.relu if relu else lambda h: h
    return models.from_linen(
        models.MLP(WIDTHS, biases=False, kernel_init=he_normal, activation=activation)
    )


def linear_gradient(params: Params, batch: Batch) -> Params:
    """d/dW mean (x W1 ... WL - y)^2 of a deep linear net, by products with vectors only.

    With G = (2/b) sum_i e_i x_i, dL/dW_l = (G W_1 ... W_(l-1))^T (W_(l+1) ... W_L)^T: for any batch
    size, 2 L products of the weights with vectors. A backward pass has as many for each example.
    """
    kernels = [params[f"layer{i}"]["kernel"] for i in range(1, len(params) + 1)]
    after = [jnp.ones(1)]  # W_(l+1) ... W_L
    for kernel in kernels[:0:-1]:
        after.append(kernel @ after[-1])
    after.reverse()
    errors = batch.x @ (kernels[0] @ after[0]) - batch.y
    before, found = 2 / len(errors) * (errors @ batch.x), {}
    for i, (kernel, behind) in enumerate(zip(kernels, after, strict=True), 1):
        found[f"layer{i}"] = {"kernel": before[:, None] * behind[None]}
        before = before @ kernel
    return found


def relu_gradient(params: Params, batch: Batch) -> Params:
    """The gradient of the ReLU net."""
    objective = train.make_objective(network(relu=True), train.squared)
    return jax.grad(lambda params: objective(params, {}, batch)[0])(params)


def make_run(num_steps: int, records: int, batch_size: int, *, relu: bool = False):
    """run(key, point) -> norms of the irrelevant weights at the start and after each record."""
    everything, stride = examples(), num_steps // records
    gradient = relu_gradient if relu else linear_gradient

    def run(key: jax.Array, point: Point) -> jax.Array:
        drawing, running = jr.split(key)
        params = network(relu).init(drawing, everything.x[:1])[0]
        norm = lambda params: jnp.linalg.norm(params["layer1"]["kernel"][RELEVANT:])

        def one(params: Params, drawn):
            idx, noise = drawn
            batch = everything
            if batch_size < N:
                batch = Batch(everything.x[idx], everything.y[idx] + point.sigma * noise)
            grads = gradient(params, batch)
            shrink = jnp.minimum(1.0, point.clip / optax.tree.norm(grads))
            move = lambda p, g: p - point.step_size * (shrink * g + point.decay * p)
            return jax.tree.map(move, params, grads), None

        def record(params: Params, i: jax.Array):
            choosing, labelling = jr.split(jr.fold_in(running, i))
            shape = (stride, batch_size if batch_size < N else 0)
            drawn = jr.randint(choosing, shape, 0, N), jr.normal(labelling, shape)
            params, _ = jax.lax.scan(one, params, drawn)
            return params, norm(params)

        _, norms = jax.lax.scan(record, params, jnp.arange(records))
        return jnp.concatenate([norm(params)[None], norms])

    return run


def plan() -> list[tuple[str, int, list[Point]]]:
    """(regime, batch size, points): clean with its control, clipped with its control, ReLU, GD."""
    inf, found = np.inf, []
    for b in BATCHES:
        sizes = [np.sqrt(b * kappa) for kappa in KAPPAS]
        found.append(
            (
                "clean",
                b,
                [Point(s, 1.0, inf, 0.0) for s in sizes] + [Point(sizes[-1], 0.0, inf, 0.0)],
            )
        )
    for b in CLIPPED_BATCHES:
        both = [Point(s, sigma, 1.0, 0.0) for sigma in (1e-3, 0.0) for s in CLIPPED_SIZES]
        found.append(("clipped", b, both))
    for b in RELU_BATCHES:
        found.append(("relu", b, [Point(np.sqrt(b * k), 1.0, inf, 0.0) for k in RELU_KAPPAS]))
    descent = [Point(0.1, 0.0, 1.0, 0.0), Point(0.01, 0.0, inf, 0.0), Point(0.1, 0.0, 1.0, 0.1)]
    return [*found, ("gd", N, descent)]


def simulate(
    config: Config, store: ensemble.Store, on_chunk: Callable[[], None]
) -> "xarray.Dataset":
    """All runs along one dim: settings, and norm [run, record] of the irrelevant weights."""
    import xarray

    rows: dict[str, list] = {}
    for regime, batch_size, points in plan():
        relu, steps = regime == "relu", config.gd_steps if regime == "gd" else config.steps
        seeds = max(config.seeds // 2, 2) if relu else config.seeds
        one = make_run(steps, config.records, batch_size, relu=relu)
        sweep = train.make_sweep(one, **sweep_options(alone=True))
        stacked = Point(*map(np.array, zip(*points, strict=True)))
        norms = sweep(
            toy_runs.seed_keys(config.seed, seeds),
            stacked,
            store=store,
            fingerprint=f"{regime} {batch_size} {steps}",
            on_chunk=lambda done: on_chunk(),
        )
        settings = {"batch_size": batch_size, "seed": np.arange(seeds)[:, None]}
        settings |= {"stride": steps // config.records} | stacked._asdict()
        for name, value in settings.items():
            values = np.broadcast_to(np.asarray(value, float), norms.shape[:2])
            rows.setdefault(name, []).append(values.ravel())
        rows.setdefault("regime", []).append(np.full(norms[..., 0].size, regime))
        rows.setdefault("norm", []).append(norms.reshape(-1, norms.shape[-1]))
    whole = {name: np.concatenate(parts) for name, parts in rows.items()}
    return xarray.Dataset(
        {name: (("run", "record")[: values.ndim], values) for name, values in whole.items()}
    )


def chosen(dataset: "xarray.Dataset", regime: str, *, control: bool = False) -> "xarray.Dataset":
    """The runs of a regime, with label noise or (`control`) without."""
    mask = (dataset["regime"].values == regime) & ((dataset["sigma"].values == 0) == control)
    return dataset.isel(run=np.flatnonzero(mask))


def judge(dataset: "xarray.Dataset") -> list[claims.Claim]:
    """Prints the fits of all windows, and judges the law and its failing regimes."""
    from rich.table import Table

    title = "Exponent of rate / η in η / b, 95 % half-width, R²"
    table = Table("regime", "levels of the norm", "runs", "η / b", "R²", "η, b apart", title=title)
    number = lambda value, half: f"{value:.3f} ± {half:.3f}"
    for regime in ("clean", "clipped", "relu"):
        for window in LEVELS:
            one, two = law(chosen(dataset, regime), window)
            apart = ", ".join(map(number, two.slopes, two.halves))
            row = number(one.slopes[0], one.halves[0]), f"{one.r2:.3f}", apart
            table.add_row(regime, f"{window[0]:g} – {window[1]:g}", str(one.runs), *row)
    terminal.show(table)

    found: list[claims.Claim] = []
    clean = chosen(dataset, "clean")

    def add(
        claim: str,
        setting: str,
        value: float,
        expected: claims.Expected,
        how: str,
        half: float | None = None,
        under: str = "",
    ) -> None:
        found.append(
            claims.judged(
                claim,
                value=value,
                interval=None if half is None else (float(value - half), float(value + half)),
                expected=expected,
                source=SOURCE,
                setting=setting,
                statistic=how,
                under=under,
                figure="learn_support",
            )
        )

    stable = "linear, stable steps, σ = 1"
    one, two = law(clean, WINDOW)
    under = "stable, unclipped steps, σ ~ 1"
    fitted = f"{one.runs} runs, norm {WINDOW[0]:g} – {WINDOW[1]:g} of its start"
    near = claims.near
    add("the rate per η t is ∝ η / b", stable, one.slopes[0], near(1, absolute=0.05),
        f"exponent of η / b, {fitted}", one.halves[0], under)  # fmt: skip
    add("and R² of the law", stable, one.r2, claims.at_least(0.985), f"R², {fitted}")
    for k, (name, expected) in enumerate(
        (("η", near(2, absolute=0.15)), ("b", near(-1, absolute=0.06)))
    ):
        add(f"exponent of {name} alone", stable, two.slopes[k], expected, "rate per step",
            two.halves[k])  # fmt: skip
    for kappa in KAPPAS[:2]:
        how = "range of end / start over b ≤ 16, relative"
        add("curves collapse on η²σ²t / b", f"{stable}, η²/b = {kappa:g}", collapse(clean, kappa),
            claims.at_most(0.02), how)  # fmt: skip
    quiet = np.nanmedian(ends(chosen(dataset, "clean", control=True)))
    add("without label noise nothing decays", "linear, stable steps, σ = 0", quiet,
        claims.at_least(0.9), "median end / start")  # fmt: skip
    clipped, control = chosen(dataset, "clipped"), chosen(dataset, "clipped", control=True)
    one, _ = law(clipped, WIDE)
    how = f"exponent of η / b, {one.runs} runs, norm {WIDE[0]:g} – {WIDE[1]:g} of its start"
    add("the rate per η t is ∝ η / b", "linear, clipped at 1, σ = 1e-3", one.slopes[0],
        near(1, absolute=0.05), how, one.halves[0])  # fmt: skip
    tenth = lambda runs: ends(runs)[np.isclose(runs["step_size"].values, 0.1)]
    add("label noise drives the decay", "linear, clipped at 1, η = 0.1",
        np.nanmedian(tenth(control)) / np.nanmedian(tenth(clipped)), claims.at_least(2),
        "ratio of median ends, σ = 0 over σ = 1e-3")  # fmt: skip
    one, _ = law(chosen(dataset, "relu"), WIDE)
    how = f"exponent of η / b, {one.runs} runs, norm {WIDE[0]:g} – {WIDE[1]:g} of its start"
    add("the rate per η t is ∝ η / b", "ReLU, stable steps, σ = 1", one.slopes[0],
        near(1, absolute=0.05), how, one.halves[0])  # fmt: skip
    descent = chosen(dataset, "gd", control=True)
    last, relative, decay = descent["norm"].values[:, -1], ends(descent), descent["decay"].values
    size = descent["step_size"].values
    add("gradient descent bounces", "GD, η = 0.1, clipped at 1",
        relative[(decay == 0) & (size == 0.1)].mean(), near(0.81, absolute=0.03),
        "mean end / start")  # fmt: skip
    add("gradient descent learns no support", "GD, η = 0.01, no clipping",
        relative[size == 0.01].mean(), claims.at_least(0.95), "mean end / start")  # fmt: skip
    add("weight decay learns it", "GD, weight decay 0.1, clipped at 1", last[decay > 0].max(),
        claims.at_most(1e-2), "largest norm at the end")  # fmt: skip
    return found


def draw(stem: Path, dataset: "xarray.Dataset") -> list[Path]:
    """Draws the collapse, rates against eta / b, the control without noise, gradient descent."""
    clean, kappa, collapsed = chosen(dataset, "clean"), KAPPAS[1], {}
    for b in BATCHES:
        near = np.isclose(clean["step_size"].values ** 2 / b, kappa)
        norms = clean["norm"].values[near & (clean["batch_size"].values == b)]
        tau = kappa * clean["stride"].values[0] * np.arange(norms.shape[1])
        collapsed[f"b = {b}"] = tau[::20], np.nanmean(norms / norms[:, :1], axis=0)[::20]
    title = f"linear, σ = 1, η²/b = {kappa:g}"
    panels = [plots.Panel(title, "norm / start", {}, "η²σ²t / b", points=collapsed)]
    for regime, name, window in (
        ("clean", "linear, σ = 1", WINDOW),
        ("clipped", "linear, clipped", WIDE),
        ("relu", "ReLU, σ = 1", WIDE),
    ):
        runs = chosen(dataset, regime)
        scaled, b = rates(runs, *window) / runs["step_size"].values, runs["batch_size"].values
        ratio = np.log10(runs["step_size"].values / b)
        points = {f"b = {each:g}": (ratio[b == each], scaled[b == each]) for each in np.unique(b)}
        span = np.array([ratio.min(), ratio.max()])
        known = np.isfinite(scaled)
        middle = np.median((scaled / 10**ratio)[known]) if known.any() else np.nan
        law = {"∝ η / b": (span, middle * 10**span)}
        title = f"{name}: {window[0]:g} to {window[1]:g} of the start"
        look = {"log_y": True, "points": points}
        panels.append(plots.Panel(title, "rate / η", law, "log₁₀ η / b", **look))
    control, descent = {}, {}
    for name, quiet in (("σ = 1e-3", False), ("σ = 0", True)):
        runs = chosen(dataset, "clipped", control=quiet)
        mine = np.isclose(runs["step_size"].values, 0.1) & (runs["batch_size"].values == 16)
        norms, stride = runs["norm"].values[mine], runs["stride"].values[0]
        control[name] = 1e-3 * stride * np.arange(norms.shape[1]), norms
    runs = chosen(dataset, "gd", control=True)
    of = runs["step_size"].values, runs["decay"].values
    for size, decay in sorted(set(zip(*of, strict=True))):
        norms = runs["norm"].values[(of[0] == size) & (of[1] == decay)]
        steps = 1e-3 * runs["stride"].values[0] * np.arange(norms.shape[1])
        descent[f"GD, η = {size:g}" + (", weight decay" if decay else "")] = steps, norms
    title = "linear, clipped, η = 0.1, b = 16"
    panels.append(plots.Panel(title, "norm", control, "thousand steps", log_y=True))
    panels.append(plots.Panel("Gradient descent", "norm", descent, "thousand steps", log_y=True))
    colours = {"∝ η / b": "grey"}
    return plots.figure(
        stem, panels, columns=3, title="Decay of irrelevant weights", colours=colours
    )


if __name__ == "__main__":
    main()
