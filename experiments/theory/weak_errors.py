"""Weak errors E phi(surrogate) - E phi(SGD) at time 2, on a diagonal net with n = d = 4."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from experiments.figures import claims, plots
from experiments.toy.problems import Toy
from sgd_sparse_jax import measure
from sgd_sparse_jax.theory import flows

if TYPE_CHECKING:
    import xarray

TIME = 2.0
NOISES = {
    "SGD": flows.sampled,
    "exact covariance": flows.exact_gaussian,
    "isotropic": flows.isotropic(),
    "GD": flows.no_noise,
}
SURROGATES = tuple(NOISES)[1:]
QUANTITIES = ("L", "‖u² − v²‖₁")
SOURCE = "docs/theory.md"


def simulate(
    toy: Toy, step_sizes: Sequence[float], paths: int, seed: int, on_chunk: Callable[[], None]
) -> "xarray.Dataset":
    """Means and standard errors [quantity, model, step size] at time 2, with dt = step size."""
    import xarray

    start = toy.network(1.0).init(jr.key(0), toy.train.x)[0]

    def expectations(
        noise: flows.LabelNoise, step_size: jax.Array, steps: int, key: jax.Array
    ) -> jax.Array:
        step = flows.make_step(toy.predict, toy.train, noise, step_size=step_size)
        shape = (paths, len(toy.train.y))

        def advance(i, params):
            key_i = jr.fold_in(key, i)
            z = jr.normal(key_i, shape)
            if noise is flows.sampled:
                z = jr.randint(key_i, (paths, 1), 0, shape[1])
            return jax.vmap(step, (0, 0, None))(z, params, i)

        many = jax.tree.map(lambda leaf: jnp.tile(leaf, (paths, 1)), start)
        ends = jax.lax.fori_loop(0, steps, advance, many)
        values = jnp.stack(
            [
                jax.vmap(lambda params: toy.mean_loss(params, toy.train))(ends),
                jax.vmap(lambda params: measure.balancedness(**params))(ends),
            ]
        )
        return jnp.stack([values.mean(1), values.std(1) / np.sqrt(paths)])

    found = np.zeros((2, len(QUANTITIES), len(NOISES), len(step_sizes)))
    for i, noise in enumerate(NOISES.values()):
        program = jax.jit(partial(expectations, noise))
        for j, step_size in enumerate(step_sizes):
            key = jr.fold_in(jr.key(seed), i * len(step_sizes) + j)
            found[:, :, i, j] = program(step_size, round(TIME / step_size), key)
            on_chunk()
    dims = ("quantity", "model", "step_size")
    coords = {"quantity": list(QUANTITIES), "model": list(NOISES), "step_size": list(step_sizes)}
    return xarray.Dataset({"mean": (dims, found[0]), "error": (dims, found[1])}, coords)


def errors(dataset: "xarray.Dataset", quantity: str, model: str) -> tuple[np.ndarray, np.ndarray]:
    """Differences to SGD and their standard errors, [step sizes]."""
    of = dataset.sel(quantity=quantity)
    mine, sgd = of.sel(model=model), of.sel(model="SGD")
    spread = np.hypot(mine["error"].values, sgd["error"].values)
    return mine["mean"].values - sgd["mean"].values, spread


def judge(dataset: "xarray.Dataset") -> list[claims.Claim]:
    """Constants relative to gradient descent's error, whose weak order is 1 too, and orders."""
    found, sizes = [], dataset["step_size"].values
    common: dict[str, Any] = {"source": SOURCE, "figure": "noise_models"}
    imbalance = QUANTITIES[1]
    whole, _ = errors(dataset, imbalance, "GD")
    for model, bound in (("isotropic", 0.2), ("exact covariance", 0.02)):
        parts, spread = errors(dataset, imbalance, model)
        for j in np.flatnonzero(sizes <= 0.05):
            share, half = parts[j] / whole[j], 1.96 * spread[j] / whole[j]
            found.append(
                claims.judged(
                    f"{model} noise has less weak error than GD",
                    value=share,
                    interval=(share - half, share + half),
                    expected=claims.at_most(bound),
                    setting=f"n = d = 4, η = {sizes[j]:g}",
                    statistic=f"ratio of errors in E{imbalance}",
                    **common,
                )
            )
    for model, expected in (
        ("GD", claims.Expected("1 ± 0.3", 0.7, 1.3)),
        ("isotropic", claims.at_least(0.8)),
        ("exact covariance", claims.at_least(1.7)),
    ):
        parts, spread = errors(dataset, imbalance, model)
        order = np.diff(np.log(np.abs(parts[:2])))[0] / np.diff(np.log(sizes[:2]))[0]
        half = 1.96 * np.hypot(*(spread[:2] / parts[:2])) / abs(np.log(sizes[0] / sizes[1]))
        found.append(
            claims.judged(
                f"weak order of {model}",
                value=order,
                interval=(order - half, order + half),
                expected=expected,
                setting=f"n = d = 4, η = {sizes[0]:g} and {sizes[1]:g}",
                statistic=f"order of the error in E{imbalance}",
                **common,
            )
        )
    return found


def draw(stem: Path, dataset: "xarray.Dataset") -> list[Path]:
    """Draws the absolute errors against the step size, with lines of order 1 and 2."""
    panels, sizes = [], dataset["step_size"].values
    for quantity in QUANTITIES:
        points = {m: (sizes, np.abs(errors(dataset, quantity, m)[0])) for m in SURROGATES}
        top = np.abs(errors(dataset, quantity, "GD")[0][0])
        lines = {f"η^{k}": (sizes, top * (sizes / sizes[0]) ** k) for k in (1, 2)}
        panels.append(
            plots.Panel(
                f"E {quantity}",
                "|error|",
                lines,
                xlabel="step size",
                log_y=True,
                points=points,
            )
        )
    colours = {"η^1": "grey", "η^2": "lightgrey"}
    return plots.figure(stem, panels, title="Weak errors at time 2", colours=colours)
