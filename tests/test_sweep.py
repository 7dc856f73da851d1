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
    half_squared,
    init_state,
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


POINTS = Point(jnp.array([0.02, 0.05, 0.1]), jnp.array([1.0, 2.0, 5.0]))


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


def run(key, point, at=range(0, NUM_STEPS, 7)):
    schedule = lambda step: point.step_size / jnp.where(step < 60, 1.0, point.decay)
    return record_run(key, *parts(optax.sgd(schedule, 0.5)), [Probe(loss_of, at)], NUM_STEPS)


KEYS = jr.split(jr.key(1), 5)


@pytest.fixture(scope="module")
def whole():
    return sweep(run, KEYS, POINTS)


def assert_equal(a, b, rtol=1e-12):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol, 1e-15), a, b)


def test_a_sweep_is_the_loop_over_its_runs(whole):
    one = jax.jit(run)
    for i, j in ((0, 0), (4, 2), (2, 1)):
        alone = one(KEYS[i], jax.tree.map(lambda leaf, j=j: leaf[j], POINTS))
        assert_equal(jax.tree.map(lambda leaf, ij=(i, j): leaf[ij], whole), alone)


def test_chunks_and_devices_change_nothing(whole):
    one_device = jax.make_mesh((1,), ("runs",), (AxisType.Auto,), devices=jax.devices()[:1])
    done = []
    chunked = sweep(run, KEYS, POINTS, chunk=4, mesh=one_device, on_chunk=done.append)
    assert_equal(chunked, whole)
    assert done == [4, 8, 12, 15]


def test_a_seed_does_not_depend_on_how_many_there_are(whole):
    few = sweep(run, KEYS[:2], POINTS)
    assert_equal(few, jax.tree.map(lambda leaf: leaf[:2], whole))


def test_seeds_and_points_are_different_runs(whole):
    finals = whole[0].params["u"]
    assert finals.shape == (5, 3, 12)
    assert len(np.unique(finals[:, :, 0].round(12))) == 15


def test_records_do_not_change_the_run(whole):
    at = [0, 1, 2, 77, NUM_STEPS - 1]
    key, point = KEYS[0], jax.tree.map(lambda leaf: leaf[1], POINTS)
    state, (rows,) = jax.jit(lambda k, p: run(k, p, at))(key, point)
    assert_equal(state, jax.tree.map(lambda leaf: leaf[0, 1], whole[0]))
    np.testing.assert_allclose(rows[3], whole[1][0][0, 1, 11], rtol=1e-12)  # step 77 = 11 * 7


def test_gauges_have_cadences_of_their_own():
    often, rarely = [0, 3, 4, 100, 149], [4, 101]
    gauges = [Probe(lambda s: s.step, often), Probe(lambda s: (s.step, loss_of(s)), rarely)]
    run = jax.jit(lambda key: record_run(key, *parts(optax.sgd(0.1)), gauges, NUM_STEPS))
    state, (first, (second, _)) = run(KEYS[0])
    assert first.tolist() == often and second.tolist() == rarely and state.step == NUM_STEPS


def test_an_expensive_gauge_is_computed_only_where_it_is_due():
    called = []

    def gauge(state):
        jax.debug.callback(lambda step: called.append(int(step)), state.step)
        return state.step

    gauges = [Probe(loss_of, range(0, 90, 9)), Probe(gauge, [9, 81])]
    jax.block_until_ready(
        jax.jit(lambda key: record_run(key, *parts(optax.sgd(0.1)), gauges, 90))(KEYS[0])
    )
    jax.effects_barrier()
    assert called == [9, 81]


def test_cutting_a_run_changes_nothing():
    sampler, segment, state = parts(optax.sgd(0.1, 0.9), batch=3)
    key, noise = jr.split(jr.key(2))
    whole, losses = segment(noise, state, sampler(key, 0, 25))
    part, first = segment(noise, state, sampler(key, 0, 9))
    part, second = segment(noise, part, sampler(key, 9, 16))
    assert_equal(part, whole)
    assert_equal(jnp.concatenate([first, second]), losses)


def test_a_run_can_start_from_a_saved_state():
    sampler, segment, state = parts(optax.sgd(0.1, 0.9))
    gauge = [Probe(loss_of, [0])]
    half, _ = record_run(KEYS[0], sampler, segment, state, gauge, 70)
    resumed, (rows,) = record_run(
        KEYS[0], sampler, segment, half, [Probe(loss_of, [70, 80])], NUM_STEPS
    )
    whole, (expected,) = record_run(
        KEYS[0], sampler, segment, state, [Probe(loss_of, [70, 80])], NUM_STEPS
    )
    assert_equal((resumed, rows), (whole, expected))


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


def test_a_diverged_run_is_a_row_of_nan_and_leaves_the_others_alone(whole):
    wild = Point(jnp.array([0.02, 50.0]), jnp.array([1.0, 1.0]))
    _, (rows,) = sweep(run, KEYS, wild)
    assert np.isnan(rows[:, 1, -1]).all() and np.isfinite(rows[:, 0]).all()
    assert_equal(rows[:, 0], whole[1][0][:, 0])


def test_a_program_is_compiled_once():
    traced = []

    def counted(key, point):
        traced.append(1)
        return jr.uniform(key) * point

    sweeping = make_sweep(counted, chunk=1)
    first = sweeping(KEYS, jnp.arange(2.0))
    again = sweeping(KEYS, jnp.arange(2.0) * 3)
    assert len(traced) == 1 and first.shape == (5, 2)
    np.testing.assert_allclose(again, first * 3)


def test_axes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"unequal length: .*step_size.*3.*decay.*2"):
        sweep(run, KEYS, Point(jnp.ones(3), jnp.ones(2)))
    with pytest.raises(ValueError, match="Nothing to run: 0 seeds x 3 points"):
        sweep(run, KEYS[:0], POINTS)
    with pytest.raises(ValueError, match="150 of a run of 150 steps"):
        run(KEYS[0], jax.tree.map(lambda leaf: leaf[0], POINTS), at=[0, 150])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (jnp.zeros(3), r"keys has shape \(3,\) and dtype float64; give one key per seed"),
        (jr.key(0), r"keys has shape \(\)"),
        (jr.split(jr.key(0), 4).reshape(2, 2), r"keys has shape \(2, 2\)"),
    ],
)
def test_what_is_no_list_of_keys_is_named(keys, words):
    with pytest.raises(ValueError, match=words):
        sweep(lambda key, point: point, keys, jnp.ones(2))


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (np.float64(0.1), r"points\['eta'\] has shape \(\) and dtype float64"),
        (np.array(["a", "b"]), r"points\['eta'\] has shape \(2,\) and dtype <U1"),
        (np.array([1j, 2.0]), r"points\['eta'\] .* dtype complex128; give an array of numbers"),
        (np.array([0.1, np.nan]), r"points\['eta'\] of shape \(2,\) holds NaN at point 1"),
    ],
)
def test_a_leaf_that_is_no_axis_is_named(leaf, words):
    points = {"eta": leaf, "scale": np.ones(2)}
    with pytest.raises(ValueError, match=words):
        sweep(lambda key, point: point["scale"], jr.split(jr.key(0), 2), points)
