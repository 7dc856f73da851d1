"""Rates at which a norm decays along runs, and their regression on the settings. No JAX.

`runs` is a dataset with dim run: norm [run, record], stride (steps per record), step_size,
batch_size and seed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import xarray


def ends(runs: "xarray.Dataset") -> np.ndarray:
    """The last norm relative to the first, [runs]; NaN if it diverged."""
    norms = runs["norm"].values
    return np.where(np.isfinite(norms).all(1), norms[:, -1] / norms[:, 0], np.nan)


def rates(runs: "xarray.Dataset", high: float, low: float) -> np.ndarray:
    """ln(high / low) / steps between the levels `high` and `low` of the relative norm, [runs].

    Levels, not stretches of steps, since the decay isn't exponential; NaN if one isn't reached.
    """
    found = []
    for norms, stride in zip(runs["norm"].values, runs["stride"].values, strict=True):
        level = np.minimum.accumulate(norms / norms[0])
        steps = [np.interp(-at, -level, stride * np.arange(len(level))) for at in (high, low)]
        reached = np.isfinite(norms).all() and level[-1] < low
        found.append(np.log(high / low) / (steps[1] - steps[0]) if reached else np.nan)
    return np.array(found)


class Fit(NamedTuple):
    """Least squares: slopes and their 95 % half-widths, R^2 and the number of runs."""

    slopes: np.ndarray
    halves: np.ndarray
    r2: float
    runs: int


def fit(target: np.ndarray, columns: Sequence[np.ndarray], seeds: np.ndarray) -> Fit:
    """Regression with an intercept per seed: seeds differ in the constant. NaN for too few runs."""
    from scipy import stats

    known = np.isfinite(target)
    y, groups = target[known], (seeds[known, None] == np.unique(seeds)[None]).astype(float)
    slopes = np.stack(columns, 1)[known]
    x = np.concatenate([slopes, groups[:, groups.any(0)]], 1)
    free = len(y) - x.shape[1]
    if free < 2 or np.linalg.matrix_rank(x) < x.shape[1]:
        nan = np.full(len(columns), np.nan)
        return Fit(nan, nan, np.nan, len(y))
    found, *_ = np.linalg.lstsq(x, y, rcond=None)
    square = ((y - x @ found) ** 2).sum()
    spread = np.sqrt(square / free * np.diag(np.linalg.inv(x.T @ x)))
    halves = stats.t.ppf(0.975, free) * spread
    k = len(columns)
    return Fit(found[:k], halves[:k], 1 - square / ((y - y.mean()) ** 2).sum(), len(y))


def law(runs: "xarray.Dataset", window: tuple[float, float]) -> tuple[Fit, Fit]:
    """Fits of ln(rate / eta) on ln(eta / b), and of ln rate on ln eta and ln b."""
    with np.errstate(invalid="ignore"):
        rate = np.log(rates(runs, *window))
    eta, b = np.log(runs["step_size"].values), np.log(runs["batch_size"].values)
    seeds = runs["seed"].values
    return fit(rate - eta, [eta - b], seeds), fit(rate, [eta, b], seeds)


def collapse(runs: "xarray.Dataset", kappa: float) -> float:
    """(max - min) / mean over b <= 16 of the mean end, at eta^2 / b = kappa."""
    b, found = runs["batch_size"].values, ends(runs)
    near = np.isclose(runs["step_size"].values ** 2 / b, kappa)
    means = np.array([found[near & (b == each)].mean() for each in np.unique(b[b <= 16])])
    return float((means.max() - means.min()) / means.mean())
