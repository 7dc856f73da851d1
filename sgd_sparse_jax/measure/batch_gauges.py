"""Curvature and noise of mini-batch gradients: the gauges of the edge of stochastic stability.

Gradients g_B and Hessians H_B are those of the mean loss of a batch B. All gauges of a call use the
same batches, and each has its own standard error. The error of a fixed set of batches doesn't
average out along a run: draw new batches for each record before averaging over records. Sources:
Andreyev & Beneventano, arXiv 2412.20553 (v5; v1 has a different quantity at 2 / eta); for updates
with momentum arXiv 2604.14108.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sgd_sparse_jax.types import Batch, Objective, Params, PRNGKey, Scalar, Stats

from .eigenpairs import lanczos_sharpness, top_eigenpairs
from .estimates import FEWEST, Estimate, mean_estimate, ratio_estimate
from .operators import (
    Operator,
    as_tree,
    flatten,
    generator,
    hessian as hessian_at,
    require_real,
    unflatten,
    value_of,
)


def step_sharpness(
    objective: Objective, params: Params, stats: Stats, batch: Batch
) -> tuple[Scalar, Scalar]:
    """(g^T H g / |g|^2, |g|^2) of the loss of one batch; compatible with jit and vmap.

    The curvature along the step of SGD, whose mean over batches is batch sharpness; NaN for a zero
    gradient. Computed as a second directional derivative, by forward-mode differentiation.

    Args:
        objective: (params, stats, batch) -> (loss, stats).
        params: Where it is measured.
        stats: Statistics of the network; {} for none.
        batch: The examples.

    Example:
        >>> objective = lambda params, stats, batch: ((batch.x * params**2).sum() / 2, stats)
        >>> batch = Batch(jnp.array([1.0, 3.0]), jnp.zeros(2))
        >>> [float(v) for v in step_sharpness(objective, jnp.array([1.0, 0.0]), {}, batch)]
        [1.0, 1.0]
    """
    loss = lambda params: value_of(objective(params, stats, batch))
    return _along(loss, params, jax.grad(loss)(params))


def batch_gauges(
    objective: Objective,
    params: Params,
    stats: Stats,
    batches: Batch,
    *,
    gradient: Params | None = None,
    direction: Params | None = None,
    hessian: Operator | None = None,
    tx: optax.GradientTransformation | None = None,
    opt_state: optax.OptState | None = None,
    lanczos_steps: int = 0,
    key: PRNGKey | None = None,
    tol: float = 0.0,
    chunk: int = 8,
    vectorized: int | None = None,
) -> dict[str, Estimate]:
    """Gauges of the gradients g and Hessians H_B of mini-batches B, with standard errors.

    - batch_sharpness: E[g^T H_B g / |g|^2], at 2 / eta at SGD's edge;
    - ratio_of_means: E[g^T H_B g] / E|g|^2, a different quantity;
    - gradient_norm2: E|g|^2;
    - gradient_noise_trace: E|g - dL|^2, with `gradient`;
    - gradient_noise_along: E(v, g - dL)^2, v the unit `direction`, with `gradient` as well;
    - gni: E[g^T H g] / |dL|^2, H of the full batch, with `gradient` and `hessian`; no test of an
      edge;
    - minibatch_sharpness: E lambda_max(H_B), a lower bound, with `lanczos_steps`;
    - minibatch_residual: E of the relative residual of these eigenvalues, with it;
    - generalized_sharpness: E[s^T H_B s] / -E[s^T g], s the update, with `tx` and its state; the
      edge is at 2;
    - generalized_mean_of_ratios: E[s^T H_B s / -s^T g], with them.

    Args:
        objective: (params, stats, batch) -> (loss, stats), for the batch's own loss.
        params: The parameters at which all gauges are measured.
        stats: Statistics of the network; {} for none.
        batches: Independent batches, leaves [m, b, ...]; may be in host memory.
        gradient: dL, of the full batch.
        direction: v, such as the top eigenvector of the full-batch Hessian; |v| is divided out.
        hessian: H, of the full batch; one product with it per batch.
        tx: The optimizer, any of optax.
        opt_state: Its state before the update that is measured.
        lanczos_steps: Products with H_B per batch (default: none), which cost 20-50 times as much
            as all other gauges.
        key: Of the start vector for `lanczos_steps` (default: a fixed one).
        tol: Relative standard error at which sampling stops, once all gauges have reached it
            (default: all batches are used); each gauge's `converged` says whether it has.
        chunk: Batches per compiled call. With 1, the loops over batches and Lanczos steps run on
            the host, which is faster for convolutions on CPUs.
        vectorized: Number of batches that a compiled call computes at once (default: all). On CPUs
            1 is fastest where the gradients of `chunk` batches exceed the cache, from about 50,000
            parameters on.

    Raises:
        ValueError: If there are no batches, `chunk` or `vectorized` is below 1, or an argument
            lacks the one that it needs.
        TypeError: If `batches` isn't one `Batch`, or the parameters aren't real numbers.
        FloatingPointError: If the gradient of a batch isn't finite. (Where it is zero, the mean of
            ratios is NaN and not converged.)

    Example:
        >>> objective = lambda params, stats, batch: ((batch.x * params**2).sum() / 2, stats)
        >>> batches = Batch(jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1)))
        >>> gauges = batch_gauges(objective, jnp.array([2.0]), {}, batches)
        >>> gauges["batch_sharpness"].value, gauges["ratio_of_means"].value
        (2.0, 2.8)
    """
    require_real(params)
    if min(chunk, 1 if vectorized is None else vectorized) < 1 or lanczos_steps < 0:
        raise ValueError(
            f"chunk is {chunk}, vectorized {vectorized}, lanczos_steps {lanczos_steps}; give at "
            "least 1, 1 and 0."
        )
    if gradient is None and (hessian is not None or direction is not None):
        raise ValueError("`hessian` and `direction` need the full batch's `gradient`.")
    if (tx is None) != (opt_state is None):
        raise ValueError("Give both `tx` and its `opt_state`, or none.")
    update = as_tree(tx.update) if tx is not None else None
    compiled_steps = lanczos_steps if chunk > 1 else 0
    total, seen, gauges, random = _count(batches), [], {}, None
    start_key = lambda: jax.random.key(0) if key is None else key  # drawn only where it is used
    host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batches))
    if compiled_steps:  # one start for all batches; `top_eigenpairs` draws the same
        random = unflatten(generator(start_key()).normal(size=len(flatten(params))), params)
    for start in range(0, total, chunk):
        rows = np.minimum(np.arange(start, start + chunk), total - 1)  # one shape, one program
        some = jax.tree.map(lambda leaf, rows=rows: leaf[rows], batches) if host else batches
        rows = np.arange(chunk) if host else rows
        given = (params, stats, opt_state, gradient, direction, random, some, rows)
        found, grads = _observe(
            as_tree(objective),
            update,
            *given,
            steps=compiled_steps,
            whole=hessian is not None,
            vectorized=vectorized,
        )
        found = {name: np.array(value, np.float64) for name, value in found.items()}
        if hessian is not None:
            found["gHg"] = np.array([_quadratic(hessian, grads, i) for i in range(chunk)])
        if lanczos_steps and chunk == 1:
            one = jax.tree.map(lambda leaf, row=rows[0]: leaf[row], some)
            at = hessian_at(objective, params, stats, one)
            budget = {"tol": 0.0, "max_matvecs": lanczos_steps, "basis": max(lanczos_steps, 3)}
            pairs = top_eigenpairs(at, 1, start_key(), **budget)
            found["top"], found["top_residual"] = pairs.values, pairs.residuals
        seen.append({name: value[: total - start] for name, value in found.items()})
        columns = {name: np.concatenate([part[name] for part in seen]) for name in found}
        if not np.isfinite(columns["g2"]).all():
            raise FloatingPointError(
                "The gradient of a batch isn't finite, or |g|^2 overflows; check the loss, or use "
                "float64."
            )
        gauges = _gauges(columns, tol if len(columns["g2"]) >= FEWEST else 0.0)
        if all(gauge.converged for gauge in gauges.values()):
            break
    return gauges


def second_moment_contraction(
    objective: Objective,
    params: Params,
    stats: Stats,
    batches: Batch,
    step_size: float,
    key: PRNGKey,
    *,
    tol: float = 1e-4,
    max_matvecs: int = 100,
) -> Estimate:
    """lambda_max(E_B[(I - eta H_B)^2]): above 1, SGD expands E|theta|^2 in a quadratic valley.

    Negative eigenvalues of H_B expand too, so that far from a minimum this isn't a test of an edge.
    Not `converged` if the residual is above `tol`. The standard error is that of the mean over
    batches along the eigenvector, to first order; with few batches the value is biased upwards.

    Args:
        objective: (params, stats, batch) -> (loss, stats).
        params: Where it is measured.
        stats: Statistics of the network; {} for none.
        batches: Independent batches, leaves [m, b, ...]; a product takes 2 m of Hessians.
        step_size: eta.
        key: Of the start vector.
        tol: Relative residual of the eigenvalue.
        max_matvecs: Largest number of products with the mean.

    Example:
        >>> objective = lambda params, stats, batch: (batch.x.sum() * (params**2).sum() / 2, stats)
        >>> batches = Batch(jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1)))
        >>> key = jax.random.key(0)
        >>> second_moment_contraction(objective, jnp.ones(1), {}, batches, 1.0, key).value
        2.0
    """
    count, of = _count(batches), as_tree(objective)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], batches) for i in range(count)]
    contract = lambda batch, v: _contract(of, params, stats, batch, step_size, v)

    def matvec(v: Any) -> Any:
        squared = [contract(batch, contract(batch, v)) for batch in each]
        return jax.tree.map(lambda *leaves: sum(leaves) / count, *squared)

    top = top_eigenpairs(Operator(matvec, params), 1, key, tol=tol, max_matvecs=max_matvecs)
    x = jax.tree.map(lambda leaf: leaf[0], top.vectors)
    lengths = [np.sum(flatten(contract(batch, x)) ** 2) for batch in each]
    error = mean_estimate(np.array(lengths)).standard_error
    return Estimate(float(top.values[0]), error, count, bool(top.converged[0]))


def _count(batches: Any) -> int:
    if not isinstance(batches, Batch):
        raise TypeError("Stack the batches: `batches` is one Batch with leaves [m, b, ...].")
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(sizes) != 1 or not all(map(any, sizes)):
        raise ValueError(
            f"Leaves of `batches` are [m, b, ...] with the same m of 1 or more; found {sizes}."
        )
    return len(batches.x)


def _along(loss: Callable[[Any], Any], params: Any, direction: Any) -> tuple[Any, Any]:
    """(d^T H d / |d|^2, |d|^2) for a direction d, by two forward derivatives; NaN for d = 0."""
    squared: Any = _dot(direction, direction)
    slope = lambda params: jax.jvp(loss, (params,), (direction,))[1]
    try:
        curvature = jax.jvp(slope, (params,), (direction,))[1]
    except (NotImplementedError, TypeError):  # functions with a jax.custom_vjp: reverse mode only
        curvature = _dot(direction, jax.jvp(jax.grad(loss), (params,), (direction,))[1])
    defined = (squared > 0) & jnp.isfinite(squared)
    return jnp.where(defined, curvature / squared, jnp.nan), squared


@np.errstate(divide="ignore", invalid="ignore")  # where gradients are zero
def _gauges(seen: dict[str, np.ndarray], tol: float) -> dict[str, Estimate]:
    rayleigh, g2 = seen["rayleigh"], seen["g2"]
    gauges = {
        "batch_sharpness": mean_estimate(rayleigh, tol),
        # Where g is zero, so is g^T H g: only the mean of ratios is undefined.
        "ratio_of_means": ratio_estimate(np.where(g2 > 0, rayleigh, 0.0) * g2, g2, tol),
        "gradient_norm2": mean_estimate(g2, tol),
    }
    means = {
        "noise": "gradient_noise_trace",
        "noise_along": "gradient_noise_along",
        "top": "minibatch_sharpness",
        "top_residual": "minibatch_residual",
    }
    gauges |= {
        gauge: mean_estimate(seen[name], tol) for name, gauge in means.items() if name in seen
    }
    if "gHg" in seen and "full2" in seen:
        gauges["gni"] = mean_estimate(seen["gHg"] / seen["full2"], tol)
    if "fall" in seen:
        bend = np.where(seen["s2"] > 0, seen["s_rayleigh"], 0.0) * seen["s2"]
        gauges["generalized_sharpness"] = ratio_estimate(bend, seen["fall"], tol)
        gauges["generalized_mean_of_ratios"] = mean_estimate(bend / seen["fall"], tol)
    return gauges


@partial(jax.jit, static_argnames=("steps", "whole", "vectorized"))
def _observe(
    objective,
    update,
    params,
    stats,
    opt_state,
    gradient,
    direction,
    random,
    batches,
    rows,
    *,
    steps,
    whole,
    vectorized,
):
    """Scalars of the batches at `rows`, and with `whole` the gradients, [rows, ...]."""

    def one(row):
        batch = jax.tree.map(lambda leaf: leaf[row], batches)
        loss = lambda params: value_of(objective(params, stats, batch))
        grad = jax.grad(loss)(params)
        found = {}
        found["rayleigh"], found["g2"] = _along(loss, params, grad)
        if gradient is not None:
            noise = optax.tree.sub(grad, gradient)
            found["noise"] = _dot(noise, noise)
            found["full2"] = _dot(gradient, gradient)
            if direction is not None:
                length = optax.tree.norm(direction, squared=True)
                found["noise_along"] = _dot(direction, noise) ** 2 / length
        if update is not None:
            step = update(grad, opt_state, params)[0]
            found["s_rayleigh"], found["s2"] = _along(loss, params, step)
            found["fall"] = jnp.negative(_dot(step, grad))
        if steps:
            product = lambda v: jax.jvp(jax.grad(loss), (params,), (v,))[1]
            found["top"], found["top_residual"] = lanczos_sharpness(product, random, steps=steps)
        return found, grad if whole else ()

    if len(rows) == 1:  # vmap over a single batch makes convolutions slower
        return jax.tree.map(lambda leaf: leaf[None], one(rows[0]))
    if vectorized is None:
        return jax.vmap(one)(rows)
    return jax.lax.map(one, rows, batch_size=vectorized if vectorized > 1 else None)


def _dot(v: Any, w: Any) -> Any:
    """(v, w); XLA's dot product of long float32 vectors is slower and less accurate on CPUs."""
    return sum(jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (v, w)), strict=True))


def _quadratic(operator: Operator, vectors: Any, i: int) -> float:
    v = jax.tree.map(lambda leaf: leaf[i], vectors)
    return float(flatten(v) @ flatten(operator.matvec(v)))


@jax.jit
def _contract(objective, params, stats, batch, step_size, v):
    slope = jax.grad(lambda params: value_of(objective(params, stats, batch)))
    bent = jax.jvp(slope, (params,), (v,))[1]
    return jax.tree.map(lambda v, hv: v - step_size * hv, v, bent)
