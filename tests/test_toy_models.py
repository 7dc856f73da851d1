"""The small networks: what they start from, and that their outputs follow from their features."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from sgd_sparse_jax.models import MLP, DiagonalNet, FactorizedLinear, gaussian, rademacher

X = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)))


def initial(model: nn.Module, x: jax.Array = X, seed: int = 0):
    return jax.tree.map(np.asarray, model.init(jr.key(seed), x)["params"])


def shapes(model: nn.Module):
    drawn = jax.eval_shape(model.init, jr.key(0), X)["params"]
    return jax.tree.map(lambda leaf: leaf.shape, drawn)


def by_hand(params, x, activation=lambda z: np.maximum(z, 0)):
    """Hidden layers and the last layer's output, from the parameters alone."""
    hidden = []
    for layer in range(1, len(params) + 1):
        kernel = np.asarray(params[f"layer{layer}"]["kernel"])
        out = (hidden[-1] if hidden else np.asarray(x)) @ kernel
        if "bias" in params[f"layer{layer}"]:
            out = out + np.asarray(params[f"layer{layer}"]["bias"])
        hidden.append(activation(out) if layer < len(params) else out)
    return hidden[:-1], hidden[-1]


def assert_drawn_from(values, distribution):
    """Kolmogorov and Smirnov's distance at a level of about one in a thousand."""
    values = np.ravel(values)
    distance = stats.ks_1samp(values, distribution.cdf).statistic
    assert distance < 1.95 / values.size**0.5, distance


def test_a_diagonal_net_starts_at_alpha_and_zero_and_predicts_zero():
    params = initial(DiagonalNet(0.3))
    assert params.keys() == {"u", "v"}
    np.testing.assert_array_equal(params["u"], np.full(4, 0.3))
    np.testing.assert_array_equal(params["v"], np.zeros(4))
    out, features = DiagonalNet(0.3).apply({"params": params}, X)
    np.testing.assert_array_equal(out, np.zeros(9))
    assert features == {}


def test_a_diagonal_net_may_have_a_scale_per_coordinate():
    alpha = np.array([0.1, 2.0, 0.0, -0.5])
    params = initial(DiagonalNet(alpha))
    np.testing.assert_array_equal(params["u"], alpha)
    np.testing.assert_array_equal(params["v"], np.zeros(4))


def test_a_random_diagonal_net_has_two_independent_gaussian_layers():
    alpha = np.repeat([0.2, 3.0], 4000)
    params = initial(DiagonalNet(alpha, random=True), jnp.ones((1, 8000)))
    u, v = params["u"] / alpha, params["v"] / alpha
    assert_drawn_from(u, stats.norm)
    assert_drawn_from(v, stats.norm)
    assert abs(np.corrcoef(u, v)[0, 1]) < 4 / 8000**0.5


def test_a_diagonal_net_is_linear_in_x_with_slope_u_times_v():
    rng = np.random.default_rng(1)
    params = {"u": rng.normal(size=4), "v": rng.normal(size=4)}
    out = DiagonalNet().apply({"params": params}, X)[0]
    expected = [
        sum(params["u"][i] * params["v"][i] * x[i] for i in range(4)) for x in np.asarray(X)
    ]
    np.testing.assert_allclose(out, expected, rtol=1e-13)


@pytest.mark.parametrize("outputs", [None, 3])
@pytest.mark.parametrize("widths", [(), (7,), (7, 5), (6, 6, 6)])
def test_layers_have_the_shapes_that_their_widths_say(widths, outputs):
    sizes = (4, *widths, outputs or 1)
    assert shapes(MLP(widths, outputs=outputs)) == {
        f"layer{i}": {"kernel": (sizes[i - 1], sizes[i]), "bias": (sizes[i],)}
        for i in range(1, len(sizes))
    }


