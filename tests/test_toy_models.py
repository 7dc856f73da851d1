"""The small networks: what they start from, and that their outputs follow from their features."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from sgd_sparse_jax.models import MLP, DiagonalNet, FactorizedLinear, gaussian, rademacher

X = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)))


def initial(model, x=X, seed=0):
    return jax.device_get(jax.jit(model.init)(jr.key(seed), x)["params"])


def apply(model, params, x=X):
    return jax.device_get(jax.jit(model.apply)({"params": params}, x))


def shapes(model, x=X):
    (out, _), variables = jax.eval_shape(model.init_with_output, jr.key(0), x)
    return out, variables["params"]


def random_params(widths, biases=True):
    """Drawn by NumPy, for inputs like X and a scalar output."""
    rng, sizes = np.random.default_rng(7), (4, *widths, 1)
    params = {}
    for layer, bias in enumerate(np.broadcast_to(biases, len(widths) + 1), 1):
        kernel = rng.normal(size=sizes[layer - 1 : layer + 1])
        params[f"layer{layer}"] = {"kernel": kernel}
        if bias:
            params[f"layer{layer}"]["bias"] = rng.normal(size=sizes[layer])
    return params


def by_hand(params, x, activation):
    """Hidden layers and the last layer's output, from the parameters alone."""
    hidden = [np.asarray(x)]
    for layer in range(1, len(params) + 1):
        each = params[f"layer{layer}"]
        out = hidden[-1] @ each["kernel"] + each.get("bias", 0.0)
        hidden.append(activation(out) if layer < len(params) else out)
    return hidden[1:-1], hidden[-1]


def assert_drawn_from(values, distribution):
    """Kolmogorov and Smirnov's distance at a level of about one in a thousand."""
    values = np.ravel(values)[:8000]
    distance = stats.ks_1samp(values, distribution.cdf).statistic
    assert distance < 1.95 / values.size**0.5, distance


def test_a_diagonal_net_starts_at_alpha_and_zero():
    for alpha in (0.3, np.array([0.1, 2.0, 0.0, -0.5])):
        (out, features), variables = jax.jit(DiagonalNet(alpha).init_with_output)(jr.key(0), X)
        np.testing.assert_array_equal(variables["params"]["u"], np.broadcast_to(alpha, 4))
        np.testing.assert_array_equal(variables["params"]["v"], np.zeros(4))
        np.testing.assert_array_equal(out, np.zeros(9))
        assert features == {}


def test_random_layers_are_independent_gaussians_of_their_scales():
    alpha, x = np.repeat([0.2, 3.0], 4000), jnp.ones((1, 8000))
    u, v = (leaf / alpha for leaf in initial(DiagonalNet(alpha, random=True), x).values())
    other = initial(FactorizedLinear(width=8000, scales=(1.2, 0.7)), X[:, :1])
    a, b = other["a"] / 1.2, other["b"] / 0.7
    for one, two in ((u, v), (a, b)):
        assert_drawn_from(one, stats.norm)
        assert_drawn_from(two, stats.norm)
        assert abs(np.corrcoef(one, two)[0, 1]) < 4 / 8000**0.5


def test_linear_networks_have_the_slope_of_the_product_of_their_layers():
    rng = np.random.default_rng(1)
    params = {"u": rng.normal(size=4), "v": rng.normal(size=4)}
    expected = [sum(params["u"] * params["v"] * x) for x in np.asarray(X)]
    np.testing.assert_allclose(apply(DiagonalNet(), params)[0], expected, rtol=1e-13)
    params = {"a": rng.normal(size=5), "b": rng.normal(size=5)}
    slope = sum(params["a"] * params["b"])
    for x in (X[:, :1], X[:, 0]):
        out = apply(FactorizedLinear(), params, x)[0]
        np.testing.assert_allclose(out, slope * np.asarray(X)[:, 0], rtol=1e-13)


@pytest.mark.parametrize("outputs", [None, 3])
@pytest.mark.parametrize("widths", [(), (7,), (6, 6, 6)])
def test_layers_have_the_shapes_that_their_widths_say(widths, outputs):
    sizes = (4, *widths, outputs or 1)
    out, params = shapes(MLP(widths, outputs=outputs))
    assert out.shape == ((9,) if outputs is None else (9, outputs))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == {
        f"layer{i}": {"kernel": (sizes[i - 1], sizes[i]), "bias": (sizes[i],)}
        for i in range(1, len(sizes))
    }


def test_biases_and_precision_are_as_given():
    for biases in (True, False, (True, False, True), [False, True, False]):
        params = shapes(MLP((7, 5), biases=biases))[1]
        expected = [biases] * 3 if isinstance(biases, bool) else list(biases)
        assert ["bias" in layer for layer in params.values()] == expected
    for model in (DiagonalNet(), MLP((5,)), FactorizedLinear()):
        for dtype in (jnp.float32, jnp.float64):
            found = jax.tree.leaves(shapes(model, X[:, :1].astype(dtype)))
            assert {leaf.dtype for leaf in found} == {np.dtype(dtype)}


