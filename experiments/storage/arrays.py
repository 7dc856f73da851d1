"""Arrays on disk: results.nc, a labelled data set (netCDF), and .npz files of named arrays.

`xarray.open_dataset(folder / "results.nc")` opens the results of a toy run.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.storage import files

if TYPE_CHECKING:
    import xarray


def save_dataset(folder: Path, dataset: "xarray.Dataset") -> None:
    """Writes results.nc, whole or not at all."""
    content = dataset.to_netcdf(engine="scipy")  # needs nothing that JAX doesn't install
    files.write_bytes(folder / "results.nc", bytes(content))


def load_dataset(folder: Path) -> "xarray.Dataset":
    """Reads results.nc into memory; ValueError if it is missing or damaged."""
    import xarray

    path = folder / "results.nc"
    try:
        return xarray.load_dataset(io.BytesIO(path.read_bytes()), engine="scipy")
    except Exception as error:  # scipy raises many kinds for damaged files
        raise ValueError(
            f"{path} is missing, damaged or of another version ({error}); remove {folder} and run "
            "again, or give this run a name of its own with --exp_name."
        ) from error


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays and a checksum, whole or not at all."""
    archive = io.BytesIO()
    np.savez(archive, **arrays)  # pyright: ignore[reportArgumentType]
    content = archive.getvalue()
    files.write_bytes(path, content + hashlib.sha256(content).digest())


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads what `write_npz` wrote; ValueError if the file is anything else."""
    whole = path.read_bytes()
    # First of all: numpy and zipfile raise many kinds of errors for a damaged file.
    content, checksum = whole[:-32], whole[-32:]
    if hashlib.sha256(content).digest() != checksum:
        raise ValueError(f"{path} is damaged")
    return dict(np.load(io.BytesIO(content), allow_pickle=False))
