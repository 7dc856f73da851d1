"""SGD without replacement: closed forms, and the command that checks them."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import without_replacement as command
from experiments.theory import drift, orders
from sgd_sparse_jax.theory import sampling

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_drift_is_that_of_quadratics_in_closed_form():
    """l_i = h_i (theta - c_i)^2 / 2: the mean over both orders of two steps, to second order."""
    h, c, eta = np.array([1.0, 3.0]), np.array([0.5, -1.0]), 1e-3
    theta = 2.0

    def epoch(order):
        end = theta
        for i in order:
            end = end - eta * h[i] * (end - c[i])
        return end

    mean = (epoch([0, 1]) + epoch([1, 0])) / 2
    gd = theta
    for _ in range(2):
        gd = gd - eta * (h * (gd - c)).mean()
    losses = lambda p: jnp.asarray(h) * (p[0] - jnp.asarray(c)) ** 2 / 2
    found = sampling.reshuffling_drift(losses, jnp.array([theta]), eta)
    np.testing.assert_allclose(found[0], mean - gd, rtol=1e-5)  # a quadratic has no third order


def test_ends_of_epochs_are_those_of_a_loop():
    loss, theta = drift.problem(0, 3)
    orders = np.array(list(itertools.permutations(range(3))))
    ends = drift.epoch_ends(loss, theta, orders, jnp.array(0.1))
    for order, end in zip(orders, ends, strict=True):
        expected = theta
        for i in order:
            expected = expected - 0.1 * jax.grad(loss)(expected, i)
        np.testing.assert_allclose(end, expected, rtol=1e-13)


def test_flat_directions_shrink_exactly_without_replacement_only():
    found = orders.flat(jax.random.key(0), 1)
    _, ends = found["flat_end"]
    np.testing.assert_allclose(ends[1:], float(found["flat_predicted"]), rtol=1e-12)
    assert np.std(ends[0]) > 0.01


@pytest.mark.slow
def test_the_claims_have_verdicts_and_a_figure(unrendered, tmp_path):
    small = {"orders": 200, "seeds": 2, "net_seeds": 2, "net_epochs": 16}
    finding = command.run(command.Config(**small, runs_dir=str(tmp_path)))
    written = json.loads((finding.folder / "verdicts.json").read_text())
    assert [each["verdict"] for each in written] == [each.verdict for each in finding.claims]
    assert finding.figures[0].name == f"{written[0]['figure']}.png"
    exact = [each.verdict for each in finding.claims if "k = 4" in each.setting]
    assert exact == ["holds"] * 4
