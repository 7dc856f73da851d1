"""Toy data: the paper's numbers, the laws they obey, and what is refused."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sgd_sparse_jax import data
from sgd_sparse_jax.models import MLP

FOLDER = Path(__file__).parent / "golden"
MOVED = (
    "The toy data is no longer the paper's. Look for a changed order or shape of draws from "
    "np.random.RandomState, or for a changed teacher; tests/golden holds the original's arrays."
)


def assert_normal(values):
    """N(0, 1), by the test of Kolmogorov and Smirnov."""
    assert stats.kstest(values.ravel(), "norm").statistic < 1.95 / values.size**0.5


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("regression_1d_decay02", data.regression_1d()),
        ("two_layer_decay00", data.teacher_student(1)),
        ("three_layer_decay00", data.teacher_student(6, n=50, teacher=data.DEEP_TEACHER)),
    ],
)
def test_problems_are_the_papers(name, problem):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as golden:
        for part, drawn in (("train", problem.train), ("test", problem.test)):
            # The original kept its data in float32.
            close = {"rtol": 3e-7, "atol": 3e-7, "err_msg": MOVED}
            np.testing.assert_allclose(drawn.x, golden[f"x_{part}"], **close)
            np.testing.assert_allclose(drawn.y, golden[f"y_{part}"][:, 0], **close)


@pytest.mark.parametrize("support", [1, 200])
def test_sparse_regression_is_noiseless_and_its_target_a_sparse_unit_vector(support):
    train, test, target = data.sparse_regression(3, support=support, n_test=170)
    assert train.x.shape == (80, 200) and test.x.shape == (170, 200)
    np.testing.assert_allclose(np.linalg.norm(target), 1.0, rtol=1e-14)
    assert (target[:support] > 0).all() and (target[support:] == 0).all()
    for x, y in (train, test):
        np.testing.assert_allclose(y, (x * target).sum(1), rtol=1e-12, atol=1e-14)
        assert_normal(x)


@pytest.mark.parametrize("teacher", [data.CIRCLE_TEACHER, data.DEEP_TEACHER])
def test_a_students_inputs_lie_on_the_unit_sphere_in_all_directions(teacher):
    problem = data.teacher_student(2, n=500, teacher=teacher, n_test=700)
    assert (len(problem.train.y), len(problem.test.y)) == (500, 700)
    assert problem.target == tuple(teacher)
    for x, _ in (problem.train, problem.test):
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, rtol=1e-14)
        moments = x.T @ x / len(x) * x.shape[1]
        np.testing.assert_allclose(moments, np.eye(x.shape[1]), atol=5 * (2 / len(x)) ** 0.5)
        assert (np.abs(x.mean(0)) < 4 / len(x) ** 0.5).all()
    other = data.teacher_student(3, n=500, teacher=teacher)
    assert not (other.train.x == problem.train.x).any() and other.target == problem.target


@pytest.mark.parametrize("widths", [(3, 1), (3, 6, 5, 1)])
def test_a_teacher_is_an_mlp_with_its_layers(widths):
    layers = data.random_teacher(0, widths, biases=True)
    x, y = data.teacher_student(0, teacher=layers).train
    params = {f"layer{i}": layer._asdict() for i, layer in enumerate(layers, 1)}
    out = MLP(widths[1:-1]).apply({"params": params}, jnp.asarray(x))[0]
    np.testing.assert_allclose(out, y, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(data.relu_network(x, layers), y)


@pytest.mark.parametrize("biases", [False, True])
def test_random_teachers_are_gaussian_or_normalized(biases):
    plain = data.random_teacher(5, (40, 60, 30, 1), biases=biases)
    assert [layer.kernel.shape for layer in plain] == [(40, 60), (60, 30), (30, 1)]
    assert [layer.bias.shape for layer in plain] == [(60,), (30,), (1,)]
    for layer in plain:
        assert layer.bias.any() == biases
        values = np.concatenate([layer.kernel.ravel(), layer.bias if biases else []])
        assert_normal(values)
    *hidden, last = data.random_teacher(5, (40, 60, 30, 1), biases=biases, normalized=True)
    for layer in hidden:
        np.testing.assert_allclose(np.linalg.norm(layer.kernel, axis=0), 1.0, rtol=1e-14)
    cosines = (plain[0].kernel * hidden[0].kernel).sum(0) / np.linalg.norm(plain[0].kernel, axis=0)
    np.testing.assert_allclose(cosines, 1.0, rtol=1e-14)
    assert set(last.kernel.ravel()) == {-1.0, 1.0}
    assert not (data.random_teacher(6, (40, 60, 30, 1))[0].kernel == plain[0].kernel).any()


@pytest.mark.parametrize("n", [1, 400, 401])
def test_binary_gaussians_lie_around_plus_and_minus_their_target(n):
    std = 0.1
    train, test, v = data.binary_gaussians(4, n=n, d=7, std=std, n_test=600)
    np.testing.assert_allclose(np.linalg.norm(v), 1.0, rtol=1e-14)
    assert train.x.shape == (n, 7) and test.x.shape == (600, 7)
    for x, y in (train, test):
        assert set(y) <= {-1.0, 1.0}
        assert (y > 0).sum() == len(y) // 2
        noise = (x - y[:, None] * v) / std
        assert_normal(noise)
        # 1 + .1 N(0, 1) along the target: half way to the other class is far away.
        assert (y * (x @ v) > 0.5).all()
        assert len(y) == 1 or abs((y[1:] != y[:-1]).mean() - 0.5) < 0.2  # in random order
    other = data.binary_gaussians(5, n=n, d=7).train
    assert not (other.x == train.x).any() and not (train.x[:, 0] == test.x[:n, 0][:600]).any()


def test_own_examples_come_as_float64_with_a_column_per_input():
    x, y = np.arange(6, dtype=np.int32), np.arange(6, dtype=np.float32)
    drawn = data.examples(x, y)
    assert drawn.x.dtype == drawn.y.dtype == np.float64
    np.testing.assert_array_equal(drawn.x, x[:, None])
    np.testing.assert_array_equal(drawn.y, y)
    drawn = data.examples(jnp.asarray(x.reshape(3, 2)), [0, 1, 2])
    assert isinstance(drawn.x, np.ndarray)
    np.testing.assert_array_equal(drawn.x, x.reshape(3, 2))


X, Y = np.ones((4, 2)), np.ones(4)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        *((np.where(np.eye(4)[:, :2], bad, X), Y) for bad in (np.nan, np.inf, -np.inf)),
        *((X, Y * np.nan), (X, np.ones(3)), (X, np.ones((4, 1))), (np.ones((4, 2, 1)), Y)),
        *((X, 1.0), (1.0, Y), (np.ones((0, 2)), np.ones(0)), (np.ones((4, 0)), Y)),
        *((X, np.array(list("abcd"))), ([[1, 2], [3]], np.ones(2))),
    ],
)
def test_examples_that_do_not_fit_are_refused(x, y):
    with pytest.raises(ValueError):
        data.examples(x, y)
    assert data.examples(X, Y).x.shape == (4, 2)


@pytest.mark.parametrize("widths", [(3,), (3, 0, 1), (3, 4, 2)])
def test_sizes_that_make_no_problem_are_refused_by_name(widths):
    with pytest.raises(ValueError, match="widths"):
        data.random_teacher(0, widths)
    with pytest.raises(ValueError, match="support"):
        data.sparse_regression(0, d=10, support=11)
