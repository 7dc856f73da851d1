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
    """Locks `folder`, which is made if need be; of several hosts, process 0 calls this.

    Raises ValueError that names the process that holds it. The kernel frees the lock when a process
    ends, however it does: a `.lock` left behind means nothing. Where a file system has no locks a
    warning is logged; one made of a file's existence would outlive a killed process.
    """
    lock = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
    holder = folder / ".holder.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        process = "another process"
        with contextlib.suppress(OSError, ValueError):  # it may be about to write the file
            found = json.loads(holder.read_text())
            process = "process {pid} on {host} since {started}".format(**found)
        advice = "wait for its end or stop it, or choose another --exp_name"
        raise ValueError(f"{folder} is in use by {process}; {advice}.") from None
    except OSError as error:
        message = "%s can't be locked (%s): start no second process in it."
        logging.getLogger(__name__).warning(message, folder, error.strerror or error)
        yield
        return
    try:
        started = datetime.now().astimezone().isoformat(" ", "seconds")
        process = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        holder.write_text(json.dumps(process))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
