"""Signals that ask a run to stop: it ends at its next step, saved, and not in the middle of one."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command, later, goes on


class Stopped(Exception):
    """The run was asked to stop, and has saved what it needs to go on."""


@dataclass
class Asked:
    """Whether a signal has asked to stop, and which."""

    name: str = ""

    def __bool__(self) -> bool:
        return bool(self.name)


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Within, SIGTERM and SIGUSR1 raise KeyboardInterrupt, as SIGINT does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with _listening(interrupt):
        yield


@contextlib.contextmanager
def deferred() -> Iterator[Asked]:
    """Within, SIGINT, SIGTERM and SIGUSR1 are noted and change nothing; a second one interrupts.

    Threads other than the main one can't listen: there signals do what they always did.
    """
    asked = Asked()

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.name = signal.Signals(number).name
        told = f"\n{asked.name}: saves what is done, then stops; once more to stop now\n"
        os.write(2, told.encode())  # not print: that may be what the signal interrupted

    with _listening(note):
        yield asked


@contextlib.contextmanager
def _listening(handler: Callable[[int, object], None]) -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in ASKING} if main else {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
