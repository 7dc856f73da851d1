"""One process at a time in a run folder."""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`, which is made if need be; of several hosts, process 0 does.

    Raises ValueError with the process that holds it. The kernel frees the lock however that process
    ends, so a `.lock` file left behind locks nothing. Where the file system has no locks, a warning
    is logged and nothing is locked: a lock made of a file's existence would outlive its process.
    """
    lock = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
    holder = folder / ".holder.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder} is in use by {_describe(holder)}; wait for its end or stop it, or choose "
            "another --exp_name."
        ) from None
    except OSError as error:
        message = "%s can't be locked (%s): start nothing else in it meanwhile."
        logging.getLogger(__name__).warning(message, folder, error.strerror or error)
        yield
        return
    try:
        started = datetime.now().astimezone().isoformat(" ", "seconds")
        process = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        holder.write_text(json.dumps(process))
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


def _describe(holder: Path) -> str:
    try:
        process = json.loads(holder.read_text())
        return "process {pid} on {host} since {started}".format(**process)
    except (OSError, ValueError, KeyError):  # between taking the lock and writing the file
        return "another process"
