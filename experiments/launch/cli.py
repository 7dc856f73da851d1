"""The command line of an experiment: flags from a dataclass, errors in one line. Imports no JAX.

Exit codes: 0 finished; 1 failed; 2 invalid flag; 75 stopped by a signal and saved (EX_TEMPFAIL: the
same command continues the run); 130 interrupted without saving.
"""

import argparse
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeVar

from experiments.launch.signals import EXIT_CODE, Stopped, interrupting

ConfigT = TypeVar("ConfigT")


def main(
    config_type: type[ConfigT],
    run: Callable[[ConfigT], object],
    argv: Sequence[str] | None = None,
    *,
    settings: Mapping[str, ConfigT] | None = None,
) -> None:
    """Parses the flags and calls `run`; errors that a user can fix are printed in one line.

    SGD_SPARSE_TRACEBACK=1 in the environment adds their tracebacks.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # an ASCII terminal shows η as ?
        sys.stdout.reconfigure(errors="replace")
    # Figures are files: the user's backend may not be installed here, a matplotlibrc be broken.
    os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull)
    try:
        config = parse(config_type, argv, settings=settings)
        with interrupting():
            run(config)
    except BrokenPipeError:  # `--help | head`: tyro prints the help, not `figures.terminal`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes again at exit
        raise SystemExit(1) from None
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("SGD_SPARSE_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        _exit(f"error: {describe(error)}", 1)
    except Stopped as stop:
        _exit(str(stop), EXIT_CODE)
    except KeyboardInterrupt:
        _exit("error: interrupted; run the same command to continue from the last saved state", 130)


def parse(
    config_type: type[ConfigT],
    argv: Sequence[str] | None = None,
    *,
    settings: Mapping[str, ConfigT] | None = None,
) -> ConfigT:
    """`config_type` from flags like `--lr_init=0.75 --no_data_augm`; exits with 2 on an error.

    With `settings`, `--setting NAME` chooses the defaults of the other flags.
    """
    import tyro

    default = tyro.MISSING_NONPROP
    if settings:
        first = next(iter(settings))
        chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        chooser.add_argument("--setting", nargs="?", default=first)
        chosen = chooser.parse_known_args(argv)[0].setting
        default = settings.get(chosen, settings[first])  # tyro reports an unknown name
    command = sys.modules["__main__"]
    spec = getattr(command, "__spec__", None)
    # Examples keep their lines where they are indented, which ruff undoes in some docstrings.
    text = re.sub(r"(?m)^python -m", "    \\g<0>", command.__doc__ or "")
    config = tyro.cli(
        config_type,
        prog=f"python -m {spec.name}" if spec else None,
        description=text if spec else None,
        args=argv,
        default=default,
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )
    for name, value in vars(config).items():
        # tyro reads `--lr_init` without a value as an empty tuple.
        if value == () and getattr(config_type, name, None) != ():
            _exit(f"error: --{name} needs at least one value", 2)
    return config


def describe(error: BaseException) -> str:
    """The message of an exception in one line, with the file name of an OSError."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        text = where + error.strerror
    return one_line(text) or type(error).__name__


def one_line(text: str) -> str:
    """`text` in one line, with control characters escaped."""
    escape = lambda c: c if c.isprintable() else c.encode("unicode_escape").decode()
    return "".join(map(escape, " ".join(text.split())))


def _exit(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)
