"""The flags of an ensemble of toy runs, and the plan resolved from them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.launch import ranges
from experiments.launch.hosts import ALONE, Hosts
from experiments.storage import records
from experiments.toy.problems import Toy
from experiments.toy.run import Descent, Schedule

PLACE = ("exp_name", "runs_dir", "hosts")  # flags that results don't depend on
DENSITY = (
    *("seeds", "seed", "spectra_records", "curvature", "gd_jitter", "grid", "low", "high"),
    "frames",
)


@dataclass(frozen=True)
class Config:
    """Flags of all ensembles; tuples have one entry per schedule."""

    setting: str = ""
    """Setting of the paper."""
    exp_name: str = ""
    """Name of the run's folder; empty: the setting's name."""
    seeds: ranges.Count = 32
    """Seeds per schedule, of SGD and of the initialization (where it is random)."""
    seed: ranges.Seed = 0
    """Base seed: seed i of the ensemble is fold_in(key(seed), i)."""
    step_sizes: tuple[ranges.Positive, ...] = ()
    """Step size at the start of each schedule."""
    decay_times: tuple[ranges.Share, ...] = ()
    """Share of the run after which each schedule decays; 1: never."""
    decay_factors: tuple[ranges.Positive, ...] = ()
    """Factor that divides the step size of each schedule at its decay."""
    warmup_gains: tuple[ranges.AboveMinusOne, ...] = ()
    """Until its decay, each step size grows as 1 + gain * (step / num_steps) ** exponent."""
    warmup_exponent: ranges.Positive = 1.0
    """The exponent of the warm-up."""
    batch_sizes: tuple[ranges.Count, ...] = ()
    """Examples per step, drawn with replacement; all examples: gradient descent."""
    num_steps: ranges.Count = 100_001
    """Steps of each run."""
    init_scale: ranges.Positive = 1.0
    """Multiplies the paper's scale of the initial weights."""
    momentum: ranges.Fraction = 0.0
    """Heavy-ball momentum."""
    weight_decay: ranges.NonNegative = 0.0
    """Adds WEIGHT_DECAY * weights to each gradient."""
    sam_rho: ranges.NonNegative = 0.0
    """Gradients are taken at weights + SAM_RHO * gradient (not normalized)."""
    sam_of: Literal["batch", "examples"] = "batch"
    """Whether that gradient is of the batch, or of each example for its own."""
    label_noise: ranges.NonNegative = 0.0
    """Standard deviation of Gaussian noise on the labels; divided by the decay factor, too."""
    average: ranges.Fraction = 0.0
    """Measure the moving average of the weights with this decay; 0: the weights themselves."""
    valley_steps: ranges.CountOrNone = 0
    """Measure the valley floor: the weights after this many steps of GD of size 0.5; 0: off."""
    gd_jitter: ranges.Fraction = 1e-9
    """Gradient descent, which has no seed, multiplies initial weights by 1 + GD_JITTER N(0, 1)."""
    log_records: bool = False
    """Record the first 500 steps, then logarithmically spaced ones; else 100, then even ones."""
    spectra_records: ranges.Count = 40
    """Number of records, including the last, with singular values for every seed (one seed has all
    records)."""
    curvature: bool = False
    """Add sharpness, trace and batch sharpness of the training loss to the records with singular
    values, and the edge 2 / step size; with momentum m, GD's edge is 2 (1 + m) / step size. At the
    edge, GD jumps across the valley at every step: records, at odd and even steps, see both sides.
    """
    runs_dir: str = "runs"
    """Folder that contains the run folders."""
    hosts: Hosts = ALONE


Published = Mapping[str, Sequence[float | None]]  # variable -> a number per schedule


@dataclass(frozen=True)
class Plan:
    """An ensemble, resolved from its flags: runs, records and folder."""

    config: Config
    toy: Toy
    folder: Path
    fingerprint: str  # of the flags that results depend on
    record_steps: np.ndarray
    spectra_steps: np.ndarray  # record steps with singular values for every seed
    schedules: Schedule  # leaves [schedules]
    groups: Mapping[int, np.ndarray]  # batch size -> its schedules, which share a program
    labels: Sequence[str]  # one per schedule, all different
    marks: Mapping[str, Sequence[float]]  # label -> steps at which its step size decays
    descent: Descent


