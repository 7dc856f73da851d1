"""The installed jaxlib agrees with NumPy, and commands configure JAX as their flags specify."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib
import numpy as np
import pytest

from experiments.launch import devices

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_compiled_vmap_over_many_rows_computes_what_numpy_does(dtype):
    """jaxlib 0.10.2 gets most of 40,000 rows of width 3 wrong (jax issue 39103)."""
    rng = np.random.default_rng(0)
    m, r = (rng.standard_normal((n, 3)).astype(dtype) for n in (3, 40_000))
    expected, tolerance = abs(r @ m.T).max(-1), 1e3 * np.finfo(dtype).eps
    got = jax.jit(jax.vmap(lambda row: abs(m @ row).max()))(r)
    wrong = ~np.isclose(got, expected, rtol=tolerance, atol=tolerance)
    assert not wrong.any(), (
        f"jaxlib {jaxlib.version.__version__} computes |M r| wrong in {wrong.sum()} rows: "
        "install another, and exclude it in pyproject.toml."
    )


def python(*words, **env):
    """A Python process in the repository's root; a variable that is None is removed."""
    env = {name: value for name, value in (os.environ | env).items() if value is not None}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )


def test_a_jaxlib_that_computes_wrong_numbers_is_refused(tmp_path):
    (tmp_path / "jaxlib-0.10.2.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: jaxlib\nVersion: 0.10.2\n"
    (tmp_path / "jaxlib-0.10.2.dist-info" / "METADATA").write_text(metadata)
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = python("-m", "experiments.fc_nets", **path, SGD_SPARSE_ALLOW_JAXLIB=None)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "SGD_SPARSE_ALLOW_JAXLIB" in done.stderr
    assert python("-c", "import experiments", **path, SGD_SPARSE_ALLOW_JAXLIB="1").returncode == 0


def test_deterministic_sets_xla_flags_and_keeps_the_users(tmp_path):
    """Reads XLA's dump of a compilation after a command that failed for lack of data."""
    program = (
        "import jax\nfrom experiments import sweep_deep as command\n"
        f"try: command.main(['--deterministic', '--data_dir=.', '--runs_dir={tmp_path}'])\n"
        "finally: jax.jit(lambda x: x + 1)(1)"
    )
    done = python("-c", program, XLA_FLAGS=f"--xla_dump_to={tmp_path / 'dump'}")
    assert "cifar10" in done.stderr and "Traceback" not in done.stderr
    (options, *_) = (tmp_path / "dump").glob("*.debug_options")
    assert "xla_gpu_deterministic_ops: true" in options.read_text()


def test_deterministic_is_refused_on_gpus_that_were_started_without_it(monkeypatch):
    """By then XLA has read its flags; CPUs are deterministic anyway."""
    monkeypatch.setenv("XLA_FLAGS", "")
    count = jax.device_count()  # starts JAX
    devices.set_up_deep(deterministic=True)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for _ in range(2):
        with pytest.raises(ValueError, match="XLA_FLAGS"):
            devices.set_up_deep(deterministic=True)
    monkeypatch.setenv("XLA_FLAGS", devices.FIXED_ORDER)  # as the error advises
    devices.set_up_deep(deterministic=True)
    assert jax.device_count() == count


@pytest.mark.parametrize(
    ("env", "count"),
    [
        ({"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_ENABLE_X64": "0"}, len(os.sched_getaffinity(0))),
        ({"JAX_NUM_CPU_DEVICES": "3", "JAX_THREEFRY_PARTITIONABLE": "0"}, 3),
    ],
)
def test_toys_use_a_device_per_core_or_the_users_number_with_equal_results(env, count):
    program = (
        "from experiments.launch import devices\ndevices.set_up_toys()\nimport jax\n"
        "print(jax.device_count(), *jax.random.normal(jax.random.key(0), 3))"
    )
    done = python("-c", program, **{"XLA_FLAGS": None} | env)
    found, *numbers = map(float, done.stdout.split())
    assert found == count
    np.testing.assert_array_equal(numbers, jax.random.normal(jax.random.key(0), 3))


def test_a_jax_that_cannot_start_is_an_error_in_one_line(tmp_path):
    flags = ["--seeds=1", f"--runs_dir={tmp_path}"]
    done = python("-m", "experiments.diag_nets", *flags, JAX_PLATFORMS="cuda")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr


def test_folded_loops_give_the_same_bits():
    """Toys fold small loops into one function; a value in the user's XLA_FLAGS stays."""
    program = (
        "import os, jax\nfrom experiments.launch import devices\ndevices.set_up_toys()\n"
        "from benchmarks.toy_runs import make_run\nfrom experiments.toy import problems\n"
        "from sgd_sparse_jax import train\n"
        "loss = train.Probe(lambda state: state.params, range(0, 300, 7))\n"
        "run = make_run(problems.PROBLEMS['diagonal'](), 300, [loss])\n"
        "found = train.sweep(run, jax.random.split(jax.random.key(0), 3), jax.numpy.ones(2) / 8)\n"
        "print(*(leaf.tobytes().hex() for leaf in jax.tree.leaves(found)))\n"
        "print('threshold=1000000000' in os.environ['XLA_FLAGS'])"
    )
    unfolded = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=0"
    (a, folded), (b, other) = (
        python("-c", program, XLA_FLAGS=flags).stdout.splitlines() for flags in (None, unfolded)
    )
    assert (folded, other) == ("True", "False")
    assert a == b and len(a) > 10_000
