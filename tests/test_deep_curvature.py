"""Curvature in the rows of a classifier's run: what it is, and that it changes nothing else."""

import contextlib
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.flatten_util import ravel_pytree

from experiments.deep import curves, setup, training, workbench
from experiments.deep.config import Config
from experiments.launch import cli
from experiments.storage import records
from sgd_sparse_jax import train
from sgd_sparse_jax.data import images as images_of

CIFAR = images_of.STORED["cifar10"]
pytestmark = pytest.mark.usefixtures("shallow", "single_precision")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Flags for 32 random images of 8 x 8 pixels, for dense Hessians in seconds."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (root / "cifar10").mkdir()
    for split in ("train", "test"):
        images = rng.integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
        np.save(root / "cifar10" / f"{split}_images.npy", images)
        np.save(root / "cifar10" / f"{split}_labels.npy", rng.integers(0, 10, 32, dtype=np.int32))
    flags = (
        "--model=shallow --model_width=2 --batch_size=32 --batch_size_eval=16 --epochs=4 "
        "--max_steps=3 --lr_init=0.05 --lr_schedule=constant --eval_iter_freq=1 --n_final_eval=5 "
        "--sparsity_images=7 --bn_images=32 --curvature_every=2 --curvature_examples=32 "
        "--curvature_eigenvalues=2 --l2_reg=0.1 --momentum=0.5 "
        f"--deterministic --data_dir={root}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(images_of.STORED, "cifar10", CIFAR._replace(shape=(8, 8, 3)))
        yield cli.parse(Config, flags.split())


@contextlib.contextmanager
def on_devices(count):
    """Runs use the first `count` of the eight devices."""
    mesh = train.data_mesh(jax.devices()[:count])
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False):
        patch.setattr(train, "data_mesh", lambda: mesh)
        patch.setattr(workbench, "_latest", {})
        yield


def on(count, base, root):
    """The same run without curvature, with it, with it at other steps, and stopped on the way."""
    starts = {
        "off": [{"curvature_every": 0}],
        "often": [{}],
        "seldom": [{"curvature_every": 3}],
        "cut": [{"max_steps": 2}, {}],
    }
    with on_devices(count):
        return {
            name: [training.run(replace(base, runs_dir=str(root / name), **c)) for c in changes][-1]
            for name, changes in starts.items()
        }


@pytest.fixture(scope="module")
def one(base, shallow, tmp_path_factory):
    return on(1, base, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def four(base, shallow, tmp_path_factory):
    return on(4, base, tmp_path_factory.mktemp("four"))


@pytest.fixture(params=["four", pytest.param("one", marks=pytest.mark.slow)])
def folders(request):
    return request.getfixturevalue(request.param)


def curved_steps(folder):
    return [row["step"] for row in records.read_records(folder) if "curvature/edge" in row]


def test_curvature_changes_neither_weights_nor_other_columns(folders):
    """Bit for bit, on one device and on four."""
    steps = {name: curved_steps(folder) for name, folder in folders.items()}
    assert steps == {"off": [], "often": [0, 2, 3], "seldom": [0, 3], "cut": [0, 2, 3]}
    states, columns = [], []
    for folder in folders.values():
        read = ocp.StandardCheckpointer().restore
        states.append(read(folder / "checkpoints" / "3" / "default"))
        rows = records.read_records(folder)
        without = [{k: v for k, v in row.items() if not k.startswith("curvature/")} for row in rows]
        columns.append(without)
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, state, states[0])
    assert columns[1:] == columns[:-1] and len(columns[0]) == 4


def test_a_row_depends_on_the_state_alone(folders):
    """A run that was stopped and resumed, and one with curvature at other steps, have the same."""
    rows = {name: records.read_records(folder) for name, folder in folders.items()}
    assert rows["cut"] == rows["often"]
    assert rows["seldom"][-1] == rows["often"][-1] and rows["seldom"][1] == rows["off"][1]


