"""Signals that stop a run once its state is saved."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command, later, continues the run


class Stopped(Exception):
    """A signal has stopped the run, whose state is saved."""


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """A context in which SIGTERM and SIGUSR1 raise KeyboardInterrupt, as SIGINT does.

    Python prints and discards exceptions in finalizers and garbage-collector callbacks (JAX has
    one), so the interrupt is raised again after a second of CPU time.
    """

    def interrupt(number: int, frame: object) -> None:
        if number != signal.SIGVTALRM:
            signal.setitimer(signal.ITIMER_VIRTUAL, 1.0)
        raise KeyboardInterrupt

    def hook(dropped: Any) -> None:
        # From reads that orbax abandons after the first error of a damaged state, a page each.
        late = str(dropped.exc_value) == "Event loop is closed"
        if not late and not isinstance(dropped.exc_value, KeyboardInterrupt):
            show(dropped)

    show, sys.unraisablehook = sys.unraisablehook, hook
    with _handling(interrupt, (*REQUESTS, signal.SIGVTALRM)):
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
            sys.unraisablehook = show


@contextlib.contextmanager
def deferred() -> Iterator[list[str]]:
    """A context that adds the first SIGINT, SIGTERM or SIGUSR1 to a list; a second interrupts."""
    received: list[str] = []

    def record(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        message = f"\n{received[0]}: stopping after a save; repeat to stop without saving\n"
        os.write(2, message.encode())  # not print, which the signal may have interrupted

    with _handling(record, REQUESTS):
        yield received


@contextlib.contextmanager
def _handling(handler: Callable[[int, object], None], numbers: tuple[int, ...]) -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()  # others can't handle signals
    before = {number: signal.signal(number, handler) for number in numbers} if main else {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