def test_initializers_are_given_for_all_layers_or_for_each():
    shared = initial(MLP((7, 5), kernel_init=rademacher(2.0), bias_init=rademacher(3.0)))
    for layer in shared.values():
        assert set(np.abs(np.ravel(layer["kernel"]))) == {2.0}
        assert set(np.abs(layer["bias"])) == {3.0}
    kernels, biases = (rademacher(2.0), None, gaussian(0.7)), [gaussian(3.0), rademacher(0.1), None]
    each = initial(MLP((1000, 800), kernel_init=kernels, bias_init=biases))
    signs = np.sign(each["layer1"]["kernel"])
    np.testing.assert_array_equal(each["layer1"]["kernel"], 2.0 * signs)
    assert abs(signs.mean()) < 4 / signs.size**0.5
    # Independent across rows and columns: no direction stands out.
    assert np.linalg.svd(signs, compute_uv=False)[0] < 1.15 * (4**0.5 + 1000**0.5)
    assert_drawn_from(each["layer1"]["bias"], stats.norm(0, 3))
    bound = 1000**-0.5  # the default: uniform on one over the root of the fan-in
    assert_drawn_from(each["layer2"]["kernel"][:, :6], stats.uniform(-bound, 2 * bound))
    assert set(np.abs(each["layer2"]["bias"])) == {0.1}
    assert_drawn_from(each["layer3"]["kernel"], stats.norm(0, 0.7))
    assert abs(each["layer3"]["bias"][0]) <= 800**-0.5


def test_layers_and_keys_are_drawn_independently():
    draw = jax.jit(MLP((6, 6)).init)
    first, other = (
        jax.device_get(draw(jr.key(seed), jnp.ones((1, 6)))["params"]) for seed in (0, 1)
    )
    assert not (first["layer1"]["kernel"] == first["layer2"]["kernel"]).any()
    assert not (first["layer1"]["bias"] == first["layer2"]["bias"]).any()
    assert not (first["layer2"]["kernel"] == other["layer2"]["kernel"]).any()


def test_balanced_layers_have_equal_norms_in_every_unit():
    sizes = {"biases": False, "outputs": 3}
    params = initial(MLP((30, 500), balanced=True, kernel_init=gaussian(0.8), **sizes))
    norms = np.linalg.norm(params["layer2"]["kernel"], axis=0)
    last = params["layer3"]["kernel"]
    np.testing.assert_allclose(np.abs(last), np.repeat(norms[:, None], 3, axis=1), rtol=1e-12)
    assert np.abs(np.sign(last).mean(0)).max() < 4 / 500**0.5
    assert np.abs(np.corrcoef(np.sign(last).T) - np.eye(3)).max() < 4 / 500**0.5
    assert_drawn_from(params["layer2"]["kernel"], stats.norm(0, 0.8))


def test_a_balanced_net_without_hidden_layers_is_drawn_as_any_other():
    balanced, plain = initial(MLP((), balanced=True)), initial(MLP(()))
    jax.tree.map(np.testing.assert_array_equal, balanced, plain)


@pytest.mark.parametrize(
    ("widths", "biases", "activation"),
    [
        ((7, 5, 6), True, lambda z: np.maximum(z, 0)),
        ((7, 5), (True, False, True), np.tanh),
        ((), True, None),
    ],
)
def test_features_are_the_hidden_layers_and_lead_to_the_output(widths, biases, activation):
    other = {"activation": jnp.tanh} if activation is np.tanh else {}
    params = random_params(widths, biases)
    out, features = apply(MLP(widths, biases=biases, **other), params)
    hidden, last = by_hand(params, X, activation)
    assert list(features) == [f"layer{i + 1}" for i in range(len(widths))]
    for ours, expected in zip(features.values(), hidden, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(out, last[:, 0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("widths", "biases"), [((7,), True), ((7, 5), False)])
def test_scaled_features_sum_to_the_output(widths, biases):
    plain, scaled = (MLP(widths, biases=biases, scaled=yes) for yes in (False, True))
    params = random_params(widths, biases)
    (other, unscaled), (out, features) = apply(plain, params), apply(scaled, params)
    np.testing.assert_array_equal(out, other)
    *before, last = features
    layer = params[f"layer{len(widths) + 1}"]
    expected = unscaled[last] * layer["kernel"][:, 0]
    np.testing.assert_allclose(features[last], expected, rtol=1e-13)
    total = features[last].sum(1) + (layer["bias"][0] if biases else 0.0)
    np.testing.assert_allclose(total, out, rtol=1e-12, atol=1e-15)
    for name in before:
        np.testing.assert_array_equal(features[name], unscaled[name])


def test_scales_of_an_initialization_may_be_traced():
    networks = (
        lambda scale: DiagonalNet(scale, random=True),
        lambda scale: MLP((5,), kernel_init=(rademacher(scale), gaussian(2.0 * scale))),
        lambda scale: MLP((5,), kernel_init=gaussian(scale), balanced=True),
        lambda scale: FactorizedLinear(scales=(scale, 2.0)),
    )
    drawn = lambda scale: [net(scale).init(jr.key(3), X[:, :1])["params"] for net in networks]
    together = jax.jit(jax.vmap(drawn))(jnp.array([0.5, 3.0]))
    one = jax.jit(lambda: drawn(3.0))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-12), together, one)
    for params in together:
        assert any(
            (6 * leaf[0]).round(9).tolist() == leaf[1].round(9).tolist()
            for leaf in jax.tree.leaves(params)
        )


@pytest.mark.parametrize("name", ["biases", "kernel_init", "bias_init"])
@pytest.mark.parametrize("count", [1, 4])
def test_too_few_or_too_many_values_per_layer_are_refused(name, count):
    values = [True if name == "biases" else gaussian(1.0)] * count
    with pytest.raises(ValueError, match=name):
        shapes(MLP((7, 5), **{name: values}))
    shapes(MLP((7, 5), **{name: (values * 3)[:3]}))


def test_scaled_features_of_several_outputs_are_refused():
    with pytest.raises(ValueError, match="outputs"):
        shapes(MLP((7,), outputs=3, scaled=True))
