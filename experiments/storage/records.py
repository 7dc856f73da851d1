"""The run folder: settings, provenance and metrics, as JSON. Imports no JAX.

runs/EXPERIMENT/NAME/config.json      the flags
                     manifest.json    one entry per start: versions, devices, git revision
                     metrics.jsonl    one record of scalars per evaluation
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
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.storage import files

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def run_folder(runs_dir: str | os.PathLike[str], experiment: str, name: str) -> Path:
    """The absolute path of a run's folder, which may not exist; ValueError for an invalid name."""
    if "://" in str(runs_dir):
        raise ValueError(f"--runs_dir is {runs_dir}, a URL; give a folder, such as a mounted one.")
    if name in ("", ".", "..") or name != Path(name).name or len(os.fsencode(name)) > 255:
        raise ValueError(
            f"The run's name is {name[:255]!r}; choose a file name of up to 255 bytes (--exp_name)."
        )
    return Path(os.path.expanduser(runs_dir)).absolute() / experiment / name


def open_run(folder: Path, config: Any, *, may_change: Collection[str] = ()) -> None:
    """`check_run`, then `write_settings`."""
    check_run(folder, config, may_change=may_change)
    write_settings(folder, config)


def check_run(folder: Path, config: Any, *, may_change: Collection[str] = ()) -> None:
    """Compares `config`, a dataclass, with config.json in the folder, which is created if missing.

    Removes temporary files and a torn last line of metrics.jsonl, left by a killed process. Raises
    ValueError if the folder has a run with other settings, except those in `may_change`. A flag
    that config.json doesn't have, because an earlier version wrote it, had its default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, folder / "chunks", folder / "figures"):
        for unfinished in place.glob(files.TEMPORARY):
            unfinished.unlink()
    drop_records_after(folder, math.inf)  # rewrites the file only if its last line is torn
    path = folder / "config.json"
    requested = _flags(config)
    found = _defaults(config) | read_json(path) if path.exists() else requested
    shown = lambda flags, name: json.dumps(flags[name])[:60] if name in flags else "absent"
    changed = [
        f"{name} {shown(found, name)} -> {shown(requested, name)}"
        for name in (requested | found)
        if name not in may_change and found.get(name, ...) != requested.get(name, ...)
    ]
    if changed:
        raise ValueError(
            f"{folder} has a run with other settings ({', '.join(changed)}); choose another "
            "--exp_name, or remove that folder."
        )


def write_settings(folder: Path, config: Any) -> None:
    """Writes `config`, a dataclass, to config.json."""
    write_json(folder / "config.json", dataclasses.asdict(config))


def read_json(path: Path) -> Any:
    """Reads a JSON object or array; ValueError, naming the file, if it is not valid JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); remove it and run again.") from error


def write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes a JSON object or array atomically."""
    files.write_bytes(path, f"{_to_json(value, indent=2)}\n".encode())


def start_manifest(folder: Path, *, seed: int, devices: Collection[str], **more: Any) -> None:
    """Adds a start to manifest.json: time, command, seed, devices, versions, git, `more`."""
    start = {
        "started": _now(),
        "command": sys.orig_argv,
        "seed": seed,
        "devices": sorted(devices),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "git": git_revision(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **more,
    }
    write_json(folder / "manifest.json", {"starts": [*read_starts(folder), start]})


def finish_manifest(folder: Path, **more: Any) -> None:
    """Marks the last start as finished, with the time and `more`."""
    *before, last = read_starts(folder)
    write_json(folder / "manifest.json", {"starts": [*before, last | {"finished": _now()} | more]})


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts in manifest.json, oldest first."""
    path = folder / "manifest.json"
    return read_json(path)["starts"] if path.exists() else []


def is_finished(folder: Path) -> bool:
    """Whether the last start of the run reached its end."""
    return any("finished" in start for start in read_starts(folder)[-1:])


def append_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Appends a record to metrics.jsonl and flushes it to disk."""
    path = folder / "metrics.jsonl"
    with files.named(path), path.open("ab") as file:
        file.write(f"{_to_json(record)}\n".encode())
        file.flush()
        os.fsync(file.fileno())  # before the checkpoint that follows


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records in metrics.jsonl, without a torn last one."""
    return [record for _, record in _whole_lines(folder)]


def drop_records_after(folder: Path, step: float) -> None:
    """Removes records with record["step"] > step, and a torn one; a resumed run rewrites them."""
    path = folder / "metrics.jsonl"
    before = b"".join(line for line, record in _whole_lines(folder) if record["step"] <= step)
    if path.exists() and before != path.read_bytes():
        files.write_bytes(path, before)


def git_revision() -> str | None:
    """The commit of this code, with a `+` if tracked files are modified; None outside git."""
    # Untracked files are ignored: runs and data are in the working tree.
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):  # there is no git
        return None
    return found.stdout.strip() or None


def _flags(config: Any) -> dict[str, Any]:
    return json.loads(_to_json(dataclasses.asdict(config)))  # tuples become lists


def _defaults(config: Any) -> dict[str, Any]:
    default = {field.name: field.default for field in dataclasses.fields(config)}
    known = {name: value for name, value in default.items() if value is not dataclasses.MISSING}
    return _flags(dataclasses.replace(config, **known))


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON with Python's NaN and Infinity; arrays as lists, paths as strings."""
    plain = lambda value: value.tolist() if hasattr(value, "tolist") else os.fspath(value)
    return json.dumps(value, indent=indent, default=plain)


def _whole_lines(folder: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            yield line + b"\n", json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); remove it.") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
