"""Atomic writes: readers never see a part of a file."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".*-" + 32 * "[0-9a-f]"  # of unfinished files, which a killed process leaves


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to a temporary file, then renames it to `path`; creates the folder."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # else a crash could leave an empty file
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # the first error matters more
            temporary.unlink()


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Adds the path to an OSError: that of a full disk has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
