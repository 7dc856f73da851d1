"""Laws of toy runs and sweeps."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from sgd_sparse_jax import train
from sgd_sparse_jax.data import sparse_regression
from sgd_sparse_jax.models import DiagonalNet, from_linen
from sgd_sparse_jax.types import Batch

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROBLEM = jax.tree.map(jnp.asarray, sparse_regression(3, n=10, d=12, support=2, n_test=4))
MODEL = DiagonalNet(0.3)
NUM_STEPS = 150


POINTS = jnp.array([0.02, 0.1, 50.0]), jnp.array([1.0, 2.0, 5.0])  # the last diverges


def loss_of(state):
    out = MODEL.apply({"params": state.params}, PROBLEM.train.x)[0]
    return train.half_squared(out, PROBLEM.train.y).mean()


def parts(tx):
    network = from_linen(MODEL)
    step = train.make_step(train.make_objective(network, train.half_squared), tx)
    fetch = lambda key, idx: Batch(PROBLEM.train.x[idx], PROBLEM.train.y[idx])
    state = train.init_state(jr.key(5), network, tx, PROBLEM.train.x)
    return train.with_replacement(10, 1), train.make_segment(step, fetch), state


EVERY_7 = [train.Probe(loss_of, range(0, NUM_STEPS, 7))]


def run(key, point, probes=EVERY_7):
    schedule = lambda step: point[0] / jnp.where(step < 60, 1.0, point[1])
    return train.record_run(key, *parts(optax.sgd(schedule, 0.5)), probes, NUM_STEPS)


KEYS = jr.split(jr.key(1), 5)


@pytest.fixture(scope="module")
def whole():
    return train.sweep(run, KEYS, POINTS)


def assert_equal(a, b, rtol=1e-12):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol, 1e-15), a, b)


def test_a_sweep_is_the_loop_over_its_runs(whole):
    one = jax.jit(run)
    for i, j in ((0, 0), (4, 1), (2, 2)):
        alone = one(KEYS[i], jax.tree.map(lambda leaf, j=j: leaf[j], POINTS))
        assert_equal(jax.tree.map(lambda leaf, ij=(i, j): leaf[ij], whole), alone)
    finals, losses = whole[0].params["u"], whole[1][0]
    assert len(np.unique(finals[:, :2, 0].round(12))) == 10  # seeds and points are different runs
    assert np.isnan(losses[:, 2, -1]).all() and np.isfinite(losses[:, :2]).all()


def test_chunks_devices_and_the_number_of_seeds_change_nothing(whole):
    one_device = jax.make_mesh((1,), ("runs",), (AxisType.Auto,), devices=jax.devices()[:1])
    done = []
    few = train.sweep(run, KEYS[:3], POINTS, chunk=4, mesh=one_device, on_chunk=done.append)
    assert_equal(few, jax.tree.map(lambda leaf: leaf[:3], whole))
    assert done == [4, 8, 9]


@pytest.mark.parametrize("vectorized", [1, 2])
def test_runs_in_turn_are_vmapped_runs(whole, vectorized):
    in_turn = train.sweep(run, KEYS[:3], POINTS, chunk=3, vectorized=vectorized)
    assert_equal(in_turn, jax.tree.map(lambda leaf: leaf[:3], whole))


def test_records_do_not_change_the_run_and_each_probe_has_its_own_steps(whole):
    called = []

    def expensive(state):
        jax.debug.callback(lambda step: called.append(int(step)), state.step)
        return state.step, loss_of(state)

    key, point = KEYS[0], jax.tree.map(lambda leaf: leaf[1], POINTS)
    probes = [train.Probe(loss_of, [0, 1, 2, 77]), train.Probe(expensive, [4, 77, NUM_STEPS])]
    state, (losses, (steps, same)) = jax.jit(lambda k, p: run(k, p, probes))(key, point)
    jax.effects_barrier()
    assert called == steps.tolist() == [4, 77, NUM_STEPS]
    assert_equal(state, jax.tree.map(lambda leaf: leaf[0, 1], whole[0]))
    np.testing.assert_allclose([losses[3], same[1]], whole[1][0][0, 1, 11], rtol=1e-12)  # 77 = 11*7
    np.testing.assert_allclose(same[2], loss_of(state), rtol=1e-12)


def test_a_saved_state_continues_and_records_from_its_step_on():
    sampler, segment, start = parts(optax.sgd(0.1, 0.9))
    half, none = train.record_run(KEYS[0], sampler, segment, start, [], 70)
    assert half.step == 70 and none == ()
    probed = lambda state, at: train.record_run(
        KEYS[0], sampler, segment, state, [train.Probe(loss_of, at)], 90
    )
    compiled = jax.jit(lambda state: probed(state, [70, 80]))
    # Two programs round differently, which 90 steps with momentum amplify.
    assert_equal(compiled(half), compiled(start), rtol=1e-9)
    for wrong in ([69], [80, 70], [70, 70], [70, 91]):
        with pytest.raises(ValueError, match=r"probes\[0\]\.at"):
            probed(half, wrong)


def uniform(key, point):
    return {"drawn": jr.uniform(key) * point, "point": point}


def test_a_program_is_compiled_once():
    traced = []
    sweeping = train.make_sweep(lambda *args: (traced.append(1), uniform(*args))[1], chunk=1)
    first, again = sweeping(KEYS, jnp.arange(2.0)), sweeping(KEYS, jnp.arange(2.0) * 3)
    assert len(traced) == 1 and first["drawn"].shape == (5, 2)
    np.testing.assert_allclose(again["drawn"], first["drawn"] * 3)


class Killed(dict):
    """A store that raises after two chunks."""

    def __setitem__(self, name, arrays):
        super().__setitem__(name, arrays)
        if len(self) == 2:
            raise KeyboardInterrupt


def test_an_interrupted_sweep_continues_after_its_chunks_bit_for_bit():
    points, store = jnp.arange(1.0, 7.0), Killed()
    sweeping = train.make_sweep(uniform, chunk=1)  # 8 devices: 30 runs are 4 chunks
    with pytest.raises(KeyboardInterrupt):
        sweeping(KEYS, points, store=store)
    rest, done = dict(store), []
    got = sweeping(KEYS, points, store=rest, on_chunk=done.append)
    assert done == [8, 16, 24, 30] and list(rest)[:2] == list(store) and len(rest) == 4
    jax.tree.map(np.testing.assert_array_equal, got, sweeping(KEYS, points))
    first = next(iter(rest))  # read, not computed again
    rest[first] = {name: array + 1 for name, array in rest[first].items()}
    again = sweeping(KEYS, points, store=rest)
    np.testing.assert_array_equal(again["point"] - got["point"], np.arange(30).reshape(5, 6) < 8)


@pytest.mark.parametrize(
    "other",
    [
        {"points": jnp.array([1.0, 2.5])},
        {"points": jnp.array([1, 2])},
        {"keys": jr.split(jr.key(1, impl="rbg"), 5)},
        {"keys": KEYS[:4]},
        {"chunk": 2},
        {"fingerprint": "steps=3"},
        {"run": lambda key, point: jr.normal(key) * point},
    ],
)
def test_chunks_of_another_sweep_are_not_used(other):
    store, plain = {}, {"keys": KEYS, "points": jnp.array([1.0, 2.0]), "chunk": 1, "run": uniform}
    train.sweep(**plain, store=store)
    before = dict(store)
    got = train.sweep(**(plain | other), store=store)
    jax.tree.map(np.testing.assert_array_equal, got, train.sweep(**(plain | other)))
    assert len(store) > len(before) and all(store[name] is before[name] for name in before)


def test_a_leaf_without_one_entry_per_point_is_named():
    with pytest.raises(ValueError, match="eta"):
        train.sweep(lambda key, point: point["eta"], KEYS, {"eta": np.ones(3), "b": np.ones(2)})


def test_labels_match_runs():
    def run(key, point):
        curve = jr.uniform(key) + point["step_size"] * jnp.arange(4) + 100 * point["scale"]
        return {"final": curve[-1], "loss": curve}

    axes = {"step_size": np.array([0.1, 0.2]), "scale": np.array([1.0, 2.0, 3.0])}
    results = train.sweep(run, KEYS[:3], train.grid(**axes))
    steps = {"records": {"loss": ["step"]}, "coords": {"step": [0, 10, 20, 30]}}
    data = train.labelled(results, axes=axes, **steps)
    assert data["loss"].dims == (*data["final"].dims, "step") == ("seed", *axes, "step")
    for seed in range(3):
        one = data.sel(seed=seed, step_size=0.2, scale=3.0)
        expected = run(KEYS[seed], {"step_size": 0.2, "scale": 3.0})
        np.testing.assert_allclose(one["final"], expected["final"], rtol=1e-12)
        np.testing.assert_allclose(one["loss"].sel(step=20), expected["loss"][2], rtol=1e-12)
