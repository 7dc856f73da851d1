"""A digest of a data split, small enough to store in a checkpoint."""

import hashlib

import numpy as np

from .images import Images

SAMPLE = 1000  # images to hash: reading a whole memory map can take minutes


def fingerprint(images: Images) -> dict[str, int | str]:
    """Sizes and digests of a split, as JSON values; equal data have equal fingerprints.

    `n`, `shape` ("32x32x3") and `dtype` of the images, the number of `classes`, SHA-256 of all
    `labels` and of the `pixels` of about 1,000 evenly spaced images, and `source`, the data set and
    its version ("" if unknown, as for your own arrays). Arrays may be memory maps.

    Example:
        >>> cats = Images(np.zeros((9, 32, 32, 3), np.uint8), np.zeros(9, np.int32), ("cat",))
        >>> found = fingerprint(cats)
        >>> found["n"], found["shape"], found["dtype"], found["classes"]
        (9, '32x32x3', 'uint8', 1)
        >>> fingerprint(cats._replace(labels=cats.labels + 1))["labels"] == found["labels"]
        False
    """
    n = len(images.images)

    def sha256(array: np.ndarray) -> str:
        # Little-endian on every machine, so that the digests agree.
        ordered = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return hashlib.sha256(ordered.tobytes()).hexdigest()

    return {
        "n": n,
        "shape": "x".join(map(str, images.images.shape[1:])),
        "dtype": str(images.images.dtype),
        "classes": len(images.class_names),
        "labels": sha256(images.labels),
        "pixels": sha256(images.images[:: max(1, n // SAMPLE)]),
        "source": images.source,
    }
