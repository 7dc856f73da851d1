"""Toy data: the paper's numbers, and their laws."""

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
    """Kolmogorov-Smirnov test for N(0, 1)."""
    assert stats.kstest(values.ravel(), "norm").statistic < 1.95 / values.size**0.5


def assert_unit(vectors):
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1.0, rtol=1e-14)


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


def test_sparse_regression_is_noiseless_and_its_target_a_sparse_unit_vector():
    train, test, target = data.sparse_regression(3, support=20, n_test=170)
    assert train.x.shape == (80, 200) and test.x.shape == (170, 200)
    assert_unit(target)
    assert (target[:20] > 0).all() and (target[20:] == 0).all()
    for x, y in (train, test):
        np.testing.assert_allclose(y, (x * target).sum(1), rtol=1e-12, atol=1e-14)
        assert_normal(x)


def test_a_student_learns_an_mlp_from_inputs_on_the_unit_sphere_in_all_directions():
    problem = data.teacher_student(2, n=500, teacher=data.DEEP_TEACHER, n_test=700)
    assert (len(problem.train.y), len(problem.test.y)) == (500, 700)
    params = {f"layer{i}": layer._asdict() for i, layer in enumerate(data.DEEP_TEACHER, 1)}
    for x, y in (problem.train, problem.test):
        assert_unit(x)
        out = MLP((2, 2)).apply({"params": params}, jnp.asarray(x))[0]
        np.testing.assert_allclose(out, y, rtol=1e-12, atol=1e-13)
        moments = x.T @ x / len(x) * x.shape[1]
        np.testing.assert_allclose(moments, np.eye(x.shape[1]), atol=5 * (2 / len(x)) ** 0.5)
        assert (np.abs(x.mean(0)) < 4 / len(x) ** 0.5).all()
    other = data.teacher_student(3, n=500, teacher=data.DEEP_TEACHER)
    assert not (other.train.x == problem.train.x).any() and other.target == problem.target


def test_binary_gaussians_lie_around_plus_and_minus_their_target():
    train, test, v = data.binary_gaussians(4, n=401, d=7, std=0.1, n_test=600)
    assert_unit(v)
    assert train.x.shape == (401, 7) and test.x.shape == (600, 7)
    for x, y in (train, test):
        assert set(y) == {-1.0, 1.0} and (y > 0).sum() == len(y) // 2
        assert_normal((x - y[:, None] * v) / 0.1)
        assert abs((y[1:] != y[:-1]).mean() - 0.5) < 0.2  # in random order
    assert not (train.x[:, 0] == test.x[:401, 0]).any()
