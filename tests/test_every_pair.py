"""Every network on images of every kind: two steps, evaluations, a save and a resume.

Sets of one shape and number of classes differ only in pixels: one set of each kind is combined with
all networks, and all sets with the fastest network. The sets are small.
"""

import jax
import numpy as np
import pytest

from experiments.deep import training
from experiments.deep.config import Config
from experiments.storage import records
from sgd_sparse_jax import data, models
from sgd_sparse_jax.data.images import STORED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("quick_compilation"),
]
KINDS = ["cifar10", "cifar100", "cifar10_gs", "cifar10_dog_cat", "mnist", "tiny_imagenet"]
KINDS += ["gaussians_binary"]
PAIRS = [(net, kind) for net in models.NETWORKS for kind in KINDS]
PAIRS += [("resnet_tiny_gn", name) for name in data.IMAGE_SETS if name not in KINDS]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """All stored sets, as arrays of 200 training and 40 test images."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, kind in STORED.items():
        (root / name).mkdir()
        for split, n in (("train", 200), ("test", 40)):
            pixels = rng.integers(0, 256, (n, *kind.shape), np.uint8)
            np.save(root / name / f"{split}_images.npy", pixels)
            np.save(root / name / f"{split}_labels.npy", np.arange(n) % len(kind.class_names))
    return str(root)


@pytest.mark.parametrize(("net", "dataset"), PAIRS)
def test_a_run_is_trained_evaluated_saved_and_resumed(net, dataset, data_dir, tmp_path):
    sizes = {"batch_size": 8, "batch_size_eval": 16, "sparsity_images": 24, "bn_images": 16}
    sizes |= {"n_final_eval": 24, "model_width": 1 if net == "wrn28" else 2, "epochs": 1}
    places = {"data_dir": data_dir, "runs_dir": str(tmp_path)}
    with jax.enable_x64(False):
        for steps in (1, 2):
            folder = training.run(
                Config(dataset=dataset, model=net, lr_init=1e-4, max_steps=steps, **sizes, **places)
            )
    rows = records.read_records(folder)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    starts = records.read_json(folder / "manifest.json")["starts"]
    assert [start["from_step"] for start in starts] == [0, 1]
