"""Gradient flow, and SGD and its surrogates as gradient descent on labels y + xi.

The loss is L = scale / (2n) |r|^2 with residuals r = f(x) - y in R^n and J = df/dtheta: `scale` is
1 for `train.half_squared`, 2 for `train.squared`. Every model is a step(z, params, t) -> params of
random numbers z and step number t; models whose z have the same shape can share them.

- `make_step` with `sampled`, SGD exactly: z are the indices of the batch [b];
- with `exact_gaussian`, `isotropic()` or `no_noise` (GD): z ~ N(0, I) in R^n;
- `make_parameter_noise_step`: z ~ N(0, I) in R^(n + p).

Source: Andriushchenko, Varre, Pillaud-Vivien, Flammarion, arXiv 2210.05337, Section 3 and Eq. 8.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PyTree

from sgd_sparse_jax.types import Batch, Params, Scalar

Predict: TypeAlias = Callable[[Params, jax.Array], jax.Array]  # (params, x [n, ...]) -> [n]
LabelNoise: TypeAlias = Callable[[Array, Array, ArrayLike], jax.Array]  # (z, r, t) -> xi [n]
FlowStep: TypeAlias = Callable[[Array, Params, ArrayLike], Params]  # (z, params, t) -> params


def gradient_flow(
    loss: Callable[[Params], Scalar],
    params: Params,
    times: Float[Array, " t"],
    *,
    tol: float = 1e-8,
) -> PyTree[Float[Array, "t ..."]]:
    """d theta/dt = -grad L(theta) from t = 0: the parameters at `times`, leaves [t, ...].

    Args:
        loss: L, a pure function of the parameters.
        params: theta at time 0.
        times: Increasing and positive, [t]. Parameters are inf at times that 100,000 steps
            of the solver don't reach, such as after a NaN or where the loss has no minimum.
        tol: Relative and absolute tolerance of the adaptive solver (diffrax's Tsit5).

    Raises:
        ImportError: diffrax is not installed.
        ValueError: There are no parameters, or times that are not as above.

    Example:
        >>> path = gradient_flow(lambda p: p**2 / 2, jnp.array(1.0), jnp.array([1.0, 2.0]))
        >>> path.round(4).tolist()
        [0.3679, 0.1353]
    """
    try:
        import diffrax
    except ImportError as error:
        hint = "gradient_flow needs diffrax; pip install diffrax"
        raise ImportError(hint) from error
    _check_params(params)
    if not isinstance(times, Tracer):  # of a sweep, which has no values to look at
        gaps = np.diff(np.asarray(times), prepend=0)
        if not (gaps.size and np.isfinite(gaps).all() and (gaps > 0).all()):
            raise ValueError("The times must be positive, finite and increasing, at least one.")
    descend = lambda t, params, args: optax.tree.scale(-1.0, jax.grad(loss)(params))
    found = diffrax.diffeqsolve(
        diffrax.ODETerm(descend),
        diffrax.Tsit5(),
        t0=0.0,
        t1=times[-1],
        dt0=None,
        y0=params,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
        max_steps=100_000,  # without a limit it would run forever at a NaN
        adjoint=diffrax.ForwardMode(),
        throw=False,
    )
    return found.ys


def make_step(
    predict: Predict,
    batch: Batch,
    noise: LabelNoise,
    *,
    step_size: ArrayLike,
    dt: ArrayLike | None = None,
    scale: ArrayLike = 1.0,
) -> FlowStep:
    """theta <- theta - scale / n J^T (dt r - sqrt(dt step_size) xi), xi = noise(z, r, t).

    One vector-Jacobian product a step. With dt = step_size this is gradient descent on labels
    y + xi; with smaller dt and Gaussian xi, Euler-Maruyama for the SDE whose noise is that of SGD
    with `step_size`.

    Args:
        predict: f(params, x), [n].
        batch: All n examples.
        noise: `sampled`, `exact_gaussian`, `isotropic(...)` or `no_noise`.
        step_size: eta of the SGD that is modelled.
        dt: Time of one step (default: step_size).
        scale: Of the loss: 1 for `train.half_squared`, 2 for `train.squared`.

    Example:
        >>> examples = Batch(jnp.array([[1.0], [2.0]]), jnp.array([0.0, 0.0]))
        >>> step = make_step(lambda w, x: x[:, 0] * w, examples, sampled, step_size=0.1)
        >>> round(float(step(jnp.array([1]), jnp.array(1.0), 0)), 6)  # SGD on the second example
        0.6
    """
    time = step_size if dt is None else dt
    n = len(batch.y)

    def step(z: Array, params: Params, t: ArrayLike) -> Params:
        _check_params(params)
        out, pull = jax.vjp(lambda params: predict(params, batch.x), params)
        residuals = out - batch.y
        diffusion = jnp.sqrt(jnp.asarray(time * step_size, out.dtype)) * noise(z, residuals, t)
        (decrease,) = pull(scale / n * (time * residuals - diffusion))
        return optax.tree.sub(params, decrease)

    return step


def sampled(z: Array, residuals: Float[Array, " n"], t: ArrayLike) -> Float[Array, " n"]:
    """xi_i = r_i (1 - n/b #{k: z_k = i}), the label noise of SGD on the examples z [b].

    E xi = 0 and Cov xi = (n diag(r^2) - r r^T) / b, of trace (n - 1)|r|^2 / b.

    Args:
        z: Indices of the batch, [b].
        residuals: r, [n].
        t: Step number, not used.

    Example:
        >>> sampled(jnp.array([1]), jnp.array([3.0, 2.0]), 0).tolist()
        [3.0, -2.0]
    """
    n = len(residuals)
    counts = jnp.zeros(n, residuals.dtype).at[z].add(1.0)
    return residuals * (1.0 - n / len(z) * counts)


def exact_gaussian(z: Array, residuals: Float[Array, " n"], t: ArrayLike) -> Float[Array, " n"]:
    """xi = sqrt(n) r * (z - mean z): Gaussian, with the covariance of SGD's label noise (b = 1).

    Args:
        z: Independent N(0, 1), [n].
        residuals: r, [n].
        t: Step number, not used.

    Example:
        >>> exact_gaussian(jnp.array([1.0, -1.0]), jnp.array([3.0, 2.0]), 0).round(3).tolist()
        [4.243, -2.828]
    """
    return np.sqrt(len(residuals)) * residuals * (z - z.mean())


def no_noise(z: Array, residuals: Float[Array, " n"], t: ArrayLike) -> Float[Array, " n"]:
    """xi = 0: gradient descent.

    Args:
        z: Not used.
        residuals: r, [n].
        t: Step number, not used.

    Example:
        >>> no_noise(jnp.array([1.0]), jnp.array([3.0]), 0).tolist()
        [0.0]
    """
    return jnp.zeros_like(residuals)


def isotropic(
    level: ArrayLike | None = None, *, scale: ArrayLike = 1.0, num_steps: int | None = None
) -> LabelNoise:
    """xi = sqrt(2 (n - 1) delta(t) / scale) z: the noise of Eq. 8, of equal trace (b = 1).

    Args:
        level: delta: a constant, one value per step [num_steps], or None for the model's own loss
            delta(t) = L(theta_t).
        scale: Of the loss, as in `make_step`.
        num_steps: Length of the run; required if `level` has one value per step.

    Raises:
        ValueError: A level is negative or not finite, or their number isn't num_steps.

    Example:
        >>> isotropic(0.5)(jnp.array([1.0, -2.0]), jnp.array([9.0, 9.0]), 0).tolist()
        [1.0, -2.0]
    """
    if level is not None:
        shape = jnp.shape(level)
        if shape and shape != (num_steps,):
            raise ValueError(
                f"The noise level has shape {shape}; give a constant, or as many values as "
                f"num_steps, which is {num_steps}."
            )
        # Traced levels, of a sweep, can't be looked at.
        if not isinstance(level, Tracer):
            values = np.asarray(level)
            if wrong := values[~((values >= 0) & (values < np.inf))].tolist():
                raise ValueError(
                    f"The noise level is {wrong[0]}; it must be finite and not negative."
                )

    def noise(z: Array, residuals: Float[Array, " n"], t: ArrayLike) -> Float[Array, " n"]:
        if level is None:
            square = (residuals**2).mean()
        else:
            now = jnp.asarray(level)
            square = 2 / scale * (now[t] if now.ndim else now)
        return jnp.sqrt((len(residuals) - 1) * square).astype(residuals.dtype) * z

    return noise


def make_parameter_noise_step(
    predict: Predict,
    batch: Batch,
    *,
    step_size: ArrayLike,
    dt: ArrayLike | None = None,
    scale: ArrayLike = 1.0,
) -> FlowStep:
    """theta <- theta - dt grad L + sqrt(dt step_size / p) |scale/n J^T xi| z', isotropic.

    Of z [n + p], the first n give xi by `exact_gaussian`, and z' are the others. The mean square
    of scale/n J^T xi is the trace of the covariance of SGD's gradients (b = 1), so that the noise
    has covariance trace/p I: of the trace of SGD's, without its structure.

    Args:
        predict: f(params, x), [n].
        batch: All n examples.
        step_size: eta of the SGD that is modelled.
        dt: Time of one step (default: step_size).
        scale: Of the loss: 1 for `train.half_squared`, 2 for `train.squared`.

    Example:
        >>> examples = Batch(jnp.array([[1.0], [-1.0]]), jnp.array([1.0, 1.0]))
        >>> step = make_parameter_noise_step(lambda w, x: x[:, 0] * w, examples, step_size=0.1)
        >>> round(float(step(jnp.array([1.0, -1.0, 2.0]), jnp.array(0.0), 0)), 6)
        0.282843
    """
    time, n = step_size if dt is None else dt, len(batch.y)

    def step(z: Array, params: Params, t: ArrayLike) -> Params:
        _check_params(params)
        out, pull = jax.vjp(lambda params: predict(params, batch.x), params)
        residuals = out - batch.y
        (gradient,) = pull(scale / n * residuals)
        (shift,) = pull(scale / n * exact_gaussian(z[:n], residuals, t))
        flat, unravel = ravel_pytree(params)
        each = jnp.sqrt(time * step_size / len(flat)) * optax.tree.norm(shift)
        return optax.tree.add_scale(unravel(flat + each * z[n:]), -jnp.asarray(time), gradient)

    return step


def check_dt(
    predict: Predict, params: Params, x: jax.Array, dt: float, *, scale: float = 1.0
) -> None:
    """Checks that dt <= 2 / lambda_max(scale / n J J^T), the bound of Euler's method.

    At a minimum with L = 0 that is the largest eigenvalue of the Hessian: larger steps leave it.

    Args:
        predict: f(params, x), [n].
        params: Those at which J is taken.
        x: Inputs of all examples, [n, ...].
        dt: Time of one step.
        scale: Of the loss: 1 for `train.half_squared`, 2 for `train.squared`.

    Raises:
        ValueError: If dt exceeds the bound, with the bound in the message, or J is not finite.

    Example:
        >>> check_dt(lambda w, x: x[:, 0] * w, jnp.array(1.0), jnp.array([[2.0]]), 0.4)
    """
    _check_params(params)
    rows = jax.jacrev(predict)(params, x)
    matrix = jax.vmap(lambda row: ravel_pytree(row)[0])(rows)
    top = float(jnp.linalg.eigvalsh(matrix @ matrix.T)[-1]) * scale / len(x)
    if not np.isfinite(top):
        raise ValueError("The Jacobian of the predictions is not finite at these parameters.")
    if not dt * top <= 2:  # NaN too
        raise ValueError(
            f"dt is {dt:.3g}; Euler's method is stable up to 2 / lambda_max = {2 / top:.3g} at "
            "these parameters: choose a smaller step size or dt."
        )


def _check_params(params: Params) -> None:
    if not sum(jnp.size(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError("The network has no parameters; there is nothing to train.")