def resolve(experiment: str, config: Config, toy: Toy) -> Plan:
    """The plan of an ensemble; ValueError for flags that contradict each other or the problem."""
    per_schedule = ("step_sizes", "decay_times", "decay_factors", "warmup_gains", "batch_sizes")
    lengths = {field: len(getattr(config, field)) for field in per_schedule}
    if len(set(lengths.values())) != 1 or not config.step_sizes:
        counts = ", ".join(f"--{field} {length}" for field, length in lengths.items())
        raise ValueError(f"Values per schedule: {counts}; all must have the same number.")
    largest, examples = max(config.batch_sizes), len(toy.train.y)
    if largest > examples:
        raise ValueError(f"--batch_sizes is {largest}; there are {examples} training examples.")
    at = record_steps(config.num_steps, config.log_records)
    # A single record of singular values is of the trained network, not the initial one.
    first, last = (0 if config.spectra_records > 1 else len(at) - 1), len(at) - 1
    spread = np.rint(np.linspace(first, last, config.spectra_records)).astype(int)
    labels = [label(config, j, examples) for j in range(len(config.step_sizes))]
    # Labels are coordinates of the results and must be unique.
    labels = [f"{x} #{j + 1}" if labels.count(x) > 1 else x for j, x in enumerate(labels)]
    decays = zip(labels, config.decay_times, config.decay_factors, strict=True)
    fill = lambda value: jnp.full(len(labels), value)
    return Plan(
        config=config,
        toy=toy,
        folder=records.run_folder(config.runs_dir, experiment, config.exp_name or config.setting),
        fingerprint=fingerprint(config),
        record_steps=at,
        spectra_steps=at[np.unique(spread)],
        schedules=Schedule(
            jnp.asarray(config.step_sizes),
            jnp.asarray(config.warmup_gains),
            fill(config.warmup_exponent),
            jnp.asarray([int(share * config.num_steps) for share in config.decay_times]),
            jnp.asarray(config.decay_factors),
            fill(config.init_scale),
        ),
        groups={
            size: np.flatnonzero(np.equal(config.batch_sizes, size))
            for size in sorted(set(config.batch_sizes))
        },
        labels=labels,
        marks={name: [share * config.num_steps] for name, share, factor in decays if factor != 1},
        descent=Descent(*(getattr(config, field) for field in Descent._fields)),
    )


def fingerprint(config: Any) -> str:
    """SHA-256 of the flags that results depend on, and of the version of JAX."""
    flags = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in PLACE}
    return hashlib.sha256(f"{jax.__version__} {flags}".encode()).hexdigest()


def published(
    config: Config, settings: Mapping[str, Config], numbers: Mapping[str, Published]
) -> Published:
    """The paper's numbers if `config` is its setting, up to flags in PLACE and DENSITY; else {}."""
    setting, free = settings[config.setting], {*PLACE, *DENSITY}
    same = lambda name: name in free or getattr(config, name) == getattr(setting, name)
    return numbers[config.setting] if all(same(f.name) for f in fields(config)) else {}


def record_steps(num_steps: int, logarithmic: bool) -> np.ndarray:
    """The first 100 steps, then evenly spaced ones, as in the original.

    `logarithmic`: the first 500 steps, then 200 spaced logarithmically.
    """
    if logarithmic:
        spread = np.geomspace(1, num_steps - 1, 201).astype(int)
        return np.union1d(np.arange(min(500, num_steps)), spread)
    intervals = 249 if num_steps > 50_000 else 150
    spread = np.rint(np.arange(intervals) * num_steps / intervals).astype(int)
    return np.union1d(np.arange(min(100, num_steps)), spread)


def label(config: Config, j: int, examples: int) -> str:
    """The label of schedule j, such as `η = 0.282, /3.4 at 30%`."""
    size, gain, factor = config.batch_sizes[j], config.warmup_gains[j], config.decay_factors[j]
    share = config.decay_times[j]
    single = "SGD, " if len(set(config.batch_sizes)) > 1 else ""
    kind = {1: single, examples: "GD, "}.get(size, f"b = {size}, ")
    reached = config.step_sizes[j] * (1 + gain * share**config.warmup_exponent)
    warm = f" → {reached:.2g}" if gain else ""
    decay = f", /{factor:g} at {share:.0%}" if factor != 1 else ", constant"
    return f"{kind}η = {config.step_sizes[j]:g}{warm}{decay}"
