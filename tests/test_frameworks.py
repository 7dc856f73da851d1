"""The same network in four frameworks gives the same runs; docs/frameworks.md runs."""

import re
from functools import partial
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from flax import nnx

from sgd_sparse_jax import measure, models, train
from sgd_sparse_jax.types import Batch, Network

pytestmark = pytest.mark.usefixtures("quick_compilation")
PAGE = (Path(__file__).parents[1] / "docs" / "frameworks.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^#+ ([^\n]+)\n(.*?)(?=^#+ |\Z)", PAGE, re.DOTALL | re.MULTILINE))
FRAMEWORKS = ("Flax linen", "Flax NNX", "Equinox", "Haiku")


def blocks(title):
    return re.findall(r"```python\n(.*?)```", SECTIONS[title], re.DOTALL)


def namespace(*code):
    """The names defined by the page's blocks and then `code`."""
    names = {}
    for block in [*blocks("Your data"), *code]:
        exec(block, names)
    return names


def each_framework(*quick):
    """Parametrizes a test over the frameworks of the page."""
    marks = lambda framework: () if framework in quick else pytest.mark.slow
    params = [pytest.param(name, marks=marks(name)) for name in FRAMEWORKS]
    return pytest.mark.parametrize("page", params, indirect=True)


@pytest.fixture(scope="module")
def page(request):
    return namespace(blocks(request.param)[0])


def test_recipes_are_at_most_20_lines():
    code = [block for title in SECTIONS for block in blocks(title)]
    assert max(len(list(filter(None, block.splitlines()))) for block in code) <= 20


@each_framework("Equinox", "Flax NNX")
def test_a_sweep(page):
    exec(blocks("A sweep")[0], page)
    losses = page["losses"]
    assert losses.shape == (4, 2, 4) and len(np.unique(losses[:, 0, 0])) == 4  # seeds differ
    assert (losses[:, 0] != losses[:, 1])[:, 1:].all()
    assert (losses[..., -1].mean(0) < losses[..., 0].mean(0)).all()


@each_framework("Equinox", "Flax linen")
def test_feature_sparsity(page):
    exec(blocks("Feature sparsity")[0], page)
    outputs = page["network"].apply(page["params"], page["stats"], page["x"])
    phi, record = np.asarray(outputs.features["hidden"]), page["record"]
    assert record["active/hidden"] == pytest.approx((phi > 0).mean(), rel=1e-6)
    assert 0 < record["distinct/hidden"] <= record["active/hidden"]
    error = (outputs.out.argmax(-1) != page["y"]).mean()
    assert record["error"] == pytest.approx(float(error), rel=1e-6)


@each_framework("Haiku", "Flax NNX")
def test_a_run_that_is_stopped_and_resumed_is_the_whole_run(page, tmp_path):
    exec(blocks("A sweep")[0].splitlines()[0], page)
    exec(blocks("A training run that resumes")[0], page)
    whole = page["trained"](tmp_path / "whole", (3, 10))
    page["trained"](tmp_path / "cut", (3,))
    resumed = page["trained"](tmp_path / "cut", (3, 10))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_features_of_submodules_are_captured():
    page = namespace(*blocks("Flax linen"))
    x, network = page["x"], page["network"]
    params, stats = network.init(jr.key(0), x)
    out, features, _ = network.apply(params, stats, x)
    hidden = nn.Dense(16).apply({"params": params["hidden"]}, x)
    np.testing.assert_allclose(features["hidden"], hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out, page["Plain"]().apply({"params": params}, x))


