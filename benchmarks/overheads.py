"""Overhead of a run over its steps alone: progress bar and records, and checkpoints.

    python -m benchmarks.overheads --batch_size 32 --out benchmarks/results/overheads.json

Three sides run the same steps, alternating: bare; with progress bar and records; with a save after
the first quarter, whose files are written during the following steps. By default a run saves every
300 seconds, and at every evaluation.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.random as jr

from benchmarks import deep_plan, timing
from benchmarks.deep_sides import Training
from experiments.deep.config import Config as Flags
from experiments.figures import progress
from experiments.launch import cli
from experiments.storage import records
from sgd_sparse_jax import train


@dataclass(frozen=True)
class Config:
    """Times the same training steps bare, with progress bar and records, and with a save."""

    net: str = "resnet18_plain"
    """Network by name."""
    width: int = 0
    """Width of the network (0: its default)."""
    batch_size: int = 256
    """Examples per step, over all devices."""
    steps: int = 40
    """Steps per side and round."""
    rounds: int = 5
    """Number of timings of each side."""
    steps_per_call: int = 0
    """Steps in one compiled call (0: 1 on CPUs, 25 on accelerators)."""
    out: Path | None = None
    """Where to write the JSON."""


class Sides:
    """The same steps in three ways, and the times for which saves block the loop."""

    def __init__(self, config: Config, folder: Path):
        plan = deep_plan.complete(
            deep_plan.Config(
                nets=(config.net,),
                width=config.width,
                batch_size=config.batch_size,
                precision="fp32",
                images=max(20 * config.batch_size, 1),
            )
        )
        self.config, self.folder, self.training = config, folder, Training(config.net, plan)
        one = 1 if jax.default_backend() == "cpu" else 25
        self.steps_per_call = config.steps_per_call or one
        self.blocked: list[float] = []
        self.first: list[float] = []

    def windows(self, *stops: int, **hooks: Any) -> Iterator[train.Window]:
        """The steps, with additional stops."""
        training, every = self.training, self.steps_per_call
        stops = (*stops, self.config.steps)
        parts = (jr.key(2), training.start(), training.sampler, training.segment, stops)
        return train.windows(*parts, steps_per_call=every, **hooks)

    def bare(self) -> None:
        """The steps alone."""
        list(self.windows())

    def watched(self) -> None:
        """With progress bar and records, as in `experiments.resnet_cifar`."""
        live = progress.Live(0, self.config.steps, self.config.batch_size)
        record = {"step": self.config.steps, "train/loss": 0.0, "test/error": 0.0}
        try:
            list(self.windows(on_call=live.on_call))
            records.append_record(self.folder, record)
            live.on_record(record)
        finally:
            live.close()

    def saved(self) -> None:
        """With a save after the first quarter of the steps, finished at the end at the latest."""
        quarter = max(self.config.steps // 4 // self.steps_per_call, 1) * self.steps_per_call
        with self.checkpoints() as checkpoints:
            for window in self.windows(quarter):
                if window.step < self.config.steps:
                    begin = time.perf_counter()
                    train.save(checkpoints, window.state)
                    self.blocked.append(time.perf_counter() - begin)

    def alone(self) -> float:
        """Seconds until a state is on disk, without concurrent steps."""
        state = jax.block_until_ready(self.training.start())
        with self.checkpoints() as checkpoints:
            begin = time.perf_counter()
            train.save(checkpoints, state._replace(step=state.step + 1))
            checkpoints.wait_until_finished()
            return time.perf_counter() - begin

    @contextlib.contextmanager
    def checkpoints(self) -> Iterator[Any]:
        """A temporary folder for states."""
        with (
            tempfile.TemporaryDirectory(dir=self.folder) as place,
            train.open_checkpoints(place) as checkpoints,
        ):
            begin = time.perf_counter()
            train.save(checkpoints, self.training.start())  # the first save is synchronous
            self.first.append(time.perf_counter() - begin)
            yield checkpoints


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(Config, run, argv)


def run(config: Config) -> dict[str, Any]:
    """Measures, prints, and writes JSON."""
    if min(config.steps // 4, config.rounds, config.batch_size) < 1:
        raise ValueError("--steps needs 4 or more, --rounds and --batch_size 1 or more.")
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(config, Path(folder))
        ways = {"bare": sides.bare, "watched": sides.watched, "saved": sides.saved}
        seconds = timing.rounds(ways, config.rounds)
        alone = [sides.alone() for _ in range(config.rounds)]
    pairs = lambda name: list(zip(seconds[name], seconds["bare"], strict=True))
    watched = [a / b for a, b in pairs("watched")]
    longer = [a - b - c for (a, b), c in zip(pairs("saved"), sides.first[1:], strict=False)]
    middle = statistics.median
    cost = max(middle(longer), middle(sides.blocked[1:]))  # the first compiles its digest
    results = {
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(sides.training.state)),
        "ms_per_step": 1e3 * middle(seconds["bare"]) / config.steps,
        "watched_over_bare": middle(watched),
        "save_alone_s": middle(alone),
        "save_keeps_the_loop_s": middle(sides.blocked[1:]),
        "save_lengthens_the_run_s": middle(longer),
        "seconds_between_saves": Flags.save_every_seconds,
        "share_of_a_run": cost / Flags.save_every_seconds,
        "rounds": seconds | {"alone": alone, "keeps_the_loop": sides.blocked[1:]},
    }
    print(
        f"{config.net}: {results['ms_per_step']:.1f} ms a step, with bar and records "
        f"{results['watched_over_bare']:.4f} of that. A save of "
        f"{results['state_bytes'] / 2**20:.0f} MiB takes {results['save_alone_s']:.2f} s, blocks "
        f"the loop for {results['save_keeps_the_loop_s']:.2f} s and lengthens the run by "
        f"{results['save_lengthens_the_run_s']:.2f} s: {results['share_of_a_run']:.2%} of the "
        f"{Flags.save_every_seconds:.0f} s from one to the next"
    )
    timing.write(config.out, command(config), ("flax", "optax", "orbax-checkpoint"), **results)
    return results


def command(config: Config) -> str:
    """The command line that runs `config` again."""
    flags = [f"--{name} {value}" for name, value in vars(config).items() if value is not None]
    return f"python -m benchmarks.overheads {' '.join(flags)}"


if __name__ == "__main__":
    main()
