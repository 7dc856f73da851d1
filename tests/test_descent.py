"""Optimizers and sharpness-aware gradients against loops in NumPy."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from sgd_sparse_jax import train
from sgd_sparse_jax.models import DiagonalNet, from_linen
from sgd_sparse_jax.types import Batch

pytestmark = pytest.mark.usefixtures("quick_compilation")
N, D, STEPS, ETA, ALPHA = 12, 8, 40, 0.1, 0.5
RNG = np.random.default_rng(4)
X = RNG.normal(size=(N, D))
Y = X @ (np.arange(D) - 3.0) / 4 + 0.2 * RNG.normal(size=N)
DATA = Batch(jnp.asarray(X), jnp.asarray(Y))
NETWORK = from_linen(DiagonalNet(ALPHA))
OBJECTIVE = train.make_objective(NETWORK, train.half_squared)


def descend(tx, gradient=None):
    """(loss before each step, u, v at the end) of full-batch descent."""
    fetch = lambda key, idx: Batch(DATA.x[idx], DATA.y[idx])
    segment = train.make_segment(train.make_step(OBJECTIVE, tx, gradient=gradient), fetch, unroll=1)
    state = train.init_state(jr.key(0), NETWORK, tx, DATA.x)
    state, losses = segment(jr.key(1), state, train.full_batch(N)(jr.key(2), 0, STEPS))
    return losses, state.params["u"], state.params["v"]


def loop(move):
    """The expected result of `descend` for steps `move(u, v, du, dv)`."""
    u, v, losses = np.full(D, ALPHA), np.zeros(D), []
    for _ in range(STEPS):
        losses.append(np.mean((X @ (u * v) - Y) ** 2) / 2)
        u, v = move(u, v, *slopes(u, v))
    return np.array(losses), u, v


def slopes(u, v):
    back = X.T @ (X @ (u * v) - Y) / N
    return back * v, back * u


def assert_close(one, other, rtol=1e-10):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13)
    jax.tree.map(close, jax.device_get(one), jax.device_get(other))


def shrunk(share):
    return lambda u, v, du, dv: (u - ETA * du - share * u, v - ETA * dv - share * v)


def ascended(rho, unit=False):
    def move(u, v, du, dv):
        length = rho / np.sqrt(du @ du + dv @ dv) if unit else rho
        du, dv = slopes(u + length * du, v + length * dv)
        return u - ETA * du, v - ETA * dv

    return move


def ascended_by_example(rho):
    """The paper's loop over examples moves each by 2 rho r_k dphi_k: its rho is half of `rho`."""

    def move(u, v, *_):
        du, dv = np.zeros(D), np.zeros(D)
        for x, y in zip(X, Y, strict=True):
            length = 2 * (rho / 2) * (x @ (u * v) - y)
            u_k, v_k = u + length * x * v, v + length * x * u
            moved = x @ (u_k * v_k) - y
            du, dv = du + moved * x * v_k / N, dv + moved * x * u_k / N
        return u - ETA * du, v - ETA * dv

    return move


RATES = (0.0, 0.01, 0.06)  # at 0 most of them are gradient descent
SGD = optax.sgd(ETA)
RUNS = {  # rate -> our run, and its step in NumPy
    "shrinkage": (lambda r: descend(optax.chain(SGD, optax.add_decayed_weights(-r))), shrunk),
    "sam": (lambda r: descend(SGD, train.sharpness_aware(r)), ascended),
    "sam, normalized": (
        lambda r: descend(SGD, train.sharpness_aware(r, normalized=True)),
        partial(ascended, unit=True),
    ),
    "per example": (lambda r: descend(SGD, train.example_sharpness_aware(r)), ascended_by_example),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_vmapped_rate_is_the_numpy_loop_at_each_rate(name):
    run, move = RUNS[name]
    loops = [loop(move(rate)) for rate in RATES]
    stacked = tuple(map(np.stack, zip(*loops, strict=True)))
    assert_close(jax.jit(jax.vmap(run))(jnp.array(RATES)), stacked)
    assert np.abs(np.diff(stacked[1], axis=0)).max(1).min() > 1e-4  # all rates are different runs
    assert loops[0][0][-1] < 0.5 * loops[0][0][0]  # else nothing moves


def test_averages_are_geometric_sums_of_iterates():
    tx, decays = optax.sgd(ETA), np.array([0.0, 0.7, 0.99])
    start = train.init_state(jr.key(0), NETWORK, tx, DATA.x, averaged=True)

    def run(decay):
        step = train.make_step(OBJECTIVE, tx, ema_decay=decay)

        def body(state, _):
            after, _ = step(state, DATA)
            return after, (state.params["v"], state.average["v"])

        return jax.lax.scan(body, start, length=STEPS)[1]

    iterates, averages = jax.device_get(jax.jit(jax.vmap(run))(decays))
    for tau, theta, average in zip(decays, iterates, averages, strict=True):
        assert_close(theta, iterates[0])  # averaging does not change a run
        for t in range(STEPS):
            weights = (1 - tau) * tau ** np.arange(t)[::-1]
            assert_close(average[t], tau**t * theta[0] + weights @ theta[1 : t + 1], rtol=1e-12)


class BatchNormed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        normed = nn.BatchNorm(use_running_average=not train, param_dtype=x.dtype)(x)
        return normed.sum(1) * self.param("scale", nn.initializers.ones, (1,), x.dtype)


def test_statistics_are_those_of_the_parameters_and_not_of_the_ascended_point():
    """Per-example ascents refuse networks with statistics."""
    tx, network = optax.sgd(ETA), from_linen(BatchNormed())
    state = train.init_state(jr.key(0), network, tx, DATA.x)
    objective = train.make_objective(network, train.half_squared)
    of = lambda gradient: jax.jit(train.make_step(objective, tx, gradient=gradient))(state, DATA)
    plain, sharp = of(None), of(train.sharpness_aware(0.5))
    assert_close((sharp[0].stats, sharp[1]), (plain[0].stats, plain[1]), rtol=1e-14)
    assert np.abs(plain[0].params["scale"] - sharp[0].params["scale"])[0] > 1e-3
    with pytest.raises(ValueError, match="batch_stats"):
        of(train.example_sharpness_aware(0.1))
