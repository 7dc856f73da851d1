"""What a run may not have suffered, against the same run undisturbed; and the table of it."""

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
ASKED = {name: getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1")}
STOPPED, INTERRUPTED = 75, 130
CURES = {
    "disk full": "free some space and run again",
    "read-only": "choose another place",
}
UNREADABLE = "remove that folder to start from the beginning|move the damaged step's folder"


class Finding(NamedTuple):
    """One thing that is wrong, and the fault it was seen after."""

    counter: str
    kind: str
    what: str


def of_run(experiment: Experiment, run: Run, reference: Path) -> list[Finding]:
    """All findings about a run, each where it was first seen."""
    found: dict[tuple[str, str], Finding] = {}
    wanted = records.read_rows(reference)
    for number, life in enumerate(run.lives):
        for finding in (
            *of_rows(life, wanted),
            *of_resume(experiment, life),
            *of_end(experiment, life, run.ran_in, number),
        ):
            found.setdefault((finding.counter, finding.what), finding)
    for finding in (*of_numbers(experiment, run, reference), *of_leftovers(run, reference)):
        found.setdefault((finding.counter, finding.what), finding)
    return list(found.values())


def of_rows(life: Life, wanted: list[dict[str, Any]]) -> Iterator[Finding]:
    """Rows so far: the reference's, one each, up to the newest saved state at least."""
    if isinstance(life.rows, str):
        yield Finding("wrong resumes", life.after, life.rows)
        return
    newest = max((int(name) for name in life.left if name.isdigit()), default=-1)
    # The row is what this fault took; the next start that gets so far puts it back.
    newest = -1 if life.kind == "cut row" or life.from_step is None else newest
    counts = Counter(row["step"] for row in life.rows)
    reached = max([newest, *counts])
    for row in wanted:
        if row["step"] <= reached and not counts[row["step"]]:
            yield Finding("lost rows", life.after, f"step {row['step']} has no row")
    for step, count in counts.items():
        if count > 1:
            yield Finding("duplicate rows", life.after, f"step {step} has {count} rows")
    right = {row["step"]: row for row in wanted}
    for row in life.rows:
        if right.get(row["step"]) != row:
            yield Finding("wrong resumes", life.after, f"another row at step {row['step']}: {row}")


def of_resume(experiment: Experiment, life: Life) -> Iterator[Finding]:
    """A start goes on from the newest state on disk, or says why from an older one."""
    if experiment.saves == "chunks":
        for name, identity in life.before.items():
            again = life.seen.get(name, identity) != identity
            if again and not told(life, rf"{re.escape(name)} is damaged.* computed again"):
                yield Finding("silent fallbacks", life.after, f"{name} was computed again")
        return
    steps = sorted(map(int, life.before))
    if life.from_step is None or life.from_step == max(steps, default=0):
        return
    what = f"went on from {life.from_step} with states {steps}"
    if life.from_step not in (*steps, 0) or (steps and life.from_step == 0):
        yield Finding("wrong resumes", life.after, what)
    elif not told(life, rf"state of step \d+ is damaged .*back to step {life.from_step}\b"):
        yield Finding("silent fallbacks", life.after, what)


def told(life: Life, pattern: str) -> bool:
    """Whether a line of stderr says it."""
    return any(re.search(pattern, line) for line in life.said)


def of_end(experiment: Experiment, life: Life, folder: Path, number: int) -> Iterator[Finding]:
    """A documented exit code, and one line with the folder, the step of deep runs, and the cure."""
    last = life.said[-1] if life.said else ""
    show = f"life {number} ({life.kind or 'left alone'}, {life.detail}), {life.code}: "
    complain = lambda words: Finding("unclear ends", life.kind or life.after, show + words)
    # Before it began, a signal does to it what it does to any Python program.
    unbegun = life.kind in ASKED and not life.touched
    if not unbegun:
        yield from map(complain, noise(life))
    if life.code is None:
        yield complain("it hung")
        return
    if life.code == 0 or unbegun or (life.code == -signal.SIGKILL and is_kill(life.kind)):
        return
    training = life.before and str(experiment.whole) not in life.left
    step = r"\bstep \d+" if experiment.saves == "checkpoints" and training else "error"
    place = re.escape(str(folder))
    if life.kind in ASKED and life.code == STOPPED:
        of = r"step \d+ of \d+.*" if experiment.saves == "checkpoints" else ""
        right = re.search(rf"^{life.kind}: stopped.*{of}{place}.*the same command goes on", last)
    elif life.kind in ASKED and life.code == INTERRUPTED:
        right = last.startswith("error: interrupted; the same command goes on")
    elif life.code == 1 and life.kind in CURES:
        parts = [place, f"({CURES[life.kind]})", step]
        right = last.startswith("error: ") and all(re.search(part, last) for part in parts)
    elif life.code == 1 and not life.kind:
        right = re.search(rf"^error: .*{place}.*({UNREADABLE})", last)
    else:
        right = False
    if not right:
        yield complain(last)


def noise(life: Life) -> Iterator[str]:
    """What is on stderr beside the lines that are for the reader, however it ended."""
    if any("Traceback" in line for line in life.said):
        yield "a traceback: " + " | ".join(life.said[-3:])
    if len([line for line in life.said if "Waiting for previous save" not in line]) > 4:
        yield f"{len(life.said)} lines, among them " + " | ".join(life.said[:3])


def is_kill(kind: str) -> bool:
    """Whether the fault itself ends the process."""
    return kind in ("kill -9", "damaged save", "cut row")


def of_numbers(experiment: Experiment, run: Run, reference: Path) -> Iterator[Finding]:
    """The finished run has the reference's arrays, bit for bit."""
    kind = run.lives[-1].after
    try:
        ours, theirs = arrays(experiment, run.folder), arrays(experiment, reference)
    except Exception as error:
        yield Finding("wrong resumes", kind, f"the last state can't be read: {error}")
        return
    for name in sorted(ours.keys() | theirs.keys()):
        same = name in ours and name in theirs and ours[name].dtype == theirs[name].dtype
        if not same or ours[name].tobytes() != theirs[name].tobytes():
            yield Finding("wrong resumes", kind, f"{name} differs in the end")


def arrays(experiment: Experiment, folder: Path) -> Mapping[str, np.ndarray]:
    """All numbers that a finished run leaves."""
    if experiment.saves == "chunks":
        return {"results.nc": np.fromfile(folder / "results.nc", np.uint8)}
    import jax
    import orbax.checkpoint as ocp

    place = folder / "checkpoints" / str(experiment.whole) / "default"
    state = ocp.StandardCheckpointer().restore(place)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def of_leftovers(run: Run, reference: Path) -> Iterator[Finding]:
    """A finished run has the reference's files, no scratch, and what damaged-* folders document."""
    ours = files(run.folder)
    scratch = {path for path in ours if re.search(r"(^|/)\.(?!lock$)|-tmp$|^chunks$", path)}
    for path in sorted((ours ^ files(reference)) | scratch):
        yield Finding("leftovers", run.lives[-1].after, path)


def files(folder: Path) -> set[str]:
    """Paths in a run's folder, but for the insides of states and what was moved aside."""
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    names = ("/".join(path.parts[:2]) for path in found)
    return {name for name in names if not re.fullmatch(r"checkpoints/(\d+|damaged-[\d-]+)", name)}


def table(runs: Mapping[str, list[Run]], findings: Mapping[str, list[Finding]]) -> dict[str, Any]:
    """Experiment -> kind of fault -> how often it was injected, and what was found after it."""
    out: dict[str, Any] = {}
    for name, of_experiment in runs.items():
        lives = [life for run in of_experiment for life in run.lives]
        injected = Counter(life.kind for life in lives if life.kind)
        restarts = Counter(life.after for life in lives if life.after)
        counts = Counter((finding.counter, finding.kind) for finding in findings[name])
        kinds = sorted(injected | {finding.kind: 1 for finding in findings[name]})
        out[name] = {
            kind: {"injected": injected[kind], "restarts": restarts[kind]}
            | {counter: counts[counter, kind] for counter in COUNTERS}
            for kind in kinds
        }
    return out


def printed(table: Mapping[str, Any], not_run: Mapping[str, Mapping[str, int]]) -> str:
    """The table as text, with a sum, and the faults that this machine does not permit."""
    columns = ("injected", "restarts", *COUNTERS)
    head = f"{'':30}" + "".join(f"{column:>17}" for column in columns)
    lines, total = [head], Counter()
    for name, kinds in table.items():
        for kind, row in kinds.items():
            total.update(row)
            cells = "".join(f"{row[column]:>17}" for column in columns)
            lines.append(f"{name + ', ' + (kind or 'no fault'):30}" + cells)
    lines.append(f"{'sum':30}" + "".join(f"{total[column]:>17}" for column in columns))
    for name, kinds in not_run.items():
        for kind, count in kinds.items():
            lines.append(f"not run: {count} x {kind} in {name}; this user may not mount")
    return "\n".join(lines)
