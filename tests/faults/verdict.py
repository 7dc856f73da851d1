"""Comparison of runs with faults with the same run without, and a table of the findings."""

import re
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from campaign import Experiment, Life, Run

from experiments.storage import records

COUNTERS = (
    *("lost rows", "duplicate rows", "wrong resumes", "silent fallbacks"),
    *("unclear ends", "leftovers"),
)
STOPPED, INTERRUPTED = 75, 130


class Finding(NamedTuple):
    """A problem, and the fault after which it was found."""

    counter: str
    kind: str
    what: str


def of_run(experiment: Experiment, run: Run, reference: Path) -> list[Finding]:
    """All findings of a run, each at its first occurrence."""
    found: dict[tuple[str, str], Finding] = {}
    wanted = records.read_records(reference)
    for life in run.lives:
        for finding in (
            *of_rows(life, wanted),
            *of_resume(experiment, life),
            *of_end(experiment, life, run.ran_in),
        ):
            found.setdefault((finding.counter, finding.what), finding)
    last = run.lives[-1].after
    return [
        *found.values(),
        *(Finding("wrong resumes", last, what) for what in of_numbers(experiment, run, reference)),
        *(Finding("leftovers", last, path) for path in of_leftovers(run, reference)),
    ]


def of_rows(life: Life, wanted: list[dict[str, Any]]) -> Iterator[Finding]:
    """Records so far equal the reference's, without duplicates, up to the newest saved state."""
    newest = max((int(name) for name in life.left if name.isdigit()), default=-1)
    # This fault removes the record; the next start that gets so far restores it.
    newest = -1 if life.kind == "cut row" or life.from_step is None else newest
    counts = Counter(row["step"] for row in life.rows)
    reached = max([newest, *counts])
    for row in wanted:
        if row["step"] <= reached and not counts[row["step"]]:
            yield Finding("lost rows", life.after, f"step {row['step']} has no row")
    for step, count in counts.items():
        if count > 1:
            yield Finding("duplicate rows", life.after, f"step {step} has {count} rows")
    for row in life.rows:
        if row not in wanted:
            yield Finding("wrong resumes", life.after, f"another row at step {row['step']}: {row}")


def of_resume(experiment: Experiment, life: Life) -> Iterator[Finding]:
    """A start continues from the newest state on disk, or prints why from an older one."""
    says = lambda pattern: any(re.search(pattern, line) for line in life.stderr)
    if experiment.saves == "chunks":
        for name, identity in life.before.items():
            again = life.seen.get(name, identity) != identity
            if again and not says(rf"{re.escape(name)} is damaged.* computed again"):
                yield Finding("silent fallbacks", life.after, f"{name} was computed again")
        return
    steps = sorted(map(int, life.before))
    if life.from_step is None or life.from_step == max(steps, default=0):
        return
    what = f"continued from {life.from_step} with states {steps}"
    if life.from_step not in steps:
        yield Finding("wrong resumes", life.after, what)
    elif not says(rf"step \d+ is damaged.*back to step {life.from_step}\b"):
        yield Finding("silent fallbacks", life.after, what)


def of_end(experiment: Experiment, life: Life, folder: Path) -> Iterator[Finding]:
    """A documented exit code, and one line with the folder and, after a stop, the step."""
    is_signal, last = life.kind.startswith("SIG"), life.stderr[-1] if life.stderr else ""
    if is_signal and life.from_step is None and life.code == -getattr(signal, life.kind):
        return  # Python was still importing, without our signal handlers
    expected = rf"^error: .*{re.escape(str(folder))}"
    if is_signal and life.code == STOPPED:
        step = r" at step \d+ of \d+" if experiment.saves == "checkpoints" else ""
        expected = rf"^{life.kind}: stopped{step}.*{re.escape(str(folder))}.*the same command"
    elif is_signal and life.code == INTERRUPTED:
        expected = "^error: interrupted; run the same command to continue"
    elif not life.kind:  # all states were damaged
        expected += ".*to start from the beginning"
    by_kill = life.kind in ("kill -9", "damaged save", "cut row") and life.code == -signal.SIGKILL
    documented = life.code == 1 and (life.kind in ("disk full", "read-only", ""))
    documented |= is_signal and life.code in (STOPPED, INTERRUPTED)
    right = life.code == 0 or by_kill or (documented and re.search(expected, last))
    # Orbax may print that it waits for a save.
    lines = [line for line in life.stderr if "Waiting for previous save" not in line]
    if not right or len(lines) > 4 or any("Traceback" in line for line in lines):
        what = f"{life.kind or 'no fault'} ({life.detail}), exit code {life.code}: "
        yield Finding("unclear ends", life.kind or life.after, what + " | ".join(lines[-5:]))


def of_numbers(experiment: Experiment, run: Run, reference: Path) -> Iterator[str]:
    """The finished run has the reference's arrays, bit for bit."""
    actual, expected = arrays(experiment, run.folder), arrays(experiment, reference)
    for name in sorted(actual.keys() | expected.keys()):
        same = name in actual and name in expected and actual[name].dtype == expected[name].dtype
        if not same or actual[name].tobytes() != expected[name].tobytes():
            yield f"{name} differs in the end"


def arrays(experiment: Experiment, folder: Path) -> Mapping[str, np.ndarray]:
    """All results of a finished run."""
    if experiment.saves == "chunks":
        return {"results.nc": np.fromfile(folder / "results.nc", np.uint8)}
    import jax
    import orbax.checkpoint as ocp

    place = folder / "checkpoints" / str(experiment.whole) / "default"
    leaves = jax.tree_util.tree_leaves_with_path(ocp.StandardCheckpointer().restore(place))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def of_leftovers(run: Run, reference: Path) -> list[str]:
    """Missing, additional and temporary files; damaged-* folders are documented."""
    actual = files(run.folder)
    scratch = {path for path in actual if re.search(r"(^|/)\.(?!lock$)|-tmp$|^chunks$", path)}
    return sorted((actual ^ files(reference)) | scratch)


def files(folder: Path) -> set[str]:
    """Paths in a run's folder, except inside of states and of damaged-* folders."""
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    names = ("/".join(path.parts[:2]) for path in found)
    return {name for name in names if not re.fullmatch(r"checkpoints/(\d+|damaged-[\d-]+)", name)}


def table(runs: Mapping[str, list[Run]], findings: Mapping[str, list[Finding]]) -> str:
    """Counts of injected faults and of findings by kind of fault, and their sums."""
    rows = Counter()
    for name, of_experiment in runs.items():
        lives = [life for run in of_experiment for life in run.lives]
        rows.update((f"{name}, {life.kind}", "injected") for life in lives if life.kind)
        rows.update((f"{name}, {f.kind or 'no fault'}", f.counter) for f in findings[name])
    columns = ("injected", *COUNTERS)
    kinds = [*sorted({kind for kind, _ in rows}), "sum"]
    for (_, column), count in list(rows.items()):
        rows["sum", column] += count
    lines = [f"{kind:30}" + "".join(f"{rows[kind, c]:17}" for c in columns) for kind in kinds]
    return "\n".join([" " * 30 + "".join(f"{column:>17}" for column in columns), *lines])
