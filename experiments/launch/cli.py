"""The command line of an experiment: flags from a dataclass, errors in one line. Imports no JAX.

Exit codes: 0 done, 1 the run could not be made or failed, 2 a flag is wrong, 75 stopped by a signal
after its state was saved (EX_TEMPFAIL: the same command goes on), 130 interrupted at once.
"""

import contextlib
import dataclasses
import difflib
import errno
import io
import itertools
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from experiments.launch.signals import EXIT_CODE, Stopped, interrupting
from experiments.storage import files

ConfigT = TypeVar("ConfigT")
CURABLE = (ValueError, OSError, FloatingPointError)  # what a user can mend; the rest are bugs
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
MORE = "--help lists all flags"


def main(
    config_type: type[ConfigT],
    run: Callable[[ConfigT], object],
    argv: Sequence[str] | None = None,
    *,
    settings: Mapping[str, ConfigT] | None = None,
) -> None:
    """Parses the flags and runs; what a user can cure ends in one line and not in a traceback.

    Of several `settings`, `--setting NAME` chooses whose values the other flags' defaults are.
    SGD_SPARSE_TRACEBACK=1 shows the traceback as well.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # η on a terminal without Unicode is a ?
            stream.reconfigure(errors="replace")
    try:
        config = parse(config_type, argv, settings=settings)
        try:
            with interrupting(), _no_echoes():
                run(config)
        except BrokenPipeError:
            raise
        except CURABLE as error:
            if os.environ.get("SGD_SPARSE_TRACEBACK", "0") not in ("", "0"):
                traceback.print_exc()
            _stop(told(error), 1)
        except Stopped as stop:
            print(stop, file=sys.stderr)
            raise SystemExit(EXIT_CODE) from None
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _stop("interrupted; the same command goes on from the last saved state", 130)


def parse(
    config_type: type[ConfigT],
    argv: Sequence[str] | None = None,
    *,
    settings: Mapping[str, ConfigT] | None = None,
) -> ConfigT:
    """`config_type` from flags like `--lr_init=0.75 --no_data_augm`; exits with 2 on a bad one."""
    argv = sys.argv[1:] if argv is None else list(argv)
    default = _setting(settings, argv) if settings else None
    fields = list(_flags(config_type))
    if not {"-h", "--help"} & set(argv) and (misuse := _misuse(argv, fields)):
        _stop(f"{misuse}; {MORE}", 2)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return _tyro(config_type, argv, default)
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
    message = _first_sentence(_box(config_type, argv, default)).rstrip(".")
    suggestion = _suggestion(message, argv, [f"--{field.name}" for field in fields])
    return _stop(message + suggestion, 2)


def _setting(settings: Mapping[str, ConfigT], argv: Sequence[str]) -> ConfigT:
    """The one that `--setting` names, else the first."""
    chosen = next(iter(settings))
    for word, after in itertools.pairwise([*argv, ""]):
        name, equals, value = word.partition("=")
        if name == "--setting":
            chosen = value if equals else after
    if chosen not in settings:
        near = difflib.get_close_matches(chosen, settings, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        _stop(f"unknown --setting {chosen!r}; {hint}Known are {', '.join(settings)}", 2)
    return settings[chosen]


def _tyro(
    config_type: type[ConfigT], argv: Sequence[str], default: ConfigT | None = None
) -> ConfigT:
    import tyro

    return tyro.cli(
        config_type,
        args=argv,
        default=tyro.MISSING_NONPROP if default is None else default,
        prog=_program(),
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )


def _flags(config_type: Any) -> Iterator[dataclasses.Field[Any]]:
    """The fields that are flags: those of groups in place of the groups."""
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(field.default):
            yield from _flags(type(field.default))
        else:
            yield field


def _box(config_type: type, argv: Sequence[str], default: Any) -> str:
    """What tyro says about wrong flags, on a screen so wide that it breaks no line."""
    screen = io.StringIO()
    with (
        _environment(COLUMNS="1000000"),
        contextlib.redirect_stdout(io.StringIO()),  # of no encoding: drawn without a frame
        contextlib.redirect_stderr(screen),
        contextlib.suppress(SystemExit),
    ):
        _tyro(config_type, argv, default)
    return screen.getvalue()


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _program() -> str:
    """`python -m experiments.diag_nets`, as the user typed it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name}" if spec and spec.name != "__main__" else "experiment"


