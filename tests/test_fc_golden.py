"""Fully connected nets against the paper's PyTorch code, gradient descent against its NumPy code.

All runs here are stable ones: a relative change of 1e-12 of the initialization moves the last
loss by 2e-11, so that rounding, at 1e-16 a step, stays far below the tolerance.
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

from sgd_sparse_jax import measure
from sgd_sparse_jax.data import sparse_regression
from sgd_sparse_jax.models import MLP, DiagonalNet, from_linen
from sgd_sparse_jax.train import (
    Probe,
    full_batch,
    half_squared,
    init_state,
    make_objective,
    make_segment,
    make_step,
    piecewise_decay,
    power_warmup,
    record_run,
    recorded,
    squared,
)
from sgd_sparse_jax.types import Batch

FOLDER = Path(__file__).parent / "golden"
RUNS = json.loads((FOLDER / "fc_nets.json").read_text())
DESCENT = np.load(FOLDER / "diag_gd.npz", allow_pickle=False)
MOVED = (
    "The run no longer matches the original code. If the dynamics were meant to change, say in "
    "the pull request which equation changed, and record tests/golden again."
)


class Golden(NamedTuple):
    model: MLP
    corr_threshold: float
    meta: dict
    arrays: dict


class Run(NamedTuple):
    train: np.ndarray  # losses before each of the recorded steps
    test: np.ndarray
    params: dict  # likewise


NETWORKS = {
    "regression_1d_decay02": (MLP((100,), biases=(True, False)), 0.999),
    "two_layer_decay00": (MLP((20,), biases=False), 0.99),
    "three_layer_decay00": (MLP((10, 10)), 0.99),
}
every_network = pytest.mark.parametrize("name", list(NETWORKS))


@functools.cache
def golden(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        return Golden(*NETWORKS[name], RUNS[name], dict(arrays))


def parameters(name: str, which: str):
    """torch's [out, in] weights, in the order of their names, as layer1, layer2 …"""
    params = {}
    _, _, meta, arrays = golden(name)
    counts_from_zero = any(".0." in entry for entry in meta["names"])
    for i, entry in enumerate(meta["names"]):
        layer = int("".join(filter(str.isdigit, entry))) + counts_from_zero
        leaf, key = arrays[f"{which}_{i}"], "kernel" if entry.endswith("weight") else "bias"
        params.setdefault(f"layer{layer}", {})[key] = jnp.asarray(leaf.T)
    return params


def batches(name: str) -> tuple[Batch, Batch]:
    arrays = golden(name).arrays
    batch = lambda part: Batch(
        jnp.asarray(arrays[f"x_{part}"]), jnp.asarray(arrays[f"y_{part}"][:, 0])
    )
    return batch("train"), batch("test")


def trained(model, loss, tx, sampler, params, train: Batch, test: Batch, at, num_steps) -> Run:
    def losses(state):
        of = lambda batch: loss(model.apply({"params": state.params}, batch.x)[0], batch.y).mean()
        return of(train), of(test)

    @jax.jit
    def run(key):
        fetch = lambda key, idx: Batch(train.x[idx], train.y[idx])
        segment = make_segment(make_step(make_objective(from_linen(model), loss), tx), fetch)
        state = init_state(key, from_linen(model), tx, train.x)
        state = state if params is None else state._replace(params=params)
        gauges = [Probe(losses, at), Probe(lambda state: state.params, at)]
        return record_run(key, sampler, segment, state, gauges, num_steps)

    _, (seen, thetas) = run(jr.key(0))
    return Run(*map(np.asarray, seen), thetas)


@functools.cache
def sgd_run(name: str) -> Run:
    model, _, meta, arrays = golden(name)
    steps = meta["num_iter"]
    gain = meta["warmup_factor"] - 1.0 if meta["warmup_fraction"] > 0 else 0.0
    warm = power_warmup(meta["gamma"], gain, meta["warmup_exponent"], steps)
    # The threshold is 0 where there is no decay.
    tx = optax.sgd(piecewise_decay(warm, [meta["threshold"] or steps], [meta["decay"]]))
    sampler = recorded(jnp.asarray(arrays["indices"])[:, None])
    train, test = batches(name)
    start, at = parameters(name, "init"), np.array(meta["record_steps"])
    return trained(model, squared, tx, sampler, start, train, test, at, steps)


