"""Laws of toy runs: what may not change a run, and what must."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from sgd_sparse_jax.data import sparse_regression
from sgd_sparse_jax.measure import balancedness
from sgd_sparse_jax.models import DiagonalNet, from_linen
from sgd_sparse_jax.train import (
    Probe,
    full_batch,
    grid,
    half_squared,
    init_state,
    labelled,
    make_objective,
    make_segment,
    make_step,
    make_sweep,
    record_run,
    recorded,
    sweep,
    with_replacement,
)
from sgd_sparse_jax.types import Batch

PROBLEM = jax.tree.map(jnp.asarray, sparse_regression(3, n=10, d=12, support=2, n_test=4))
MODEL = DiagonalNet(0.3)
NUM_STEPS = 150


class Point(NamedTuple):
    step_size: jax.Array
    decay: jax.Array


POINTS = Point(jnp.array([0.02, 0.1, 50.0]), jnp.array([1.0, 2.0, 5.0]))  # the last diverges


def loss_of(state):
    out = MODEL.apply({"params": state.params}, PROBLEM.train.x)[0]
    return half_squared(out, PROBLEM.train.y).mean()


def parts(tx, batch=1):
    fetch = lambda key, idx: Batch(PROBLEM.train.x[idx], PROBLEM.train.y[idx])
    segment = make_segment(make_step(make_objective(from_linen(MODEL), half_squared), tx), fetch)
    return (
        with_replacement(10, batch),
        segment,
        init_state(jr.key(5), from_linen(MODEL), tx, PROBLEM.train.x),
    )


EVERY_7 = [Probe(loss_of, range(0, NUM_STEPS, 7))]


def run(key, point, probes=EVERY_7):
    schedule = lambda step: point.step_size / jnp.where(step < 60, 1.0, point.decay)
    return record_run(key, *parts(optax.sgd(schedule, 0.5)), probes, NUM_STEPS)


KEYS = jr.split(jr.key(1), 5)


@pytest.fixture(scope="module")
def whole():
    return sweep(run, KEYS, POINTS)


def assert_equal(a, b, rtol=1e-12):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol, 1e-15), a, b)


def test_a_sweep_is_the_loop_over_its_runs(whole):
    one = jax.jit(run)
    for i, j in ((0, 0), (4, 1), (2, 2)):
        alone = one(KEYS[i], jax.tree.map(lambda leaf, j=j: leaf[j], POINTS))
        assert_equal(jax.tree.map(lambda leaf, ij=(i, j): leaf[ij], whole), alone)


def test_chunks_devices_and_the_number_of_seeds_change_nothing(whole):
    one_device = jax.make_mesh((1,), ("runs",), (AxisType.Auto,), devices=jax.devices()[:1])
    done = []
    few = sweep(run, KEYS[:3], POINTS, chunk=4, mesh=one_device, on_chunk=done.append)
    assert_equal(few, jax.tree.map(lambda leaf: leaf[:3], whole))
    assert done == [4, 8, 9]


def test_seeds_and_points_are_different_runs_and_one_that_diverges_is_nan_alone(whole):
    finals, losses = whole[0].params["u"], whole[1][0]
    assert finals.shape == (5, 3, 12) and losses.shape == (5, 3, len(range(0, NUM_STEPS, 7)))
    assert len(np.unique(finals[:, :2, 0].round(12))) == 10
    assert np.isnan(losses[:, 2, -1]).all() and np.isfinite(losses[:, :2]).all()


def test_records_do_not_change_the_run_and_each_probe_has_its_own_steps(whole):
    called = []

    def expensive(state):
        jax.debug.callback(lambda step: called.append(int(step)), state.step)
        return state.step, loss_of(state)

    key, point = KEYS[0], jax.tree.map(lambda leaf: leaf[1], POINTS)
    probes = [Probe(loss_of, [0, 1, 2, 77]), Probe(expensive, [4, 77, NUM_STEPS])]
    state, (losses, (steps, same)) = jax.jit(lambda k, p: run(k, p, probes))(key, point)
    jax.effects_barrier()
    assert called == steps.tolist() == [4, 77, NUM_STEPS]
    assert_equal(state, jax.tree.map(lambda leaf: leaf[0, 1], whole[0]))
    np.testing.assert_allclose([losses[3], same[1]], whole[1][0][0, 1, 11], rtol=1e-12)  # 77 = 11*7
    np.testing.assert_allclose(same[2], loss_of(state), rtol=1e-12)


def test_cutting_a_run_changes_nothing():
    sampler, segment, state = parts(optax.sgd(0.1, 0.9), batch=3)
    key, noise = jr.split(jr.key(2))
    whole, losses = segment(noise, state, sampler(key, 0, 25))
    part, first = segment(noise, state, sampler(key, 0, 9))
    part, second = segment(noise, part, sampler(key, 9, 16))
    assert_equal(part, whole)
    assert_equal(jnp.concatenate([first, second]), losses)


def test_a_saved_state_continues_and_records_from_its_step_on():
    sampler, segment, start = parts(optax.sgd(0.1, 0.9))
    half, none = record_run(KEYS[0], sampler, segment, start, [], 70)
    assert half.step == 70 and none == ()
    probed = lambda state, at: record_run(
        KEYS[0], sampler, segment, state, [Probe(loss_of, at)], 90
    )
    compiled = jax.jit(lambda state: probed(state, [70, 80]))
    assert_equal(compiled(half), compiled(start))
    for wrong in ([0, 80], [69], [80, 70], [70, 70], [70, 91], [70.0, 80.0]):
        with pytest.raises(ValueError, match=r"probes\[0\]\.at"):
            probed(half, wrong)


def test_sgd_is_the_numpy_loop():
    x, y = map(np.asarray, PROBLEM.train)
    order = np.random.RandomState(0).randint(0, 10, size=300)
    _, segment, state = parts(optax.sgd(0.2))
    sampler = recorded(jnp.asarray(order)[:, None])
    state, _ = record_run(KEYS[0], sampler, segment, state, [Probe(loss_of, [0])], 300)
    u, v = np.full(12, 0.3), np.zeros(12)
    for i in order:
        g = (x[i] @ (u * v) - y[i]) * x[i]
        u, v = u - 0.2 * g * v, v - 0.2 * g * u
    np.testing.assert_allclose(state.params["u"], u, rtol=1e-10)
    np.testing.assert_allclose(state.params["v"], v, rtol=1e-10)


def test_every_step_shrinks_balancedness_by_the_closed_form():
    _, segment, state = parts(optax.sgd(0.2))
    state = state._replace(params={"u": jnp.linspace(0.1, 1, 12), "v": jnp.linspace(0.9, -0.3, 12)})
    u, v = state.params["u"], state.params["v"]
    x, y = PROBLEM.train
    g = x.T @ (x @ (u * v) - y) / 10
    stepped, _ = segment(KEYS[0], state, full_batch(10)(KEYS[0], 0, 1))
    expected = (jnp.abs(u**2 - v**2) * jnp.abs(1 - 0.2**2 * g**2)).sum()
    got = balancedness(stepped.params["u"], stepped.params["v"])
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert got != balancedness(u, v)


def uniform(key, point):
    return {"drawn": jr.uniform(key) * point, "point": point}


def test_a_program_is_compiled_once():
    traced = []
    sweeping = make_sweep(lambda key, point: (traced.append(1), uniform(key, point))[1], chunk=1)
    first = sweeping(KEYS, jnp.arange(2.0))
    again = sweeping(KEYS, jnp.arange(2.0) * 3)
    assert len(traced) == 1 and first["drawn"].shape == (5, 2)
    np.testing.assert_allclose(again["drawn"], first["drawn"] * 3)


class Killed(dict):
    """A store whose process ends when it has stored two chunks."""

    def __setitem__(self, name, arrays):
        super().__setitem__(name, arrays)
        if len(self) == 2:
            raise KeyboardInterrupt


def test_an_interrupted_sweep_continues_behind_its_chunks_bit_for_bit():
    points, store = jnp.arange(1.0, 7.0), Killed()
    sweeping = make_sweep(uniform, chunk=1)  # 8 devices: 30 runs are 4 chunks
    with pytest.raises(KeyboardInterrupt):
        sweeping(KEYS, points, store=store)
    first, second = list(store)
    rest, done = dict(store), []
    got = sweeping(KEYS, points, store=rest, on_chunk=done.append)
    assert done == [8, 16, 24, 30] and list(rest)[:2] == [first, second] and len(rest) == 4
    jax.tree.map(np.testing.assert_array_equal, got, sweeping(KEYS, points))
    rest[first] = {name: array + 1 for name, array in rest[first].items()}  # it is read, not redone
    again = sweeping(KEYS, points, store=rest)
    np.testing.assert_array_equal(again["point"] - got["point"], np.arange(30).reshape(5, 6) < 8)


@pytest.mark.parametrize(
    "other",
    [
        {"points": jnp.array([1.0, 2.5])},
        {"points": jnp.array([1, 2])},
        {"points": jnp.array([1.0, 2.0, 3.0])},
        {"keys": jr.split(jr.key(2), 5)},
        {"keys": jr.split(jr.key(1, impl="rbg"), 5)},
        {"keys": KEYS[:4]},
        {"chunk": 2},
        {"fingerprint": "steps=3"},
        {"run": lambda key, point: jr.normal(key) * point},
    ],
)
def test_chunks_of_another_sweep_are_not_its_own(other):
    store, plain = {}, {"keys": KEYS, "points": jnp.array([1.0, 2.0]), "chunk": 1, "run": uniform}
    sweep(**plain, store=store)
    before = dict(store)
    got = sweep(**(plain | other), store=store)
    jax.tree.map(np.testing.assert_array_equal, got, sweep(**(plain | other)))
    assert len(store) > len(before) and all(store[name] is before[name] for name in before)


@pytest.mark.parametrize("keys", [jnp.zeros(3), jr.key(0), KEYS[:0], jr.PRNGKey(0)])
def test_what_is_no_list_of_keys_is_refused(keys):
    with pytest.raises(ValueError, match="keys"):
        sweep(uniform, keys, jnp.ones(2))
    assert sweep(uniform, jr.split(jr.key(0), 3), jnp.ones(2))["drawn"].shape == (3, 2)


@pytest.mark.parametrize("leaf", [np.float64(0.1), jnp.ones(3), jnp.ones(0)])
def test_a_leaf_without_one_entry_per_point_is_named(leaf):
    with pytest.raises(ValueError, match=r"points\['eta'\]"):
        sweep(lambda key, point: point["eta"], KEYS, {"eta": leaf, "scale": np.ones(2)})


def test_a_label_names_the_run_it_came_from():
    def run(key, point):
        shift = jr.uniform(key)
        curve = shift + point["step_size"] * jnp.arange(4) + 100 * point["scale"]
        return {"final": curve[-1], "loss": curve}

    axes = {"step_size": np.array([0.1, 0.2]), "scale": np.array([1.0, 2.0, 3.0])}
    results = sweep(run, KEYS[:3], grid(**axes))
    steps = {"records": {"loss": ["step"]}, "coords": {"step": [0, 10, 20, 30]}}
    data = labelled(results, axes=axes, **steps)
    assert data["loss"].dims == ("seed", "step_size", "scale", "step")
    assert data["final"].dims == ("seed", "step_size", "scale")
    for seed in range(3):
        one = data.sel(seed=seed, step_size=0.2, scale=3.0)
        expected = run(KEYS[seed], {"step_size": 0.2, "scale": 3.0})
        np.testing.assert_allclose(one["final"], expected["final"], rtol=1e-12)
        np.testing.assert_allclose(one["loss"].sel(step=20), expected["loss"][2], rtol=1e-12)
    for axis in ([], 0.1, np.array([[0.1, 0.2]])):
        with pytest.raises(ValueError, match="step_size"):
            grid(step_size=axis, scale=[1.0])
    for shape in ((2, 5), (2, 6, 7)):
        with pytest.raises(ValueError, match="loss"):
            labelled({"loss": np.zeros(shape)}, axes=axes)
