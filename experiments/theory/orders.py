"""Runs with four orders of the batches: stationary states, flat valleys, saddles, a ReLU net."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from sgd_sparse_jax import measure, train
from sgd_sparse_jax.theory import sampling

SAMPLERS = {
    "with replacement": train.with_replacement,
    "reshuffled": train.reshuffled_epochs,
    "shuffled once": train.shuffled_once,
    "cyclic": train.cyclic,
}
K = 8  # batches per epoch; 24 in the ReLU net
STATIONARY = (0.2, 0.1, 0.05, 0.025)  # step sizes
VALLEY, VALLEY_NOISE = (0.05, 0.025), 0.3  # step sizes, and s
SADDLES = {  # dl/dx, dl/dy of example i with eps = +-.3
    "noise along the escape": lambda x, y, eps: (x, -y + eps),
    "noise that couples": lambda x, y, eps: (x + eps * (1 + y), -y + eps * x),
    "degenerate, coupled": lambda x, y, eps: (x + eps * (1 + y), -(y**3) + eps * x),
}
SADDLE_STEP, LONGEST = 0.05, 60_000
UNITS, POINTS, NET_STEP, NET_NOISE = 30, 12, 0.02, 0.5  # of the ReLU net


def sign(i: jax.Array) -> jax.Array:
    """+1 for even examples, -1 for odd ones."""
    return 1.0 - 2.0 * (i % 2)


def advance(
    gradient: Callable, order: Callable, number: jax.Array, theta: jax.Array, eta, k: int = K
) -> jax.Array:
    """theta after window `number` of eight epochs, with batches order(first step, steps)."""
    step = lambda theta, i: (theta - eta * gradient(theta, i), None)
    return jax.lax.scan(step, theta, order(number * 8 * k, 8 * k)[:, 0])[0]


def walk(gradient: Callable, order: Callable, theta: jax.Array, eta, windows: int) -> jax.Array:
    """theta after each of the windows, [windows, ...]."""

    def several(theta, number):
        theta = advance(gradient, order, number, theta, eta)
        return theta, theta

    return jax.lax.scan(several, theta, jnp.arange(windows))[1]


def by_sampler(run: Callable, key: jax.Array, seeds: int, k: int = K) -> jax.Array:
    """`run(key, order)` of all samplers and seeds, [samplers, seeds, ...]; see `advance`."""
    draws = [sampler(k, 1) for sampler in SAMPLERS.values()]

    def of_sampler(which):  # a loop over samplers in one program, in place of a program for each
        branches = lambda steps: [lambda *at, draw=draw: draw(*at, steps) for draw in draws]
        order = lambda key: lambda *at: jax.lax.switch(which, branches(at[1]), key, at[0])
        return jax.vmap(lambda key: run(key, order(key)))(jr.split(key, seeds))

    return jax.jit(lambda: jax.lax.map(of_sampler, jnp.arange(len(draws))))()


def stationary(key: jax.Array, seeds: int) -> dict:
    """Variance at ends of epochs on (theta - c_i)^2 / 2, c_i = +-1, [sampler, eta]."""
    eta = jnp.array(STATIONARY)
    run = lambda key, order: walk(lambda t, i: t - sign(i), order, jnp.zeros(len(eta)), eta, 400)
    late = by_sampler(run, key, seeds)[:, :, 100:]
    return {"stationary": (("sampler", "eta"), late.var((1, 2)))}


def flat(key: jax.Array, seeds: int) -> dict:
    """z on l_i = +-z^2 / 2 after 24 epochs at eta = .1 from 1, [sampler, seed]; and predicted."""
    eta, windows = jnp.array(0.1), 3
    run = lambda key, order: walk(lambda z, i: sign(i) * z, order, jnp.array(1.0), eta, windows)[-1]
    predicted = sampling.flat_shrinkage(eta, 1.0, K) ** (8 * windows)
    ends = by_sampler(run, key, 64 * seeds)
    return {"flat_end": (("sampler", "flat_seed"), ends), "flat_predicted": predicted}


def valley(key: jax.Array, seeds: int) -> dict:
    """Rate of ln |u^2 - v^2| per step over eta^2 s^2, [sampler, seed, eta]."""
    eta, s = jnp.array([VALLEY]), VALLEY_NOISE

    def gradient(theta, i):
        u, v = theta
        residual = u * v - 1 - s * sign(i)
        return jnp.stack([residual * v, residual * u])

    start = jnp.stack([jnp.full(2, 1.6), jnp.full(2, 1 / 1.6)])
    run = lambda key, order: walk(gradient, order, start, eta, 256)
    path = np.asarray(by_sampler(run, key, 4 * seeds))[:, :, [63, 255]]
    u, v = path[..., 0, :], path[..., 1, :]
    gap = np.log(np.abs(u**2 - v**2))
    rate = (gap[:, :, 0] - gap[:, :, 1]) / (192 * 8 * K) / np.asarray(sampling.valley_rate(eta, s))
    return {"valley_rate": (("sampler", "valley_seed", "valley_step"), rate)}


def saddles(key: jax.Array, seeds: int) -> dict:
    """Steps until |y| > 1 from the saddle, [saddle, sampler, run]; `LONGEST` if not before."""

    def time_of(slopes: Callable, order: Callable) -> jax.Array:
        def gradient(state, i):  # of x and y, and -1 for the number of steps
            x, y, _ = state
            slope = jnp.stack([*slopes(x, y, 0.3 * sign(i)), -1 / SADDLE_STEP])
            return jnp.where(jnp.abs(y) > 1, 0, slope)

        more = lambda carry: (jnp.abs(carry[1][1]) <= 1) & (carry[1][2] < LONGEST)
        several = lambda carry: (
            carry[0] + 1,
            advance(gradient, order, carry[0], carry[1], SADDLE_STEP),
        )
        return jax.lax.while_loop(more, several, (jnp.array(0), jnp.zeros(3)))[1][2]

    times = [
        by_sampler(lambda key, order, s=slopes: time_of(s, order), key, 16 * seeds)
        for slopes in SADDLES.values()
    ]
    return {"escape": (("saddle", "sampler", "run"), jnp.stack(times))}


def relu_net(key: jax.Array, seeds: int, epochs: int) -> dict:
    """Trace of the Jacobian's Gram matrix, effective rank and rank at the end, [sampler, seed].

    A net 1-30-1 at 12 points of sin 3x, each with the labels +.5 and -.5: 24 batches.
    """
    x = jnp.linspace(-1, 1, POINTS)
    labels = jnp.concatenate([jnp.sin(3 * x) + NET_NOISE, jnp.sin(3 * x) - NET_NOISE])
    scales = jnp.repeat(jnp.array([1.0, 0.5, np.sqrt(2 / UNITS)]), UNITS)

    def model(theta, x):
        w, b, a = theta.reshape(3, UNITS)
        return a @ jnp.maximum(w * x + b, 0)

    loss = lambda theta, i: (model(theta, x[i % POINTS]) - labels[i]) ** 2 / 2

    def jacobian(key, order):
        # The same for all samplers, which use fold_in(key, 0), fold_in(key, 1), ...
        theta = scales * jr.normal(jr.fold_in(key, 2**32 - 1), (3 * UNITS,))
        several = lambda number, theta: advance(
            jax.grad(loss), order, number, theta, NET_STEP, 2 * POINTS
        )
        theta = jax.lax.fori_loop(0, -(-epochs // 8), several, theta)
        return jax.vmap(jax.grad(model), (None, 0))(theta, x)

    found = by_sampler(jacobian, key, seeds, 2 * POINTS)
    s = np.linalg.svd(np.asarray(found), compute_uv=False)
    dims = ("sampler", "net_seed")
    return {
        "trace": (dims, (s**2).sum(-1)),
        "effective_rank": (dims, jax.vmap(jax.vmap(measure.effective_rank))(jnp.asarray(s))),
        "rank": (dims, (s > 1e-4 * s[..., :1]).sum(-1)),
    }
