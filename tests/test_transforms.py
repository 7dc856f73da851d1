"""Optimizers of the toy runs against loops in NumPy, and what each of them must conserve."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax.models import DiagonalNet, FactorizedLinear, from_linen
from sgd_sparse_jax.train import (
    balancing,
    full_batch,
    half_squared,
    init_state,
    make_objective,
    make_segment,
    make_step,
    normalized_leaves,
    shrinkage,
)
from sgd_sparse_jax.types import Batch

N, D, STEPS, ETA, ALPHA = 12, 8, 40, 0.1, 0.5
RNG = np.random.default_rng(4)
X = RNG.normal(size=(N, D))
Y = X @ (np.arange(D) - 3.0) / 4 + 0.2 * RNG.normal(size=N)
DATA = Batch(jnp.asarray(X), jnp.asarray(Y))
MODEL = DiagonalNet(ALPHA)


def descend(tx):
    """(loss before each step, u, v at the end) of full-batch gradient descent."""
    fetch = lambda key, idx: Batch(DATA.x[idx], DATA.y[idx])
    segment = make_segment(
        make_step(make_objective(from_linen(MODEL), half_squared), tx), fetch, unroll=1
    )
    state = init_state(jr.key(0), from_linen(MODEL), tx, DATA.x)
    state, losses = segment(jr.key(1), state, full_batch(N)(jr.key(2), 0, STEPS))
    return losses, state.params["u"], state.params["v"]


def loop(move):
    """What `descend` should return where a step is `move(u, v, du, dv)`."""
    u, v, losses = np.full(D, ALPHA), np.zeros(D), []
    for _ in range(STEPS):
        residual = X @ (u * v) - Y
        losses.append((residual**2).sum() / (2 * N))
        back = X.T @ residual / N
        u, v = move(u, v, back * v, back * u)
    return np.array(losses), u, v


def assert_close(one, other, rtol=1e-10):
    close = partial(np.testing.assert_allclose, rtol=rtol, atol=1e-13)
    jax.tree.map(close, jax.device_get(one), jax.device_get(other))


def test_gradient_descent_is_its_numpy_loop():
    expected = loop(lambda u, v, du, dv: (u - ETA * du, v - ETA * dv))
    assert expected[0][-1] < 0.5 * expected[0][0]  # else the comparison is of runs at rest
    assert_close(descend(optax.sgd(ETA)), expected)


def test_momentum_adds_the_decayed_sum_of_gradients():
    memory = [np.zeros(D), np.zeros(D)]

    def move(u, v, du, dv):
        memory[:] = 0.8 * memory[0] + du, 0.8 * memory[1] + dv
        return u - ETA * memory[0], v - ETA * memory[1]

    assert_close(descend(optax.sgd(ETA, momentum=0.8)), loop(move))


def test_coupled_weight_decay_is_the_gradient_of_a_penalty():
    move = lambda u, v, du, dv: (u - ETA * (du + 0.3 * u), v - ETA * (dv + 0.3 * v))
    tx = optax.chain(optax.add_decayed_weights(0.3), optax.sgd(ETA))
    assert_close(descend(tx), loop(move))


def test_shrinkage_takes_a_share_of_the_parameters_whatever_the_step_size():
    move = lambda u, v, du, dv: (u - ETA * du - 0.02 * u, v - ETA * dv - 0.02 * v)
    assert_close(descend(optax.chain(optax.sgd(ETA), shrinkage(0.02))), loop(move))


def test_shrinkage_is_coupled_decay_times_the_step_size():
    coupled = optax.chain(optax.add_decayed_weights(0.3), optax.sgd(ETA))
    assert_close(descend(coupled), descend(optax.chain(optax.sgd(ETA), shrinkage(0.3 * ETA))))


def test_balancing_shrinks_the_larger_factor_and_grows_the_smaller():
    crossings = []

    def move(u, v, du, dv):
        u_larger, v_larger = np.abs(u) > np.abs(v), np.abs(v) > np.abs(u)
        crossings.append(u_larger)
        return (
            u - ETA * du - 0.01 * u * (2 * u_larger - 1),
            v - ETA * dv - 0.01 * v * (2 * v_larger - 1),
        )

    expected = loop(move)
    assert np.any(crossings, axis=0)[~np.all(crossings, axis=0)].any()  # some pair changes order
    assert_close(descend(optax.chain(optax.sgd(ETA), balancing(0.01))), expected)


def test_balancing_alone_changes_products_only_to_second_order_and_lets_equals_grow():
    tx, rate = balancing(0.1, ("a", "b")), 0.1
    params = {
        "a": jnp.array([3.0, -1.0, 2.0, -2.0]),
        "b": jnp.array([1.0, 4.0, -2.0, -2.0]),
        "c": jnp.array([7.0]),
    }
    moves, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    after = optax.apply_updates(params, moves)
    equal = np.array([False, False, True, True])
    product = np.asarray(params["a"] * params["b"])
    factor = np.where(equal, (1 + rate) ** 2, 1 - rate**2)
    np.testing.assert_allclose(after["a"] * after["b"], factor * product, rtol=1e-14)
    np.testing.assert_allclose(after["a"], [2.7, -1.1, 2.2, -2.2], rtol=1e-14)
    np.testing.assert_array_equal(after["c"], params["c"])


def test_normalized_leaves_have_norm_one_unless_one_of_them_is_zero():
    raw = []

    def move(u, v, du, dv):
        norms = np.sqrt(du @ du), np.sqrt(dv @ dv)
        raw.append(0.0 in norms)
        if raw[-1]:
            norms = 1.0, 1.0
        return u - ETA * du / norms[0], v - ETA * dv / norms[1]

    expected = loop(move)
    assert raw[0] and not any(raw[1:])  # v = 0 at first, so the gradient of u is 0
    assert_close(descend(optax.chain(normalized_leaves(), optax.sgd(ETA))), expected)


def test_normalized_leaves_forget_the_scale_of_the_gradient_but_not_its_direction():
    leaves = {"w": jr.normal(jr.key(0), (3, 4)), "b": jr.normal(jr.key(1), (5,))}
    tx = normalized_leaves()
    of = lambda grads: tx.update(grads, tx.init(grads))[0]
    scaled = of({"w": 1e-3 * leaves["w"], "b": 1e5 * leaves["b"]})
    assert_close(of(leaves), scaled, rtol=1e-14)
    for name, leaf in of(leaves).items():
        np.testing.assert_allclose(np.vdot(leaf, leaf), 1.0, rtol=1e-14)
        assert np.vdot(leaf, leaves[name]) > 0
    silent = leaves | {"b": jnp.zeros(5)}
    jax.tree.map(np.testing.assert_array_equal, of(silent), silent)


VARIANTS = {
    "step_size": lambda rate: optax.chain(normalized_leaves(), optax.sgd(rate)),
    "momentum": lambda rate: optax.sgd(ETA, momentum=rate),
    "decay": lambda rate: optax.chain(optax.add_decayed_weights(rate), optax.sgd(ETA)),
    "shrinkage": lambda rate: optax.chain(optax.sgd(ETA), shrinkage(rate)),
    "balancing": lambda rate: optax.chain(optax.sgd(ETA), balancing(rate)),
}


RATES = jnp.array([0.0, 0.01, 0.05])


def looped(run, numbers):
    """`run` of one number after the other, stacked as `jax.vmap` would stack it."""
    one = jax.jit(run)
    rows = jax.device_get([one(number) for number in numbers])
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_vmapped_rate_is_the_loop_over_rates_and_rate_zero_is_gradient_descent(name):
    run = lambda rate: descend(VARIANTS[name](rate))
    rows = looped(run, RATES)
    assert np.abs(np.diff(rows[1], axis=0)).max(1).min() > 1e-4  # each rate is a run of its own
    assert_close(jax.jit(jax.vmap(run))(RATES), rows)
    if name != "step_size":
        plain = descend(optax.sgd(ETA))
        assert_close(jax.tree.map(lambda leaf: leaf[0], rows), plain, rtol=1e-13)


def averaged_run(decay):
    """(iterates at 0 … STEPS, averages at the same steps)."""
    tx = optax.sgd(ETA)
    step = make_step(make_objective(from_linen(MODEL), half_squared), tx, ema_decay=decay)
    start = init_state(jr.key(0), from_linen(MODEL), tx, DATA.x, averaged=True)

    def body(state, _):
        state, _ = step(state, DATA)
        return state, (state.params, state.average)

    _, rows = jax.lax.scan(body, start, length=STEPS)
    prepend = lambda first, rest: jnp.concatenate([first[None], rest])
    return jax.tree.map(prepend, (start.params, start.average), rows)


def test_averages_are_the_geometric_sum_of_iterates():
    tau = 0.7
    iterates, averages = jax.device_get(averaged_run(tau))
    for name in ("u", "v"):
        theta = iterates[name]
        for t in (0, 1, 2, 17, STEPS):
            past = [tau ** (t - s) * theta[s] for s in range(1, t + 1)]
            closed = tau**t * theta[0] + (1 - tau) * np.sum(past, axis=0)
            np.testing.assert_allclose(averages[name][t], closed, rtol=1e-12, atol=1e-15)


def test_an_average_of_decay_zero_is_the_iterate_and_averaging_changes_no_run():
    iterates, averages = averaged_run(0.0)
    jax.tree.map(np.testing.assert_array_equal, averages, iterates)
    jax.tree.map(np.testing.assert_array_equal, averaged_run(0.9)[0], iterates)
    _, u, v = descend(optax.sgd(ETA))
    assert_close((iterates["u"][-1], iterates["v"][-1]), (u, v), rtol=1e-13)


def test_a_vmapped_ema_decay_is_the_loop_over_decays():
    decays = jnp.array([0.0, 0.5, 0.99])
    assert_close(jax.jit(jax.vmap(averaged_run))(decays), looped(averaged_run, decays))


def test_balancing_names_the_leaf_that_is_missing():
    model, x = FactorizedLinear(), jnp.ones(3)
    params = init_state(jr.key(0), from_linen(model), optax.sgd(ETA), x).params
    with pytest.raises(ValueError, match=r"no leaf \['u', 'v'\] in \['a', 'b'\]"):
        balancing(0.1).update(params, optax.EmptyState(), params)
    with pytest.raises(ValueError, match=r"no leaf \['w'\] in \['a', 'b'\]"):
        balancing(0.1, ("a", "w")).update(params, optax.EmptyState(), params)


@pytest.mark.parametrize("tx", [shrinkage(0.1), balancing(0.1)])
def test_what_moves_the_parameters_asks_for_them(tx):
    updates = {"u": jnp.ones(2), "v": jnp.ones(2)}
    with pytest.raises(ValueError, match="moves the parameters themselves"):
        tx.update(updates, tx.init(updates))
