"""Strict JAX: broadcasting between ranks is an error; eight devices; float64 enabled."""

import contextlib
import os
import resource
import tempfile

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

os.environ["SGD_SPARSE_ALLOW_JAXLIB"] = "1"  # see tests/test_backend.py

from experiments.launch import devices  # refuses that jaxlib without the variable

devices.add_xla_flag(devices.KERNEL_GRADIENTS)  # convolution networks also compile faster
# Compiled programs are cached on disk for the session, for all workers and started commands.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory()  # of the first process, whose variable workers inherit
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}
# The suite draws the same examples every time; `--hypothesis-profile=explore` draws others.
settings.register_profile("explore", **SHARED)
settings.register_profile("repeatable", **SHARED, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def small_cifar(tmp_path_factory):
    """A data folder with 64 random images per split, in the layout of the decoded cache."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (root / "cifar10").mkdir(parents=True)
    for split in ("train", "test"):
        images = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
        np.save(root / "cifar10" / f"{split}_images.npy", images)
        np.save(root / "cifar10" / f"{split}_labels.npy", rng.integers(0, 10, 64, dtype=np.int32))
    return str(root)


@pytest.fixture(scope="module")
def unrendered():
    """Draws figures but writes empty files: rendering takes most of the time of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        empty = lambda self, target, **options: target.write(b"a figure")
        patch.setattr("matplotlib.figure.Figure.savefig", empty)
        yield


@pytest.fixture
def no_room():
    """`with no_room(size)`: writing more than `size` bytes to a file fails, as on a full disk."""

    @contextlib.contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def single_precision():
    """Float32, as in commands that train image classifiers."""
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def quick_compilation():
    """Halves the compile time of tests that compare programs with each other."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def shallow(quick_compilation):
    """One block instead of eight, to compile faster; the network is tested elsewhere."""
    from sgd_sparse_jax import models  # not above: pytest must enable the checks of shapes first

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.NETWORKS, "shallow", lambda **sizes: models.ResNet((1,), **sizes))
        yield
