"""Files that are whole or not there: a reader never sees one that was written by halves."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

FULL = (errno.ENOSPC, errno.EDQUOT)
SCRATCH = ".*-" + 32 * "[0-9a-f]"  # names that `replacing` gives; a killed process leaves such


def write_bytes(path: Path, content: bytes) -> None:
    """All or nothing: a reader sees the old file or the new one."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once all of it is on disk."""
    scratch = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with named(path):
            with scratch.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):  # what went wrong before that matters more
            scratch.unlink()


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the file system say which file they are about: a full disk's don't."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
