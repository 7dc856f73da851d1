"""The command line of an experiment: flags from a dataclass, errors in one line. Imports no JAX.

Exit codes: 0 done, 1 the run could not be made or stopped, 2 a flag is wrong, 130 interrupted.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

ConfigT = TypeVar("ConfigT")
CURABLE = (ValueError, OSError, FloatingPointError)  # what a user can mend; the rest are bugs


def main(
    config_type: type[ConfigT],
    run: Callable[[ConfigT], object],
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the flags and runs; what a user can cure ends in one line and not in a traceback.

    SGD_SPARSE_TRACEBACK=1 shows the traceback as well.
    """
    config = parse(config_type, argv)
    try:
        run(config)
    except KeyboardInterrupt:
        _stop("interrupted; the same command goes on from the last saved state", 130)
    except CURABLE as error:
        if os.environ.get("SGD_SPARSE_TRACEBACK"):
            traceback.print_exc()
        _stop(_message(error), 1)


def parse(config_type: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """`config_type` from flags like `--lr_init=0.75 --no_data_augm`; exits with 2 on a bad one."""
    import tyro

    argv = sys.argv[1:] if argv is None else list(argv)
    screen = io.StringIO()
    try:
        with contextlib.redirect_stderr(screen):
            return tyro.cli(
                config_type,
                args=argv,
                prog=_program(),
                use_underscores=True,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        known = [f"--{field.name}" for field in dataclasses.fields(config_type)]  # pyright: ignore[reportArgumentType]
        _stop(_first_sentence(screen.getvalue()) + _suggestion(argv, known), 2)


def _program() -> str:
    """`python -m experiments.diag_nets`, as the user typed it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name}" if spec and spec.name != "__main__" else "experiment"


def _first_sentence(box: str) -> str:
    """The message in the box that tyro draws: its text down to the first rule, unwrapped."""
    lines = [line.strip("│ ").rstrip() for line in box.splitlines() if not line.startswith("╭")]
    message = []
    for line in lines:
        if set(line) <= set("─╰╯ "):
            break
        message.append(line)
    text = " ".join(" ".join(message).split())
    return text[:1].lower() + text[1:] if text else "the flags can't be read"


def _suggestion(argv: Sequence[str], known: Sequence[str]) -> str:
    flags = [re.split("=", word)[0] for word in argv if word.startswith("--")]
    unknown = [flag for flag in flags if flag.replace("-", "_") not in _underscored(known)]
    near = [match for flag in unknown for match in difflib.get_close_matches(flag, known, 1)]
    hint = f"; did you mean {' '.join(near)}?" if near else ";"
    return f"{hint} --help lists all flags"


def _underscored(flags: Sequence[str]) -> set[str]:
    return {flag.replace("-", "_") for flag in (*flags, "--help")}


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _stop(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
