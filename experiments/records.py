"""The run folder: what was asked, what ran, and what was measured. Imports no JAX.

runs/EXPERIMENT/NAME/config.json      the flags, as values
                     manifest.json    versions, devices, revision, one entry per start
                     metrics.jsonl    a row of scalars per record, flushed as it is written
                     arrays.npz       arrays, if any
                     figures/  checkpoints/
"""

import dataclasses
import json
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
from typing import Any

import numpy as np

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
    if not name or name != Path(name).name or name in (".", ".."):
        raise ValueError(f"The run's name is {name!r}; choose a plain file name (--exp_name).")
    folder = Path(runs_dir).expanduser().absolute() / experiment / name
    asked = _encode(dataclasses.asdict(config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PermissionError(
            f"The run folder {folder} can't be written ({error.strerror}); "
            "choose another place with --runs_dir."
        ) from error
    path = folder / "config.json"
    if path.exists():
        before = _encode(read_json(path))
        changed = sorted(
            field
            for field in before.keys() | asked.keys()
            if before.get(field) != asked.get(field) and field not in may_change
        )
        if changed:
            differences = ", ".join(
                f"{field} {before.get(field)!r} -> {asked.get(field)!r}" for field in changed
            )
            raise ValueError(
                f"{folder} holds a run with other settings ({differences}); "
                "give this one a name of its own with --exp_name, or remove that folder."
            )
    write_json(path, asked)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError names the file where it isn't one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); remove it and run again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; remove it and run again.")
    return {key: _decode(item) for key, item in value.items()}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """All or nothing: a reader sees the old file or the new one."""
    text = json.dumps(_encode(value), indent=2, allow_nan=False) + "\n"
    _replace(path, text.encode("utf-8"))


def start_manifest(folder: Path, *, seed: int, devices: Collection[str], **more: Any) -> None:
    """Adds this start to manifest.json: versions, devices, seed, revision, command, time."""
    path = folder / "manifest.json"
    manifest = read_json(path) if path.exists() else {"starts": []}
    manifest["starts"].append(
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
    write_json(path, manifest)


def finish_manifest(folder: Path, **more: Any) -> None:
    """Adds the time and `more` to the last start: without it, that start did not finish."""
    manifest = read_json(folder / "manifest.json")
    manifest["starts"][-1] |= {"finished": _now(), **more}
    write_json(folder / "manifest.json", manifest)


def is_finished(folder: Path) -> bool:
    """Whether the last start of the run came to its end."""
    path = folder / "manifest.json"
    return path.exists() and "finished" in read_json(path)["starts"][-1]


def append_row(folder: Path, row: Mapping[str, Any]) -> None:
    """One line of metrics.jsonl, on disk when this returns."""
    line = json.dumps(_encode(dict(row)), allow_nan=False) + "\n"
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(line.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All whole rows of metrics.jsonl; a last line that a kill cut short is left out."""
    return [row for _, row in _whole_lines(folder)]


def drop_rows_after(folder: Path, step: int) -> None:
    """Keeps the rows with `row["step"] <= step`: a resumed run writes the others anew."""
    path = folder / "metrics.jsonl"
    if path.exists():
        kept = [line for line, row in _whole_lines(folder) if row["step"] <= step]
        _replace(path, b"".join(kept))


def save_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """arrays.npz, all or nothing."""
    path = folder / "arrays.npz"
    scratch = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with scratch.open("wb") as file:
            np.savez_compressed(file, **dict(arrays))
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def load_arrays(folder: Path) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote. Nothing in the file is executed."""
    path = folder / "arrays.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} can't be read ({error}); remove it and run again.") from error


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


def _whole_lines(folder: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            return  # a kill came in the middle of the last row
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except (UnicodeDecodeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: not a row of metrics ({error}); remove that line."
            ) from error
        yield line, {key: _decode(item) for key, item in row.items()}


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


# JSON has no NaN and no infinities; they travel as these words.
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, np.generic | np.ndarray) or hasattr(value, "__array__"):
        return _encode(np.asarray(value).tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any) -> Any:
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


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
