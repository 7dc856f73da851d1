"""The flags of the studies at the edge of stability, and the runs resolved from them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from experiments.edge.runs import BETA1
from experiments.launch import ranges
from experiments.launch.hosts import ALONE, Hosts

Optimizer = Literal["sgd", "rmsprop", "adam"]


@dataclass(frozen=True)
class Config:
    """Measures curvature under large steps; tuples have one entry per run."""

    setting: Literal["chebyshev", "diagonal", "cifar-mlp", "cifar-cnn", "resnet"] = "chebyshev"
    """Problem: chebyshev (20 points, tanh), diagonal (D1), cifar-mlp (1,000 images, tanh), or, for
    accelerators, cifar-cnn and resnet."""
    study: Literal["plateaus", "edge-test", "branches"] = "plateaus"
    """plateaus: where curvature settles. edge-test: the step size or momentum of the first jump.
    branches: runs continued with smaller and larger steps."""
    step_sizes: tuple[ranges.Positive, ...] = ()
    """Step size of each run."""
    momenta: tuple[ranges.Fraction, ...] = ()
    """Heavy-ball momentum of each run with optimizer sgd."""
    batch_sizes: tuple[ranges.CountOrNone, ...] = ()
    """Examples per step of each run; 0: all, gradient descent."""
    optimizers: tuple[Optimizer, ...] = ()
    """Optimizer of each run. RMSProp and Adam (beta1 .9) have beta2 .99, and need full batches."""
    num_steps: tuple[ranges.Count, ...] = ()
    """Steps of each run."""
    with_replacement: bool = False
    """Draw each mini-batch independently; default: reshuffle the examples in every epoch."""
    seeds: ranges.TwoOrMore = 3
    """Seeds of each run."""
    seed: ranges.Seed = 0
    """Base seed: seed i is fold_in(key(seed), i)."""
    records: ranges.TwoOrMore = 30
    """Number of evenly spaced records of each run."""
    lanczos_steps: ranges.TwoOrMore = 16
    """Products with the Hessian for each eigenvalue, three quarters as many with those of
    mini-batches."""
    gauge_batches: ranges.TwoOrMore = 256
    """Mini-batches of each record of the batch sharpness, drawn anew for each record."""
    lanczos_batches: ranges.CountOrNone = 32
    """Mini-batches whose own largest eigenvalue is computed, in the last 3 records; 0: none."""
    factors: tuple[ranges.Positive, ...] = (0.25, 0.5, 1.0, 1.5)
    """Study branches: factors of the step size; 1 is the unchanged run."""
    horizon: ranges.TwoOrMore = 400
    """Studies edge-test and branches: steps from the checkpoint on."""
    bisect: Literal["step_size", "momentum", "batch_size"] = "step_size"
    """Study edge-test: what is varied until the loss jumps: the step size; momentum between 0 and
    .99; or the size of independently drawn batches, from all examples down to 1."""
    jump: ranges.Positive = 2.0
    """Study edge-test: the loss jumps above this multiple of the unchanged run's maximum."""
    data_dir: str = ""
    """Folder of CIFAR-10 (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    exp_name: str = ""
    """Name of the run's folder; empty: SETTING-STUDY."""
    runs_dir: str = "runs"
    """Folder that contains the run folders."""
    hosts: Hosts = ALONE


class Spec(NamedTuple):
    """One run of the study, for all seeds."""

    step_size: float
    momentum: float
    batch_size: int
    optimizer: str
    num_steps: int
    full: bool

    @property
    def label(self) -> str:
        """A name such as `SGD b = 8, η = 0.04`."""
        kind = {"sgd": "GD", "rmsprop": "RMSProp", "adam": "Adam"}[self.optimizer]
        kind = kind if self.full else f"SGD b = {self.batch_size}"
        momentum = f", β = {self.momentum:g}" if self.momentum else ""
        return f"{kind}, η = {self.step_size:g}{momentum}"

    @property
    def edge(self) -> float:
        """The value at which the gauge of this run is predicted to settle.

        2 (1 + beta) / eta for full batches, 2 (1 - beta) / eta for small ones (arXiv 2604.14108),
        (2 + 2 beta1) / ((1 - beta1) eta) for Adam (arXiv 2207.14484).
        """
        if self.optimizer == "adam":
            return 2 * (1 + BETA1) / (1 - BETA1) / self.step_size
        return 2 * (1 + self.momentum * (1 if self.full else -1)) / self.step_size

    @property
    def gauge(self) -> str:
        """The gauge that is predicted to settle there."""
        if self.optimizer != "sgd":
            return "preconditioned"
        return "midpoint" if self.full else "batch_sharpness"


