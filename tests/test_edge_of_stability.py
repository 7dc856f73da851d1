"""Studies at the edge of stability, on problems whose answers are known."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from experiments import edge_of_stability
from experiments.edge import branches, config as flags, edge_test, plateaus, problems, runs
from experiments.edge.config import Config
from experiments.edge.runs import Point, Program
from experiments.toy.problems import Toy
from sgd_sparse_jax import Batch, Network, Outputs, measure
from sgd_sparse_jax.train import half_squared

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZES = np.array([3.0, 1.0, 0.5])  # curvatures of a quadratic, one example each


def quadratic() -> Toy:
    """Three examples with losses 3 h_i w_i^2 / 2, mean w^T diag(h) w / 2."""
    x = jnp.diag(jnp.sqrt(3 * jnp.asarray(SIZES)))
    network = Network(
        lambda key, x: (jr.normal(key, (3,)), {}),
        lambda params, stats, x, train=False: Outputs(x @ params, {}, stats),
    )
    data, nothing = Batch(x, jnp.zeros(3)), lambda *params: {}
    return Toy(data, data, lambda scale: network, half_squared, nothing, nothing, False)


def config_of(**changes) -> Config:
    one = {"momenta": (0.0,), "batch_sizes": (0,), "optimizers": ("sgd",), "num_steps": (40,)}
    small = {"seeds": 2, "records": 4, "lanczos_steps": 3, "gauge_batches": 16, "horizon": 200}
    return Config(**{**small, **one, "step_sizes": (0.2,), **changes})


def study(module, config, toy=None):
    toy = toy or quadratic()
    specs = flags.specs(config, len(toy.train.y))
    return module.simulate(config, toy, specs, {}, lambda: None), specs


@pytest.mark.parametrize(
    ("step_size", "momentum", "bisect"),
    [(0.2, 0.0, "step_size"), (0.2, 0.5, "step_size"), (1.0, 0.8, "momentum")],
)
def test_a_quadratic_jumps_at_two_over_its_curvature(step_size, momentum, bisect):
    """Times 1 + momentum; just below it, momentum may double the loss for a while."""
    how = {"horizon": 2000, "bisect": bisect}
    config = config_of(step_sizes=(step_size,), momenta=(momentum,), **how)
    dataset, specs = study(edge_test, config)
    exact = 2 * (1 + momentum) / SIZES.max()
    np.testing.assert_allclose(step_size * dataset["critical"][0], exact, rtol=0.02)
    np.testing.assert_allclose(dataset["midpoint"][0], SIZES.max(), rtol=1e-9)
    (row,) = edge_test.shares(dataset, specs)
    np.testing.assert_allclose(row["sharpness"], 1, rtol=0.02)


@pytest.mark.parametrize(("step_size", "between"), [(0.5, 2.5), (0.35, 1.5)])
def test_the_loss_jumps_below_the_batch_size_whose_curvature_exceeds_the_edge(step_size, between):
    """A step on b of 3 orthogonal examples has curvature 3 h / b along each of them, or 0."""
    config = config_of(step_sizes=(step_size,), horizon=2000, bisect="batch_size")
    dataset, specs = study(edge_test, config)
    np.testing.assert_allclose(dataset["critical"][0], between, rtol=0.01)
    (row,), size = edge_test.shares(dataset, specs), between + 0.5
    bound = 3 * SIZES.max() / size * step_size / 2  # on the curvature of batches of this size
    assert (np.array(row["batch_sharpness"]) <= bound * (1 + 1e-9)).all()
    assert bound < 1 < bound * size / (size - 1)


def test_bisection_finds_the_threshold_of_each_seed_or_none():
    thresholds = np.array([0.3, 7.0, 100.0, 0.01])
    ends = np.full(4, 0.25), np.full(4, 16.0)
    found = edge_test.bisected(lambda factors, name: factors > thresholds, *ends)
    np.testing.assert_allclose(found[:2], thresholds[:2], rtol=0.01)
    assert np.isnan(found[2:]).all()


@pytest.fixture(scope="module")
def snapshot():
    """A state of the Chebyshev problem after 60 steps, and its parameters."""
    program, key = Program(problems.chebyshev(), "sgd", 20), jr.key(3)
    run = jax.jit(runs.make_run(program, np.array([60])))
    point = Point(0.2, 0.0, run(key, Point(0.2, 0.0))["snapshot"][0])
    return program, key, point, program.state(key, point).params


def test_the_sharpness_of_a_snapshot_is_that_of_the_dense_hessian(snapshot):
    program, key, _, params = snapshot
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    scale = jnp.linspace(1, 2, len(flat))
    found = jax.jit(runs.make_sharpness(program.toy, 40))(key, (flat, scale))
    loss = lambda v: program.toy.mean_loss(unravel(v), program.toy.train)
    dense = scale[:, None] * jax.jit(jax.hessian(loss))(flat) * scale[None]
    np.testing.assert_allclose(found["sharpness"], np.linalg.eigvalsh(dense)[-1], rtol=1e-6)
    assert found["residual"] < 1e-3


def test_batch_gauges_of_whole_batches_are_rayleigh_quotients(snapshot):
    program, key, _, params = snapshot
    flat = jax.flatten_util.ravel_pytree(params)[0]
    found = jax.jit(runs.make_batch_gauges(program, 3))(key, flat)
    (expected, g2) = measure.step_sharpness(program.objective, params, {}, program.toy.train)
    np.testing.assert_allclose(found["g2"], g2, rtol=1e-10)
    np.testing.assert_allclose(found["rayleigh"], expected, rtol=1e-8)


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adam"])
def test_a_run_continued_from_its_snapshot_is_the_whole_run(optimizer):
    program, key = Program(problems.chebyshev(), optimizer, 20), jr.key(1)
    point = Point(0.01, 0.9 if optimizer == "sgd" else 0.0)
    whole = jax.jit(runs.make_run(program, np.array([10, 30])))(key, point)
    rest = jax.jit(runs.make_run(program, np.array([0, 1, 20])))
    rest = rest(key, point._replace(start=whole["snapshot"][0]))["snapshot"]
    np.testing.assert_allclose(rest[0], whole["snapshot"][0], rtol=0)
    np.testing.assert_allclose(rest[1], whole["after"][0], rtol=1e-12)
    np.testing.assert_allclose(rest[2], whole["snapshot"][1], rtol=1e-12)


def test_branches_share_batches_and_the_unchanged_one_is_the_longer_run():
    toy = quadratic()
    config = config_of(batch_sizes=(2,), factors=(0.5, 1.0, 1.0), horizon=40)
    dataset, _ = study(branches, config, toy)
    losses = dataset["loss"].values[0]
    np.testing.assert_array_equal(losses[1], losses[2])
    assert not np.array_equal(losses[0], losses[1])
    # A quadratic has one Hessian, wherever the branches go.
    np.testing.assert_allclose(dataset["sharpness"].values, SIZES.max(), rtol=1e-9)
    annealed = dataset["train_loss"].sel(when="annealed").values
    assert (annealed < dataset["train_loss"].sel(when="end").values).all()


def test_edges_of_runs_follow_from_momentum_and_batch_size():
    config = config_of(
        step_sizes=(0.1,) * 4,
        momenta=(0.5, 0.5, 0.0, 0.0),
        batch_sizes=(0, 2, 0, 0),
        optimizers=("sgd", "sgd", "rmsprop", "adam"),
        num_steps=(40,) * 4,
    )
    edges = [spec.edge for spec in flags.specs(config, 3)]
    np.testing.assert_allclose(edges, [30, 10, 20, 380])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"batch_sizes": (4,)}, {"batch_sizes": (3,)}),
        ({"num_steps": (3,)}, {"num_steps": (16,)}),
        ({"momenta": ()}, {"momenta": (0.0,)}),
        ({"optimizers": ("adam",), "momenta": (0.5,)}, {"optimizers": ("adam",)}),
    ],
)
def test_flags_that_contradict_each_other_are_refused(wrong, right):
    with pytest.raises(ValueError, match="--"):
        flags.specs(config_of(**wrong), 3)
    assert flags.specs(config_of(**right), 3)


def test_a_finished_study_is_shown_again_without_computing(tmp_path, capsys, monkeypatch):
    small = ["--seeds=2", "--records=4", "--step_sizes=0.2", "--momenta=0", "--batch_sizes=4"]
    small += ["--optimizers=sgd", "--num_steps=40", "--lanczos_steps=3", "--gauge_batches=16"]
    command = [*small, "--lanczos_batches=0", f"--runs_dir={tmp_path}"]
    edge_of_stability.main(command)
    first = capsys.readouterr().out
    folder = tmp_path / "edge_of_stability" / "chebyshev-plateaus"
    assert (folder / "figures" / "plateaus.png").exists()
    monkeypatch.setattr(plateaus, "simulate", None)
    edge_of_stability.main(command)
    assert first.strip().splitlines()[-6:-1] == capsys.readouterr().out.strip().splitlines()[-6:-1]


def test_a_run_that_diverges_is_at_no_edge(tmp_path):
    dataset, specs = study(plateaus, config_of(step_sizes=(9.0,), num_steps=(800,)))
    plateaus.summarize(tmp_path, dataset, specs)
    plateaus.draw(tmp_path, dataset, specs, "")
    (verdict,) = plateaus.verdicts(plateaus.levels(dataset, specs), specs).values()
    assert verdict.startswith("no")
    critical, specs = study(edge_test, config_of(step_sizes=(9.0,), num_steps=(800,)))
    assert np.isnan(critical["critical"]).all()
    edge_test.summarize(tmp_path, critical, specs)
    edge_test.draw(tmp_path, critical, specs, "")


def test_records_alternate_between_even_and_odd_steps():
    at = flags.record_steps(1000, 30)
    assert (at % 2 == np.arange(30) % 2).all()
    assert (np.diff(at) > 0).all() and at[-1] < 1000


def test_runs_of_one_program_are_the_runs_alone():
    both = config_of(
        step_sizes=(0.2, 0.1),
        momenta=(0.0, 0.5),
        batch_sizes=(0, 0),
        optimizers=("sgd",) * 2,
        num_steps=(40,) * 2,
    )
    together, _ = study(plateaus, both)
    alone, _ = study(plateaus, config_of(step_sizes=(0.1,), momenta=(0.5,)))
    np.testing.assert_allclose(together["loss"][1], alone["loss"][0], rtol=1e-12)
