"""Means and variances over the orders of the batches in one epoch, by enumeration and by pairs."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from sgd_sparse_jax.theory import sampling

STEP_SIZES = (0.1, 0.05, 0.025, 0.0125, 0.00625)
SIZES = (2, 3, 5, 6, 7)  # numbers of batches whose orders are enumerated at .01 and .005
MOST_DRAWN = 6  # batches, of which all sequences with replacement are enumerated
PAIRS = "pairs"  # of an order and its reverse
PAIR_STEP_SIZES, PAIR_BATCHES = (0.04, 0.02, 0.01, 0.005), 16


def problem(seed: int, k: int) -> tuple[Callable, jax.Array]:
    """Losses (t_2 tanh(t_0 x + t_1) + t_3 - y)^2 / 2 of k random points, and parameters t."""
    x, y = jnp.asarray(np.random.RandomState(seed).randn(k, 2)).T
    model = lambda t, x: t[2] * jnp.tanh(t[0] * x + t[1]) + t[3]
    return lambda t, i: (model(t, x[i]) - y[i]) ** 2 / 2, jnp.array([0.7, -0.2, 1.1, 0.1])


def epoch_ends(loss: Callable, theta: jax.Array, orders: np.ndarray, eta: jax.Array) -> jax.Array:
    """theta after an epoch in each of the orders [n, k], [n, p]."""
    step = lambda theta, i: (theta - eta * jax.grad(loss)(theta, i), None)
    end = lambda order: jax.lax.scan(step, theta, order)[0]
    return jax.lax.map(end, jnp.asarray(orders), batch_size=min(len(orders), 4096))


def residuals(
    seed: int, k: int, etas: Sequence[float], orders: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Per name of `orders`: mean of the ends minus GD, and their variance; and the formula.

    Of `PAIRS`, whose second half reverses the first, also the variance of the means of pairs.
    """
    loss, theta = problem(seed, k)
    losses = lambda theta: jax.vmap(lambda i: loss(theta, i))(jnp.arange(k))

    def of(eta):
        descend = lambda _, t: t - eta * jax.grad(lambda t: losses(t).mean())(t)
        gd = jax.lax.fori_loop(0, k, descend, theta)
        found = {"formula": sampling.reshuffling_drift(losses, theta, eta)}
        for name, each in orders.items():
            ends = epoch_ends(loss, theta, each, eta)
            found[name] = ends.mean(0) - gd
            found[f"{name} variance"] = ends.var(0).sum()
            if name == PAIRS:
                pairs = ends.reshape(2, -1, ends.shape[1]).mean(0)
                found["pair variance"] = pairs.var(0).sum()
        return found

    return {name: np.asarray(v) for name, v in jax.jit(jax.vmap(of))(jnp.array(etas)).items()}


def enumerated(seed: int, k: int) -> dict:
    """Residual and variance over all orders of an epoch, by step size; orders of the residual."""
    orders = {"without": np.array(list(itertools.permutations(range(k))))}
    if k <= MOST_DRAWN:
        orders["with"] = np.array(list(itertools.product(range(k), repeat=k)))
    found = residuals(seed, k, STEP_SIZES, orders)
    missing = np.full(len(STEP_SIZES), np.nan)
    norm = lambda values: np.linalg.norm(values, axis=1)
    by_size = []
    for size in SIZES:
        orders = {"without": np.array(list(itertools.permutations(range(size))))}
        each = residuals(seed, size, (0.01, 0.005), orders)
        by_size.append(norm(each["without"] - each["formula"]))
    subsets = np.array(list(itertools.combinations(range(6), 2)))
    loss, theta = problem(seed, 6)
    gradients = jax.vmap(lambda i: jax.grad(loss)(theta, i))(jnp.arange(6))
    ratio = gradients[subsets].mean(1).var(0).sum() / gradients.var(0).sum()
    return {
        "drift": ("step_size", norm(found["without"])),
        "residual": ("step_size", norm(found["without"] - found["formula"])),
        "residual_with": ("step_size", norm(found["with"]) if "with" in found else missing),
        "variance": ("step_size", found["without variance"]),
        "variance_with": ("step_size", found.get("with variance", missing)),
        "order_by_size": ("size", [np.log2(first / last) for first, last in by_size]),
        "batch_factor": ratio,
    }


def paired(seed: int, count: int) -> dict:
    """Residuals with 16 batches from `count` orders, half of them the reverse of the others."""
    half = count // 2
    keys = jr.split(jr.key(seed), half)
    some = np.asarray(jax.vmap(lambda key: jr.permutation(key, PAIR_BATCHES))(keys))
    orders = {PAIRS: np.concatenate([some, some[:, ::-1]])}
    found = residuals(seed, PAIR_BATCHES, PAIR_STEP_SIZES, orders)
    residual = np.linalg.norm(found[PAIRS] - found["formula"], axis=1)
    return {
        "pair_residual": ("pair_step", residual),
        "pair_error": ("pair_step", np.sqrt(found["pair variance"] / half)),
        "plain_error": ("pair_step", np.sqrt(found[f"{PAIRS} variance"] / (2 * half))),
    }
