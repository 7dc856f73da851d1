"""Arrays on disk: results.nc, a labelled data set (netCDF), and .npz files of named arrays.

`xarray.open_dataset(folder / "results.nc")` opens the results of a toy run.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.storage import files

if TYPE_CHECKING:
    import xarray


def save_dataset(folder: Path, dataset: "xarray.Dataset") -> None:
    """Writes results.nc atomically."""
    content = dataset.to_netcdf(engine="scipy")  # scipy is a dependency of JAX
    files.write_bytes(folder / "results.nc", bytes(content))


def load_dataset(folder: Path) -> "xarray.Dataset":
    """Reads results.nc into memory; ValueError if it is missing or damaged."""
    import xarray

    path = folder / "results.nc"
    try:
        return xarray.load_dataset(io.BytesIO(path.read_bytes()), engine="scipy")
    except Exception as error:  # scipy raises many types for damaged files
        raise ValueError(
            f"{path} is missing, damaged or of another version ({error}); remove {folder} and run "
            "again, or choose another --exp_name."
        ) from error


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays atomically."""
    archive = io.BytesIO()
    np.savez(archive, **arrays)  # pyright: ignore[reportArgumentType]
    files.write_bytes(path, archive.getvalue())


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads what `write_npz` wrote; ValueError if the file is damaged."""
    try:
        return dict(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))
    except Exception as error:  # zipfile, which verifies checksums, and NumPy raise many types
        raise ValueError(f"{path} is damaged ({error})") from error