def _misuse(argv: Sequence[str], fields: Sequence[dataclasses.Field[Any]]) -> str | None:
    """What tyro lets pass or doesn't name: a switch with a value, a list of values with none."""
    defaults = {f"--{field.name}": field.default for field in fields}
    for word, after in itertools.pairwise([*argv, "--"]):
        name, equals, value = word.partition("=")
        default = defaults.get(_underscored(name))
        if not equals and not after.startswith("--"):
            equals, value = " ", after
        if isinstance(default, bool) and equals:
            return f"{name} takes no value, and {value!r} is one"
        if isinstance(default, tuple) and default and not equals:
            return f"{name} needs one value or more"
    return None


def _first_sentence(box: str) -> str:
    """The message between the rule under the title and the next one, in one line."""
    _, *parts = re.split(r"^ +-{5,} *$", box, flags=re.MULTILINE)
    text = " ".join("".join(parts[:1]).split())
    return text[:1].lower() + text[1:] if text else "the flags can't be read"


def _suggestion(message: str, argv: Sequence[str], known: Sequence[str]) -> str:
    """`; did you mean --seeds?`: the flags nearest to unknown ones, the choice nearest to a bad."""
    near: list[str] = []
    if message.startswith("unrecognized"):
        flags = [word.partition("=")[0] for word in argv if re.match("--?[A-Za-z]", word)]
        unknown = [flag for flag in flags if _underscored(flag) not in known]
        matches = [difflib.get_close_matches(_underscored(flag), known, 1) for flag in unknown]
        near = [match for found in matches for match in found]
    elif choice := re.match("invalid choice '(.*?)' for .*Expected one of (.*)", message):
        near = difflib.get_close_matches(choice[1], re.findall("'(.*?)'", choice[2]), 1)
    return (f"; did you mean {' '.join(near)}? " if near else "; ") + MORE


def _underscored(flag: str) -> str:
    name = flag.lstrip("-")
    return flag[: len(flag) - len(name)] + name.replace("-", "_")


def told(error: BaseException) -> str:
    """An exception's text in one line, with the file it is about."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.errno in files.FULL:
            text = f"the disk is full ({text}); free some space and run again"
        if error.errno in FORBIDDEN:
            text += "; change its permissions, or choose another place, and run again"
        if isinstance(error.filename, str | bytes | os.PathLike):
            text = f"{os.fsdecode(error.filename)}: {text}"
    return in_a_line(text) or type(error).__name__


def in_a_line(text: str) -> str:
    """`text` in one line that any terminal only prints: what a file says is no command to it."""
    escaped = lambda c: c.encode("unicode_escape").decode()
    return "".join(c if c.isprintable() else escaped(c) for c in " ".join(text.split()))


@contextlib.contextmanager
def _no_echoes() -> Iterator[None]:
    """Silences errors that nobody waits for any more: who waited has had the first of them.

    Such come late for an event loop, or from the other reads of a damaged state, a page for each.
    An interruption that came in a callback of Python's garbage collector is made once more.
    """
    before = sys.unraisablehook
    again: list[threading.Timer] = []

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # a coroutine's
        of_orbax = code is not None and "orbax" in code.co_filename
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            interrupt = (threading.main_thread().ident, signal.SIGINT)
            again.append(threading.Timer(0.05, signal.pthread_kill, interrupt))
            again[-1].start()  # it comes once this callback is over
        elif not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in again:  # none may come to whoever called us
            timer.cancel()
            timer.join()


def _stop(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
