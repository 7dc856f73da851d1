"""SGD and its surrogates as runs: limits of the noise, tables with diverged runs, bad flags."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

from experiments import noise_models as command
from experiments.figures import claims
from experiments.theory import weak_errors
from experiments.toy import problems, run as toy_runs

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOY = problems.diagonal(n=6, d=22, support=20, alpha=0.7)
SMALL = replace(command.SETTINGS["d1"], windows=2, seeds=4)


def follow(kind, level, refinement=1, step_size=0.1):
    config = replace(SMALL, refinement=refinement)
    point = {"step_size": jnp.array(step_size), "level": jnp.full(2, level)}
    run = jax.jit(command.make_run(config, TOY, kind))
    return run(toy_runs.seed_keys(0, 1)[0], point)


def test_without_noise_the_sdes_are_gradient_descent_and_refined_they_are_gradient_flow():
    descent = follow("gd", 0.0)
    for kind in ("measured", "constant"):
        silent = follow(kind, 0.0)
        np.testing.assert_allclose(silent["loss"], descent["loss"], rtol=1e-12)
        assert abs(follow(kind, 1e-3)["loss"] / descent["loss"] - 1).max() > 0.1
    ends = [follow("gd", 0.0, refinement)["coordinates"] for refinement in (1, 2, 4)]
    first, second = (np.abs(a - b).max() for a, b in itertools.pairwise(ends))
    assert 1.8 < first / second < 2.3  # the same time, with an error of order dt


def dataset(seeds=8, steps=10, lost=()):
    """Levels 1 of all models, coordinates of random order; runs of the models `lost` diverged."""
    rng, found = np.random.default_rng(0), {}
    base = np.exp(rng.normal(size=200))
    for kind in (command.OTHERS, *command.MODELS):
        losses = np.ones((seeds, 2, steps))
        if kind in lost:
            losses[:, :, 5:] = np.nan
        found[f"loss_{kind}"] = (f"seed_{kind}", "step_size", "window"), losses
        ends = np.broadcast_to(base, (seeds, 2, 200))
        found[f"coordinates_{kind}"] = (f"seed_{kind}", "step_size", "coordinate"), ends
    return xarray.Dataset(found, {"step_size": [0.25, 0.27]})


def test_equal_models_agree_and_survivors_are_counted():
    found = command.judge(SMALL, TOY, dataset())
    by = {each.claim: each for each in found}
    assert by["the SDE has SGD's level"].value == 1
    assert by["the SDE shrinks SGD's coordinates"].value == pytest.approx(1)
    assert by["gradient descent does not"].verdict == claims.FAILS
    half = dataset()
    half["loss_measured"][:3, :, 5:] = np.inf
    half["coordinates_measured"] = half["coordinates_measured"].where(half["seed_measured"] > 2)
    survived = {each.claim: each for each in command.judge(SMALL, TOY, half)}
    assert survived["the SDE has SGD's level"].value == 1
    assert "5 survivors" in survived["the SDE has SGD's level"].statistic


def test_a_comparison_survives_the_divergence_of_all_runs(unrendered, tmp_path):
    diverged = dataset(lost=(command.OTHERS, *command.MODELS))
    found = command.judge(SMALL, TOY, diverged)
    assert found and all(each.verdict == claims.FAILS for each in found)
    assert command.draw(tmp_path / "figure", diverged)


def test_an_unstable_dt_is_refused_with_a_bound_that_is_accepted():
    config = replace(SMALL, step_sizes=(50.0,))
    with pytest.raises(ValueError, match=r"stable up to 2 / lambda_max = [0-9.]+") as error:
        command.check(config, TOY)
    bound = float(str(error.value).split(" = ")[1].split()[0])
    command.check(replace(config, refinement=int(50 / bound) + 1), TOY)


def test_weak_errors_are_differences_to_sgd_with_standard_errors():
    toy = problems.diagonal(n=4, d=4, support=2, alpha=0.7)
    found = weak_errors.simulate(toy, (0.2, 0.1), 2000, 0, lambda: None)
    for quantity in weak_errors.QUANTITIES:
        errors, spread = weak_errors.errors(found, quantity, "GD")
        assert (np.abs(errors) > 5 * spread).all()  # gradient descent has no noise
        exact, spread = weak_errors.errors(found, quantity, "exact covariance")
        assert (np.abs(exact) < 5 * spread + 0.1 * np.abs(errors)).all()
    assert (found["error"].sel(model="GD") < 1e-12).all()
    assert len(weak_errors.judge(found)) == 3  # orders; no step size is 0.05 or less
