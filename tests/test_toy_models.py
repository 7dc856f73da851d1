"""Toy networks: initialization, features and outputs."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from sgd_sparse_jax.models import MLP, DiagonalNet, gaussian, rademacher

pytestmark = pytest.mark.usefixtures("quick_compilation")
X = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)))


def initial(model):
    return jax.device_get(jax.jit(model.init)(jr.key(0), X)["params"])


def apply(model, params, x=X):
    return jax.device_get(jax.jit(model.apply)({"params": params}, x))


def assert_drawn_from(values, distribution):
    """Kolmogorov-Smirnov test at a level of about 0.001."""
    values = np.ravel(values)[:8000]
    distance = stats.ks_1samp(values, distribution.cdf).statistic
    assert distance < 1.95 / values.size**0.5, distance


def test_a_diagonal_net_starts_at_alpha_and_has_the_slope_of_the_product_of_its_layers():
    alpha, rng = np.array([0.1, 2.0, 0.0, -0.5]), np.random.default_rng(1)
    params = initial(DiagonalNet(alpha))
    np.testing.assert_array_equal(params["u"], alpha)
    np.testing.assert_array_equal(params["v"], np.zeros(4))
    params = {"u": rng.normal(size=4), "v": rng.normal(size=4)}
    expected = [sum(params["u"] * params["v"] * x) for x in np.asarray(X)]
    np.testing.assert_allclose(apply(DiagonalNet(), params)[0], expected, rtol=1e-13)


def test_initializers_are_given_for_all_layers_or_for_each():
    for layer in initial(MLP((7, 5), kernel_init=rademacher(2.0))).values():
        assert set(np.abs(np.ravel(layer["kernel"]))) == {2.0}
    kernels, biases = (rademacher(2.0), None, gaussian(0.7)), [gaussian(3.0), rademacher(0.1), None]
    each = initial(MLP((1000, 800), kernel_init=kernels, bias_init=biases))
    signs = np.sign(each["layer1"]["kernel"])
    np.testing.assert_array_equal(each["layer1"]["kernel"], 2.0 * signs)
    # Independent across rows and columns.
    assert np.linalg.svd(signs, compute_uv=False)[0] < 1.15 * (4**0.5 + 1000**0.5)
    assert_drawn_from(each["layer1"]["bias"], stats.norm(0, 3))
    bound = 1000**-0.5  # the default: uniform on +-1/sqrt(fan_in)
    assert_drawn_from(each["layer2"]["kernel"][:, :6], stats.uniform(-bound, 2 * bound))
    assert set(np.abs(each["layer2"]["bias"])) == {0.1}
    assert_drawn_from(each["layer3"]["kernel"], stats.norm(0, 0.7))
    assert abs(each["layer3"]["bias"][0]) <= 800**-0.5
    for wrong in ({"biases": [True]}, {"kernel_init": [None] * 4}, {"bias_init": [None] * 2}):
        with pytest.raises(ValueError):
            jax.eval_shape(MLP((7, 5), **wrong).init, jr.key(0), X)


@pytest.mark.parametrize(
    ("widths", "outputs", "biases", "activation"),
    [
        ((7, 5, 6), None, True, lambda z: np.maximum(z, 0)),
        ((7, 5), 3, [True, False, True], np.tanh),
        ((), 3, True, None),
    ],
)
def test_features_are_the_hidden_layers_and_lead_to_the_output(widths, outputs, biases, activation):
    options = {"outputs": outputs, "biases": biases}
    options |= {"activation": jnp.tanh} if activation is np.tanh else {}
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    params = initial(MLP(widths, **options, bias_init=gaussian(1.0)))
    out, features = apply(MLP(widths, **options), params)
    assert [layer["kernel"].shape[1] for layer in params.values()] == [*widths, outputs or 1]
    given = np.broadcast_to(biases, len(params)).tolist()
    assert ["bias" in layer for layer in params.values()] == given
    assert list(features) == list(params)[:-1]
    hidden = np.asarray(X)
    for name, layer in params.items():
        hidden = hidden @ layer["kernel"] + layer.get("bias", 0.0)
        if name in features:
            hidden = activation(hidden)
            close(features[name], hidden)
    close(out, hidden if outputs else hidden[:, 0])


def test_parameters_have_the_precision_of_the_inputs():
    for model in (DiagonalNet(), MLP((5,))):
        for dtype in (jnp.float32, jnp.float64):
            found = jax.eval_shape(model.init_with_output, jr.key(0), X[:, :1].astype(dtype))
            assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(dtype)}
