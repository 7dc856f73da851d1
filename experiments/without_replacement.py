"""What sampling without replacement changes: drift, variance, flat valleys, saddles, spectra.

python -m experiments.without_replacement
python -m experiments.without_replacement --batches 6 --exp_name six
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import jax.random as jr
import numpy as np

from experiments.figures import claims, plots
from experiments.figures.claims import Claim, at_most, judged, near
from experiments.launch import cli, devices, ranges
from experiments.launch.ranges import Count, Range, Seed, TwoOrMore
from experiments.storage import records
from experiments.theory import drift, orders
from experiments.theory.orders import SADDLES, SAMPLERS, STATIONARY, UNITS, VALLEY, VALLEY_NOISE
from experiments.toy import ensemble
from sgd_sparse_jax.theory import sampling

if TYPE_CHECKING:
    import xarray

NET = {"trace": "trace", "effective_rank": "effective rank", "rank": "rank"}
NAME = "without_replacement"
SOURCE = "arXiv 2312.16143"


@dataclass(frozen=True)
class Config:
    """SGD with four orders of its batches."""

    batches: Annotated[int, Range(2, 9, "[]")] = 4
    """Batches per epoch, all orders of which are enumerated."""
    orders: TwoOrMore = 100_000
    """Random orders of 16 batches, half of them the reverse of the others."""
    seeds: TwoOrMore = 64
    """Runs of each stationary state; four times as many in the valley, sixteen at saddles."""
    net_seeds: TwoOrMore = 24
    """Initializations of the ReLU net."""
    net_epochs: Count = 8_000
    """Epochs of 24 steps of the ReLU net."""
    seed: Seed = 0
    """Base seed."""
    exp_name: str = "orders"
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
    folder = records.run_folder(config.runs_dir, "without_replacement", config.exp_name)
    dataset = ensemble.in_folder(folder, config, lambda *how: simulate(config))
    found = judge(config, dataset)
    claims.report(folder, found, title="SGD without replacement")
    figures = draw(folder / "figures" / NAME, dataset)
    return claims.Finding(folder, found, figures)


def simulate(config: Config) -> "xarray.Dataset":
    """All parts of the study."""
    import xarray

    keys = iter(jr.split(jr.key(config.seed), 5))
    parts = drift.enumerated(config.seed, config.batches)
    parts |= drift.paired(config.seed, config.orders)
    for part in (orders.stationary, orders.flat, orders.valley, orders.saddles):
        parts |= part(next(keys), config.seeds)
    parts |= orders.relu_net(next(keys), config.net_seeds, config.net_epochs)
    coords = {
        "step_size": list(drift.STEP_SIZES),
        "pair_step": list(drift.PAIR_STEP_SIZES),
        "sampler": list(SAMPLERS),
    }
    return xarray.Dataset(parts, coords)


def judge(config: Config, dataset: "xarray.Dataset") -> list[Claim]:
    """The claims about drift, variance, flat valleys, saddles and spectra."""
    found, of = [], {name: dataset[name].values for name in dataset}

    def claim(text, setting, statistic, value, expected, under="", interval=None):
        how: dict = {"setting": setting, "statistic": statistic, "under": under}
        how |= {"source": SOURCE, "figure": NAME, "interval": interval}
        found.append(judged(text, value=value, expected=expected, **how))

    k, small = config.batches, np.array(drift.STEP_SIZES) <= 0.025
    order = lambda values: np.polyfit(
        np.log(np.array(drift.STEP_SIZES)[small]), np.log(values[small]), 1
    )
    text, fit = "the drift is −(η² k / 4) ∇ tr Cov + O(η³)", "fitted order, η ≤ .025"
    all_orders = f"k = {k}, all orders"
    claim(text, all_orders, fit, order(of["residual"])[0], near(3, absolute=0.05))
    sizes = f"k = {', '.join(map(str, drift.SIZES))}"
    value = of["order_by_size"][np.abs(of["order_by_size"] - 3).argmax()]
    claim(text, sizes, "farthest order, η = .01 → .005", value, near(3, absolute=0.1))
    half = config.orders // 2
    value = np.log2(of["pair_residual"][-2] / of["pair_residual"][-1])
    setting = f"k = {drift.PAIR_BATCHES}, {half} orders and their reverse"
    claim(text, setting, "order, η = .01 → .005", value, near(3, absolute=0.1))
    ratio = of["pair_error"][-1] / of["plain_error"][-1]
    text, statistic = "an order and its reverse cancel the noise", "standard error / unpaired"
    claim(text, setting, statistic, ratio, at_most(0.05))
    text = "with replacement the drift is O(η³)"
    if k <= drift.MOST_DRAWN:
        claim(text, all_orders, fit, order(of["residual_with"])[0], near(3, absolute=0.1))
        text, value = "with replacement an epoch varies as η²", order(of["variance_with"])[0]
        claim(text, all_orders, fit, value, near(2, absolute=0.1))
    text, value = "without replacement an epoch varies as η⁴", order(of["variance"])[0]
    claim(text, all_orders, fit, value, near(4, absolute=0.1))
    text = "tr Cov of batches is (n − b) / (b (n − 1)) of tr Cov"
    exact = near(sampling.batch_factor(6, 2), absolute=1e-12)
    claim(text, "n = 6, b = 2", "ratio", of["batch_factor"], exact)

    variances = dict(zip(SAMPLERS, of["stationary"], strict=True))
    predicted = np.asarray(sampling.stationary_variance(np.array(STATIONARY)))
    error = np.abs(variances["with replacement"] / predicted - 1).max()
    text, setting = "the stationary variance is η / (2 − η)", "(θ ± 1)² / 2, with replacement"
    claim(text, setting, "largest relative error", error, near(0, absolute=0.05))
    for name, expected in (("with replacement", 1), ("reshuffled", 3)):
        value = np.log2(variances[name][-2] / variances[name][-1])
        text = f"the stationary variance is O(η{'³' if expected == 3 else ''})"
        claim(text, name, "order, η = .05 → .025", value, near(expected, absolute=0.1))

    ends = of["flat_end"] / of["flat_predicted"]
    text, setting = "z falls by (1 − η² s²)^(k/2) per epoch on ± z² / 2", "η = .1, 24 epochs"
    error, exact = np.abs(ends[1:] - 1).max(), near(0, absolute=1e-12)
    claim(text, f"{setting}, without replacement", "largest relative error", error, exact)
    mean, error = of["flat_end"][0].mean(), 1.96 * of["flat_end"][0].std() / np.sqrt(ends.shape[1])
    text, interval = "E z stays constant on ± z² / 2", (mean - error, mean + error)
    setting = f"{setting}, with replacement"
    claim(text, setting, "mean", mean, near(1, absolute=0.1), interval=interval)
    rates = of["valley_rate"].mean(1)
    gap = (rates[1:] - rates[:1]) / rates[:1]
    text, statistic = "along the valley u v = 1 all orders move at η² s²", "largest difference"
    setting = f"labels 1 ± {VALLEY_NOISE}, η = "
    value = np.abs(gap[:, 0]).max()
    claim(text, f"{setting}{VALLEY[0]}", statistic, value, at_most(0.1))
    text, value = "their difference is O(η)", gap[:, 1].mean() / gap[:, 0].mean()
    claim(text, f"{setting}{VALLEY[1]} / {VALLEY[0]}", "ratio", value, near(0.5, absolute=0.15))

    rng = np.random.default_rng(config.seed)
    text, statistic = "without replacement saddles are left faster", "median steps / with"
    for name, times in zip(SADDLES, of["escape"], strict=True):
        medians = lambda drawn, t=times: np.median(t[:2][:, drawn], 1)
        ratio = lambda drawn, medians=medians: np.divide(*medians(drawn)[::-1])
        runs = times.shape[1]
        drawn = [ratio(rng.integers(runs, size=runs)) for _ in range(500)]
        interval = tuple(np.percentile(drawn, (2.5, 97.5)).tolist())
        value, under = ratio(np.arange(runs)), "" if name == next(iter(SADDLES)) else "coupling"
        claim(text, name, statistic, value, at_most(0.97), under, interval)
    with_, without = (np.stack([of[n][i] for n in NET]) for i in (0, 1))
    for name, ratios in zip(NET.values(), without / with_, strict=True):
        mean, error = ratios.mean(), 1.96 * ratios.std(ddof=1) / np.sqrt(len(ratios))
        text, interval = (
            f"without replacement the spectrum has a lower {name}",
            (mean - error, mean + error),
        )
        statistic = "mean paired ratio to with replacement"
        setting = f"ReLU net 1-{UNITS}-1, {config.net_seeds} seeds"
        # A ratio below 1 by more than its error.
        claim(text, setting, statistic, mean, at_most(1 - error), interval=interval)
    return found


def draw(stem: Path, dataset: "xarray.Dataset") -> list[Path]:
    """Draws residuals and variances over the step size, escape times and spectra."""
    eta, pairs = np.log10(drift.STEP_SIZES), np.log10(drift.PAIR_STEP_SIZES)
    of = {name: dataset[name].values for name in dataset}
    means = {
        "drift": (eta, of["drift"]),
        "drift − formula": (eta, of["residual"]),
        "drift − formula, 16 batches": (pairs, of["pair_residual"]),
    }
    epoch = {"with replacement": (eta, of["variance_with"]), "reshuffled": (eta, of["variance"])}
    late = {
        name: (np.log10(STATIONARY), np.where(values > 1e-20, values, np.nan))
        for name, values in zip(SAMPLERS, of["stationary"], strict=True)
    }
    quantile = np.linspace(1, 99, 99)
    log = {"log_y": True, "xlabel": "log₁₀ η"}
    panels = [
        plots.Panel("Mean of an epoch minus GD", "norm", means, **log),
        plots.Panel("Variance of an epoch", "variance", epoch, **log),
        plots.Panel("Stationary variance", "variance", late, **log),
    ]
    for name, times in zip(SADDLES, of["escape"], strict=True):
        lines = {
            sampler: (quantile, np.percentile(t, quantile))
            for sampler, t in zip(SAMPLERS, times, strict=True)
        }
        panels.append(plots.Panel(f"Saddle: {name}", "steps to leave it", lines, "percentile"))
    return plots.figure(stem, panels, columns=3, title="SGD without replacement")


if __name__ == "__main__":
    main()
