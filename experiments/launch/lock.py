"""One process at a time in a run folder."""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from experiments.launch import hosts
from experiments.storage import files


@contextlib.contextmanager
def alone_in(
    folder: Path, *, unless: Callable[[Path], bool] = lambda folder: False
) -> Iterator[None]:
    """Locks `folder` on process 0, unless `unless(folder)`; all processes must call it."""
    with contextlib.ExitStack() as held:
        hosts.on_first(lambda: unless(folder) or held.enter_context(holding(folder)))
        yield


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Locks `folder`, which is created if missing.

    Raises ValueError, naming the process that holds the lock; OSError if the folder can't be
    created. The kernel releases the lock when a process ends, even if killed; a remaining file
    `.lock` has no effect. File systems without locks only cause a warning: a lock file in place of
    a lock would outlive a killed process.
    """
    lock = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
    holder = folder / ".holder.json"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        process = "another process"
        with contextlib.suppress(OSError, ValueError):  # it may not have written the file yet
            found = json.loads(holder.read_text())
            process = "process {pid} on {host} since {started}".format(**found)
        advice = "wait for its end or stop it, or choose another --exp_name"
        raise ValueError(f"{folder} is in use by {process}; {advice}.") from None
    except OSError as error:
        message = "%s can't be locked (%s): do not start a second process in it."
        logging.getLogger(__name__).warning(message, folder, error.strerror or error)
        yield
        return
    try:
        started = datetime.now().astimezone().isoformat(" ", "seconds")
        process = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        files.write_bytes(holder, json.dumps(process).encode())
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
