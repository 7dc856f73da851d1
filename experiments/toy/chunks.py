"""Finished chunks of a run on disk, so that an interrupted run continues behind them."""

import logging
import shutil
from pathlib import Path

import numpy as np

from experiments.launch import hosts
from experiments.storage import arrays

Chunk = dict[str, np.ndarray]


class Chunks:
    """Name of a chunk -> its arrays, in FOLDER/chunks/NAME.npz; the part of a dict that sweeps use.

    The name has to identify all that the arrays depend on. A damaged file counts as missing, with a
    warning in the log. With several hosts, process 0 writes, and all find what it finds.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "chunks"

    def get(self, name: str) -> Chunk | None:
        """The arrays; None if there are none."""
        path, found = self.folder / f"{name}.npz", None
        if hosts.is_first() and path.exists():
            try:
                found = arrays.read_npz(path)
            except ValueError as error:
                message = "%s; these runs are computed again."
                logging.getLogger(__name__).warning(message, error)
        if hosts.agreed(found is not None) and found is None:
            found = arrays.read_npz(path)
        return found

    def __setitem__(self, name: str, chunk: Chunk) -> None:
        if hosts.is_first():
            self.folder.mkdir(exist_ok=True)
            arrays.write_npz(self.folder / f"{name}.npz", chunk)


Store = Chunks | dict[str, Chunk]


def drop(folder: Path) -> None:
    """Removes the chunks of a run: the whole takes their place."""
    shutil.rmtree(folder / "chunks", ignore_errors=True)
