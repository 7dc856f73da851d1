"""Networks against the reference's outputs in float64, with weights that depend on shape alone."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.tree_util import DictKey

from sgd_sparse_jax import models
from sgd_sparse_jax._types import Batch, TrainState
from sgd_sparse_jax.train import cross_entropy, make_objective, make_step

GOLDEN = json.loads((Path(__file__).parent / "golden" / "deep_nets.json").read_text())
MOVED = (
    "The network no longer computes what the reference's PyTorch code does. If that was meant, "
    "say in the pull request which layer changed, and record tests/golden/deep_nets.json again."
)
L2 = 5e-4


def fill(path, leaf):
    """Weights that depend on name and shape alone, as the golden file was recorded with."""
    name, shape = path[-1].key, leaf.shape
    if name == "kernel" and len(shape) == 4:
        h, w, i, o = shape
        rng = np.random.RandomState((7 + h * 1000003 + w * 10007 + i * 101 + o) % 2**31)
        return jnp.asarray(rng.randn(*shape) * np.sqrt(2 / (h * w * i)))
    if name == "kernel":
        i, o = shape
        rng = np.random.RandomState((7 + i * 1000003 + o * 10007) % 2**31)
        return jnp.asarray(rng.randn(i, o) / np.sqrt(i))
    j = jnp.arange(shape[0], dtype=jnp.float64)
    return {"bias": 0.1 * jnp.sin(j), "scale": 1 + 0.1 * jnp.cos(j)}[name]


def images_and_labels():
    n, h, w, c = np.ogrid[:8, :32, :32, :3]
    waves = 0.37 * n + 0.11 * h * (1 + n % 3) + 0.23 * w + 1.9 * c + 0.05 * h * w * (n % 2)
    return jnp.asarray(0.5 + 0.5 * np.sin(waves)), jnp.asarray((3 * np.arange(8) + 1) % 10)


X, Y = images_and_labels()


def filled(name):
    model = models.build(name, classes=10, width=GOLDEN[name]["width"], dtype=jnp.float64)
    variables = dict(jax.jit(model.init)(jr.key(0), X))
    params = jax.tree_util.tree_map_with_path(fill, variables.pop("params"))
    return model, params, variables


@pytest.fixture(scope="module", params=["resnet18_plain"])
def net(request):
    return GOLDEN[request.param], *filled(request.param)


def test_count_of_parameters(net):
    golden, _, params, _ = net
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == golden["params"]


def test_logits(net):
    golden, model, params, stats = net
    evaluated = jax.jit(model.apply)({"params": params, **stats}, X)[0]
    np.testing.assert_allclose(evaluated[:2], golden["eval_logits"][:2], rtol=1e-8, err_msg=MOVED)
    train = lambda p, s: model.apply({"params": p, **s}, X, train=True, mutable=list(s))
    (logits, _), moved = jax.jit(train)(params, stats)
    np.testing.assert_allclose(logits[:2], golden["train_logits"][:2], rtol=1e-8, err_msg=MOVED)
    _, features = jax.jit(model.apply)({"params": params, **moved}, X)
    assert list(features) == [f"block{i}" for i in range(1, 6)]
    to_nchw = lambda shape: [shape[0], shape[-1], *shape[1:-1]]
    assert [to_nchw(phi.shape) for phi in features.values()] == golden["feature_shape"]
    # The reference keeps the unbiased running variance, which alone moves these by up to .2 %.
    means = [phi.mean() for phi in features.values()]
    np.testing.assert_allclose(means, golden["feature_mean"], rtol=5e-3, err_msg=MOVED)
    positive = [(phi > 0).mean() for phi in features.values()]
    np.testing.assert_allclose(positive, golden["feature_positive_fraction"], rtol=5e-3)


def test_three_training_steps(net):
    golden, model, params, stats = net
    tx = optax.chain(optax.add_decayed_weights(L2), optax.sgd(0.05, 0.9))
    step = make_step(model, cross_entropy, tx)
    objective = make_objective(model, cross_entropy)

    @jax.jit
    def measured(state: TrainState):
        penalty = lambda p: 0.5 * L2 * sum((leaf**2).sum() for leaf in jax.tree.leaves(p))
        total = lambda p: objective(p, state.stats, Batch(X, Y))[0] + penalty(p)
        norm = optax.tree.norm(jax.grad(total)(state.params))
        state_after, loss = step(state, Batch(X, Y))
        return state_after, loss, penalty(state.params), norm

    state = TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params), ())
    for (loss, penalty), norm in zip(golden["losses"], golden["grad_norms"], strict=True):
        state, *ours = measured(state)
        np.testing.assert_allclose(ours, [loss, penalty, norm], rtol=1e-8, err_msg=MOVED)
    np.testing.assert_array_equal(state.step, 3)


def test_running_moments_follow_the_precision():
    for dtype, stored in (
        (jnp.float64, "float64"),
        (jnp.float32, "float32"),
        (jnp.bfloat16, "float32"),
    ):
        model = models.build("resnet18_plain", classes=3, width=2, dtype=dtype)
        out = jax.eval_shape(model.init, jr.key(0), jnp.zeros((2, 28, 28, 1), jnp.float32))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(out)} == {stored}
        logits, features = jax.eval_shape(model.apply, out, jnp.zeros((2, 28, 28, 1), jnp.float32))
        assert logits.dtype.name == stored and logits.shape == (2, 3)
        assert features["block1"].dtype == dtype


def test_init_is_he_normal_of_fan_out_and_uniform_of_fan_in():
    model = models.build("resnet18_plain", classes=1000, width=64)
    params = jax.jit(model.init)(jr.key(3), jnp.zeros((1, 32, 32, 3), jnp.float32))["params"]
    kernel = params["BasicBlock_7"]["Conv_1"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 512)), rtol=1e-2)
    head = params["Dense_0"]["kernel"]
    np.testing.assert_allclose(jnp.abs(head).max(), 1 / np.sqrt(512), rtol=1e-3)
    np.testing.assert_allclose(head.std(), 1 / np.sqrt(3 * 512), rtol=1e-2)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert all((leaf == 0).all() for path, leaf in leaves if path[-1] == DictKey("bias"))
    assert all((leaf == 1).all() for path, leaf in leaves if path[-1] == DictKey("scale"))


@pytest.mark.parametrize("wrong", [{"name": "resnet19"}, {"width": 0}, {"classes": 0}])
def test_what_cannot_be_built_is_refused(wrong):
    with pytest.raises(ValueError, match=r"resnet18_plain|1 or more"):
        models.build(**({"name": "resnet18_plain", "classes": 10, "width": 8} | wrong))