X = jnp.asarray(np.random.default_rng(0).normal(size=(20, 4)))
Y = jnp.sin(X[:, 0]) + X[:, 1] * X[:, 2]


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.layer1 = nnx.Linear(4, 7, rngs=rngs, param_dtype=jnp.float64)
        self.layer2 = nnx.Linear(7, 1, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        hidden = jax.nn.relu(self.layer1(x))
        return self.layer2(hidden)[:, 0], {"layer1": hidden}


class EquinoxMLP(eqx.Module):
    layers: list[eqx.nn.Linear]

    def __init__(self, key):
        self.layers = [eqx.nn.Linear(4, 7, key=key), eqx.nn.Linear(7, 1, key=key)]

    def __call__(self, x):
        hidden = jax.nn.relu(self.layers[0](x))
        return self.layers[1](hidden)[0], {"layer1": hidden}


def haiku_mlp(x, train):
    hidden = jax.nn.relu(hk.Linear(7)(x))
    return hk.Linear(1)(hidden)[:, 0], {"layer1": hidden}


def segment_of(network, tx):
    step = train.make_step(train.make_objective(network, train.half_squared), tx)
    return train.make_segment(step, lambda key, idx: Batch(X[idx], Y[idx]), unroll=1)


def observed(network: Network, params):
    """Losses of 100 steps of SGD; outputs, sparsity and the Jacobian's rank where they end."""
    tx = optax.sgd(0.02)
    segment = segment_of(network, tx)
    indices = jnp.asarray(np.random.default_rng(1).integers(0, 20, (100, 3)))

    @jax.jit
    def run(params):
        state = train.init_state(jr.key(1), network, tx, X, params=params)
        state, losses = segment(jr.key(3), state, indices)
        out, features, _ = network.apply(state.params, state.stats, X)
        predict = lambda params, x: network.apply(params, state.stats, x).out
        rows = measure.jacobian(predict, state.params, X)
        sparsity = [measure.feature_sparsity(phi) for phi in features.values()]
        return losses, out, features, sparsity, rows

    *results, rows = run(params)
    rank = measure.numerical_rank(rows, tol=1e-4)
    return *results, rank, np.linalg.svd(rows, compute_uv=False)


def test_the_same_weights_give_the_same_run_in_every_framework():
    linen = models.from_linen(models.MLP((7,)))
    weights, _ = jax.jit(linen.init)(jr.key(0), X)
    expected = observed(linen, weights)
    assert expected[0][-20:].mean() < 0.9 * expected[0][:20].mean()
    first, last = weights.values()
    haiku = {"linear": first, "linear_1": last}
    haiku = {name: {"w": each["kernel"], "b": each["bias"]} for name, each in haiku.items()}
    equinox = [first["kernel"].T, first["bias"], last["kernel"].T, last["bias"]]
    for network, params in (
        (models.from_nnx(lambda key: NnxMLP(nnx.Rngs(key))), weights),
        (namespace(blocks("Equinox")[0])["from_equinox"](EquinoxMLP), equinox),
        (namespace(blocks("Haiku")[0])["from_haiku"](haiku_mlp), haiku),
    ):
        drawn, _ = jax.eval_shape(network.init, jr.key(0), X)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, drawn)
        found = observed(network, params)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), found, expected)


def test_linen_modules_need_neither_features_nor_a_training_mode():
    network = models.from_linen(nn.Sequential([nn.Dense(3), nn.relu]))
    params, stats = network.init(jr.key(0), X)
    calm, busy = (network.apply(params, stats, X, train=train) for train in (False, True))
    assert stats == {} and calm.features == busy.features == {} and busy.stats == {}
    np.testing.assert_array_equal(busy.out, calm.out)


class Normalized(nnx.Module):
    """BatchNorm and Dropout, in float64."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, param_dtype=jnp.float64, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 1, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(self.norm(x)))[:, 0]


def test_only_training_changes_stats_of_nnx_modules_also_if_resumed():
    network = models.from_nnx(lambda key: Normalized(nnx.Rngs(key)))
    params, stats = network.init(jr.key(0), X)
    assert (network.init(jr.key(1), X)[0]["last"]["kernel"] != params["last"]["kernel"]).all()
    assert network.apply(params, stats, X).stats is stats
    trained = jax.jit(partial(network.apply, train=True))
    first, second = trained(params, stats, X), trained(params, stats, X)
    np.testing.assert_array_equal(first.out, second.out)  # a function of the state
    assert (trained(params, first.stats, X).out != first.out).any()
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), stats, first.stats)
    assert moved["norm"] == {"mean": True, "var": True}
    assert {leaf.dtype for leaf in first.stats["norm"].values()} == {np.dtype("float64")}
    tx = optax.sgd(0.1)
    segment = segment_of(network, tx)
    state = train.init_state(jr.key(1), network, tx, X)
    indices = jnp.asarray(np.random.default_rng(1).integers(0, 20, (8, 5)))
    run = jax.jit(lambda state, rows: segment(jr.key(3), state, rows)[0])
    whole, part = run(state, indices), run(run(state, indices[:4]), indices[4:])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), part, whole)