@pytest.fixture(scope="module")
def both_modes(four, base, tmp_path_factory):
    """The plan, last state and last row of a run in each mode; batches are all 32 images."""
    runs_dir, found = str(tmp_path_factory.mktemp("eval")), {}
    configs = {
        "train": replace(base, runs_dir=str(four["often"].parents[1])),
        "eval": replace(base, curvature_mode="eval", curvature_every=3, runs_dir=runs_dir),
    }
    with on_devices(4):
        for mode, config in configs.items():
            plan = setup.resolve(config)
            row = records.read_records(training.run(config))[-1]
            with train.open_checkpoints(plan.folder / "checkpoints") as checkpoints:
                state, _ = training.starting_state(plan, checkpoints)
            found[mode] = plan, jax.device_get(state), row
    return found


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def dense(plan, state, mode):
    """Parameters, gradient and Hessian of the cross-entropy on all images, in float64."""
    with jax.enable_x64(True):
        x, y = jnp.asarray(plan.images.images / 255.0), plan.images.labels
        layers = plan.model.layers._replace(dtype=jnp.float64)
        module = plan.model.clone(layers=layers)
        wide = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tree)
        params, unravel = ravel_pytree(wide(state.params))
        stats = wide(state.stats)

        def loss(params):
            options = {"train": True, "mutable": list(stats)} if mode == "train" else {}
            found = module.apply({"params": unravel(params), **stats}, x, **options)
            logits = (found[0] if mode == "train" else found)[0]
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

        # Reverse mode twice, a row at a time: XLA takes minutes over a vectorized convolution.
        row = jax.jit(jax.grad(lambda params, v: jax.grad(loss)(params) @ v))
        rows = np.stack([row(params, v) for v in np.eye(len(params))])
        return np.asarray(params), np.asarray(jax.grad(loss)(params)), rows


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_numbers_in_a_row_are_those_of_the_dense_hessian(both_modes, mode):
    """Of the cross-entropy without the penalty; batches of all images have no noise."""
    plan, state, row = both_modes[mode]
    params, gradient, hessian = dense(plan, state, mode)
    of = lambda name: row[f"curvature/{name}"]
    values = np.linalg.eigvalsh(hessian)[::-1]
    np.testing.assert_allclose([of("eigenvalue_1"), of("eigenvalue_2")], values[:2], rtol=1e-4)
    assert of("converged") and max(of("residual_1"), of("residual_2")) <= 1e-3
    assert of("products") >= 9
    assert abs(of("trace") - np.trace(hessian)) < 4 * of("trace_error")
    along = lambda step: step @ hessian @ step
    squared = gradient @ gradient
    for name in ("batch_sharpness", "ratio_of_means"):
        np.testing.assert_allclose(of(name), along(gradient) / squared, rtol=1e-3)
        assert of(f"{name}_error") < 1e-3 * abs(of(name))
    np.testing.assert_allclose(of("gradient_norm2"), squared, rtol=1e-4)
    assert of("gradient_noise_trace") < 1e-6 * squared
    (velocity,) = (part.trace for part in state.opt_state[1] if hasattr(part, "trace"))
    step = -0.05 * (0.5 * flat(velocity) + gradient + 0.1 * params)
    generalized = along(step) / -(step @ gradient)
    np.testing.assert_allclose(of("generalized_sharpness"), generalized, rtol=1e-3)
    np.testing.assert_allclose([of("edge"), of("batch_edge")], [60, 20], rtol=1e-6)


def test_the_modes_of_batch_norm_are_two_hessians_at_the_same_weights(both_modes):
    (_, state, row), (_, other_state, other) = both_modes["train"], both_modes["eval"]
    jax.tree.map(np.testing.assert_array_equal, state.params, other_state.params)
    assert abs(row["curvature/eigenvalue_1"] / other["curvature/eigenvalue_1"] - 1) > 0.05


def test_where_a_product_is_not_finite_the_row_has_no_curvature(base, both_modes, caplog):
    plan, state, _ = both_modes["train"]
    huge = jax.tree.map(lambda leaf: leaf * np.float32(1e30), state.params)
    with on_devices(4):
        huge = train.replicate(state._replace(params=huge), train.data_mesh())
        assert workbench.of(plan).curvature(plan)(huge) == {}
    assert "No curvature at step 3" in caplog.text


WRONG = [
    ({"curvature_every": 4, "eval_iter_freq": 3}, r"multiple of (\d+)", "curvature_every"),
    ({"curvature_every": 7, "eval_iter_freq": -1}, r"multiple of (\d+)", "curvature_every"),
    ({"curvature_examples": 12}, r"multiple of (\d+)", "curvature_examples"),
    ({"curvature_examples": 40}, r"choose (\d+) or less", "curvature_examples"),
]


@pytest.mark.parametrize(("wrong", "advice", "flag"), WRONG)
def test_invalid_flags_are_refused_before_anything_is_written(base, tmp_path, wrong, advice, flag):
    """The error names a value that works; without records of curvature, any value does."""
    config = replace(base, runs_dir=str(tmp_path), **wrong)
    with pytest.raises(ValueError, match=f"--{flag}") as refused:
        training.run(config)
    assert list(tmp_path.iterdir()) == []
    (value,) = re.findall(advice, str(refused.value))
    for works in (replace(config, **{flag: int(value)}), replace(config, curvature_every=0)):
        setup.validate(works)
        setup.resolve(works)


def test_figures_show_the_records_with_curvature(tmp_path, monkeypatch):
    """Between evaluations without it, and beside runs that have ended earlier."""
    drawn, keep = [], lambda self, *_, **__: drawn.append(self)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    names = ("train/loss", "test/loss", "train/error", "test/error", "train/distinct/block1")
    of = ("eigenvalue_1", "batch_sharpness", "trace", "edge", "batch_edge")
    folders = [tmp_path / name for name in "ab"]
    for folder, steps in zip(folders, (5, 3), strict=True):
        folder.mkdir()
        for step in range(steps):
            row = {"step": step, "epoch": step / 2} | dict.fromkeys(names, 0.5)
            curved = {f"curvature/{name}": step + i for i, name in enumerate(of, 1)}
            records.append_record(folder, row | (curved if step % 2 == 0 else {}))
    curves.one_run(folders[0], "one")
    axes = {ax.get_title(): ax for ax in drawn[0].axes}
    top, *_, batch_edge = axes["Sharpness"].get_lines()
    np.testing.assert_array_equal(top.get_xydata(), [[0, 1], [1, 3], [2, 5]])
    np.testing.assert_array_equal(batch_edge.get_ydata(), [5, 7, 9])
    curves.several_runs(tmp_path / "figure", {"both": folders}, "several")
    axes = {ax.get_title(): ax for ax in drawn[-1].axes}
    (line,) = axes["Largest eigenvalue"].get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[0, 1], [1, 3], [2, 5]])
