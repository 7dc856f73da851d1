"""arrays.npz: named arrays, and data sets of labelled ones. Nothing in a file is executed."""

import errno
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.storage import files, values

if TYPE_CHECKING:
    import xarray

AXES = "axes of each array, as JSON"


def save(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """arrays.npz, all or nothing; arrays of Python objects are refused."""
    write(folder / "arrays.npz", arrays)


def load(folder: Path) -> dict[str, np.ndarray]:
    """What `save` wrote. Nothing in the file is executed."""
    path = folder / "arrays.npz"
    cure = f"remove {folder} and run again"
    try:
        return read(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, f"it is missing; {cure}", str(path)) from error
    except ValueError as error:
        raise ValueError(f"{error}; {cure}.") from error


def write(path: Path, arrays: Mapping[str, np.ndarray], *, compressed: bool = True) -> None:
    """An .npz file, all or nothing; arrays of Python objects are refused."""
    how = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with files.replacing(path) as file, zipfile.ZipFile(file, "w", how) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)


def read(path: Path) -> dict[str, np.ndarray]:
    """What `write` wrote; ValueError where it can't be read. Nothing in it is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            if len(set(members)) < len(members) or not all(m.endswith(".npy") for m in members):
                raise ValueError("its members aren't arrays, each under a name of its own")
            return {m.removesuffix(".npy"): _array(archive, m) for m in members}
    except FileNotFoundError:
        raise
    except Exception as error:  # the archive, its compression and the arrays each have their own
        raise ValueError(f"{path} can't be read ({values.shortened(str(error))})") from error


def _array(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    with archive.open(member) as entry:
        array = np.lib.format.read_array(entry, allow_pickle=False)
        if entry.read(1):  # else nothing compares the checksum of what is read in part
            raise ValueError(f"{member} is longer than its array")
        return array


def save_dataset(folder: Path, dataset: "xarray.Dataset") -> None:
    """arrays.npz with one array per variable and coordinate, and the names of their axes."""
    arrays = {str(name): variable.values for name, variable in dataset.variables.items()}
    axes = {str(name): variable.dims for name, variable in dataset.variables.items()}
    save(folder, {**arrays, AXES: np.array(json.dumps(axes))})


def load_dataset(folder: Path) -> "xarray.Dataset":
    """What `save_dataset` wrote."""
    import xarray

    arrays = load(folder)
    try:
        axes = values.from_bytes(str(arrays.pop(AXES)).encode())
        for name, dims in axes.items():
            if not isinstance(dims, list) or not all(isinstance(dim, str) for dim in dims):
                raise ValueError(f"axes of {name}: {values.shown(dims)}")
            if len(set(dims)) < len(dims):
                raise ValueError(f"{name} has an axis twice: {values.shown(dims)}")
        variables = {name: (tuple(axes[name]), array) for name, array in arrays.items()}
        coords = {dim for dims in axes.values() for dim in dims} & variables.keys()
        return xarray.Dataset(variables).set_coords(sorted(coords))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{folder / 'arrays.npz'} is no labelled data set ({values.shortened(repr(error))}); "
            f"remove {folder} and run again."
        ) from error
