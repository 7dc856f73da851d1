"""Toy runs against recorded ones of the paper's NumPy and PyTorch code.

All of them are stable: a relative change of 1e-12 of the initialization moves the last loss by
2e-11, so that rounding, at 1e-16 a step, stays far below the tolerances.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax import measure, train
from sgd_sparse_jax.data import sparse_regression
from sgd_sparse_jax.models import MLP, DiagonalNet, from_linen
from sgd_sparse_jax.types import Batch

FOLDER = Path(__file__).parent / "golden"
RUNS = json.loads((FOLDER / "fc_nets.json").read_text())
SGD, DESCENT = (np.load(FOLDER / f"diag_{of}.npz", allow_pickle=False) for of in ("sgd", "gd"))
MOVED = (
    "The run no longer matches the original code. If the dynamics were meant to change, say in "
    "the pull request which equation changed, and record tests/golden again."
)
NETWORKS = {  # and threshold of feature sparsity
    "regression_1d_decay02": (from_linen(MLP((100,), biases=(True, False))), 0.999),
    "two_layer_decay00": (from_linen(MLP((20,), biases=False)), 0.99),
    "three_layer_decay00": (from_linen(MLP((10, 10))), 0.99),
}
every_network = pytest.mark.parametrize("name", list(NETWORKS))


class Run(NamedTuple):
    train: np.ndarray  # losses before each of the recorded steps
    test: np.ndarray
    params: dict  # likewise


def trained(network, loss, tx, sampler, data, at, num_steps, params=None):
    """The Run with its records at the steps `at`; traceable."""
    x, y = data[0]

    def record(state):
        of = lambda x, y: loss(network.apply(state.params, {}, x).out, y).mean()
        return Run(*(of(*part) for part in data), state.params)

    step = train.make_step(train.make_objective(network, loss), tx)
    segment = train.make_segment(step, lambda key, idx: Batch(x[idx], y[idx]))
    state = train.init_state(jr.key(0), network, tx, x, params=params)
    probe = train.Probe(record, at)
    return train.record_run(jr.key(0), sampler, segment, state, [probe], num_steps)[1][0]


def assert_same(actual, recorded, **tolerance):
    np.testing.assert_allclose(actual, recorded, **tolerance, err_msg=MOVED)


def assert_same_diagonal_run(recorded, step_size, sampler, problem, **close):
    """Of 100,001 steps, the last of which is not recorded; returns its parameters."""
    tx, data = optax.sgd(step_size), [Batch(*map(jnp.asarray, part)) for part in problem[:2]]
    rest = tx, sampler, data, recorded["record_steps"], 100_001
    run = jax.jit(lambda: trained(from_linen(DiagonalNet(0.1)), train.half_squared, *rest))()
    assert_same(run.train, recorded["train_loss"], rtol=1e-9, atol=1e-20)
    assert_same(run.test, recorded["test_loss"], rtol=1e-9)
    last = {name: layer[-1] for name, layer in run.params.items()}
    for name, layer in last.items():
        assert_same(layer, recorded[f"{name}_final"], **close)
    return last


def test_sgd_on_a_diagonal_net_and_what_is_measured_on_its_last_parameters():
    # The reference draws its single-example batches from NumPy's legacy generator with seed 1.
    order = jnp.asarray(np.random.RandomState(1).randint(0, 80, size=100_001)[:, None])
    problem, close = sparse_regression(0), {"rtol": 1e-8, "atol": 1e-12}
    last = assert_same_diagonal_run(SGD, 0.25, train.recorded(order), problem, **close)
    jacobian = measure.diagonal_net_jacobian(jnp.asarray(problem.test.x[:400]), **last)
    ranks = [measure.numerical_rank(jacobian, tolerance) for tolerance in (1e-15, 1e-4)]
    assert [measure.support_size(**last), *ranks] == [200, 200, 147]


def test_gradient_descent_on_a_diagonal_net():
    """At its end rounding leaves a loss of 1e-33."""
    problem = sparse_regression(0, n=40, d=100, support=20)
    assert_same_diagonal_run(DESCENT, 2.0, train.full_batch(40), problem, atol=1e-9)


@functools.cache
def golden(name: str) -> dict[str, jax.Array]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: jnp.asarray(arrays[key]) for key in arrays if key != "meta"}


def parameters(name: str, which: str):
    """torch's [out, in] weights, in the order of their names, as layer1, layer2 …"""
    names, params = RUNS[name]["names"], {}
    counts_from_zero = any(".0." in entry for entry in names)
    for i, entry in enumerate(names):
        layer = int("".join(filter(str.isdigit, entry))) + counts_from_zero
        leaf = "kernel" if entry.endswith("weight") else "bias"
        params.setdefault(f"layer{layer}", {})[leaf] = golden(name)[f"{which}_{i}"].T
    return params


