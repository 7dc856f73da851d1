"""Arrays of images and labels: opened without executing anything, and checked."""

from pathlib import Path

import numpy as np


def opened(path: Path) -> np.ndarray:
    """The memory map of a .npy file; ValueError if it can't be read."""
    try:
        return np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
    except Exception as error:  # a damaged header raises many types
        # NumPy's message is not included: it may quote pixels that it parsed as a header.
        found = f"can't be read ({type(error).__name__}): it is missing, truncated or not an array"
        raise unfit(path, found) from error


def checked_images(
    images: np.ndarray, where: str | Path, shape: tuple[int, int, int] | None = None
) -> np.ndarray:
    """Images as uint8 [n, h, w, c], also from [n, c, h, w], or [n, h, w] if c = 1.

    Raises ValueError, naming `where`, for other ones, and for images not of `shape` [h, w, c].
    """
    found = f"holds {images.dtype} {list(images.shape)}"
    if images.ndim == 3 and (shape is None or shape[-1] == 1):
        images = images[..., None]
    first = images.shape[1:2] == (shape[-1],) if shape else images.shape[1:2] in ((1,), (3,))
    if images.ndim == 4 and first and images.shape[-1] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)  # a view
    sizes = ", ".join(map(str, shape)) if shape else "h, w, c"
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[1:] != (shape or images.shape[1:])
    ):
        raise unfit(where, f"{found}; expected uint8 [n, {sizes}] with values from 0 to 255")
    return images


def checked_labels(labels: np.ndarray, n: int, classes: int, where: str | Path) -> np.ndarray:
    """Labels as int32 [n] from 0 to `classes` - 1.

    Raises ValueError, naming `where`, for other ones: they would silently make the loss NaN.
    """
    labels, span = labels[:, 0] if labels.shape[1:] == (1,) else labels, ""
    if labels.dtype.kind in "iuf" and labels.size:
        with np.errstate(invalid="ignore"):  # casts of NaN
            numbers = labels.astype(np.int32, copy=False)
        in_range = numbers.min() >= 0 and numbers.max() < classes
        if labels.shape == (n,) and in_range and (numbers == labels).all():
            return numbers
        span = f" from {labels.min()} to {labels.max()}"
    expected = f"integers from 0 to {classes - 1}, one for each of {n} images"
    raise unfit(where, f"holds {labels.dtype} {list(labels.shape)}{span}; expected {expected}")


def unfit(where: str | Path, found: str) -> ValueError:
    """An error that says what was found in `where`, and how to renew a cache."""
    folder = Path(where).parent
    hint = f" Delete {folder}: the next call writes it again." if folder.name == "decoded" else ""
    return ValueError(f"{where} {found}.{hint}")
