"""Runs on several hosts: one process each, all with the same command."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from experiments.launch import cli, devices
from experiments.launch.signals import Stopped
from sgd_sparse_jax import train

HEARTBEAT_SECONDS = 30  # JAX aborts all processes if one sends no heartbeat for so long
JOIN_SECONDS = 120


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Several hosts: the same command on each, with run folders on a file system they share."""

    distributed: bool = False
    """Join the other hosts; under Slurm, Kubernetes and on TPU pods JAX detects them."""
    coordinator: str = ""
    """HOST:PORT of process 0, if JAX can't find it."""
    num_processes: int = 0
    """Number of processes, if JAX can't find it."""
    process_id: int = -1
    """Index of this process, from 0, if JAX can't find it."""


ALONE = Hosts()


def join(hosts: Hosts) -> None:
    """Joins the other hosts, if any, and starts JAX; call it before JAX computes anything."""
    given = (bool(hosts.coordinator), hosts.num_processes > 0, hosts.process_id >= 0)
    in_range = hosts.process_id < hosts.num_processes
    if any(given) and not (all(given) and hosts.distributed and in_range):
        raise ValueError(
            "--coordinator, --num_processes and --process_id go together, with --distributed, and "
            "--process_id is below --num_processes."
        )
    if not hosts.distributed or jax.distributed.is_initialized():
        devices.start()  # detects a missing driver before anything is written
        return
    jax.config.update("jax_enable_preemption_service", False)  # it replaces our handlers
    _say(  # in advance, because JAX aborts the process on a timeout
        f"--distributed: waiting {JOIN_SECONDS} s for the other hosts; start the same command on "
        "each, or specify --coordinator HOST:PORT, --num_processes and --process_id."
    )
    try:
        jax.distributed.initialize(
            hosts.coordinator or None,
            hosts.num_processes or None,
            hosts.process_id if all(given) else None,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--distributed: the other hosts were not found ({error}).") from error


def is_first() -> bool:
    """Whether this is process 0, the one that writes metrics, figures and messages."""
    return jax.process_index() == 0


def on_first(act: Callable[[], object]) -> None:
    """Calls `act()` on process 0 while the others wait; if it fails, all of them raise."""
    failure: Exception | None = None
    try:
        if is_first():
            act()
    except Exception as error:
        failure = error
    if agreed(failure is not None):
        raise failure or ValueError("process 0 failed; its message has the reason.")


def agreed(answer: bool) -> bool:
    """The answer of process 0, on all processes; all must call it."""
    return _answers(answer)[0]


def any_of(answer: bool) -> bool:
    """Whether the answer of any process is true; all must call it."""
    return any(_answers(answer))


def _answers(answer: bool) -> list[bool]:
    if jax.process_count() == 1:
        return [answer]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.asarray(answer)).tolist()


def leave_the_rest_to_first() -> None:
    """Exits from every process but process 0."""
    if not is_first():
        raise SystemExit(0)


@contextlib.contextmanager
def together(folder: Path) -> Iterator[None]:
    """With several processes, one that fails prints the reason and exits at once.

    A regular exit would wait for the others, which JAX aborts at their next exchange or after a
    missing heartbeat. They can't print a hint then, so it is printed at the start.
    """
    if jax.process_count() == 1:
        yield
        return
    me = f"process {jax.process_index()} of {jax.process_count()}"
    _say(f"{me} runs in {folder}; if one ends, run the same command on all hosts again")
    try:
        yield
    except (Stopped, FloatingPointError):
        raise  # raised by all processes at the same step
    except BaseException as error:
        step = train.latest_step(folder / "checkpoints")
        _say(
            f"error: {me} failed ({cli.describe(error)[:300]}); {folder} is saved up to step "
            f"{step}; run the same command on all hosts to continue"
        )
        os._exit(1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
