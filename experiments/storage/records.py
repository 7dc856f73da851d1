"""The run folder: settings, provenance and metrics, as standard JSON. Imports no JAX.

runs/EXPERIMENT/NAME/config.json      the flags
                     manifest.json    versions, devices, revision, one entry per start
                     metrics.jsonl    a line of scalars per evaluation, flushed as it is written
                     results.nc       arrays of a toy run (see `arrays`)
                     figures/  checkpoints/  chunks/
"""

import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.storage import files

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
    """Creates the folder of a run if need be, with `config` (a dataclass) in its config.json.

    Raises ValueError if it holds a run with other settings, those in `may_change` excepted. Removes
    what a killed process left unfinished: temporary files, and half a line of metrics.jsonl.
    """
    folder = run_folder(runs_dir, experiment, name)
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, folder / "chunks", folder / "figures"):
        for unfinished in place.glob(files.TEMPORARY):
            unfinished.unlink()
    metrics = folder / "metrics.jsonl"
    if metrics.exists() and not metrics.read_bytes().endswith(b"\n"):
        drop_rows_after(folder, math.inf)
    path = folder / "config.json"
    requested = json.loads(_to_json(dataclasses.asdict(config)))
    found = read_json(path) if path.exists() else requested
    changed = [
        f"{field} {_shown(found, field)} -> {_shown(requested, field)}"
        for field in (requested | found)
        if field not in may_change and found.get(field, ...) != requested.get(field, ...)
    ]
    if changed:
        more = [f"{len(changed) - SHOWN} more"] if len(changed) > SHOWN else []
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(changed[:SHOWN] + more)}); "
            "give this one a name of its own with --exp_name, or remove that folder."
        )
    write_json(path, requested)
    return folder


def run_folder(runs_dir: str | os.PathLike[str], experiment: str, name: str) -> Path:
    """The absolute path of a run's folder, which may not exist; ValueError where it can't."""
    if "://" in str(runs_dir):
        raise ValueError(
            f"--runs_dir {runs_dir} is a URL, and runs are written to folders; give a folder, such "
            "as one where that bucket is mounted."
        )
    if name in ("", ".", "..") or name != Path(name).name or len(os.fsencode(name)) > 255:
        raise ValueError(
            f"The run's name is {name[:255]!r}; choose a file name of up to 255 bytes (--exp_name)."
        )
    try:
        return Path(runs_dir).expanduser().absolute() / experiment / name
    except RuntimeError as error:
        raise ValueError(f"--runs_dir {runs_dir}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ValueError names the file where it isn't one."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); remove it and run again.") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    files.write_bytes(path, f"{_to_json(value, indent=2)}\n".encode())


def start_manifest(folder: Path, *, seed: int, devices: Collection[str], **more: Any) -> None:
    """Adds a start to manifest.json: time, command, seed, devices, versions, revision, `more`."""
    start = {
        "started": _now(),
        "command": sys.orig_argv,
        "seed": seed,
        "devices": sorted(devices),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "git": git_revision(),
        **more,
    }
    write_json(folder / "manifest.json", {"starts": [*_starts(folder), start]})


def finish_manifest(folder: Path, **more: Any) -> None:
    """Adds the time and `more` to the last start: the run is finished."""
    *before, last = _starts(folder)
    write_json(folder / "manifest.json", {"starts": [*before, last | {"finished": _now()} | more]})


def is_finished(folder: Path) -> bool:
    """Whether the last start of the run reached its end."""
    return any("finished" in start for start in _starts(folder)[-1:])


def append_row(folder: Path, row: Mapping[str, Any]) -> None:
    """Adds a line to metrics.jsonl, on disk when this returns."""
    path = folder / "metrics.jsonl"
    with files.named(path), path.open("ab") as file:
        file.write(f"{_to_json(row)}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl; one that a kill cut short at the end is left out."""
    return [row for _, row in _whole_lines(folder)]


def drop_rows_after(folder: Path, step: float) -> None:
    """Removes the lines with row["step"] > step, and a torn one: a resumed run writes them anew."""
    path = folder / "metrics.jsonl"
    if path.exists():
        before = [line for line, row in _whole_lines(folder) if row["step"] <= step]
        files.write_bytes(path, b"".join(before))


def git_revision() -> str | None:
    """The commit of this code, with a `+` if files differ from it; None outside git."""

    def git(*arguments: str) -> str:
        command, here = ["git", *arguments], Path(__file__).parent
        return subprocess.check_output(
            command, cwd=here, stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return None


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON with Python's NaN and Infinity; arrays as lists, paths as strings."""
    plain = lambda value: value.tolist() if hasattr(value, "tolist") else os.fspath(value)
    return json.dumps(value, indent=indent, default=plain)


def _shown(config: Mapping[str, Any], field: str) -> str:
    return json.dumps(config[field])[:60] if field in config else "absent"


def _starts(folder: Path) -> list[dict[str, Any]]:
    path = folder / "manifest.json"
    return read_json(path)["starts"] if path.exists() else []


def _whole_lines(folder: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            yield line + b"\n", dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no JSON ({error}); remove it.") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
