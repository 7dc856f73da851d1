"""Equal data have equal fingerprints; a change appears in the corresponding entry."""

import json

import numpy as np

from sgd_sparse_jax import data


def test_different_data_differ_in_the_right_entry(tmp_path):
    rng, index = np.random.default_rng(0), np.arange(2500)
    pixels = rng.integers(0, 256, (2500, 4, 4, 3), np.uint8)
    labels = rng.integers(0, 3, 2500).astype(np.int32)
    np.save(tmp_path / "images.npy", pixels)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    whole = data.Images(mapped, labels, ("a", "b", "c"), "letters 1.0.0")
    late = np.where(index[:, None, None, None] == 2000, 255 - pixels, pixels)
    first = data.fingerprint(whole)
    assert first == json.loads(json.dumps(first))
    for change, differing in (
        ({"images": pixels.copy(order="F")}, set()),
        ({"labels": labels.astype(">i4")}, set()),
        ({"labels": np.where(index == 1234, 7, labels)}, {"labels"}),
        ({"images": late}, {"pixels"}),
        ({"images": pixels[::-1]}, {"pixels"}),
        ({"images": pixels.reshape(-1, 6, 8, 1)}, {"shape"}),
        ({"images": np.float32(pixels)}, {"pixels", "dtype"}),
        ({"images": pixels[:-1], "labels": labels[:-1]}, {"n", "labels"}),
        ({"class_names": ("a", "b", "c", "d")}, {"classes"}),
        ({"source": "letters 2.0.0"}, {"source"}),
    ):
        other = data.fingerprint(whole._replace(**change))
        assert {name for name in first if first[name] != other[name]} == differing
