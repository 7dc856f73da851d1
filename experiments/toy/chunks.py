"""Finished parts of a sweep, on disk: a run that is cut goes on behind them."""

import logging
import re
import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.launch import hosts
from experiments.storage import npz

Arrays = dict[str, np.ndarray]


class Chunks(MutableMapping[int, Arrays]):
    """First run of a part -> its arrays, in FOLDER/chunks/NAME-FIRST.npz.

    A damaged file is as good as none, and the log says so. Of several hosts the first writes, and
    what it finds holds for all.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder / "chunks", name

    def __getitem__(self, first: int) -> Arrays:
        found = self._read(first) if hosts.is_first() else None
        if not hosts.agreed(found is not None):
            raise KeyError(first)
        return npz.read(self._path(first)) if found is None else found

    def __setitem__(self, first: int, arrays: Mapping[str, np.ndarray]) -> None:
        if hosts.is_first():
            self.folder.mkdir(exist_ok=True)
            npz.write(self._path(first), arrays, compressed=False)

    def __delitem__(self, first: int) -> None:
        self._path(first).unlink()

    def __iter__(self) -> Iterator[int]:
        names = (path.stem.rpartition("-") for path in self.folder.glob("*-*.npz"))
        ours = (first for name, _, first in names if name == self.name)
        return iter(sorted(int(first) for first in ours if re.fullmatch("[0-9]+", first)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _path(self, first: int) -> Path:
        return self.folder / f"{self.name}-{first}.npz"

    def _read(self, first: int) -> Arrays | None:
        try:
            return npz.read(self._path(first))
        except FileNotFoundError:
            return None
        except ValueError as error:
            logging.getLogger(__name__).warning("%s; these runs are computed again.", error)
            return None


def drop(folder: Path) -> None:
    """Removes all parts: the whole has taken their place."""
    shutil.rmtree(folder / "chunks", ignore_errors=True)


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested dicts of arrays as one, under names like `step/train_loss`."""
    arrays: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping)
        arrays |= flat(value, f"{above}{name}/") if nested else {f"{above}{name}": value}
    return arrays


def nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *above, name = path.split("/")
        place = tree
        for step in above:
            place = place.setdefault(step, {})
        place[name] = array
    return tree
