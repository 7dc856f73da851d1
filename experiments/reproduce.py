"""Every toy number that the paper's code printed next to our runs, with a computed verdict.

python -m experiments.reproduce                    # 32 seeds: report.md and report.html
python -m experiments.reproduce --seeds 128 --exp_name more
"""

import contextlib
import io
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import jax

from experiments import diag_nets, fc_nets, loss_surface
from experiments.figures import report, terminal, verdicts
from experiments.figures.report import Chapter
from experiments.launch import cli, devices, ranges
from experiments.launch.ranges import Count, CountOrNone, Seed, TwoOrMore
from experiments.storage import records
from experiments.toy import config as toys


@dataclass(frozen=True)
class Config:
    """All toy experiments of the paper: D1-D3, F1, F2, T1, T3."""

    seeds: TwoOrMore = 32
    """Seeds of every setting (two-layer nets, most of which diverge: eight times as many)."""
    seed: Seed = 0
    """Base seed."""
    spectra_records: Count = 40
    """Number of records with singular values for every seed (for one seed: all records)."""
    frames: CountOrNone = 40
    """Frames of the animation; 0 for none."""
    workers: CountOrNone = 0
    """Settings run at the same time, each on one device; 0: one per core, or one after another on
    an accelerator."""
    exp_name: str = "toys"
    """Name of the run's folder."""
    runs_dir: str = "runs"
    """Where run folders go."""


class Task(NamedTuple):
    """One setting to run."""

    title: str
    settings: toys.Config

    @property
    def module(self) -> ModuleType:
        """The experiment whose flags the settings are."""
        return sys.modules[type(self.settings).__module__]

    @property
    def command(self) -> str:
        """The command that runs this setting alone."""
        flags = f"--setting {self.settings.setting} --seeds {self.settings.seeds}"
        return f"python -m {self.module.__name__} {flags}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    devices.set_up_toys()
    cli.main(Config, run, argv)


def run(config: Config) -> list[Chapter]:
    """Runs all settings (finished ones are read) and writes the two reports."""
    ranges.check(config)
    folder = records.run_folder(config.runs_dir, "reproduce", config.exp_name)
    start = time.perf_counter()
    todo = tasks(config, str(folder))
    devices.start()
    workers = config.workers or (devices.cores() if jax.default_backend() == "cpu" else 1)
    chapters = in_processes(todo, workers) if workers > 1 else [chapter_of(task) for task in todo]
    seconds = time.perf_counter() - start
    report.write(folder, config.seeds, chapters, seconds)
    terminal.show(report.score(chapters), f"{folder / 'report.html'} ({seconds:.0f} s)")
    return chapters


def tasks(config: Config, runs_dir: str) -> list[Task]:
    """The paper's settings in its order."""
    common = {
        "seeds": config.seeds,
        "seed": config.seed,
        "spectra_records": config.spectra_records,
        "runs_dir": runs_dir,
    }

    def task(title: str, settings: toys.Config, **changes: int) -> Task:
        return Task(title, replace(settings, **(common | changes)))

    fc = fc_nets.SETTINGS
    return [
        task("D1 · diagonal nets, SGD", diag_nets.SETTINGS["d1"]),
        task("D2 · diagonal nets, GD and SGD", diag_nets.SETTINGS["d2"]),
        task("D3 · over the loss", loss_surface.SETTINGS["d3"], frames=config.frames),
        task("F1 · 1-D regression", fc["1d"]),
        task("F2 · 1-D, over-regularized", fc["1d-overregularized"]),
        task("T1 · teacher-student, two layers", fc["two-layer"], seeds=8 * config.seeds),
        task("T3 · teacher-student, three layers", fc["three-layer"]),
    ]


def in_processes(todo: Sequence[Task], workers: int) -> list[Chapter]:
    """The chapters in order, computed `workers` at a time in processes of one device each.

    Compiling takes one core: two settings at once take little longer than one.
    """
    chapters: list[Chapter] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, devices.set_up_toys, (1,)) as pool:
        try:
            for chapter in pool.map(_quiet_chapter, todo):
                chapters.append(chapter)
                terminal.show(f"{len(chapters)} of {len(todo)}: {chapter.title}")
        except BrokenProcessPool as error:
            raise OSError(
                "A worker was killed, perhaps for lack of memory; try --workers 1. "
                "The same command reads what is finished."
            ) from error
    return chapters


def _quiet_chapter(task: Task) -> Chapter:
    """`chapter_of` in a worker, whose tables would mix with those of the others."""
    with contextlib.redirect_stdout(io.StringIO()):
        return chapter_of(task)


def chapter_of(task: Task) -> Chapter:
    """Runs one setting, and compares each of its published numbers with the runs."""
    finding = task.module.run(task.settings)
    rows = finding.rows
    found = [verdicts.verdict(row, rows) for row in rows]
    evidence = [
        verdicts.evidence(row, each, rows)
        for row, each in zip(rows, found, strict=True)
        if each is not None and each.word == verdicts.DIFFERS
    ]
    diverged = any(row.published is not None and not len(row.values) for row in rows)
    if diverged and isinstance(task.settings, diag_nets.Config):
        evidence.append(survival(task.settings))
    return Chapter(task.title, task.command, rows, found, finding.figures, evidence)


def survival(settings: diag_nets.Config) -> str:
    """What SGD does around the step size at which all seeds diverged, as a sentence of evidence."""
    step_size, decay = settings.step_sizes[-1], settings.decay_times[-1]
    shares = (0.9, 0.92, 0.94, 0.96, 0.98)
    near = replace(
        settings,
        exp_name=f"{settings.setting}-survival",
        step_sizes=tuple(round(share * step_size, 4) for share in shares),
        decay_times=(decay,) * len(shares),
        decay_factors=(settings.decay_factors[-1],) * len(shares),
        warmup_gains=(0.0,) * len(shares),
        batch_sizes=(settings.batch_sizes[-1],) * len(shares),
        spectra_records=1,
    )
    found = {(row.schedule, row.name): row for row in diag_nets.run(near).rows}
    parts = []
    for schedule in dict.fromkeys(schedule for schedule, _ in found):
        test, support = found[schedule, "test_loss"], found[schedule, "support"]
        parts.append(
            f"{schedule}: {test.share_diverged:.0%} diverged, of the rest test loss "
            f"{test.show(test.percentile(50))}, ‖u⊙v‖₀ {support.show(support.percentile(50))}"
        )
    return "SGD at smaller step sizes, same decay: " + "; ".join(parts) + "."


if __name__ == "__main__":
    main()
