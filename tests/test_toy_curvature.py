"""Curvature of toy nets: against dense Hessians, and without effect on the runs it measures."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments import diag_nets
from experiments.storage import records
from experiments.toy import problems
from experiments.toy.curvature import make_curvature
from experiments.toy.run import parameters
from sgd_sparse_jax import train
from sgd_sparse_jax.types import Batch

pytestmark = pytest.mark.usefixtures("quick_compilation")

MAKE = {
    "diagonal": lambda: problems.diagonal(n=12, d=16, support=3),
    "two-layer": problems.two_layer,
    "three-layer": problems.three_layer,
}


@cache
def measured(name, batch_size):
    """A toy, weights at which nothing is special, and their curvature."""
    toy = MAKE[name]()
    network = toy.network(1.0)
    flat, unravel = ravel_pytree(network.init(jax.random.key(3), toy.train.x)[0])
    params = unravel(flat + 0.3 * jax.random.normal(jax.random.key(4), flat.shape))
    return toy, params, jax.jit(make_curvature(toy, batch_size))(params)


def derivatives(name):
    """Gradients [n, p] and dense Hessians [n, p, p] of the loss of every training example."""
    toy, params, _ = measured(name, 1)
    flat, unravel = ravel_pytree(params)
    objective = train.make_objective(toy.network(1.0), toy.loss)
    loss = lambda flat, x, y: objective(unravel(flat), {}, Batch(x[None], y[None]))[0]
    each = lambda of: np.asarray(jax.jit(jax.vmap(of(loss), (None, 0, 0)))(flat, *toy.train))
    return each(jax.grad), each(jax.hessian)


@pytest.mark.parametrize("name", MAKE)
def test_sharpness_and_trace_are_those_of_the_dense_hessian(name):
    found = measured(name, len(MAKE[name]().train.y))[2]
    gradients, hessians = derivatives(name)
    gradient, hessian = gradients.mean(0), hessians.mean(0)
    np.testing.assert_allclose(found["sharpness"], np.linalg.eigvalsh(hessian)[-1], rtol=1e-8)
    np.testing.assert_allclose(found["trace"], np.trace(hessian), rtol=1e-10)
    assert found["sharpness_residual"] < 1e-4
    # One batch, of all examples: the Rayleigh quotient of the full gradient.
    rayleigh = gradient @ hessian @ gradient / (gradient @ gradient)
    for gauge in ("batch_sharpness", "ratio_of_means"):
        np.testing.assert_allclose(found[gauge], rayleigh, rtol=1e-10)
        assert found[f"{gauge}_error"] == 0


def test_sharpness_of_a_diagonal_net_has_a_closed_form():
    """Of one example x with residual r: H = [[xx^T * vv^T, r x I + ...], ...], at u = v."""
    toy = problems.diagonal(n=1, d=5, support=2)
    x, y = np.asarray(toy.train.x)[0], float(toy.train.y[0])
    w = np.linspace(0.2, 1.0, 5)
    r = w**2 @ x - y
    # In (u + v, u - v) / sqrt(2) the blocks are 2 (x w)(x w)^T + r diag(x) and -r diag(x).
    blocks = 2 * np.outer(x * w, x * w) + r * np.diag(x), -r * np.diag(x)
    top = max(np.linalg.eigvalsh(block)[-1] for block in blocks)
    found = jax.jit(make_curvature(toy, 1))({"u": jnp.array(w), "v": jnp.array(w)})
    np.testing.assert_allclose(found["sharpness"], top, rtol=1e-8)


@pytest.mark.parametrize("name", ["diagonal", "two-layer"])
def test_batch_sharpness_is_exact_for_one_example_and_has_its_error_for_more(name):
    gradients, hessians = derivatives(name)

    def gauges(g, h):
        """Both means, and for each the deviation of one batch, of first order."""
        bends, squares = np.einsum("bi,bij,bj->b", g, h, g), (g**2).sum(1)
        ratio = bends.mean() / squares.mean()
        return {
            "batch_sharpness": ((bends / squares).mean(), (bends / squares).std()),
            "ratio_of_means": (ratio, (bends - ratio * squares).std() / squares.mean()),
        }

    single = measured(name, 1)[2]
    for gauge, (mean, _) in gauges(gradients, hessians).items():
        np.testing.assert_allclose(single[gauge], mean, rtol=1e-9)
        assert single[f"{gauge}_error"] == 0
    i, j = np.indices((len(gradients), len(gradients))).reshape(2, -1)
    of_two = measured(name, 2)[2]  # from 64 batches
    pairs = gauges((gradients[i] + gradients[j]) / 2, (hessians[i] + hessians[j]) / 2)
    for gauge, (mean, deviation) in pairs.items():
        assert abs(of_two[gauge] - mean) < 4 * deviation / 8
        np.testing.assert_allclose(of_two[f"{gauge}_error"], deviation / 8, rtol=0.5)


def test_batches_without_a_gradient_are_left_out():
    toy, params, _ = measured("diagonal", 1)
    silent = Batch(toy.train.x.at[0].set(0.0), toy.train.y)
    others = Batch(toy.train.x[1:], toy.train.y[1:])
    of = lambda batch: jax.jit(make_curvature(toy._replace(train=batch), 1))(params)
    found, expected = of(silent), of(others)
    for gauge in ("batch_sharpness", "ratio_of_means"):
        np.testing.assert_allclose(found[gauge], expected[gauge], rtol=1e-12)


CONFIG = diag_nets.Config(
    step_sizes=(0.1, 0.4, 50.0),
    decay_times=(1.0, 0.5, 1.0),
    decay_factors=(1.0, 4.0, 1.0),
    warmup_gains=(0.0,) * 3,
    batch_sizes=(1, 20, 1),
    seeds=3,
    num_steps=400,
    spectra_records=6,
    n=20,
    d=30,
    support=3,
)


@pytest.fixture(scope="module")
def with_curvature(unrendered, tmp_path_factory):
    runs_dir = str(tmp_path_factory.mktemp("curvature"))
    return diag_nets.run(replace(CONFIG, curvature=True, runs_dir=runs_dir)).dataset


@pytest.fixture(scope="module")
def without(unrendered, tmp_path_factory):
    config = replace(CONFIG, runs_dir=str(tmp_path_factory.mktemp("plain")))
    return config, diag_nets.run(config)


def test_measuring_curvature_changes_no_bit_of_a_run(with_curvature, without):
    dataset = without[1].dataset
    assert with_curvature[list(dataset)].identical(dataset)
    added = set(with_curvature) - set(dataset)
    assert {"sharpness", "trace", "batch_sharpness", "edge"} <= added


def test_records_have_the_curvature_and_the_edge_of_their_step(with_curvature):
    edge = with_curvature["edge"]
    np.testing.assert_allclose(edge[0], 2 / 0.1)
    late = edge["spectra_step"] > 200  # a diagonal net decays after its boundary step
    np.testing.assert_allclose(edge[1], np.where(late, 8 / 0.4, 2 / 0.4))
    toy = problems.diagonal(n=20, d=30, support=3)
    for schedule, batch_size in ((0, 1), (1, 20)):
        end = with_curvature["theta"].sel(end="end").values[2, schedule]
        for name, value in jax.jit(make_curvature(toy, batch_size))(parameters(toy, end)).items():
            np.testing.assert_allclose(
                with_curvature[name][2, schedule, -1], value, rtol=1e-6, atol=1e-6
            )
    assert np.isnan(with_curvature["sharpness"][:, 2, -1]).all()  # diverged


def test_a_folder_that_is_older_than_the_flag_is_read_without_it(without, capsys):
    config, before = without
    path = before.folder / "config.json"
    saved = records.read_json(path)
    assert saved.pop("curvature") is False
    records.write_json(path, saved)
    assert diag_nets.run(config).dataset.identical(before.dataset)
    assert "finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="curvature false -> true"):
        diag_nets.run(replace(config, curvature=True))
