"""Equal data have equal fingerprints, and whatever changes shows in the entry of its name."""

import json

import numpy as np
import pytest

from sgd_sparse_jax import data

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (2500, 4, 4, 3), np.uint8)
LABELS = RNG.integers(0, 3, 2500).astype(np.int32)
LATE = np.arange(2500)[:, None, None, None] == 2000
WHOLE = data.Images(PIXELS, LABELS, ("a", "b", "c"), "letters 1.0.0")


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (WHOLE._replace(images=PIXELS.copy(order="F")), set()),
        (WHOLE._replace(labels=LABELS.astype(">i4")), set()),
        (WHOLE._replace(labels=np.where(np.arange(2500) == 1234, 7, LABELS)), {"labels"}),
        (WHOLE._replace(images=np.where(LATE, 255 - PIXELS, PIXELS)), {"pixels"}),
        (WHOLE._replace(images=PIXELS[::-1]), {"pixels"}),
        (WHOLE._replace(images=PIXELS.reshape(-1, 6, 8, 1)), {"shape"}),
        (WHOLE._replace(images=np.float32(PIXELS)), {"pixels", "dtype"}),
        (WHOLE._replace(images=PIXELS[:-1], labels=LABELS[:-1]), {"n", "labels"}),
        (WHOLE._replace(class_names=("a", "b", "c", "d")), {"classes"}),
        (WHOLE._replace(source="letters 2.0.0"), {"source"}),
    ],
)
def test_what_differs_is_named(tmp_path, other, differing):
    np.save(tmp_path / "images.npy", PIXELS)
    mapped = WHOLE._replace(images=np.load(tmp_path / "images.npy", mmap_mode="r"))
    first, second = data.fingerprint(mapped), data.fingerprint(other)
    assert first == json.loads(json.dumps(first)) and first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == differing
