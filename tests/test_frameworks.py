"""One network in four frameworks is one network; docs/frameworks.md does what it says."""

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

PAGE = (Path(__file__).parents[1] / "docs" / "frameworks.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^#+ ([^\n]+)\n(.*?)(?=^#+ |\Z)", PAGE, re.DOTALL | re.MULTILINE))
pytestmark = pytest.mark.usefixtures("compiled_once")
FRAMEWORKS = ("Flax linen", "Flax NNX", "Equinox", "Haiku")


def blocks(title):
    return re.findall(r"```python\n(.*?)```", SECTIONS[title], re.DOTALL)


def namespace(*code):
    """What the page's blocks define, after `code`."""
    names = {}
    for block in [*blocks("Your data"), *code]:
        exec(block, names)
    return names


def each_framework(*quick):
    """Parametrizes by the page's names once the network of a framework is chosen."""
    marks = lambda framework: () if framework in quick else pytest.mark.slow
    params = [pytest.param(name, marks=marks(name)) for name in FRAMEWORKS]
    return pytest.mark.parametrize("page", params, indirect=True)


@pytest.fixture(scope="module")
def page(request):
    return namespace(blocks(request.param)[0])


def test_recipes_are_short():
    for title in (*FRAMEWORKS, "A sweep", "Feature sparsity", "A training run that resumes"):
        assert blocks(title)
        for block in blocks(title):
            adapter = re.search(r"^def from_.*?(?=^\S)(?<!def)", block, re.DOTALL | re.MULTILINE)
            adapter = adapter[0] if adapter else ""
            for part, most in ((adapter, 10), (block.replace(adapter, ""), 20)):
                assert len([line for line in part.splitlines() if line]) <= most


@each_framework("Equinox", "Flax NNX")
def test_a_sweep(page):
    exec(blocks("A sweep")[0], page)
    losses = page["losses"]
    assert losses.shape == (4, 2, 4)
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
WIDTHS = (4, 7, 5, 1)
LINEN = models.from_linen(models.MLP(WIDTHS[1:-1]))


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        make = partial(nnx.Linear, rngs=rngs, param_dtype=jnp.float64)
        self.layer1, self.layer2, self.layer3 = map(make, WIDTHS[:-1], WIDTHS[1:])

    def __call__(self, x):
        one = jax.nn.relu(self.layer1(x))
        two = jax.nn.relu(self.layer2(one))
        return self.layer3(two)[:, 0], {"layer1": one, "layer2": two}


class EquinoxMLP(eqx.Module):
    layers: list[eqx.nn.Linear]

    def __init__(self, key):
        keys = jr.split(key, 3)
        self.layers = [
            eqx.nn.Linear(*sizes, key=key)
            for *sizes, key in zip(WIDTHS[:-1], WIDTHS[1:], keys, strict=True)
        ]

    def __call__(self, x):
        one = jax.nn.relu(self.layers[0](x))
        two = jax.nn.relu(self.layers[1](one))
        return self.layers[2](two)[0], {"layer1": one, "layer2": two}


def haiku_mlp(x, train):
    one = jax.nn.relu(hk.Linear(7)(x))
    two = jax.nn.relu(hk.Linear(5)(one))
    return hk.Linear(1)(two)[:, 0], {"layer1": one, "layer2": two}


def observed(network: Network, params):
    """Losses of 100 steps of SGD; outputs, sparsity and the Jacobian's rank where they end."""
    tx = optax.sgd(0.02)
    step = train.make_step(train.make_objective(network, train.half_squared), tx)
    segment = train.make_segment(step, lambda key, idx: Batch(X[idx], Y[idx]), unroll=1)
    indices = jnp.asarray(np.random.default_rng(1).integers(0, 20, (100, 3)))

    @jax.jit
    def run(params):
        state = train.init_state(jr.key(1), network, tx, X, params=params)
        state, losses = segment(jr.key(3), state, indices)
        predict = lambda params, x: network.apply(params, state.stats, x).out
        outputs = network.apply(state.params, state.stats, X)
        return losses, outputs.out, outputs.features, measure.jacobian(predict, state.params, X)

    losses, out, features, rows = run(params)
    shares = [sparsity(phi) for phi in features.values()]
    return losses, out, shares, rank(rows), np.linalg.svd(rows, compute_uv=False)


