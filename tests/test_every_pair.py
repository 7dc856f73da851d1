"""Every network on images of every kind: two steps, evaluations, a save and a resume.

Sets of one shape and number of classes differ in their pixels alone, so one of each kind meets all
networks, and all sets meet the quickest network. The sets are small.
"""

import jax
import numpy as np
import pytest

from experiments.deep import training as classifiers
from experiments.deep.config import Config
from experiments.storage import records
from sgd_sparse_jax import data, models
from sgd_sparse_jax.data import images

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("compiled_once"),
]
WIDTHS = {"wrn28": 1}
KINDS = (
    "cifar10",
    "cifar100",
    "cifar10_gs",
    "cifar10_dog_cat",
    "mnist",
    "tiny_imagenet",
    "gaussians_binary",
)
QUICKEST = "resnet_tiny_gn"
PAIRS = [(net, kind) for net in models.NETWORKS for kind in KINDS] + [
    (QUICKEST, name) for name in data.IMAGE_SETS if name not in KINDS
]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """All stored sets, as arrays of 200 training and 40 test images."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, kind in images.STORED.items():
        (root / name).mkdir()
        for split, n in (("train", 200), ("test", 40)):
            np.save(
                root / name / f"{split}_images.npy",
                rng.integers(0, 256, (n, *kind.shape), np.uint8),
            )
            np.save(root / name / f"{split}_labels.npy", np.arange(n) % len(kind.class_names))
    return str(root)


@pytest.mark.parametrize(("net", "dataset"), PAIRS)
def test_a_run_is_trained_evaluated_saved_and_resumed(net, dataset, data_dir, tmp_path):
    config = Config(
        dataset=dataset,
        model=net,
        model_width=WIDTHS.get(net, 2),
        batch_size=8,
        batch_size_eval=16,
        sparsity_images=24,
        bn_images=16,
        n_final_eval=24,
        epochs=1,
        lr_init=1e-4,
        max_steps=1,
        data_dir=data_dir,
        runs_dir=str(tmp_path),
    )
    with jax.enable_x64(False):
        folder = classifiers.run(config)
        classifiers.run(Config(**{**vars(config), "max_steps": 2}))
    rows = records.read_records(folder)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    starts = records.read_json(folder / "manifest.json")["starts"]
    assert [start["from_step"] for start in starts] == [0, 1]