@functools.cache
def descent() -> Run:
    problem = sparse_regression(0, n=40, d=100, support=20)
    train, test = (Batch(*map(jnp.asarray, part)) for part in problem[:2])
    model, at = DiagonalNet(0.1), DESCENT["record_steps"]
    return trained(
        model, half_squared, optax.sgd(2.0), full_batch(40), None, train, test, at, 100_001
    )


@every_network
def test_every_recorded_loss(name):
    run, meta = sgd_run(name), golden(name).meta
    np.testing.assert_allclose(run.train, meta["train_loss"], rtol=1e-8, err_msg=MOVED)
    np.testing.assert_allclose(run.test, meta["test_loss"], rtol=1e-8, err_msg=MOVED)


@every_network
def test_final_parameters(name):
    last = jax.tree.map(lambda leaf: leaf[-1], sgd_run(name).params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8, err_msg=MOVED),
        last,
        parameters(name, "final"),
    )


@every_network
def test_final_feature_sparsity(name):
    model, corr_threshold, meta, _ = golden(name)
    _, features = model.apply({"params": parameters(name, "final")}, batches(name)[0].x)
    for layer, phi in features.items():
        _, distinct = measure.feature_sparsity(measure.unit_rows(phi), corr_threshold, signed=True)
        only = meta.get("feature_sparsity")
        expected = meta[f"feature_sparsity_{layer}"] if only is None else only
        np.testing.assert_allclose(distinct, expected, rtol=1e-12, err_msg=layer)


@every_network
def test_jacobian_ranks(name):
    model, _, meta, arrays = golden(name)
    predict = lambda params, x: model.apply({"params": params}, x)[0]
    final = parameters(name, "final")
    count = sum(leaf.size for leaf in jax.tree.leaves(final))
    if name.startswith("regression_1d"):
        points = jnp.linspace(arrays["x_train"].min(), arrays["x_train"].max(), count)[:, None]
    else:
        points = jnp.asarray(arrays["x_test"][:count])
    rank = jax.jit(lambda p: measure.numerical_rank(measure.jacobian(predict, p, points), 1e-4))
    assert rank(final) == meta["jacobian_rank"][-1]
    at = [jax.tree.map(lambda leaf, i=i: leaf[i], sgd_run(name).params) for i in range(5)]
    assert [int(rank(params)) for params in at] == meta["jacobian_rank"]


@pytest.mark.parametrize("name", ["regression_1d_decay02", "two_layer_decay00"])
def test_the_smaller_jacobian_has_the_same_ranks(name):
    _, _, meta, arrays = golden(name)
    params = parameters(name, "final")
    first, outgoing = params["layer1"], params["layer2"]["kernel"][:, 0]
    low, high = arrays["x_train"].min(), arrays["x_train"].max()
    one_dimensional = arrays["x_train"].shape[1] == 1
    points = jnp.linspace(low, high, 300)[:, None] if one_dimensional else arrays["x_test"][:60]
    rows = measure.two_layer_jacobian(
        jnp.asarray(points), first["kernel"], outgoing, first.get("bias")
    )
    assert measure.numerical_rank(rows, 1e-4) == meta["jacobian_rank"][-1]


def test_gradient_descent_on_a_diagonal_net():
    train, test, params = descent()
    # The first 100 records are far above the floor; at the end rounding leaves a loss of 1e-33.
    assert DESCENT["train_loss"][:100].min() > 1e-5
    np.testing.assert_allclose(train, DESCENT["train_loss"], rtol=1e-9, atol=1e-20, err_msg=MOVED)
    np.testing.assert_allclose(test, DESCENT["test_loss"], rtol=1e-9, err_msg=MOVED)
    np.testing.assert_allclose(test[-1], 0.16824, rtol=1e-4)
    for name in ("u", "v"):
        np.testing.assert_allclose(params[name][-1], DESCENT[f"{name}_final"], atol=1e-9)
    assert measure.support_size(params["u"][-1], params["v"][-1]) == 100
