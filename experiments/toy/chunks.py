"""Finished chunks of a run on disk, so that an interrupted run continues behind them."""

import logging
import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

import numpy as np

from experiments.launch import hosts
from experiments.storage import arrays


class Chunks(MutableMapping[str, dict[str, np.ndarray]]):
    """Name of a chunk -> its arrays, in FOLDER/chunks/NAME.npz.

    The name has to identify all that the arrays depend on. A damaged file counts as missing, with a
    warning in the log. With several hosts, process 0 writes, and all find what it finds.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "chunks"

    def __getitem__(self, name: str) -> dict[str, np.ndarray]:
        found = self._read(name) if hosts.is_first() else None
        if not hosts.agreed(found is not None):
            raise KeyError(name)
        return arrays.read_npz(self._path(name)) if found is None else found

    def __setitem__(self, name: str, chunk: Mapping[str, np.ndarray]) -> None:
        if hosts.is_first():
            self.folder.mkdir(exist_ok=True)
            arrays.write_npz(self._path(name), chunk)

    def __delitem__(self, name: str) -> None:
        self._path(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self.folder.glob("*.npz")))

    def __len__(self) -> int:
        return len(list(self))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def _read(self, name: str) -> dict[str, np.ndarray] | None:
        try:
            return arrays.read_npz(self._path(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            logging.getLogger(__name__).warning("%s; these runs are computed again.", error)
            return None


def drop(folder: Path) -> None:
    """Removes the chunks of a run: the whole takes their place."""
    shutil.rmtree(folder / "chunks", ignore_errors=True)