def test_biases_are_given_for_all_layers_or_for_each():
    has_bias = lambda biases: [
        "bias" in layer for layer in shapes(MLP((7, 5), biases=biases)).values()
    ]
    assert has_bias(True) == [True] * 3
    assert has_bias(False) == [False] * 3
    assert has_bias((True, False, True)) == [True, False, True]
    assert has_bias([False, True, False]) == [False, True, False]


def test_initializers_are_given_for_all_layers_or_for_each():
    shared = initial(MLP((7, 5), kernel_init=rademacher(2.0), bias_init=rademacher(3.0)))
    for layer in shared.values():
        assert set(np.abs(np.ravel(layer["kernel"]))) == {2.0}
        assert set(np.abs(layer["bias"])) == {3.0}
    model = MLP(
        (1000, 800),
        kernel_init=(rademacher(2.0), None, gaussian(0.7)),
        bias_init=[gaussian(3.0), rademacher(0.1), None],
    )
    each = initial(model)
    assert set(np.abs(np.ravel(each["layer1"]["kernel"]))) == {2.0}
    assert_drawn_from(each["layer1"]["bias"], stats.norm(0, 3))
    bound = 1000**-0.5
    assert_drawn_from(each["layer2"]["kernel"][:, :6], stats.uniform(-bound, 2 * bound))
    assert set(np.abs(each["layer2"]["bias"])) == {0.1}
    assert_drawn_from(each["layer3"]["kernel"], stats.norm(0, 0.7))
    assert abs(each["layer3"]["bias"][0]) <= 800**-0.5


def test_the_default_is_uniform_on_one_over_the_root_of_the_fan_in():
    params = initial(MLP((1000,), outputs=600))
    for layer, fan_in in (("layer1", 4), ("layer2", 1000)):
        bound = fan_in**-0.5
        for name in ("kernel", "bias"):
            values = params[layer][name].ravel()[:6000]
            assert 0.98 * bound < np.abs(values).max() <= bound
            assert_drawn_from(values, stats.uniform(-bound, 2 * bound))


def test_layers_and_keys_are_drawn_independently():
    first, other = (initial(MLP((6, 6, 6), kernel_init=gaussian(1.0)), seed=s) for s in (0, 1))
    assert not (first["layer2"]["kernel"] == first["layer3"]["kernel"]).any()
    assert not (first["layer1"]["bias"] == first["layer2"]["bias"]).any()
    assert not (first["layer2"]["kernel"] == other["layer2"]["kernel"]).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_gaussian_and_rademacher_entries_are_what_they_are_called(dtype):
    drawn = gaussian(0.7)(jr.key(0), (100, 80), dtype)
    assert drawn.dtype == dtype
    assert_drawn_from(drawn, stats.norm(0, 0.7))
    signs = rademacher(0.7)(jr.key(0), (100, 80), dtype)
    assert signs.dtype == dtype
    np.testing.assert_array_equal(np.abs(signs), np.full((100, 80), 0.7, dtype))
    assert abs(np.sign(signs).mean()) < 4 / 8000**0.5
    # Independent across rows and columns: no direction stands out.
    singular = np.linalg.svd(np.asarray(signs) / 0.7, compute_uv=False)
    assert singular[0] < 1.15 * (100**0.5 + 80**0.5)


@pytest.mark.parametrize("model", [DiagonalNet(), MLP((5,)), FactorizedLinear()])
def test_parameters_and_outputs_have_the_precision_of_the_inputs(model):
    for dtype in (jnp.float32, jnp.float64):
        x = X[:, :1].astype(dtype)
        params = model.init(jr.key(0), x)["params"]
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
        assert model.apply({"params": params}, x)[0].dtype == dtype


@pytest.mark.parametrize("widths", [(50,), (30, 50)])
def test_balanced_layers_have_equal_norms_in_every_unit(widths):
    model = MLP(widths, balanced=True, kernel_init=gaussian(0.8))
    many = jax.vmap(lambda key: model.init(key, X)["params"])(jr.split(jr.key(0), 20))
    before, after = (many[f"layer{len(widths) + i}"]["kernel"] for i in (0, 1))
    norms = np.sqrt((np.asarray(before) ** 2).sum(1))
    np.testing.assert_allclose(np.abs(after)[..., 0], norms, rtol=1e-12)
    assert abs(np.sign(after).mean()) < 4 / 1000**0.5
    assert_drawn_from(many["layer1"]["kernel"], stats.norm(0, 0.8))


