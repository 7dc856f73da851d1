"""Several processes, one per host, that run the same command as one run."""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from experiments.launch import cli, devices
from experiments.launch.signals import Stopped
from sgd_sparse_jax import train

HEARTBEAT_SECONDS = 30  # a process that is silent for so long is gone
JOIN_SECONDS = 120
TRACES_OF_THE_GONE = "(?i)gloo|nccl|connection|coordination|heartbeat|barrier"


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Several hosts: the same command on each, with run folders on a file system they share."""

    distributed: bool = False
    """Join the other hosts; Slurm, Kubernetes and TPU pods tell JAX who they are."""
    coordinator: str = ""
    """HOST:PORT of process 0, where nobody else tells."""
    num_processes: int = 0
    """How many processes there are, where nobody else tells."""
    process_id: int = -1
    """Which of them this is, from 0, where nobody else tells."""


ALONE = Hosts()


def join(hosts: Hosts) -> None:
    """Makes this process one of several, before JAX has computed anything; once per process."""
    told = (bool(hosts.coordinator), hosts.num_processes > 0, hosts.process_id >= 0)
    if any(told) and not (all(told) and hosts.distributed):
        raise ValueError(
            "--coordinator, --num_processes and --process_id go together, with --distributed."
        )
    if not hosts.distributed or jax.distributed.is_initialized():
        devices.start()
        return
    if any(told) and hosts.process_id >= hosts.num_processes:
        raise ValueError(
            f"--process_id is {hosts.process_id}; of --num_processes {hosts.num_processes} the "
            f"last is {hosts.num_processes - 1}."
        )
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
    lost = "--distributed: the other hosts were not found"
    cure = (
        "start the same command on each, or name them with --coordinator HOST:PORT, "
        "--num_processes and --process_id."
    )
    with last_words(f"error: {lost} within {JOIN_SECONDS} s; {cure}"):
        try:
            jax.distributed.initialize(
                hosts.coordinator or None,
                hosts.num_processes if all(told) else None,
                hosts.process_id if all(told) else None,
                initialization_timeout=JOIN_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{lost} ({' '.join(str(error).split())}); {cure}") from error


def is_first() -> bool:
    """Whether this is process 0, the one that writes metrics, figures and messages."""
    return jax.process_index() == 0


def on_first(act: Callable[[], object]) -> None:
    """`act()` on process 0 while the others wait; where it fails, all of them stop."""
    failure = None
    if is_first():
        try:
            act()
        except Exception as error:
            failure = error
    failed = agreed(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise ValueError("process 0 can't go on; its message says why.")


def agreed(answer: bool) -> bool:
    """The answer of process 0, on all of them."""
    if jax.process_count() == 1:
        return answer
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def any_of(answer: bool) -> bool:
    """Whether any process answers yes; all of them have to ask."""
    if jax.process_count() == 1:
        return answer
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(answer)).any())


def leave_the_rest_to_first() -> None:
    """Ends every process but process 0, in good order."""
    if not is_first():
        raise SystemExit(0)


@contextlib.contextmanager
def together(folder: Path) -> Iterator[None]:
    """Of several processes, one that fails leaves at once, in a line: its orderly exit would wait.

    The others find out when they next exchange numbers, or by its missing heartbeat.
    """
    if jax.process_count() == 1:
        yield
        return
    me = f"process {jax.process_index()} of {jax.process_count()}"
    cure = f"the same command on all hosts goes on; {folder} is saved up to step"
    with last_words(
        f"error: {me} was ended from outside, or by another's end: {cure}", folder
    ) as said:
        try:
            yield
        except (Stopped, FloatingPointError):
            raise  # all processes end so, at the same step
        except BaseException as error:
            text = cli.describe(error)[:300]
            gone = "another process is gone: " * bool(re.search(TRACES_OF_THE_GONE, text))
            step = train.latest_step(folder / "checkpoints")
            print(f"error: {me} stops: {gone}{text}; {cure} {step}", file=sys.stderr, flush=True)
            said()
            os._exit(1)


@contextlib.contextmanager
def last_words(message: str, folder: Path | None = None) -> Iterator[Callable[[], None]]:
    """`message`, and the newest step saved in `folder`, should Python have no part in the end.

    JAX aborts a process whose coordinator is gone, and nothing in it can speak then: a shell beside
    it does, unless it is told, by the function yielded or at the end, that all is said.
    """
    saved = folder / "checkpoints" if folder else os.devnull
    step = 'ls "$1" 2>/dev/null | grep -x "[0-9]*" | sort -n | tail -n 1'
    speaker = subprocess.Popen(
        ["sh", "-c", f'read all_said || echo "$0" $({step}) >&2', message, str(saved)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is not for it
    )

    def said() -> None:
        with contextlib.suppress(BrokenPipeError):
            speaker.communicate(b"\n")

    try:
        yield said
    finally:
        said()
