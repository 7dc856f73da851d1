"""Loss stabilization in one dimension: GD on (1 - theta^2)^2 / 4, its noise, and shallow nets.

python -m experiments.loss_stabilization
python -m experiments.loss_stabilization --seeds 256 --exp_name many
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from experiments.figures import claims, maps, plots
from experiments.figures.claims import Claim, judged, near
from experiments.launch import cli, devices, ranges
from experiments.launch.ranges import Count, Seed, TwoOrMore
from experiments.storage import records
from experiments.toy import ensemble
from sgd_sparse_jax.theory import stabilization
from sgd_sparse_jax.theory.stabilization import DOUBLINGS, VALLEYS_JOIN

if TYPE_CHECKING:
    import xarray

STEP_SIZES = (0.5, 0.9, 1.05, 1.1, 1.2, 1.23, 1.25, 1.28, 1.29, 1.298, 1.3, 1.302)
LONGEST = 64  # period that is looked for
NOISY_STEP_SIZES = (0.05, *(round(0.1 * i, 2) for i in range(1, 10)))
NOISY_STEP_SIZES += tuple(round(1 + 0.05 * i, 2) for i in range(11))
NOISES = (0.01, 0.03, 0.1)
SPREADS = (0.1, 0.3, 0.5)
NEAR_EDGE = (0.98, 0.995, 1.005, 1.02)  # multiples of the largest bounded step size
BINS = 240  # of theta in the diagram
PHI, WIDTH = 2.0, 5  # of the shallow net f = a^T b
SOURCE = "arXiv 2210.05337, section 2"


@dataclass(frozen=True)
class Config:
    """The map theta -> theta + eta theta (1 - theta^2), with and without noise."""

    step_sizes: TwoOrMore = 1000
    """Step sizes of the bifurcation diagram, from 0.8 to 2."""
    seeds: TwoOrMore = 64
    """Starts of each step size, and seeds of the noise."""
    seed: Seed = 0
    """Base seed."""
    burn_in: Count = 10_000
    """Steps before anything is measured; six times as many for periods."""
    steps: Count = 4_000
    """Steps that are measured; five times as many with noise."""
    exp_name: str = "map"
    """Name of the run's folder."""
    runs_dir: str = "runs"
    """Folder that contains the run folders."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    devices.set_up_toys()
    cli.main(Config, run, argv)


def run(config: Config) -> claims.Finding:
    """Simulates, or loads a finished run; then judges the claims and draws the figures."""
    devices.start()
    ranges.check(config)
    folder = records.run_folder(config.runs_dir, "loss_stabilization", config.exp_name)
    dataset = ensemble.in_folder(folder, config, lambda *how: simulate(config))
    found = judge(dataset)
    claims.report(folder, found, title="Loss stabilization in one dimension")
    return claims.Finding(folder, found, draw(folder / "figures", dataset))


def simulate(config: Config) -> "xarray.Dataset":
    """All parts of the study: the diagram, periods, noise, and shallow nets."""
    import xarray

    key, parts = jr.key(config.seed), {}
    for i, part in enumerate((diagram, periods, noise, chaos, shallow_nets)):
        parts |= part(config, jr.fold_in(key, i))
    coords = {
        "start": np.arange(config.seeds),
        "period_step": list(STEP_SIZES),
        "noisy_step": list(NOISY_STEP_SIZES),
        "noise": list(NOISES),
        "spread": list(SPREADS),
        "edge_share": list(NEAR_EDGE),
    }
    return xarray.Dataset(parts, coords)


def starts(key: jax.Array, step_sizes: jax.Array, seeds: int) -> jax.Array:
    """Starts [step sizes, seeds], uniform over the points from which iterates stay bounded."""
    return jr.uniform(key, (len(step_sizes), seeds), minval=-0.99, maxval=0.99) * jnp.sqrt(
        1 + 2 / step_sizes[:, None]
    )


def orbit(
    theta: jax.Array, eta: jax.Array, burn_in: int, steps: int, noise: Callable = lambda t, x: 0.0
) -> dict[str, jax.Array]:
    """Mean loss, Lyapunov exponent, whether the sign changes and the last theta, after burn_in.

    `noise(t, theta)` is xi of step t.
    """
    step = lambda t, x: stabilization.map_step(x, eta, noise(t, x))

    def measured(t, carry):
        x, loss, log, crossed = carry
        after = step(burn_in + t, x)
        slope = jnp.abs(1 + eta - 3 * eta * x**2)  # without noise
        return after, loss + (1 - x**2) ** 2 / 4, log + jnp.log(slope), crossed | (x * after < 0)

    @jax.jit
    def whole(x):
        x = jax.lax.fori_loop(0, burn_in, step, x)
        zero = jnp.zeros(x.shape)
        return jax.lax.fori_loop(0, steps, measured, (x, zero, zero, zero < 0))

    x, loss, log, crossed = whole(theta)
    return {"theta": x, "level": loss / steps, "lyapunov": log / steps, "crossed": crossed}


def path_of(advance: Callable, x: jax.Array, steps: int) -> jax.Array:
    """x and its next steps - 1 iterates, stacked."""
    step = lambda x, _: (advance(x), x)
    return jax.jit(lambda x: jax.lax.scan(step, x, length=steps)[1])(x)


def period_of(advance: Callable, x: jax.Array) -> np.ndarray:
    """Smallest p <= LONGEST with |x_(t+p) - x_t| < 1e-9 for LONGEST steps t; 0: there is none."""
    path = np.asarray(path_of(advance, x, 2 * LONGEST))
    shifts = range(1, LONGEST + 1)
    away = [np.abs(path[p : p + LONGEST] - path[:LONGEST]).max(0) for p in shifts]
    same = np.stack(away) < 1e-9
    return np.where(same.any(0), same.argmax(0) + 1, 0)


def diagram(config: Config, key: jax.Array) -> dict:
    """Level, Lyapunov exponent and visited points over a fine grid of step sizes."""
    eta = jnp.linspace(0.8, 2.0, config.step_sizes)
    found = orbit(starts(key, eta, config.seeds), eta[:, None], config.burn_in, config.steps)
    path = path_of(lambda x: stabilization.map_step(x, eta[:, None]), found["theta"], LONGEST)
    edges = np.linspace(-1.6, 1.6, BINS + 1)
    points = np.moveaxis(np.asarray(path), 1, 0).reshape(len(eta), -1)
    visits = np.stack([np.histogram(row, edges)[0] for row in points], 1)
    return {
        "step_size": ("step", eta),
        "theta": ("bin", edges[:-1]),
        "visits": (("bin", "step"), visits),
        "level": (("step", "start"), found["level"]),
        "lyapunov": (("step", "start"), found["lyapunov"]),
        "crossed": (("step", "start"), found["crossed"]),
    }


def periods(config: Config, key: jax.Array) -> dict:
    """Period and level of the map at `STEP_SIZES`, and the step sizes of its first doublings."""
    eta = jnp.array(STEP_SIZES)
    found = orbit(starts(key, eta, config.seeds), eta[:, None], 6 * config.burn_in, 1_024)
    advance = lambda x: stabilization.map_step(x, eta[:, None])
    return {
        "period": (("period_step", "start"), period_of(advance, found["theta"])),
        "period_level": (("period_step", "start"), found["level"]),
        "doubling": ("doubled", [doubling(2**k) for k in range(len(DOUBLINGS))]),
    }


def doubling(period: int) -> float:
    """The step size at which the cycle of this period has multiplier -1, by root finding."""
    from scipy.optimize import root

    def conditions(unknown: np.ndarray) -> tuple[float, float]:
        (x, eta), slope = unknown, 1.0
        for _ in range(period):
            slope, x = slope * (1 + eta - 3 * eta * x**2), x + eta * x * (1 - x**2)
        return x - unknown[0], slope + 1

    eta = DOUBLINGS[period.bit_length() - 1] - 1e-4 / period
    x = 0.9
    for _ in range(100_000):  # to the cycle, which attracts just below the doubling
        x += eta * x * (1 - x**2)
    return root(conditions, (x, eta), tol=1e-13).x[1]


def noise(config: Config, key: jax.Array) -> dict:
    """Levels with label noise, with noise that vanishes at the minimum, and shares that diverge."""
    steps, eta = 5 * config.steps, jnp.array(NOISY_STEP_SIZES)[:, None]
    total = config.burn_in + steps
    signs = jr.rademacher(key, (total, config.seeds), float)  # the same for all settings
    x = jnp.full((len(eta), config.seeds), 0.9)
    label = lambda s: lambda t, x: s * signs[t][None]
    vanishing = lambda kappa: lambda t, x: kappa * signs[t][None] * (1 - x**2)
    levels = lambda of, sizes: jnp.stack(
        [orbit(x, eta, config.burn_in, steps, of(size))["level"] for size in sizes]
    )
    edges = jnp.array([[stabilization.largest_step_size(s)] for s in NOISES])
    beside = edges * jnp.array([NEAR_EDGE])  # [noises, multiples]
    spreads = jnp.array(NOISES)[:, None, None]
    edge_noise = lambda t, x: spreads * signs[t][None, None]
    bounded = orbit(
        jnp.full((*beside.shape, config.seeds), 0.9), beside[..., None], 0, total, edge_noise
    )
    return {
        "noisy_level": (("noise", "noisy_step", "start"), levels(label, NOISES)),
        "vanishing_level": (("spread", "noisy_step", "start"), levels(vanishing, SPREADS)),
        "diverged": (("noise", "edge_share", "start"), ~jnp.isfinite(bounded["theta"])),
    }


def chaos(config: Config, key: jax.Array) -> dict:
    """Level and Lyapunov exponent at eta = 2, in 25 times as many steps."""
    eta = jnp.array([2.0])
    found = orbit(starts(key, eta, config.seeds), eta[:, None], config.burn_in, 25 * config.steps)
    return {
        "chaos_level": ("start", found["level"][0]),
        "chaos_lyapunov": ("start", found["lyapunov"][0]),
    }


def shallow_nets(config: Config, key: jax.Array) -> dict:
    """Periods and levels of GD on (a^T b - Phi)^2 / 2 at step sizes eta / Phi, in units of the map.

    The level is that of theta = |a + b| / sqrt(4 Phi), whose loss is 1 / (2 Phi^2) of the net's.
    """
    eta = jnp.array(STEP_SIZES)[None, :, None, None] / PHI
    scales = jnp.array([0.3, 0.2])[:, None, None, None]
    weights = scales * jr.normal(key, (2, len(STEP_SIZES), config.seeds, WIDTH))
    loss = lambda w: ((w[0] * w[1]).sum(-1) - PHI) ** 2 / 2
    step = lambda w: w - eta * jax.grad(lambda w: loss(w).sum())(w)
    many = jax.jit(lambda w: jax.lax.fori_loop(0, 6 * config.burn_in, lambda t, w: step(w), w))
    weights = many(weights)
    add = lambda t, carry: (step(carry[0]), carry[1] + loss(carry[0]))
    total = jax.jit(lambda w: jax.lax.fori_loop(0, 1_024, add, (w, 0 * loss(w))))(weights)[1]
    flat = period_of(step, weights)
    # All coordinates have the period of the slowest.
    return {
        "net_period": (("period_step", "start"), flat.max((0, -1))),
        "net_period_level": (("period_step", "start"), total / 1_024 / (2 * PHI**2)),
    }


def judge(dataset: "xarray.Dataset") -> list[Claim]:
    """The claims about the map, about shallow nets, and about noise."""
    found, of = [], {name: dataset[name].values for name in dataset}

    def claim(text, setting, statistic, value, expected, figure="levels", under=""):
        how: dict = {"setting": setting, "statistic": statistic, "figure": figure, "under": under}
        found.append(judged(text, value=value, expected=expected, source=SOURCE, **how))

    eta, periods = of["step_size"], np.array([[stabilization.period(e)] for e in STEP_SIZES])
    exact = np.asarray(stabilization.level(np.array(STEP_SIZES)))[:, None]
    twelve = f"12 step sizes, {STEP_SIZES[0]} to {STEP_SIZES[-1]}"
    for name, where in (("", ""), ("net_", "shallow nets, ")):
        text, share = "the period is 1, 2, 4, 8, 16, 32", f"share of {of['period'].size} runs"
        right = (of[f"{name}period"] == periods).mean()
        claim(text, where + twelve, share, right, near(1), "diagram")
        error = np.abs(of[f"{name}period_level"] - exact)[periods[:, 0] == 2].max()
        text, within = "the loss settles at (1 − η⁻²)/8", near(0, absolute=1e-12)
        claim(text, f"{where}period 2", "largest error", error, within)
    text, error = "the period doubles at 1, √5 − 1, 1.2880, ...", of["doubling"] - DOUBLINGS
    within = near(0, absolute=1e-8)
    claim(text, "roots", "largest error", np.abs(error).max(), within, "diagram")
    text, gaps = "distances of doublings shrink by 4.669", np.diff(of["doubling"])
    within = near(4.669, relative=0.01)
    claim(text, "the last two", "ratio", gaps[-2] / gaps[-1], within, "diagram")
    text, crossing = "iterates change sign above 3√3/2 − 1 only", of["crossed"].any(1)
    least, within = eta[crossing].min(initial=9), near(VALLEYS_JOIN, absolute=0.005)
    claim(text, "the diagram", "smallest such step size", least, within, "diagram")
    mean = f"mean over {dataset.sizes['start']} starts"
    for text, name, value in (
        ("the mean loss is 1/8", "chaos_level", 1 / 8),
        ("the Lyapunov exponent is ln 3", "chaos_lyapunov", np.log(3)),
    ):
        claim(text, "η = 2", mean, of[name].mean(), near(value, relative=0.01))
    text, share = "the level rises with the step size", "share of neighbouring step sizes"
    rises, early = np.diff(np.median(of["level"], 1)) > 0, eta[1:] < DOUBLINGS[1]
    above = eta[:-1] > 1
    claim(text, "1 < η ≤ 2", share, rises[above].mean(), near(1))
    under = "η < √5 − 1"
    claim(text, "1 < η ≤ 2", share, rises[above & early].mean(), near(1), under=under)

    noisy, eta = dataset["noisy_level"].mean("start"), np.array(NOISY_STEP_SIZES)
    predicted = stabilization.label_noise_level(eta[None], np.array(NOISES)[:, None])
    error, within = np.abs(noisy.values / np.asarray(predicted) - 1), near(0, absolute=0.02)
    text, largest = "label noise ±s holds the loss at η s² / (4 (1 − η))", "largest relative error"
    each = f"s = {', '.join(map(str, NOISES))}"
    claim(text, each, largest, error[:, eta <= 0.5].max(), within, "noise", "η ≤ .5")
    claim(text, f"{each}, η ≤ .9", largest, np.nanmax(error), within, "noise")
    text, ratio = "label noise lowers the level of period 2", "level / level without noise"
    for s, under in ((0.03, "s ≤ .03"), (0.1, "")):
        value = float(noisy.sel(noise=s, noisy_step=1.2) / stabilization.level(1.2))
        claim(text, f"η = 1.2, s = {s}", ratio, value, claims.at_most(0.99), "noise", under)
    text = (
        "±s stays bounded up to the root of 4/27 (1 + η (1 + s))³ = 2 + η (1 − s), and not beyond"
    )
    share = dataset["diverged"].mean(("noise", "start")).values
    right = np.where(np.array(NEAR_EDGE) < 1, 1 - share, share).min()
    claim(text, f"{NEAR_EDGE} of it", "smallest share of seeds", right, near(1), "noise")
    kappa = np.array(SPREADS)[:, None]
    levels = dataset["vanishing_level"].mean("start", skipna=False).values  # NaN if a seed diverges
    for name, threshold in (
        ("1 / (1 − κ²), almost surely", stabilization.random_step_threshold(kappa)),
        ("1 / (1 + κ²), the bound of second moments", 1 / (1 + kappa**2)),
    ):
        text = f"noise ±κ(1 − θ²), 0 at the minimum, stabilizes the loss from η = {name}"
        right = ((levels > 1e-9) == (eta > np.asarray(threshold)))[np.isfinite(levels)].mean()
        statistic = "share of step sizes on the predicted side"
        claim(text, f"κ = {', '.join(map(str, SPREADS))}", statistic, right, near(1), "noise")
    return found


def draw(folder: Path, dataset: "xarray.Dataset") -> list[Path]:
    """Draws the bifurcation diagram, levels and exponents, and levels with noise."""
    eta, fine = dataset["step_size"].values, np.linspace(0.8, DOUBLINGS[1], 200)
    visits = dataset["visits"].values.astype(float)
    panel = maps.Map(
        "Iterates after the burn-in", "η", "θ", eta, dataset["theta"].values, visits, "visits", True
    )
    drawn = maps.figure(folder / "diagram", [panel], title="θ → θ + η θ (1 − θ²)")
    names = {"level": "mean loss", "lyapunov": "Lyapunov exponent"}
    exact = {"level": stabilization.level, "lyapunov": stabilization.lyapunov_exponent}
    panels = [
        plots.Panel(
            label[0].upper() + label[1:],
            label,
            {"simulated": (eta, dataset[name].values.T), "closed form": (fine, exact[name](fine))},
            xlabel="η",
            ylim=(0, 0.16) if name == "level" else (-2, 1.2),
            points={"closed form at η = 2": ([2.0], [exact[name](2.0)])},
        )
        for name, label in names.items()
    ]
    drawn += plots.figure(folder / "levels", panels, title="Loss stabilization")
    noisy, smooth = np.array(NOISY_STEP_SIZES), np.linspace(0.05, 0.95, 200)
    large = noisy >= 0.8
    lines = {f"s = {s}": (noisy, dataset["noisy_level"].sel(noise=s).values.T) for s in NOISES}
    others = {
        f"κ = {k}": (noisy[large], dataset["vanishing_level"].sel(spread=k).values[large].T)
        for k in SPREADS
    }
    levels = {f"s = {s}": (smooth, stabilization.label_noise_level(smooth, s)) for s in NOISES}
    marks = {f"κ = {k}": [float(stabilization.random_step_threshold(k))] for k in SPREADS}
    label = "Label noise ±s (dashed: η s² / (4 (1 − η)))"
    vanish = "Noise ±κ(1 − θ²) (dotted: 1 / (1 − κ²))"
    panels = [
        plots.Panel(label, "mean loss", lines, "η", log_y=True, levels=levels),
        plots.Panel(vanish, "mean loss", others, "η", log_y=True, marks=marks, ylim=(1e-7, 1)),
    ]
    return drawn + plots.figure(folder / "noise", panels, title="Noise on top of the map")


if __name__ == "__main__":
    main()