def test_balanced_layers_with_several_outputs_share_the_norm_of_their_unit():
    params = initial(MLP((50,), outputs=3, balanced=True))
    norms = np.linalg.norm(params["layer1"]["kernel"], axis=0)
    expected = np.repeat(norms[:, None], 3, axis=1)
    np.testing.assert_allclose(np.abs(params["layer2"]["kernel"]), expected, rtol=1e-12)
    signs = np.sign(params["layer2"]["kernel"])
    assert (signs[:, 0] != signs[:, 1]).any() and (signs[:, 0] == signs[:, 1]).any()


def test_a_balanced_net_without_hidden_layers_is_drawn_as_any_other():
    assert jax.tree.all(
        jax.tree.map(np.array_equal, initial(MLP((), balanced=True)), initial(MLP(())))
    )


@pytest.mark.parametrize("biases", [True, False, (True, False, True, False)])
def test_features_are_the_hidden_layers_and_lead_to_the_output(biases):
    model = MLP((7, 5, 6), biases=biases)
    params = initial(model)
    out, features = model.apply({"params": params}, X)
    hidden, last = by_hand(params, X)
    assert list(features) == ["layer1", "layer2", "layer3"]
    for ours, expected in zip(features.values(), hidden, strict=True):
        assert (expected == 0).any() and (expected > 0).any()
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(out, last[:, 0], rtol=1e-12, atol=1e-15)


