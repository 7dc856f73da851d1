"""The flags of an ensemble of toy runs, what they may be, and what follows from them alone."""

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import jax
import numpy as np

from experiments.launch import ranges
from experiments.launch.hosts import ALONE, Hosts
from experiments.launch.ranges import (
    AboveMinusOne,
    Count,
    CountOrNone,
    Fraction,
    NonNegative,
    Positive,
    Seed,
    Share,
)
from experiments.toy.problems import Toy


@dataclass(frozen=True)
class Config:
    """One entry of each tuple per schedule."""

    setting: str = ""
    """Which of the paper's settings."""
    exp_name: str = ""
    """Name of the run's folder; empty: the setting's name."""
    seeds: Count = 32
    """Seeds per schedule: of the initialization (where it is random) and of SGD."""
    seed: Seed = 0
    """Seed of the seeds: seed i of the ensemble is fold_in(key(seed), i)."""
    step_sizes: tuple[Positive, ...] = ()
    """Step size at the start of each schedule."""
    decay_times: tuple[Share, ...] = ()
    """Share of the run after which each schedule decays; 1 is never."""
    decay_factors: tuple[Positive, ...] = ()
    """What each schedule divides its step size by."""
    warmup_gains: tuple[AboveMinusOne, ...] = ()
    """Until it decays, each step size grows as 1 + gain * (step / num_steps) ** exponent."""
    warmup_exponent: Positive = 1.0
    """The exponent of the warm-up."""
    batch_sizes: tuple[Count, ...] = ()
    """Examples per step, drawn with replacement; all of them is gradient descent."""
    num_steps: Count = 100_001
    """Steps of each run."""
    init_scale: Positive = 1.0
    """Multiplies the paper's scale of the initial weights."""
    momentum: Fraction = 0.0
    """Heavy-ball momentum."""
    weight_decay: NonNegative = 0.0
    """Adds WEIGHT_DECAY * weights to each gradient."""
    sam_rho: NonNegative = 0.0
    """Gradients are taken at weights + SAM_RHO * gradient (not normalized)."""
    sam_of: Literal["batch", "examples"] = "batch"
    """Whether that point is the batch's or each example's own."""
    label_noise: NonNegative = 0.0
    """Scale of Gaussian noise on each batch's labels; decays by the factor of the step size."""
    average: Fraction = 0.0
    """What is watched is the moving average of the weights with this memory; 0 for the weights."""
    valley_steps: CountOrNone = 0
    """What is watched is the valley floor: the weights after so many steps of GD of size 0.5."""
    gd_jitter: Fraction = 1e-9
    """Gradient descent has no seed: its initial weights are multiplied by 1 + GD_JITTER N(0, 1)."""
    log_records: bool = False
    """Records at the first 500 steps, then spaced logarithmically; else 100, then evenly."""
    spectra_records: Count = 40
    """At how many of the records singular values are taken for every seed (for one seed at all)."""
    runs_dir: str = "runs"
    """Where run folders go."""
    hosts: Hosts = ALONE


def validate(config: Config, toy: Toy) -> None:
    """Raises ValueError, in the words of the flags, for what can't be run."""
    ranges.check(config)
    per_schedule = ("step_sizes", "decay_times", "decay_factors", "warmup_gains", "batch_sizes")
    lengths = {field: len(getattr(config, field)) for field in per_schedule}
    if len(set(lengths.values())) != 1 or not config.step_sizes:
        counts = ", ".join(f"--{field} {length}" for field, length in lengths.items())
        raise ValueError(f"Values per schedule: {counts}; give each schedule one of each.")
    for value in config.batch_sizes:
        if value > len(toy.train.y):
            raise ValueError(
                f"--batch_sizes is {value}, more than the {len(toy.train.y)} training examples."
            )
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError('Float64 is off; call jax.config.update("jax_enable_x64", True) first.')


ConfigT = TypeVar("ConfigT", bound=Config)


def like(config: ConfigT, setting: ConfigT) -> ConfigT:
    """`config` but for what says how often, where and how closely it is watched."""
    free = ("exp_name", "seeds", "seed", "spectra_records", "gd_jitter", "runs_dir", "hosts")
    return replace(config, **{field: getattr(setting, field) for field in free})


def record_steps(config: Config) -> np.ndarray:
    """The first 100 steps, then points spread over the whole run (the reference's cadence).

    With `log_records`: the first 500, then 200 spaced logarithmically.
    """
    if config.log_records:
        spread = np.geomspace(1, config.num_steps - 1, 201).astype(int)
        return np.unique(np.concatenate([np.arange(min(500, config.num_steps)), spread]))
    intervals = 249 if config.num_steps > 50_000 else 150
    spread = np.rint(np.arange(intervals) * config.num_steps / intervals).astype(int)
    return np.unique(np.concatenate([np.arange(min(100, config.num_steps)), spread]))


def spectra_steps(config: Config) -> np.ndarray:
    """`spectra_records` of the record steps, the first and the last among them."""
    at = record_steps(config)
    return at[np.unique(np.rint(np.linspace(0, len(at) - 1, config.spectra_records)).astype(int))]


def labels(config: Config, toy: Toy) -> list[str]:
    """`η = 0.282, /3.4 at 30 %`, one per schedule."""
    out = []
    for j, size in enumerate(config.batch_sizes):
        share, gain, factor = (
            config.decay_times[j],
            config.warmup_gains[j],
            config.decay_factors[j],
        )
        kind = {1: "", len(toy.train.y): "GD, "}.get(size, f"b = {size}, ")
        reached = config.step_sizes[j] * (1 + gain * share**config.warmup_exponent)
        warm = f" → {reached:.2g}" if gain else ""
        decay = f", /{factor:g} at {share:.0%}" if factor != 1 else ", constant"
        out.append(f"{kind}η = {config.step_sizes[j]:g}{warm}{decay}")
    return out


def decay_marks(config: Config, toy: Toy) -> dict[str, list[float]]:
    """Where each schedule's step size decays, for figures."""
    decays = zip(labels(config, toy), config.decay_times, config.decay_factors, strict=True)
    return {label: [share * config.num_steps] for label, share, factor in decays if factor != 1}
