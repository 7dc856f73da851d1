"""Kinds of faults, each injected into a running process and undone after its end."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1
from typing import NamedTuple


class Victim(NamedTuple):
    """A running process, its run folder, the folder of finished states or chunks, and its disk."""

    process: subprocess.Popen
    folder: Path
    saves: Path  # checkpoints/ or chunks/
    disk: Path


# A description; None if there was nothing to damage, and the process was only killed.
Fault = Callable[[Victim, random.Random], contextlib.AbstractContextManager[str | None]]


@contextlib.contextmanager
def mounted(folder: Path, mebibytes: int) -> Iterator[bool]:
    """Mounts a small disk at `folder`; yields whether this user may do so."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    done = _succeeds(command)
    try:
        yield done
    finally:
        if done:
            _succeeds(["umount", "-l", str(folder)])


def may_bind(scratch: Path) -> bool:
    """Whether this user can make a folder read-only."""
    scratch.mkdir()
    with _read_only(scratch):
        try:
            (scratch / "probe").touch()
        except OSError:
            return True
    return False


@contextlib.contextmanager
def signalled(number: signal.Signals, victim: Victim, rng: random.Random) -> Iterator[str]:
    victim.process.send_signal(number)
    yield ""


@contextlib.contextmanager
def disk_full(victim: Victim, rng: random.Random) -> Iterator[str]:
    """Fills the disk, completely or except for a small rest."""
    assert victim.disk.is_mount()  # a small disk
    ballast = victim.disk / "ballast"
    left = rng.choice([0, 0, 2**12, 2**16, 2**18, 2**20])
    try:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(victim.disk).free - left))
            while not left:  # space that the run has freed meanwhile
                file.seek(0, os.SEEK_END)
                file.write(bytes(2**12))
        yield f"{left} bytes left"
    finally:
        ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def read_only(victim: Victim, rng: random.Random) -> Iterator[str]:
    """Makes the folder of saves read-only."""
    place = next(path for path in (victim.saves, victim.folder, victim.disk) if path.is_dir())
    with _read_only(place):
        yield place.name


@contextlib.contextmanager
def damaged_save(victim: Victim, rng: random.Random) -> Iterator[str | None]:
    """kill -9, and damage to some files of the newest state or chunk."""
    victim.process.kill()
    names = list(finished(victim.saves)) if victim.process.wait() else []
    if not names:
        yield None
        return
    newest = victim.saves / names[-1]
    files = [newest] if newest.is_file() else [p for p in newest.rglob("*") if p.is_file()]
    files = [path for path in sorted(files) if path.stat().st_size]
    chosen = rng.sample(files, rng.randint(1, min(3, len(files))))
    for path in chosen:
        _damage(path, rng)
    yield ", ".join(str(path.relative_to(victim.saves)) for path in chosen)


@contextlib.contextmanager
def cut_row(victim: Victim, rng: random.Random) -> Iterator[str | None]:
    """kill -9, and a torn last line of metrics.jsonl."""
    path = victim.folder / "metrics.jsonl"
    victim.process.kill()
    content = path.read_bytes() if victim.process.wait() and path.exists() else b""
    if not content:
        yield None
        return
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    keep = rng.randrange(last, len(content))
    path.write_bytes(content[:keep])
    yield f"{keep - last} of {len(content) - last} bytes kept"


def finished(saves: Path) -> dict[str, tuple[int, int]]:
    """Finished states or chunks, oldest first, by inode and time."""
    found = {}
    with contextlib.suppress(FileNotFoundError):  # none yet, or just removed
        for name in os.listdir(saves):
            if name.isdigit() or name.endswith(".npz"):
                stat = (saves / name).stat()
                found[name] = stat.st_ino, stat.st_mtime_ns
    age = lambda name: (int(name) if name.isdigit() else 0, found[name][1])
    return {name: found[name] for name in sorted(found, key=age)}


KINDS: dict[str, Fault] = {
    "": lambda victim, rng: contextlib.nullcontext(""),
    "kill -9": partial(signalled, signal.SIGKILL),
    **{each.name: partial(signalled, each) for each in (SIGTERM, SIGINT, SIGUSR1)},
    "disk full": disk_full,
    "read-only": read_only,
    "damaged save": damaged_save,
    "cut row": cut_row,
}


def _damage(path: Path, rng: random.Random) -> None:
    """Truncates a file, or overwrites a part of it."""
    content = path.read_bytes()
    at = rng.randrange(len(content))
    if rng.random() < 0.5:
        path.write_bytes(content[:at])
    else:
        noise = rng.randbytes(min(64, len(content) - at))
        path.write_bytes(content[:at] + noise + content[at + len(noise) :])


@contextlib.contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """Mounts a folder read-only over itself: permissions do not apply to root."""
    over = _succeeds(["mount", "--bind", str(folder), str(folder)])
    try:
        _succeeds(["mount", "-o", "remount,ro,bind", str(folder)])
        yield
    finally:
        if over:
            _succeeds(["umount", "-l", str(folder)])


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
