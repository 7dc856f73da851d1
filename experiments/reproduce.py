"""Compares every toy number that the paper's code printed with our runs.

python -m experiments.reproduce                    # 32 seeds: report.md and report.html
python -m experiments.reproduce --theory           # and the claims of theory, with verdicts
python -m experiments.reproduce --only d2          # one setting, or one chapter of theory
python -m experiments.reproduce --seeds 128 --exp_name more
"""

import contextlib
import importlib.util
import io
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from experiments import (
    diag_implicit_bias,
    diag_nets,
    fc_nets,
    learn_support,
    loss_stabilization,
    loss_surface,
    noise_models,
    shallow_linear,
    without_replacement,
)
from experiments.figures import claims, interactive, report, terminal, verdicts
from experiments.figures.report import Chapter
from experiments.launch import cli, devices, ranges
from experiments.launch.ranges import Count, CountOrNone, Seed, TwoOrMore
from experiments.storage import records, series


@dataclass(frozen=True)
class Config:
    """All toy experiments of the paper: D1-D3, F1, F2, T1, T3."""

    seeds: TwoOrMore = 32
    """Seeds of every setting (two-layer nets, most of which diverge: eight times as many); a
    verdict needs eight that do not diverge."""
    seed: Seed = 0
    """Base seed."""
    spectra_records: Count = 12
    """Number of records with singular values for every seed (one seed has all records)."""
    theory: bool = False
    """Also run the commands that check claims of theory, with their own numbers of seeds."""
    only: tuple[str, ...] = ()
    """Names of settings, or of commands that check theory, to run instead of all."""
    frames: CountOrNone = 40
    """Frames of the animation; 0 for none."""
    workers: CountOrNone = 0
    """Settings to run in parallel, each on one device; 0: one per core on CPUs, else 1."""
    exp_name: str = "toys"
    """Name of the run's folder."""
    runs_dir: str = "runs"
    """Folder that contains the run folders."""


TITLES = {  # in the paper's order
    "d1": "D1 · diagonal nets, SGD",
    "d2": "D2 · diagonal nets, GD and SGD",
    "d3": "D3 · loss surface",
    "1d": "F1 · 1-D regression",
    "1d-overregularized": "F2 · 1-D, over-regularized",
    "two-layer": "T1 · teacher-student, two layers",
    "three-layer": "T3 · teacher-student, three layers",
}

