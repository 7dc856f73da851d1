"""The paper's four CIFAR-10 commands, for as many epochs as fit into a given time.

    python -m benchmarks.train_paper --seconds 540 --data_dir DATA --out_dir paper

Some steps of each setting are timed first; then all four are trained for the same number of epochs,
the largest that fits (at most the paper's 100), with the schedules stretched over them. Each is a
run folder of `experiments.resnet_cifar`; table and figure are those of `experiments.sweep_deep`.
The same command continues an interrupted run, with the same number of epochs.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import sweep_deep
from experiments.deep import config as flags, curves, training
from experiments.launch import cli, devices
from experiments.storage import records

PAPER_EPOCHS, IMAGES = 100, 50_000
WARM_UP, TIMED = 30, 100  # steps
EVALUATIONS = 6  # of each run, the first and the last included

PLAIN = flags.Config(
    batch_size=256, momentum=0.0, no_data_augm=True, epochs=PAPER_EPOCHS, exp_name="no_explicit_reg"
)
SOTA = dataclasses.replace(
    PLAIN, momentum=0.9, l2_reg=5e-4, no_data_augm=False, exp_name="sota_setting"
)
LARGE = {"lr_schedule": "piecewise_05epochs"}
SETTINGS = {
    "no regularization, small steps": dataclasses.replace(
        PLAIN, lr_init=0.01, lr_schedule="constant"
    ),
    "no regularization, large steps": dataclasses.replace(
        PLAIN, lr_init=0.75, warmup_exp=1.05, **LARGE
    ),
    "momentum and decay, small steps": dataclasses.replace(
        SOTA, lr_init=0.002, lr_schedule="constant"
    ),
    "momentum and decay, large steps": dataclasses.replace(SOTA, lr_init=0.05, **LARGE),
}


@dataclass(frozen=True)
class Config:
    """Trains the paper's four settings on CIFAR-10 within a given time."""

    seconds: float = 540.0
    """Total time, including compilation and evaluations."""
    data_dir: str = ""
    """Folder of the data (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    out_dir: Path = Path("paper")
    """Folder for run folders, table and figure."""
    model_width: int = 64
    """Channels of the first stage; the paper's is 64."""
    frac_train: float = 1.0
    """Share of the training set."""
    half_prec: bool = False
    """Compute in bfloat16."""
    seed: int = 0
    """Seed of all runs."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(Config, run, argv)


def run(config: Config) -> Path:
    """Trains unfinished runs; returns the folder of table and figure."""
    started = time.monotonic()
    devices.set_up_deep(deterministic=False)
    chosen = config.out_dir / "epochs.json"
    if not chosen.exists():
        epochs = affordable_epochs(config, started)
        records.write_json(chosen, {"epochs": epochs, "seconds": config.seconds})
    epochs = json.loads(chosen.read_text())["epochs"]
    print(f"{epochs} epochs of each setting", flush=True)
    settings = {name: [adapted(config, each, epochs)] for name, each in SETTINGS.items()}
    sweep_deep.compare(config.out_dir, f"{epochs} epochs of CIFAR-10", settings)
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    return config.out_dir


def adapted(config: Config, setting: flags.Config, epochs: int, **changes) -> flags.Config:
    """One of the four settings at the given length."""
    of = {n: getattr(config, n) for n in ("data_dir", "model_width", "half_prec", "seed")}
    of |= {"frac_train": config.frac_train, "runs_dir": str(config.out_dir / "runs")}
    every = max(epochs * steps_per_epoch(config, setting) // (EVALUATIONS - 1), 1)
    return dataclasses.replace(setting, **of, epochs=epochs, **{"eval_iter_freq": every} | changes)


def steps_per_epoch(config: Config, setting: flags.Config) -> int:
    """Whole batches of the share of the training set."""
    return int(IMAGES * config.frac_train) // setting.batch_size


def affordable_epochs(config: Config, started: float) -> int:
    """Number of epochs for which all four settings fit into the remaining time."""
    cost = {"epoch": 0.0, "fixed": 0.0}
    for setting in SETTINGS.values():
        begun = time.monotonic()
        steps = WARM_UP + TIMED
        trial = adapted(
            config, setting, PAPER_EPOCHS, max_steps=steps, eval_iter_freq=WARM_UP, exp_name="trial"
        )
        rows = curves.records_of(training.run(trial))
        step, evaluating = rows[-1]["step_seconds"], rows[-1]["eval_seconds"]
        trial_evaluations = sum(row["eval_seconds"] for row in rows[1:])
        compiling = time.monotonic() - begun - trial_evaluations - step * steps
        cost["epoch"] += step * steps_per_epoch(config, setting)
        cost["fixed"] += compiling + EVALUATIONS * evaluating
    left = config.seconds - (time.monotonic() - started) - cost["fixed"]
    epochs = min(int(left / cost["epoch"]), PAPER_EPOCHS)
    if epochs < 1:
        needed = config.seconds - left + cost["epoch"]
        raise ValueError(f"One epoch of each setting takes {needed:.0f} s; raise --seconds.")
    return epochs


if __name__ == "__main__":
    main()
