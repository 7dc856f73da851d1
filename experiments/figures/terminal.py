"""Printing of lines and tables, which never fails. No JAX."""

import logging
import os
import sys
from typing import Any

NARROWEST = 80  # columns; narrower tables are hard to read


def show(*parts: Any) -> None:
    """Prints lines and rich tables; if that fails, warns and discards all further output.

    A closed pipe or a full disk must not end a run, whose results are saved before.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)  # names may contain brackets
    console.width = max(console.width, NARROWEST)
    try:
        for part in parts:
            console.print(part) if isinstance(part, Table) else print(part)
        if sys.stdout:  # None if closed
            sys.stdout.flush()
    except (OSError, UnicodeError) as error:
        logging.getLogger(__name__).warning("Standard output can't show the results (%s)", error)
        if isinstance(error, OSError):  # else each further line would warn again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
