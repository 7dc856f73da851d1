"""Which minimum GD finds in a shallow linear net, and how fast: (a^T b - Phi)^2 / 2 in R^(2d).

python -m experiments.shallow_linear
python -m experiments.shallow_linear --seeds 256 --exp_name many
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from experiments.figures import claims, plots
from experiments.figures.claims import Claim, judged, near
from experiments.launch import cli, devices, ranges
from experiments.launch.ranges import Count, Positive, Seed, TwoOrMore
from experiments.storage import records
from experiments.toy import ensemble
from sgd_sparse_jax.theory import shallow

if TYPE_CHECKING:
    import xarray

SCALES = ((1.2, 0.7), (0.6, 0.35), (0.3, 0.2))  # of a and b at the start
SHARES = (0.002, 0.02, *np.linspace(0.06, 0.96, 23).round(4), 0.98, 0.998, 1.0, 1.1, 1.2)
BEYOND = (1.05, 1.1, 1.2, 1.23, 1.26, 1.29, 1.5, 1.7, 1.9)  # multiples of 1 / Phi
CONVERGED, DIVERGED = 1e-8, 1e6  # |eps|
NAME = "shallow_linear"
SOURCE = "arXiv 2501.09137"


@dataclass(frozen=True)
class Config:
    """Gradient descent from random starts, over step sizes that are multiples of 1 / Phi."""

    target: Positive = 2.0
    """Phi, the product a^T b to learn."""
    width: Count = 5
    """Length of a and of b."""
    seeds: TwoOrMore = 64
    """Starts of each scale and step size."""
    seed: Seed = 0
    """Seed of the starts, of NumPy's legacy generator."""
    num_steps: Count = 200_000
    """Largest number of steps of each run."""
    slow_steps: Count = 1_000_000
    """Steps at the step size 1 / Phi."""
    exp_name: str = "grid"
    """Name of the run's folder."""
    runs_dir: str = "runs"
    """Folder that contains the run folders."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    devices.set_up_toys()
    cli.main(Config, run, argv)


def run(config: Config) -> claims.Finding:
    """Simulates, or loads a finished run; then judges the claims and draws the figure."""
    devices.start()
    ranges.check(config)
    folder = records.run_folder(config.runs_dir, "shallow_linear", config.exp_name)
    dataset = ensemble.in_folder(folder, config, lambda *how: simulate(config))
    found = judge(config, dataset)
    claims.report(folder, found, title="Shallow linear nets")
    return claims.Finding(folder, found, draw(folder / "figures" / NAME, config, dataset))


def simulate(config: Config) -> "xarray.Dataset":
    """The grid of step sizes, the identities along runs, the slow step size, and those beyond."""
    import xarray

    scales = np.array(SCALES)[:, :, None, None]
    normal = np.random.RandomState(config.seed).randn(2, config.seeds, config.width)
    starts = jnp.asarray(scales * normal)  # [scales, 2, seeds, width]
    parts: dict = grid(config, starts) | identities(config, starts[0])
    parts |= slow(config, starts[1]) | beyond(config, starts[2])
    coords = {"scale": [a for a, _ in SCALES], "share": list(SHARES), "beyond": list(BEYOND)}
    return xarray.Dataset(parts, coords)


def advance(weights: jax.Array, eta: jax.Array, target: float) -> jax.Array:
    """A step of gradient descent for weights [..., 2, seeds, d], which are a and b."""
    a, b = weights[..., 0, :, :], weights[..., 1, :, :]
    eps = (a * b).sum(-1, keepdims=True) - target
    return jnp.stack([a - eta * eps * b, b - eta * eps * a], -3)


def invariants_of(weights: jax.Array, target: float) -> shallow.Invariants:
    """eps, lambda and Q [..., seeds] of weights [..., 2, seeds, d]."""
    return shallow.invariants(weights[..., 0, :, :], weights[..., 1, :, :], target)


def grid(config: Config, starts: jax.Array) -> dict:
    """Every scale, step size and start, until |eps| < 1e-8."""
    target = config.target
    eta = jnp.array(SHARES)[None, :, None, None] / target
    shape = (len(SCALES), len(SHARES), *starts.shape[1:])
    weights = jnp.broadcast_to(starts[:, None], shape)
    first = invariants_of(weights, target)

    def more(carry):
        return (carry[0] < config.num_steps) & carry[1][1].any()

    def step(carry):
        t, (weights, active, iterations, largest, shrinkage) = carry
        eps = invariants_of(weights, target).eps
        move = eta[..., 0] * jnp.abs(eps)
        moved = jnp.where(active[..., None, :, None], advance(weights, eta, target), weights)
        after = jnp.abs(invariants_of(moved, target).eps)
        here = active & (after >= CONVERGED) & (after < DIVERGED)
        largest = jnp.where(active, jnp.maximum(largest, move), largest)
        shrinkage = jnp.where(active, shrinkage * jnp.abs(1 - move**2), shrinkage)
        return t + 1, (moved, here, iterations + active, largest, shrinkage)

    zero = jnp.zeros(first.eps.shape)
    carry = (weights, zero == 0, zero.astype(int), zero, zero + 1)
    _, (weights, _, iterations, largest, shrinkage) = jax.jit(
        lambda carry: jax.lax.while_loop(more, step, (0, carry))
    )(carry)
    last, dims = invariants_of(weights, target), ("scale", "share", "seed")
    exact = shallow.sharpness(last.eps + target, first.imbalance, shrinkage)
    values = {
        "sharpness": last.trace,
        "flow": shallow.sharpness(target, first.imbalance),
        "formula_error": jnp.abs(exact / last.trace - 1),
        "iterations": iterations,
        "largest_move": largest,
        "converged": jnp.abs(last.eps) < CONVERGED,
    }
    return {name: (dims, value) for name, value in values.items()}


def identities(config: Config, start: jax.Array) -> dict:
    """Errors of the identities along 200 steps, and of eigenvalue and rate at the end."""
    target, shares = config.target, jnp.array([0.002, 0.1, 0.2, 0.4, 0.6])
    eta = shares[:, None, None] / target
    weights = jnp.broadcast_to(start, (len(shares), *start.shape))

    def step(weights, _):
        moved, now = advance(weights, eta, target), invariants_of(weights, target)
        after = invariants_of(moved, target)
        predicted = shallow.next_invariants(now, eta[..., 0], target)
        # Q = 0 + rounding at large eps: errors are relative to lambda, of the size of its terms.
        errors = [jnp.abs(p - x) / after.trace for p, x in zip(predicted, after, strict=True)]
        whole = 4 * (after.eps + target) ** 2 + after.imbalance**2
        errors.append(jnp.abs(whole / after.trace**2 - 1))
        used = after.trace < DIVERGED
        return moved, (jnp.where(used, jnp.stack(errors), 0).max((1, 2)), jnp.abs(now.eps))

    end, (errors, eps) = jax.jit(lambda w: jax.lax.scan(step, w, length=200))(weights)
    loss = lambda w: ((w[0] * w[1]).sum() - target) ** 2 / 2
    trace = np.asarray(invariants_of(end, target).trace)
    near_end = (np.asarray(eps[-1]) < CONVERGED) & (trace < DIVERGED)
    minima = jnp.moveaxis(end, -3, -2)[near_end]  # [runs, 2, d]
    hessians = jax.jit(jax.vmap(jax.hessian(loss)))(minima)
    top = np.linalg.eigvalsh(np.reshape(hessians, (-1, *2 * [2 * config.width])))[:, -1]
    # The last ratio before rounding errors dominate.
    index = np.argmax(np.asarray(eps) < 1e-7, axis=0)[None]
    taken = [np.take_along_axis(np.asarray(eps), np.maximum(index + i, 0), 0)[0] for i in (-1, 0)]
    rate = np.abs(1 - np.asarray(eta[..., 0]) * trace)
    found = np.abs(taken[1] / taken[0] - rate)[near_end & (index[0] > 0)]
    return {
        "identity_error": ("identity", errors.max(0)),
        "eigenvalue_error": np.abs(top / trace[near_end] - 1).max(initial=0),
        "rate_error": found.max(initial=0),
    }


def slow(config: Config, start: jax.Array) -> dict:
    """|eps| and Q at eta = 1 / Phi along the steps, [step, seed], and Q at the start."""
    target = config.target
    at = np.unique(np.logspace(0, np.log10(config.slow_steps), 41).astype(int))
    eta = jnp.array([[1 / target]])

    def walk(weights, steps):
        move = lambda _, weights: advance(weights, eta, target)
        weights = jax.lax.fori_loop(0, steps, move, weights)
        now = invariants_of(weights, target)
        return weights, (jnp.abs(now.eps), now.imbalance)

    gaps = jnp.asarray(np.diff(at, prepend=0))
    _, (eps, imbalance) = jax.jit(lambda w: jax.lax.scan(walk, w, gaps))(start)
    return {
        "slow_step": ("record", at),
        "slow_eps": (("record", "seed"), eps),
        "slow_imbalance": (("record", "seed"), imbalance),
        "first_imbalance": ("seed", invariants_of(start, target).imbalance),
    }


def beyond(config: Config, start: jax.Array) -> dict:
    """Mean loss of 1,000 steps after 5,000, at step sizes above 1 / Phi; NaN if it diverges."""
    target = config.target
    eta = jnp.array(BEYOND)[:, None, None] / target
    weights = jnp.broadcast_to(start, (len(BEYOND), *start.shape))

    def step(t, carry):
        weights, total = carry
        loss = invariants_of(weights, target).eps ** 2 / 2
        return advance(weights, eta, target), total + jnp.where(t >= 5_000, loss, 0)

    zero = jnp.zeros((len(BEYOND), config.seeds))
    run = jax.jit(lambda w: jax.lax.fori_loop(0, 6_000, step, (w, zero))[1])
    level = run(weights) / 1_000
    return {"level": (("beyond", "seed"), jnp.where(jnp.isfinite(level), level, jnp.nan))}


def judge(config: Config, dataset: "xarray.Dataset") -> list[Claim]:
    """The claims about flatness, speed, the slow step size and those beyond it."""
    found, target, of = [], config.target, {name: dataset[name].values for name in dataset}

    def claim(text, setting, statistic, value, expected, under=""):
        how: dict = {"setting": setting, "statistic": statistic, "under": under}
        how |= {"source": SOURCE, "figure": NAME}
        found.append(judged(text, value=value, expected=expected, **how))

    exact, one = near(0, absolute=1e-12), near(1)
    names = ("ε⁺ = ε (1 − ηλ + η²ε (ε + Φ))", "λ⁺ = (1 + η²ε²) λ − 4ηε (ε + Φ)")
    names += ("Q⁺ = Q · abs(1 − η²ε²)", "λ² = 4 (aᵀb)² + Q²")
    runs = f"5 step sizes × {config.seeds} starts"
    for name, error in zip(names, of["identity_error"], strict=True):
        claim(name, runs, "largest error relative to λ, 200 steps", error, exact)
    done, trace, flow = of["converged"], of["sharpness"], of["flow"]
    text = "λ∞ = √(4 (aᵀb)² + Q₀² ∏ (1 − η²ε²)²)"
    setting = f"{done.sum()} runs that converge"
    claim(text, setting, "largest relative error", of["formula_error"][done].max(initial=0), exact)
    text, within = "λ∞ is the largest eigenvalue of the Hessian", near(0, absolute=5e-7)
    claim(text, runs, "largest relative error", of["eigenvalue_error"], within)
    text, within = "the error falls by abs(1 − ηλ∞) per step", near(0, absolute=1e-5)
    claim(text, runs, "largest error of the last ratio above 1e-7", of["rate_error"], within)

    largest, sharper = of["largest_move"], trace >= flow
    calm = done & (largest < np.sqrt(2))
    text, share = "the minimum is flatter than that of gradient flow", "share of runs"
    example = ""
    if (done & sharper).any():
        scale, column, start = min(np.argwhere(done & sharper).tolist(), key=lambda i: i[1])
        here = scale, column, start
        eta = SHARES[column] / target
        example = f", such as λ = {flow[here]:.6g} → {trace[here]:.6g} at η = {eta:.4g}"
    claim(text, f"{setting}{example}", share, (~sharper)[done].mean(), one)
    claim(text, f"{calm.sum()} runs", share, (~sharper)[calm].mean(), one, "sup η·abs(ε) < √2")
    pairs = done[:, 1:] & done[:, :-1]
    falls, longer = np.diff(trace, axis=1) < 0, np.diff(of["iterations"], axis=1) > 0
    calm = pairs & (np.maximum(largest[:, 1:], largest[:, :-1]) < 1)
    text, share = "a larger step size leads to a flatter minimum", "share of neighbours"
    claim(text, f"{pairs.sum()} pairs of step sizes", share, falls[pairs].mean(), one)
    claim(text, f"{calm.sum()} pairs", share, falls[calm].mean(), one, "sup η·abs(ε) < 1")
    fastest = np.where(done, of["iterations"], np.inf).argmin(1)[:, None]
    past = pairs & (np.arange(len(SHARES) - 1)[None, :, None] >= fastest)
    text = "beyond the fastest step size, slower means flatter"
    claim(text, f"{past.sum()} pairs", share, (falls == longer)[past].mean(), one)
    over = np.array(SHARES) > 1
    text = "no step size above 1/Φ converges"
    claim(text, f"{done[:, over].size} runs", "share that converges", done[:, over].mean(), near(0))

    at, eps = of["slow_step"], of["slow_eps"]
    scaled, bounded = eps[-1] / shallow.slow_error(at[-1], target), np.isfinite(eps[-1])
    slopes = np.log(eps[-1] / eps[-9]) / np.log(at[-1] / at[-9])
    early = of["slow_imbalance"][np.searchsorted(at, 100)]
    farthest = lambda values, of: values[np.abs(values - of).argmax()] if len(values) else np.nan
    for some, where, under in (
        (of["first_imbalance"] > target, "Q₀ > Φ", ""),
        (early > target / 20, "Q > Φ/20 after 100 steps", "Q > Φ/20 after 100 steps"),
    ):
        some = some & bounded
        setting, last = f"η = 1/Φ, {some.sum()} starts with {where}", f"t = {at[-1]:,}"
        text, value = "the error falls as Φ / √(2t)", farthest(scaled[some], 1)
        claim(text, f"{setting}, {last}", "farthest multiple", value, near(1, absolute=0.02), under)
        text, value = "the error falls as t^-½", farthest(slopes[some], -0.5)
        claim(text, setting, "farthest exponent", value, near(-0.5, absolute=0.01), under)
    text = "beyond 1/Φ the loss settles at Φ² (1 − (ηΦ)⁻²) / 4"
    level = np.asarray(shallow.level(np.array(BEYOND) / target, target))
    two = np.isfinite(level)
    error = np.abs(of["level"] - level[:, None])[two].max()
    claim(text, f"ηΦ = {BEYOND[: two.sum()]}", "largest error, all starts", error, exact)
    return found


def draw(stem: Path, config: Config, dataset: "xarray.Dataset") -> list[Path]:
    """Draws sharpness and iterations over the step size, the slow regime, and levels beyond."""
    done, share, target = dataset["converged"], np.array(SHARES), config.target
    names = [f"a₀ ~ {a} N(0, I), b₀ ~ {b} N(0, I)" for a, b in SCALES]
    of = lambda values: {
        name: (share, values.isel(scale=scale).transpose("seed", "share").values)
        for scale, name in enumerate(names)
    }
    ratio = (dataset["sharpness"] / dataset["flow"]).where(done)
    iterations, converged = dataset["iterations"].where(done), done.mean("seed").expand_dims("seed")
    at, eps = dataset["slow_step"].values, dataset["slow_eps"].values.T
    slow = {names[1]: (np.log10(at), eps / np.asarray(shallow.slow_error(at, target)))}
    beyond, fine = np.array(BEYOND), np.linspace(1, 1.236, 100)
    levels = {
        names[2]: (beyond, dataset["level"].transpose("seed", "beyond").values),
        "closed form": (fine, shallow.level(fine / target, target)),
    }
    panels = [
        plots.Panel("Minima of runs that converge", "λ∞ / λ of gradient flow", of(ratio), "η Φ"),
        plots.Panel("Steps to an error of 1e-8", "steps", of(iterations), "η Φ", log_y=True),
        plots.Panel("Share of starts that converge", "share", of(converged), "η Φ"),
        plots.Panel("Error at η Φ = 1", "ε √(2t) / Φ", slow, "log₁₀ t", ylim=(0, 1.5)),
        plots.Panel("Loss beyond η Φ = 1", "mean loss", levels, "η Φ"),
    ]
    title = "Gradient descent in shallow linear nets"
    return plots.figure(stem, panels, columns=3, title=title)


if __name__ == "__main__":
    main()
