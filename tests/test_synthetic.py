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
        for part, ours in (("train", problem.train), ("test", problem.test)):
            # The original kept its data in float32.
            close = {"rtol": 3e-7, "atol": 3e-7, "err_msg": MOVED}
            np.testing.assert_allclose(ours.x, golden[f"x_{part}"], **close)
            np.testing.assert_allclose(ours.y, golden[f"y_{part}"][:, 0], **close)


def test_regression_1d_is_twelve_points_a_quarter_apart():
    train, test, target = data.regression_1d()
    x = [(k + 0.5) / 4 + 0.07 for k in range(-6, 6)]
    np.testing.assert_allclose(train.x[:, 0], x, rtol=1e-14)
    heights = (train.y - 0.345).round(12)
    np.testing.assert_array_equal(heights, [-2, 1.5, 0, 0, 2, 1, 0, -1, 0, 1, 2, -1])
    assert train is test and target is None


@pytest.mark.parametrize("support", [1, 20, 30])
def test_sparse_regression_is_noiseless_and_its_target_a_sparse_unit_vector(support):
    train, test, target = data.sparse_regression(3, n=10, d=30, support=support, n_test=17)
    assert train.x.shape == (10, 30) and test.x.shape == (17, 30)
    np.testing.assert_allclose(np.linalg.norm(target), 1.0, rtol=1e-14)
    assert (target[:support] > 0).all() and (target[support:] == 0).all()
    for x, y in (train, test):
        np.testing.assert_allclose(y, (x * target).sum(1), rtol=1e-12, atol=1e-14)


def test_inputs_of_sparse_regression_are_standard_normal():
    train, test, _ = data.sparse_regression(0, n=80, d=200, n_test=200)
    for x in (train.x, test.x):
        assert stats.kstest(x.ravel(), "norm").statistic < 1.95 / x.size**0.5


@pytest.mark.parametrize("teacher", [data.CIRCLE_TEACHER, data.DEEP_TEACHER])
def test_a_students_inputs_lie_on_the_unit_sphere_in_all_directions(teacher):
    problem = data.teacher_student(2, n=500, teacher=teacher, n_test=700)
    assert problem.train.x.shape == (500, len(teacher[0].kernel))
    assert problem.test.x.shape == (700, len(teacher[0].kernel))
    assert problem.target == tuple(teacher)
    for x, _ in (problem.train, problem.test):
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, rtol=1e-14)
        moments = x.T @ x / len(x) * x.shape[1]
        np.testing.assert_allclose(moments, np.eye(x.shape[1]), atol=5 * (2 / len(x)) ** 0.5)
        assert (np.abs(x.mean(0)) < 4 / len(x) ** 0.5).all()


def test_another_seed_is_another_sample_of_the_same_target():
    one, other = (data.teacher_student(seed) for seed in (1, 2))
    assert not (one.train.x == other.train.x).any()
    assert one.target == other.target
    more = data.teacher_student(1, n=15, n_test=20)
    np.testing.assert_array_equal(more.train.x, one.train.x)
    np.testing.assert_array_equal(more.test.x, one.test.x[:20])


@pytest.mark.parametrize(
    "layers",
    [
        data.CIRCLE_TEACHER,
        data.DEEP_TEACHER,
        data.random_teacher(0, (3, 1), biases=True),
        data.random_teacher(0, (3, 6, 5, 1), biases=True),
    ],
)
def test_a_teacher_is_an_mlp_with_its_layers(layers):
    x = np.random.default_rng(0).normal(size=(40, len(layers[0].kernel)))
    params = {f"layer{i}": layer._asdict() for i, layer in enumerate(layers, 1)}
    model = MLP(tuple(len(layer.bias) for layer in layers[:-1]))
    out = model.apply({"params": params}, jnp.asarray(x))[0]
    ours = data.relu_network(x, layers)
    np.testing.assert_allclose(out, ours, rtol=1e-12, atol=1e-13)
    problem = data.teacher_student(0, teacher=layers)
    for inputs, y in problem[:2]:
        np.testing.assert_array_equal(y, data.relu_network(inputs, layers))


@pytest.mark.parametrize("biases", [False, True])
def test_random_teachers_are_gaussian_or_normalized(biases):
    plain = data.random_teacher(5, (40, 60, 30, 1), biases=biases)
    assert [layer.kernel.shape for layer in plain] == [(40, 60), (60, 30), (30, 1)]
    assert [layer.bias.shape for layer in plain] == [(60,), (30,), (1,)]
    for layer in plain:
        assert layer.bias.any() == biases
        values = np.concatenate([layer.kernel.ravel(), layer.bias if biases else []])
        assert stats.kstest(values, "norm").statistic < 1.95 / values.size**0.5
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
        assert stats.kstest(noise.ravel(), "norm").statistic < 1.95 / noise.size**0.5
        # 1 + .1 N(0, 1) along the target: half way to the other class is far away.
        assert (y * (x @ v) > 0.5).all()
        assert len(y) == 1 or abs((y[1:] != y[:-1]).mean() - 0.5) < 0.2  # in random order
    other = data.binary_gaussians(5, n=n, d=7).train
    assert not (other.x == train.x).any() and not (train.x[:, 0] == test.x[:n, 0][:600]).any()


def test_own_examples_come_as_float64_with_a_column_per_input():
    x, y = np.arange(6, dtype=np.int32), np.arange(6, dtype=np.float32)
    ours = data.examples(x, y)
    assert ours.x.dtype == ours.y.dtype == np.float64
    np.testing.assert_array_equal(ours.x, x[:, None])
    np.testing.assert_array_equal(ours.y, y)
    ours = data.examples(jnp.asarray(x.reshape(3, 2)), [0, 1, 2])
    assert isinstance(ours.x, np.ndarray)
    np.testing.assert_array_equal(ours.x, x.reshape(3, 2))


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


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda: data.sparse_regression(0, d=10, support=11), "support is 11"),
        (lambda: data.sparse_regression(0, support=0), "support is 0"),
        (lambda: data.sparse_regression(0, n=0), "n is 0"),
        (lambda: data.teacher_student(0, n_test=-1), "n_test is -1"),
        (lambda: data.binary_gaussians(0, d=0), "d is 0"),
        (lambda: data.random_teacher(0, (3,)), "widths"),
        (lambda: data.random_teacher(0, (3, 0, 1)), "widths"),
        (lambda: data.random_teacher(0, (3, 4, 2)), "widths"),
    ],
)
def test_sizes_that_make_no_problem_are_refused_by_name(draw, name):
    with pytest.raises(ValueError, match=name):
        draw()