@functools.cache
def sgd_run(name: str) -> Run:
    """With the original's initialization and order of examples."""
    meta, arrays, steps = RUNS[name], golden(name), RUNS[name]["num_iter"]
    gain = meta["warmup_factor"] - 1.0 if meta["warmup_fraction"] > 0 else 0.0
    warm = train.power_warmup(meta["gamma"], gain, meta["warmup_exponent"], steps)
    decays = [meta["threshold"]] if meta["threshold"] else []
    tx = optax.sgd(train.piecewise_decay(warm, decays, [meta["decay"]] * len(decays)))
    sampler = train.recorded(arrays["indices"][:, None])
    data = [Batch(arrays[f"x_{of}"], arrays[f"y_{of}"][:, 0]) for of in ("train", "test")]
    rest = NETWORKS[name][0], train.squared, tx, sampler, data, np.array(meta["record_steps"])
    return jax.device_get(
        jax.jit(lambda start: trained(*rest, steps, start))(parameters(name, "init"))
    )


@every_network
def test_recorded_losses_and_final_parameters(name):
    run, meta = sgd_run(name), RUNS[name]
    assert_same(run.train, meta["train_loss"], rtol=1e-8)
    assert_same(run.test, meta["test_loss"], rtol=1e-8)
    last = jax.tree.map(lambda leaf: leaf[-1], run.params)
    same = functools.partial(assert_same, rtol=1e-8, atol=1e-8)
    jax.tree.map(same, last, parameters(name, "final"))


@every_network
def test_final_feature_sparsity(name):
    (network, corr_threshold), meta, x = NETWORKS[name], RUNS[name], golden(name)["x_train"]

    @jax.jit
    def sparsity(params):
        of = functools.partial(measure.feature_sparsity, corr_threshold=corr_threshold, signed=True)
        features = network.apply(params, {}, x).features
        return {layer: of(measure.unit_rows(phi))[1] for layer, phi in features.items()}

    for layer, actual in sparsity(parameters(name, "final")).items():
        expected = meta.get("feature_sparsity", meta.get(f"feature_sparsity_{layer}"))
        np.testing.assert_allclose(actual, expected, rtol=1e-12, err_msg=layer)


@every_network
def test_jacobian_ranks(name):
    """Of records and final weights; with two layers, the smaller Jacobian has the same."""
    network, arrays, final = NETWORKS[name][0], golden(name), parameters(name, "final")
    count = sum(leaf.size for leaf in jax.tree.leaves(final))
    x, x_test = arrays["x_train"], arrays["x_test"]
    line = lambda n: jnp.linspace(x.min(), x.max(), n)[:, None]
    points, fewer = (line(count), line(300)) if x.shape[1] == 1 else (x_test[:count], x_test[:60])

    def smaller(params):
        first, outgoing = params["layer1"], params["layer2"]["kernel"][:, 0]
        return measure.two_layer_jacobian(fewer, first["kernel"], outgoing, first.get("bias"))

    @jax.jit
    @jax.vmap
    def ranks(params):
        whole = measure.jacobian(lambda p, x: network.apply(p, {}, x).out, params, points)
        jacobians = [whole] if len(params) > 2 else [whole, smaller(params)]
        return [measure.numerical_rank(jacobian, 1e-4) for jacobian in jacobians]

    join = lambda records, last: jnp.concatenate([records, last[None]])
    expected = RUNS[name]["jacobian_rank"]
    for rank in ranks(jax.tree.map(join, sgd_run(name).params, final)):
        np.testing.assert_array_equal(rank, [*expected, expected[-1]])