def test_without_outputs_there_is_no_last_axis():
    flat, one, three = (MLP((7,), outputs=outputs) for outputs in (None, 1, 3))
    params = initial(one)
    out = one.apply({"params": params}, X)[0]
    assert out.shape == (9, 1)
    np.testing.assert_array_equal(flat.apply({"params": params}, X)[0], out[:, 0])
    params = initial(three)
    out = three.apply({"params": params}, X)[0]
    assert out.shape == (9, 3)
    np.testing.assert_allclose(out, by_hand(params, X)[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("widths", "biases"), [((7,), True), ((7,), False), ((7, 5), True)])
def test_scaled_features_sum_to_the_output(widths, biases):
    plain, scaled = (MLP(widths, biases=biases, scaled=yes) for yes in (False, True))
    params = initial(plain)
    out, features = scaled.apply({"params": params}, X)
    other, unscaled = plain.apply({"params": params}, X)
    np.testing.assert_array_equal(out, other)
    last = f"layer{len(widths)}"
    layer = params[f"layer{len(widths) + 1}"]
    outgoing = layer["kernel"][:, 0]
    np.testing.assert_allclose(features[last], unscaled[last] * outgoing[None], rtol=1e-13)
    total = np.asarray(features[last]).sum(1) + (layer["bias"][0] if biases else 0.0)
    np.testing.assert_allclose(total, out, rtol=1e-12, atol=1e-15)
    for name in list(features)[:-1]:
        np.testing.assert_array_equal(features[name], unscaled[name])


def test_a_linear_activation_multiplies_the_matrices():
    model = MLP((7, 5), outputs=2, biases=False, activation=lambda z: z)
    params = initial(model)
    product = np.linalg.multi_dot([layer["kernel"] for layer in params.values()])
    out, features = model.apply({"params": params}, X)
    np.testing.assert_allclose(out, np.asarray(X) @ product, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(
        -features["layer1"], model.apply({"params": params}, -X)[1]["layer1"]
    )


def test_a_net_without_hidden_layers_is_linear_regression():
    params = initial(MLP(()))
    out, features = MLP(()).apply({"params": params}, X)
    kernel, bias = params["layer1"]["kernel"], params["layer1"]["bias"]
    np.testing.assert_allclose(out, np.asarray(X) @ kernel[:, 0] + bias[0], rtol=1e-12)
    assert features == {}


def test_another_activation_is_used_in_every_hidden_layer_and_not_in_the_last():
    model = MLP((7, 5), activation=jnp.tanh, kernel_init=gaussian(2.0))
    params = initial(model)
    out, features = model.apply({"params": params}, X)
    hidden, last = by_hand(params, X, np.tanh)
    np.testing.assert_allclose(features["layer2"], hidden[1], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(out, last[:, 0], rtol=1e-12, atol=1e-14)


def test_without_biases_a_relu_net_is_homogeneous():
    model = MLP((7, 5), biases=False)
    params = initial(model)
    apply = lambda params, x: model.apply({"params": params}, x)[0]
    np.testing.assert_allclose(apply(params, 3.0 * X), 3.0 * apply(params, X), rtol=1e-12)
    doubled = jax.tree.map(lambda leaf: 2.0 * leaf, params)
    np.testing.assert_allclose(apply(doubled, X), 8.0 * apply(params, X), rtol=1e-12)


def test_scales_of_an_initialization_may_be_traced():
    scales = jnp.array([0.5, 1.0, 3.0])
    x = X[:, :1]
    networks = (
        lambda scale: DiagonalNet(scale, random=True),
        lambda scale: MLP((5,), kernel_init=(rademacher(scale), gaussian(2.0 * scale))),
        lambda scale: MLP((5,), kernel_init=gaussian(scale), balanced=True),
        lambda scale: FactorizedLinear(scales=(scale, 2.0)),
    )
    for network in networks:
        drawn = lambda scale, network=network: network(scale).init(jr.key(3), x)["params"]
        together = jax.jit(jax.vmap(drawn))(scales)
        for i in (0, 2):
            one = drawn(float(scales[i]))
            jax.tree.map(
                lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-12), together, one
            )
        assert any(
            np.allclose(leaf[2], 3.0 * leaf[1], rtol=1e-12) for leaf in jax.tree.leaves(together)
        )


@pytest.mark.parametrize("name", ["biases", "kernel_init", "bias_init"])
@pytest.mark.parametrize("count", [1, 4])
def test_too_few_or_too_many_values_per_layer_are_refused(name, count):
    values = (True,) * count if name == "biases" else (gaussian(1.0),) * count
    with pytest.raises(ValueError, match=f"{name} has {count} values for 3 layers"):
        MLP((7, 5), **{name: values}).init(jr.key(0), X)


@pytest.mark.parametrize("outputs", [1, 3])
def test_scaled_features_of_several_outputs_are_refused(outputs):
    with pytest.raises(ValueError, match="leave outputs=None"):
        MLP((7,), outputs=outputs, scaled=True).init(jr.key(0), X)


def test_a_factorized_linear_net_multiplies_x_by_the_product_of_its_factors():
    rng = np.random.default_rng(2)
    params = {"a": rng.normal(size=5), "b": rng.normal(size=5)}
    model, x = FactorizedLinear(), X[:, :1]
    slope = sum(a * b for a, b in zip(params["a"], params["b"], strict=True))
    for inputs in (x, x[:, 0]):
        out, features = model.apply({"params": params}, inputs)
        np.testing.assert_allclose(out, slope * np.asarray(x)[:, 0], rtol=1e-13)
        assert features == {}


def test_a_factorized_linear_net_has_gaussian_factors_of_its_two_scales():
    params = initial(FactorizedLinear(width=8000), X[:, :1])
    assert_drawn_from(params["a"], stats.norm(0, 1.2))
    assert_drawn_from(params["b"], stats.norm(0, 0.7))
    assert abs(np.corrcoef(params["a"], params["b"])[0, 1]) < 4 / 8000**0.5
    other = initial(FactorizedLinear(width=8000, scales=(0.0, 2.0)), X[:, 0])
    np.testing.assert_array_equal(other["a"], 0.0)
    assert_drawn_from(other["b"], stats.norm(0, 2.0))
