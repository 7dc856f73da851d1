"""Repeats a command after each fault until its run is finished, over as many runs as necessary."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from faults import KINDS, Victim, finished

from experiments.storage import records

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds after which a process counts as hung
MANY = 40  # starts of one run: more mean no progress
EARLY = 0.1  # share of faults during start-up
LATE = 0.1  # share of faults after the computation, while figures are drawn


@dataclass(frozen=True)
class Experiment:
    """A command, and where its run stores finished states or chunks."""

    name: str
    flags: tuple[str, ...]
    saves: str  # checkpoints or chunks
    whole: int  # progress of the finished run: its last step, or the number of its chunks
    kinds: Mapping[str, int]  # kind of fault -> how many

    def folder(self, runs_dir: Path) -> Path:
        """Folder of the only run in `runs_dir`; a missing folder if there is no run."""
        above = runs_dir / self.name
        return next(iter(above.iterdir()), above) if above.is_dir() else above / "none"

    def progress(self, folder: Path) -> float:
        """The finished share."""
        saves = folder / self.saves
        names = [path.name for path in saves.iterdir()] if saves.is_dir() else []
        steps = [int(name) for name in names if name.isdigit()]
        return max(steps, default=sum(name.endswith(".npz") for name in names)) / self.whole


class Life(NamedTuple):
    """One start of a command, with the files before and after."""

    after: str  # the previous fault, "" for a first start
    kind: str  # the fault that ended it, "" for none
    detail: str | None
    before: dict[str, tuple[int, int]]  # finished states or chunks, oldest first: inode and time
    seen: dict[str, tuple[int, int]]  # as last seen: a finished run removes its chunks
    left: dict[str, tuple[int, int]]
    rows: list[dict[str, Any]]
    from_step: int | None  # None if it ended before its entry in the manifest
    code: int | None  # None: it hung
    stderr: list[str]  # lines of stderr


class Run(NamedTuple):
    """A finished run, with all its starts, and its former and current folder."""

    ran_in: Path
    folder: Path
    lives: list[Life]


class Campaign:
    """All faults of an experiment, at random times, over as many runs as necessary.

    `disk` contains a run until it is finished, `place` finished runs and all logs.
    """

    def __init__(self, experiment: Experiment, place: Path, disk: Path, seed: str):
        self.experiment, self.place, self.disk = experiment, place, disk
        self.rng = random.Random(f"{seed} {experiment.name}")
        self.todo: list[str] = []
        self.seen: dict[str, tuple[int, int]] = {}
        self.starting = self.working = 0.0  # seconds of a run without faults

    def undisturbed(self) -> Path:
        """The reference run without faults; run twice, since the first compiles, and timed."""
        for count in range(2):
            runs_dir = self.place / f"{self.experiment.name}-reference-{count}"
            began = time.monotonic()
            log = runs_dir.with_suffix(".log")
            process = self._start(runs_dir, log)
            self._wait(process, runs_dir, lambda: self._starts(runs_dir))  # noqa: B023
            noted = time.monotonic()
            assert process.wait(300) == 0, log.read_text()
            self.starting, self.working = noted - began, time.monotonic() - noted
        return self.experiment.folder(runs_dir)

    def disturbed(self, can: Collection[str]) -> list[Run]:
        """The finished runs over which all faults of the kinds `can` were spread."""
        kinds = Counter(self.experiment.kinds).elements()
        self.todo = [kind for kind in kinds if kind in can]
        self.rng.shuffle(self.todo)
        runs: list[Run] = []
        while self.todo:
            name, lives = f"{self.experiment.name}-{len(runs)}", list[Life]()
            runs_dir = self.disk / name
            # Chunks that could not be removed, and figures that could not be drawn, which is a
            # warning, are left to the next start.
            unwritable = ("read-only", "disk full")
            while not lives or lives[-1].code != 0 or lives[-1].kind in unwritable:
                assert len(lives) < MANY, f"{name} comes to no end"
                log = self.place / f"{name}-{len(lives)}.log"
                lives.append(self._life(runs_dir, log, lives[-1].kind if lives else ""))
                if lives[-1].stderr and "to start from the beginning" in lives[-1].stderr[-1]:
                    shutil.rmtree(self.experiment.folder(runs_dir) / self.experiment.saves)
            ran_in = self.experiment.folder(runs_dir)
            shutil.move(ran_in, self.place / name)  # the small disk has space for one run
            runs.append(Run(ran_in, self.place / name, lives))
        return runs

    def _start(self, runs_dir: Path, log: Path) -> subprocess.Popen:
        """Starts the command on one CPU device."""
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.place / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", f"experiments.{self.experiment.name}"]
        command += [*self.experiment.flags, f"--runs_dir={runs_dir}"]
        with log.open("w") as errors:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors
            )

    def _life(self, runs_dir: Path, log: Path, after: str) -> Life:
        """One start, up to the next fault if one is left and the run lasts so long."""
        folder = self.experiment.folder(runs_dir)
        before = finished(folder / self.experiment.saves)
        noted, self.seen = len(self._starts(runs_dir)), {}
        process = self._start(runs_dir, log)
        moment = self.todo and self._lasts_to_a_moment(process, runs_dir, noted)
        kind = self.todo.pop() if moment else ""
        folder = self.experiment.folder(runs_dir)
        saves = folder / self.experiment.saves
        with KINDS[kind](Victim(process, folder, saves, self.disk), self.rng) as detail:
            self._wait(process, runs_dir)
            code = process.poll()
            if code is None:  # it hangs
                process.kill()
                process.wait()
            left, rows = finished(saves), records.read_records(folder)
        if detail is None:
            self.todo.insert(0, kind)
            kind = "kill -9"
        mine = self._starts(runs_dir)[noted:]
        from_step = mine[0].get("from_step", 0) if mine else None
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        return Life(after, kind, detail, before, self.seen, left, rows, from_step, code, lines)

    def _lasts_to_a_moment(self, process: subprocess.Popen, runs_dir: Path, noted: int) -> bool:
        """Waits for a random moment of start-up or work; returns whether the process still runs.

        Moments of the work are defined by the share that is saved, since times vary between starts.
        """
        share, goal, rest = self.rng.random(), self.rng.random() ** 2, self.rng.random()
        progress = lambda: self.experiment.progress(self.experiment.folder(runs_dir))
        if share < EARLY:
            seconds = rest * self.starting
        else:
            self._wait(process, runs_dir, lambda: len(self._starts(runs_dir)) > noted)
            done = progress()
            goal = 1.0 if share < EARLY + LATE else done + goal * (1 - done)
            self._wait(process, runs_dir, lambda: progress() >= goal)
            seconds = rest * self.working * max(LATE, 1 / self.experiment.whole)
        moment = time.monotonic() + seconds
        self._wait(process, runs_dir, lambda: time.monotonic() >= moment)
        return process.poll() is None

    def _wait(
        self,
        process: subprocess.Popen,
        runs_dir: Path,
        condition: Callable[[], object] = lambda: False,
    ) -> None:
        """Waits until the condition holds, or the process has ended or hangs."""
        patience = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < patience and not condition():
            self.seen |= finished(self.experiment.folder(runs_dir) / self.experiment.saves)
            time.sleep(0.01)

    def _starts(self, runs_dir: Path) -> list[dict[str, Any]]:
        """The starts in the manifest so far."""
        return records.read_starts(self.experiment.folder(runs_dir))
