"""The run folder: what was asked, what ran, and what was measured. Imports no JAX.

runs/EXPERIMENT/NAME/config.json      the flags, as values
                     manifest.json    versions, devices, revision, one entry per start
                     metrics.jsonl    a row of scalars per record, flushed as it is written
                     arrays.npz       arrays, if any
                     figures/  checkpoints/

What is read is what was given, or an error that names the file; nothing in a file is executed.
"""

import dataclasses
import logging
import math
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

from experiments.storage import files, values

SHOWN = 10  # settings that differ, in a message
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def open_run(
    runs_dir: str | os.PathLike[str],
    experiment: str,
    name: str,
    config: Any,
    *,
    may_change: Collection[str] = (),
) -> Path:
    """The folder of a run, made if need be, with `config` (a dataclass) in its config.json.

    Raises ValueError where the folder holds another configuration (fields in `may_change` aside),
    and PermissionError where it can't be written: both before anything is computed.
    """
    folder = run_folder(runs_dir, experiment, name)
    asked = dataclasses.asdict(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
        for place in (folder, folder / "chunks", folder / "figures"):
            for left in place.glob(files.SCRATCH):  # by a process that was killed
                left.unlink()
    except OSError as error:
        room = "free some space, or " if error.errno in files.FULL else ""
        told = f"The run folder {folder} can't be written ({error.strerror}); {room}"
        raise PermissionError(f"{told}choose another place with --runs_dir.") from error
    path = folder / "config.json"
    if path.exists():
        changes = _changes(read_json(path), asked, may_change)
        if changes:
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(changes)}); "
                "give this one a name of its own with --exp_name, or remove that folder."
            )
    write_json(path, asked)
    return folder


def run_folder(runs_dir: str | os.PathLike[str], experiment: str, name: str) -> Path:
    """Where a run's folder is or will be; nothing is made, but a place that can't be is refused."""
    if not name or name != Path(name).name or name in (".", ".."):
        raise ValueError(f"The run's name is {name!r}; choose a plain file name (--exp_name).")
    try:
        folder = Path(runs_dir).expanduser().absolute() / experiment / name
    except RuntimeError as error:
        raise ValueError(f"--runs_dir {runs_dir}: {error}") from error
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise PermissionError(
            f"The run folder {folder} can't be written ({above} is not a folder that can); "
            "choose another place with --runs_dir."
        )
    return folder


def _changes(
    before: Mapping[str, Any], asked: Mapping[str, Any], may_change: Collection[str]
) -> list[str]:
    """`seeds 3 -> 4`, one per field that differs."""

    def show(config: Mapping[str, Any], field: str) -> str:
        return values.shown(config[field]) if field in config else "absent"

    def same(field: str) -> bool:
        both = field in before and field in asked
        return both and values.encode(before[field]) == values.encode(asked[field])

    fields = [*asked, *sorted(before.keys() - asked.keys())]
    changed = [field for field in fields if field not in may_change and not same(field)]
    listed = [f"{field[:60]} {show(before, field)} -> {show(asked, field)}" for field in changed]
    more = len(listed) - SHOWN
    return [*listed[:SHOWN], f"{more} more"] if more > 0 else listed


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError names the file where it isn't one."""
    try:
        return values.from_bytes(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); remove it and run again.") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """All or nothing: a reader sees the old file or the new one."""
    files.write_bytes(path, (values.to_text(value, indent=2) + "\n").encode("utf-8"))


def start_manifest(folder: Path, *, seed: int, devices: Collection[str], **more: Any) -> None:
    """Adds this start to manifest.json: versions, devices, seed, revision, command, time."""
    path = folder / "manifest.json"
    starts = _starts(path) if path.exists() else []
    starts.append(
        {
            "started": _now(),
            "command": ["python", "-m", _module(), *sys.argv[1:]],
            "seed": seed,
            "devices": sorted(devices),
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
            "git": git_revision(),
            **more,
        }
    )
    write_json(path, {"starts": starts})


def finish_manifest(folder: Path, **more: Any) -> None:
    """Adds the time and `more` to the last start: without it, that start did not finish."""
    path = folder / "manifest.json"
    starts = _starts(path)
    if not starts:
        raise ValueError(f"{path} holds no start that could finish; remove it and run again.")
    starts[-1] |= {"finished": _now(), **more}
    write_json(path, {"starts": starts})


def is_finished(folder: Path) -> bool:
    """Whether the last start of the run came to its end."""
    path = folder / "manifest.json"
    return path.exists() and any("finished" in start for start in _starts(path)[-1:])


def append_row(folder: Path, row: Mapping[str, Any]) -> None:
    """One line of metrics.jsonl, on disk when this returns; a cut line before it goes."""
    path = folder / "metrics.jsonl"
    line = values.to_text(row) + "\n"
    with files.named(path), path.open("a+b") as file:
        _drop_cut_line(file)
        file.write(line.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All whole rows of metrics.jsonl; a last line that a kill cut short is left out."""
    return [row for _, row in _whole_lines(folder)]


class Written(NamedTuple):
    """How many rows metrics.jsonl has, and the newest as it stands there."""

    rows: int
    newest: str


def written(folder: Path) -> Written:
    """The rows of now; a last line that a kill cut short is left out."""
    lines = [line for line, _ in _whole_lines(folder)]
    return Written(len(lines), lines[-1].decode("utf-8") if lines else "")


def put_back(folder: Path, known: Written) -> None:
    """Appends the newest row where metrics.jsonl has lost it since it was `known`; the log says so.

    Raises ValueError where more is lost.
    """
    lost = known.rows - written(folder).rows
    if lost > 1:
        raise ValueError(
            f"{folder} has lost {lost} rows of its metrics.jsonl; remove that folder and run again."
        )
    if lost == 1:
        row = values.from_bytes(known.newest.encode("utf-8"))
        append_row(folder, row)
        told = "%s had lost the row of step %s; it is back, from the saved state."
        logging.getLogger(__name__).warning(told, folder / "metrics.jsonl", row.get("step"))


def drop_rows_after(folder: Path, step: int) -> None:
    """Keeps the rows with `row["step"] <= step`: a resumed run writes the others anew."""
    path = folder / "metrics.jsonl"
    if path.exists():
        kept = [line for line, row in _whole_lines(folder) if _step(path, row) <= step]
        files.write_bytes(path, b"".join(kept))


def git_revision() -> str | None:
    """The commit of the code that runs, `+` behind it where files differ; None outside git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _starts(path: Path) -> list[dict[str, Any]]:
    starts = read_json(path).get("starts")
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise ValueError(f"{path} lists no starts of a run; remove it and run again.")
    return starts


def _whole_lines(folder: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    *lines, _ = path.read_bytes().split(b"\n")  # behind the last end of line: nothing, or a cut row
    for number, line in enumerate(lines, 1):
        try:
            row = values.from_bytes(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: not a row of metrics ({error}); remove that line."
            ) from error
        yield line + b"\n", row


def _step(path: Path, row: Mapping[str, Any]) -> float:
    step = row.get("step")
    if not values.is_number(step) or not math.isfinite(step):
        told = f"holds a row without its step ({values.shown(row)})"
        raise ValueError(f"{path} {told}; remove that line.")
    return step


def _drop_cut_line(file: IO[bytes]) -> None:
    """Ends `file` behind its last whole line, where a kill cut the one that followed."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read() != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _module() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name if spec else "experiments"
