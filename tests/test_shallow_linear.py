"""Gradient descent in shallow linear nets: closed forms, and the command that checks them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import shallow_linear as command
from sgd_sparse_jax.theory import shallow

pytestmark = pytest.mark.usefixtures("quick_compilation")
PHI = 2.0
RNG = np.random.default_rng(0)


def loss(weights):
    a, b = weights
    return (a @ b - PHI) ** 2 / 2


@pytest.mark.parametrize("eta", [0.01, 0.3, 1.4])
def test_a_step_of_gradient_descent_changes_the_invariants_as_predicted(eta):
    weights = jnp.asarray(RNG.normal(size=(2, 5)))
    after = weights - eta * jax.grad(loss)(weights)
    now, then = (shallow.invariants(*w, target=PHI) for w in (weights, after))
    predicted = shallow.next_invariants(now, eta, PHI)
    np.testing.assert_allclose(jnp.stack(predicted), jnp.stack(then), rtol=1e-12)
    np.testing.assert_allclose(then.trace**2, 4 * (then.eps + PHI) ** 2 + then.imbalance**2)
    moved = command.advance(weights[:, None], jnp.full((1, 1), eta), PHI)[:, 0]
    np.testing.assert_allclose(moved, after, rtol=1e-14)


def test_the_trace_is_the_only_eigenvalue_at_a_minimum():
    a, b = jnp.array([1.0, 2.0]), jnp.array([4.0, -1.0])  # a^T b = 2
    now = shallow.invariants(a, b, target=PHI)
    hessian = jax.hessian(loss)(jnp.stack([a, b])).reshape(4, 4)
    np.testing.assert_allclose(np.linalg.eigvalsh(hessian), [0, 0, 0, now.trace], atol=1e-12)
    np.testing.assert_allclose(shallow.sharpness(PHI, now.imbalance), now.trace, rtol=1e-12)


@pytest.fixture(scope="module")
def finished(unrendered, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    return command.run(command.Config(seeds=6, num_steps=400, slow_steps=1_000, runs_dir=folder))


def test_identities_and_calm_monotony_hold_with_few_starts(finished):
    verdicts = [each.verdict for each in finished.claims]
    assert verdicts[:7] == ["holds"] * 7  # identities, formula, eigenvalue, rate
    assert (
        "holds under sup η·abs(ε) < √2" in verdicts and "holds under sup η·abs(ε) < 1" in verdicts
    )
    beyond = [each for each in finished.claims if "beyond 1/Φ" in each.claim]
    assert [each.verdict for each in beyond] == ["holds"]


def test_the_folder_has_verdicts_and_their_figure(finished):
    written = json.loads((finished.folder / "verdicts.json").read_text())
    assert [each["verdict"] for each in written] == [each.verdict for each in finished.claims]
    assert finished.figures[0].name == f"{written[0]['figure']}.png"