THEORY: dict[str, tuple[Any, str]] = {  # name -> settings of a command that checks claims, title
    "loss_stabilization": (loss_stabilization.Config(), "Loss stabilization in one dimension"),
    "shallow_linear": (shallow_linear.Config(), "Shallow linear nets"),
    "without_replacement": (without_replacement.Config(), "SGD without replacement"),
    "noise_models": (noise_models.SETTINGS["d1"], "Noise models, D1"),
    "noise_models-d2": (noise_models.SETTINGS["d2"], "Noise models, D2"),
    "noise_models-student": (noise_models.SETTINGS["student"], "Noise models, two-layer student"),
    "learn_support": (learn_support.Config(), "Learning the support"),
    "diag_implicit_bias": (diag_implicit_bias.Config(), "Large steps of (S)GD over diagonal nets"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    devices.set_up_toys()
    cli.main(Config, run, argv)


def run(config: Config) -> list[Chapter]:
    """Runs all settings, or loads finished ones, and writes the reports."""
    ranges.check(config)
    folder = records.run_folder(config.runs_dir, "reproduce", config.exp_name)
    start = time.perf_counter()
    todo = tasks(config, str(folder))
    devices.start()
    workers = config.workers or (devices.cores() if jax.default_backend() == "cpu" else 1)
    chapters = in_processes(todo, workers) if workers > 1 else list(map(chapter_of, todo))
    seconds = time.perf_counter() - start
    report.write(folder, config.seeds, chapters, seconds)
    terminal.show(report.score(chapters), f"{folder / 'report.html'} ({seconds:.0f} s)")
    return chapters


def tasks(config: Config, runs_dir: str) -> list[Any]:
    """The configs to run: of the paper's settings in its order, then of the claims of theory."""
    names = config.only or (*TITLES, *(THEORY if config.theory else ()))
    if unknown := [name for name in names if name not in (*TITLES, *THEORY)]:
        known = ", ".join((*TITLES, *THEORY))
        raise ValueError(f"--only is {unknown[0]}; it must be one of {known}.")
    common = {name: getattr(config, name) for name in ("seeds", "seed", "spectra_records")}
    common["runs_dir"] = runs_dir
    settings = {**diag_nets.SETTINGS, **loss_surface.SETTINGS, **fc_nets.SETTINGS}
    of = {"d3": {"frames": config.frames}, "two-layer": {"seeds": 8 * config.seeds}}
    return [
        replace(THEORY[name][0], runs_dir=runs_dir)
        if name in THEORY
        else replace(settings[name], **(common | of.get(name, {})))
        for name in names
    ]


def in_processes(todo: Sequence[Any], workers: int) -> list[Chapter]:
    """The chapters in order, from `workers` parallel processes of one device each.

    Compilation uses a single core, so that two settings take little longer than one.
    """
    chapters: list[Chapter] = []
    spawn = multiprocessing.get_context("spawn")
    # JAX's threads don't survive a fork.
    with ProcessPoolExecutor(workers, spawn, devices.set_up_toys, (1,)) as pool:
        try:
            for chapter in pool.map(_quiet_chapter, todo):
                chapters.append(chapter)
                terminal.show(f"{len(chapters)} of {len(todo)}: {chapter.title}")
        except BrokenProcessPool as error:
            raise OSError(
                "A worker was killed, perhaps for lack of memory; try --workers 1. "
                "Finished settings are not run again."
            ) from error
    return chapters


def _quiet_chapter(settings: Any) -> Chapter:
    """`chapter_of` without output, which would mix with that of other workers."""
    with contextlib.redirect_stdout(io.StringIO()):
        return chapter_of(settings)


def chapter_of(settings: Any) -> Chapter:
    """Runs one setting, and compares its published numbers or its claims with the runs."""
    module = sys.modules[type(settings).__module__]
    finding = module.run(settings)
    command = f"python -m {module.__name__}"
    if isinstance(finding, claims.Finding):
        here = {"runs_dir": settings.runs_dir}
        title = next(title for of, title in THEORY.values() if replace(of, **here) == settings)
        if isinstance(settings, noise_models.Config):
            command += f" --setting {settings.setting}"
        page = page_of(finding.folder, settings.runs_dir)
        return Chapter(title, command, finding.claims, finding.figures, [], page)
    rows = finding.rows
    compared = [(row, verdicts.verdict(row, rows)) for row in rows if row.published is not None]
    evidence = [
        verdicts.evidence(row, found, rows) for row, found in compared if found.word == claims.FAILS
    ]
    # D2's SGD diverges for nearly all seeds at the published step size: report smaller ones.
    unstable = any(row.share_diverged > 0.9 for row, _ in compared)
    if unstable and isinstance(settings, diag_nets.Config):
        evidence.append(survival(settings))
    command += f" --setting {settings.setting} --seeds {settings.seeds}"
    shown = [verdicts.claim(row, found, finding.figures) for row, found in compared]
    page = page_of(finding.folder, settings.runs_dir)
    return Chapter(TITLES[settings.setting], command, shown, finding.figures, evidence, page)


def page_of(folder: Path, start: str) -> str | None:
    """Writes the interactive page of the runs in `folder`; its path from `start`.

    Returns None without bokeh, which writes the page.
    """
    if importlib.util.find_spec("bokeh") is None:
        return None
    page = folder / "runs.html"
    interactive.write(page, series.read([str(folder)]))
    return page.relative_to(start).as_posix()


def survival(settings: diag_nets.Config) -> str:
    """A sentence about SGD at step sizes below the published one, at which nearly all diverge."""
    shares = (0.9, 0.92, 0.94, 0.96, 0.98)
    last = lambda values: (values[-1],) * len(shares)
    near = replace(
        settings,
        exp_name=f"{settings.setting}-survival",
        step_sizes=tuple(round(share * settings.step_sizes[-1], 4) for share in shares),
        decay_times=last(settings.decay_times),
        decay_factors=last(settings.decay_factors),
        warmup_gains=last(settings.warmup_gains),
        batch_sizes=last(settings.batch_sizes),
        spectra_records=1,
    )
    rows = diag_nets.run(near).rows
    supports = [row for row in rows if row.name == "support"]
    parts = [
        f"{test.schedule}: {test.share_diverged:.0%} diverged, of the rest test loss "
        f"{test.show(test.percentile(50))}, ‖u⊙v‖₀ {support.show(support.percentile(50))}"
        for test, support in zip((r for r in rows if r.name == "test_loss"), supports, strict=True)
    ]
    return "SGD at smaller step sizes, same decay: " + "; ".join(parts) + "."


if __name__ == "__main__":
    main()