sparsity = jax.jit(measure.feature_sparsity)
rank = jax.jit(partial(measure.numerical_rank, tol=1e-4))


@pytest.fixture(scope="module")
def linen_run():
    params, _ = jax.jit(LINEN.init)(jr.key(0), X)
    return params, observed(LINEN, params)


@pytest.mark.parametrize("framework", ["nnx", "equinox", "haiku"])
def test_the_same_weights_give_the_same_run_in_every_framework(framework, linen_run):
    weights, expected = linen_run
    layers = list(weights.values())
    if framework == "nnx":
        network, params = models.from_nnx(lambda key: NnxMLP(nnx.Rngs(key))), weights
    elif framework == "equinox":
        network = namespace(blocks("Equinox")[0])["from_equinox"](EquinoxMLP)
        params = [leaf for each in layers for leaf in (each["kernel"].T, each["bias"])]
    else:
        network = namespace(blocks("Haiku")[0])["from_haiku"](haiku_mlp)
        names = ("linear", "linear_1", "linear_2")
        params = {
            name: {"w": each["kernel"], "b": each["bias"]}
            for name, each in zip(names, layers, strict=True)
        }
    drawn, _ = jax.eval_shape(network.init, jr.key(0), X)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, drawn)
    found = observed(network, params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), found, expected)
    mean_loss = lambda out: np.square(out - Y).mean()
    assert mean_loss(expected[1]) < 0.9 * mean_loss(LINEN.apply(weights, {}, X).out)


class NeedsMode(nn.Module):
    """An argument `train` without a default, and no features."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(1)(x) * (2.0 if train else 1.0)


@pytest.mark.parametrize("module", [nn.Sequential([nn.Dense(3), nn.relu]), NeedsMode()])
def test_linen_modules_need_neither_features_nor_a_training_mode(module):
    network = models.from_linen(module)
    params, stats = network.init(jr.key(0), X)
    calm, busy = (network.apply(params, stats, X, train=train) for train in (False, True))
    assert stats == {} and calm.features == busy.features == {} and busy.stats == {}
    factor = 2.0 if isinstance(module, NeedsMode) else 1.0
    np.testing.assert_allclose(busy.out, factor * calm.out, rtol=1e-12)


class Normalized(nnx.Module):
    """BatchNorm and Dropout, in float64."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, param_dtype=jnp.float64, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 1, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(self.norm(x)))[:, 0]


def test_training_changes_the_stats_of_nnx_modules_evaluation_does_not_and_cuts_do_not_show():
    network = models.from_nnx(lambda key: Normalized(nnx.Rngs(key)))
    many, _ = jax.jit(jax.vmap(network.init, (0, None)))(jr.split(jr.key(0), 3), X)
    assert len({float(kernel.sum()) for kernel in many["last"]["kernel"]}) == 3
    params, stats = network.init(jr.key(0), X)
    assert network.apply(params, stats, X).stats is stats
    trained = jax.jit(partial(network.apply, train=True))
    first, second = trained(params, stats, X), trained(params, stats, X)
    np.testing.assert_array_equal(first.out, second.out)  # a function of the state
    assert (trained(params, first.stats, X).out != first.out).any()
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), stats, first.stats)
    assert moved["norm"] == {"mean": True, "var": True}
    assert {leaf.dtype for leaf in first.stats["norm"].values()} == {np.dtype("float64")}
    tx = optax.sgd(0.1)
    step = train.make_step(train.make_objective(network, train.half_squared), tx)
    segment = train.make_segment(step, lambda key, idx: Batch(X[idx], Y[idx]), unroll=1)
    state = train.init_state(jr.key(1), network, tx, X)
    indices = jnp.asarray(np.random.default_rng(1).integers(0, 20, (8, 5)))
    run = jax.jit(lambda state, rows: segment(jr.key(3), state, rows)[0])
    whole, part = run(state, indices), run(run(state, indices[:4]), indices[4:])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), part, whole)