def specs(config: Config, examples: int) -> list[Spec]:
    """The runs of a study; ValueError for flags that contradict each other or the problem."""
    names = ("step_sizes", "momenta", "batch_sizes", "optimizers", "num_steps")
    lengths = {name: len(getattr(config, name)) for name in names}
    if len(set(lengths.values())) != 1 or not config.step_sizes:
        counts = ", ".join(f"--{name} {length}" for name, length in lengths.items())
        raise ValueError(f"Values per run: {counts}; all must have the same number.")
    if max(config.batch_sizes) > examples:
        raise ValueError(
            f"--batch_sizes is {max(config.batch_sizes)}; there are {examples} training examples."
        )
    found = []
    for values in zip(*(getattr(config, name) for name in names), strict=True):
        step_size, momentum, batch_size, optimizer, num_steps = values
        size, full = batch_size or examples, batch_size in (0, examples)
        if optimizer != "sgd" and (momentum or not full):
            raise ValueError(f"--optimizers {optimizer} needs --batch_sizes 0 and --momenta 0.")
        if num_steps < 4 * config.records:
            raise ValueError(
                f"--num_steps {num_steps} is less than 4 per record; --records is {config.records}."
            )
        found.append(Spec(step_size, momentum, size, optimizer, num_steps, full))
    if len({spec.label for spec in found}) < len(found):
        raise ValueError("Two runs have the same step size, momentum, batch size and optimizer.")
    return found


def record_steps(num_steps: int, records: int) -> np.ndarray:
    """`records` evenly spaced steps, alternately even and odd."""
    at = np.rint(np.linspace(0, num_steps - 1, records)).astype(int)
    return np.maximum(at - (at - np.arange(records)) % 2, np.arange(records) % 2)


def last_third(records: int) -> slice:
    """The records over which levels are medians."""
    return slice(records - max(records // 3, 1), records)


# Step sizes and lengths at which each run reaches its edge, found by trial on two CPU cores.
SETTINGS = {
    "chebyshev": Config(
        step_sizes=(0.2, 0.1333, 0.3, 0.2, 0.2, 0.2, 0.003, 0.003),
        momenta=(0.0, 0.0, 0.5, 0.5, 0.9, 0.0, 0.0, 0.0),
        batch_sizes=(0, 0, 0, 0, 0, 4, 0, 0),
        optimizers=("sgd", "sgd", "sgd", "sgd", "sgd", "sgd", "rmsprop", "adam"),
        num_steps=(12_000,) * 8,
        records=60,
    ),
    "diagonal": Config(
        setting="diagonal",
        step_sizes=(0.27,),
        momenta=(0.0,),
        batch_sizes=(1,),
        optimizers=("sgd",),
        num_steps=(5_000,),
        factors=(0.25, 0.5, 1.0, 1.04),
        horizon=20_000,
        with_replacement=True,  # as in the paper
        lanczos_batches=0,  # of one example, hence of rank one: equal to the batch sharpness
    ),
    "cifar-mlp": Config(
        setting="cifar-mlp",
        step_sizes=(0.02, 0.06, 0.076, 0.04, 0.04, 0.04, 0.02),
        momenta=(0.0, 0.5, 0.9, 0.0, 0.0, 0.0, 0.5),
        batch_sizes=(0, 0, 0, 8, 16, 32, 8),
        optimizers=("sgd",) * 7,
        num_steps=(2_400, 1_200, 2_400, 20_000, 12_000, 6_000, 15_000),
    ),
    "cifar-cnn": Config(
        setting="cifar-cnn",
        step_sizes=(0.02, 0.02, 0.02),
        momenta=(0.0,) * 3,
        batch_sizes=(0, 8, 32),
        optimizers=("sgd",) * 3,
        num_steps=(4_000, 20_000, 8_000),
    ),
    "resnet": Config(
        setting="resnet",
        step_sizes=(0.02, 0.02, 0.02),
        momenta=(0.0,) * 3,
        batch_sizes=(0, 8, 32),
        optimizers=("sgd",) * 3,
        num_steps=(4_000, 20_000, 8_000),
    ),
}
