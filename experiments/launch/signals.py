"""Signals that stop a run: after its current step, when its state is saved."""

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
    """A signal has stopped the run; what it needs to continue is saved."""


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Within, SIGTERM and SIGUSR1 raise KeyboardInterrupt, as SIGINT does.

    Python prints and drops what is raised in finalizers and in callbacks of the garbage collector,
    of which JAX has one: after a second of computing, an interruption is raised again.
    """

    def interrupt(number: int, frame: object) -> None:
        if number != signal.SIGVTALRM:
            signal.setitimer(signal.ITIMER_VIRTUAL, 1.0)
        raise KeyboardInterrupt

    def hook(dropped: Any) -> None:
        # Reads that orbax abandons after the first error of a damaged state end so, a page each.
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
    """Within, the first SIGINT, SIGTERM or SIGUSR1 is added to a list; a second one interrupts."""
    received: list[str] = []

    def record(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        message = f"\n{received[0]}: saves what is done, then stops; once more to stop now\n"
        os.write(2, message.encode())  # not print: that may be what the signal interrupted

    with _handling(record, REQUESTS):
        yield received


@contextlib.contextmanager
def _handling(handler: Callable[[int, object], None], numbers: tuple[int, ...]) -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()  # no other can handle signals
    before = {number: signal.signal(number, handler) for number in numbers} if main else {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
