"""Networks against outputs of the reference in float64, with weights that depend on shape only."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax import models
from sgd_sparse_jax.models import from_linen
from sgd_sparse_jax.train import cross_entropy

pytestmark = pytest.mark.usefixtures("quick_compilation")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "deep_nets.json").read_text())
MOVED = (
    "The network no longer computes what the reference's PyTorch code does. If that was meant, "
    "say in the pull request which layer changed, and record tests/golden/deep_nets.json again."
)
L2 = 5e-4


def fill(path, leaf):
    """Weights that depend on name and shape only, as for the golden file."""
    name, shape = path[-1].key, leaf.shape
    if name == "kernel":
        primes = (1000003, 10007, 101, 1) if len(shape) == 4 else (1000003, 10007)
        rng = np.random.RandomState((7 + np.dot(shape, primes)) % 2**31)
        variance = 2 / np.prod(shape[:3]) if len(shape) == 4 else 1 / shape[0]
        return jnp.asarray(rng.randn(*shape) * np.sqrt(variance))
    j = np.arange(shape[0], dtype=np.float64)
    moments = {"mean": 0 * j, "var": 0 * j + 1, "key": np.arange(shape[0], dtype=np.uint32)}
    return jnp.asarray(({"bias": 0.1 * np.sin(j), "scale": 1 + 0.1 * np.cos(j)} | moments)[name])


n, h, w, c = np.ogrid[:8, :32, :32, :3]
WAVES = 0.37 * n + 0.11 * h * (1 + n % 3) + 0.23 * w + 1.9 * c + 0.05 * h * w * (n % 2)
X, Y = jnp.asarray(0.5 + 0.5 * np.sin(WAVES)), jnp.asarray((3 * np.arange(8) + 1) % 10)
QUICK = ("resnet18_plain", "resnet_tiny_gn")


def weights(model, shape):
    """Parameters and statistics by the rule of `fill`; compiling `init` takes ten seconds."""
    x = jax.ShapeDtypeStruct(shape, jnp.float64)
    params, stats = jax.eval_shape(from_linen(model).init, jr.key(0), x)
    return tuple(jax.tree_util.tree_map_with_path(fill, part) for part in (params, stats))


@pytest.mark.parametrize(
    "key", [key if key in QUICK else pytest.param(key, marks=pytest.mark.slow) for key in GOLDEN]
)
def test_networks_match_the_references_outputs_and_training(key):
    """Logits, features, and three steps with momentum and penalty."""
    golden = GOLDEN[key]
    name, options = key.removesuffix("_softplus"), {"softplus": 5 * key.endswith("_softplus")}
    model = models.build(name, classes=10, width=golden["width"], dtype=jnp.float64, **options)
    network, (params, stats) = from_linen(model), weights(model, X.shape)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == golden["params"]
    assert_golden = partial(np.testing.assert_allclose, rtol=1e-8, err_msg=MOVED)
    evaluated = jax.jit(network.apply)
    assert_golden(evaluated(params, stats, X).out[:2], golden["eval_logits"][:2])

    tx = optax.chain(optax.add_decayed_weights(L2), optax.sgd(0.05, 0.9))

    def loss_and_logits(params, stats):
        out, _, stats = network.apply(params, stats, X, train=True)
        return cross_entropy(out, Y).mean(), (out, stats)

    @jax.jit
    def train(params, stats, opt_state):
        (loss, (logits, stats)), grads = jax.value_and_grad(loss_and_logits, has_aux=True)(
            params, stats
        )
        penalty = 0.5 * L2 * optax.tree.norm(params, squared=True)
        norm = optax.tree.norm(jax.tree.map(lambda g, p: g + L2 * p, grads, params))
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), logits, loss, penalty, norm

    state, found, seen = (params, stats, tx.init(params)), [], []
    for _ in golden["losses"]:
        state, *values = train(*state)
        found.append(values)
        seen.append(state[1])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(seen)} <= {"float64"}
    assert_golden(found[0][0][:2], golden["train_logits"][:2])
    assert_golden([values[1:3] for values in found], golden["losses"])
    assert_golden([values[3] for values in found], golden["grad_norms"])
    if "feature_shape" not in golden:
        return  # the reference's VGG and Wide ResNet return no features
    features = evaluated(params, seen[0], X).features
    assert list(features) == [f"block{i}" for i in range(1, 6)]
    to_nchw = lambda shape: [shape[0], shape[-1], *shape[1:-1]]
    assert [to_nchw(phi.shape) for phi in features.values()] == golden["feature_shape"]
    # The reference uses the unbiased running variance, which changes these by up to .5 %; networks
    # without running moments must agree.
    rtol = 6e-3 if jax.tree.leaves(stats) else 1e-8
    means = [phi.mean() for phi in features.values()]
    np.testing.assert_allclose(means, golden["feature_mean"], rtol=rtol, err_msg=MOVED)
    positive = [(phi > 0).mean() for phi in features.values()]
    np.testing.assert_allclose(positive, golden["feature_positive_fraction"], rtol=rtol)


def test_init_is_he_normal_of_fan_out_and_uniform_of_fan_in():
    model = models.ResNet((1,), classes=1000)  # the stem has fans of 27 and 576
    params = jax.jit(model.init)(jr.key(3), jnp.zeros((1, 8, 8, 3), jnp.float32))["params"]
    np.testing.assert_allclose(params["Conv_0"]["kernel"].std(), np.sqrt(2 / (9 * 64)), rtol=6e-2)
    head = params["Dense_0"]["kernel"]
    np.testing.assert_allclose(jnp.abs(head).max(), 1 / np.sqrt(64), rtol=1e-3)
    np.testing.assert_allclose(head.std(), 1 / np.sqrt(3 * 64), rtol=1e-2)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    constants = {"bias": 0.0, "scale": 1.0}
    assert all((leaf == constants.get(path[-1].key, leaf)).all() for path, leaf in leaves)


def test_invalid_models_are_refused():
    for name, wrong in (
        ("resnet19", {}),
        ("resnet18_plain", {"dropout": 0.1}),
        ("resnet_tiny_gn", {"width": 5}),
    ):
        with pytest.raises(ValueError, match=[name, *wrong][-1]):
            models.build(name, classes=10, **wrong)


@pytest.mark.parametrize(
    ("name", "width", "classes", "count"),
    [
        ("densenet100_12", None, 10, 769_162),
        ("wrn28", 10, 100, 36_536_884),
        ("resnet18_plain", 64, 10, 11_173_962),
        ("resnet34", 64, 10, 21_282_122),
        ("resnet18", 64, 2, 11_172_170 - 9 * 513),  # one logit for two classes
    ],
)
def test_published_counts_of_parameters(name, width, classes, count):
    variables, *_ = shapes(name, (1, 32, 32, 3), classes=classes, width=width)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count


def shapes(name, shape, **options):
    """Shapes of variables, logits and features."""
    model = models.build(name, **options)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    (logits, features), variables = jax.eval_shape(model.init_with_output, jr.key(0), x)
    return variables, logits, features


@pytest.mark.parametrize("name", models.NETWORKS)
def test_every_network_takes_grey_and_colour_images_of_28_32_and_64(name):
    """And vectors of 100 numbers, as images of one row (gaussians_binary)."""
    last = {}
    for shape in ((4, 28, 28, 1), (4, 32, 32, 3), (4, 64, 64, 3), (4, 1, 100, 1)):
        variables, logits, features = shapes(name, shape, classes=2, width=2, dtype=jnp.bfloat16)
        assert logits.shape == (4, 2) and logits.dtype == jnp.float32
        assert list(features) == [f"block{i}" for i in range(1, len(features) + 1)]
        assert all(phi.size for phi in features.values())
        assert features["block1"].dtype == jnp.bfloat16
        assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
        last[shape] = features
    # The stem of stride 2 gives 64 x 64 images the maps of 32 x 32 ones; VGG has no stem.
    small, large = last[4, 32, 32, 3], last[4, 64, 64, 3]
    factor = 2 if name == "vgg16" else 1
    of = lambda phi: (*(factor * n for n in phi.shape[1:3]), phi.shape[3])
    maps = [block for block, phi in small.items() if phi.ndim == 4]
    assert [large[block].shape[1:] for block in maps] == [of(small[block]) for block in maps]


def test_dropout_is_off_in_evaluation_and_a_function_of_the_state_in_training():
    net = {"classes": 3, "width": 2, "group_norm": True, "pre_activation": True}
    plain, model = (models.ResNet((1,), layers=models.Layers(dropout=d), **net) for d in (0.0, 0.5))
    x = jr.uniform(jr.key(1), (16, 8, 8, 3))
    params, stats = weights(model, x.shape)
    run = jax.jit(from_linen(model).apply, static_argnames="train")
    calm = run(params, stats, x)
    np.testing.assert_array_equal(calm.out, jax.jit(from_linen(plain).apply)(params, {}, x).out)
    jax.tree.map(np.testing.assert_array_equal, calm.stats, stats)
    first, again = (run(params, stats, x, train=True) for _ in range(2))
    np.testing.assert_array_equal(first.out, again.out)
    second = run(params, first.stats, x, train=True)
    assert jnp.abs(first.out - second.out).max() > 1e-3 < jnp.abs(first.out - calm.out).max()
    drop, ones = models.Dropout(0.3), jnp.ones((100, 1000))
    y, _ = drop.apply(drop.init(jr.key(0), ones), ones, True, mutable=["dropout"])
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.7], rtol=1e-15)
    np.testing.assert_allclose((y == 0).mean(), 0.3, atol=0.005)


def test_vgg_reads_grey_images_as_three_equal_channels():
    model = models.build("vgg16", classes=3, width=2)
    grey = jr.uniform(jr.key(1), (2, 28, 28, 1), jnp.float32)
    params, _ = weights(model, grey.shape)
    run = jax.jit(lambda x: model.apply({"params": params}, x)[0])
    np.testing.assert_array_equal(run(grey), run(jnp.concatenate([grey] * 3, -1)))
