"""SGD on many diagonal nets as one GPU kernel per segment: u and v stay in registers (Pallas).

The plain program reads and writes u and v at each step. Whether the kernel is faster on a GPU is
for `benchmarks.accelerator` to measure; its numbers are those of the plain step to rounding.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

LANES = 32  # of a warp; one warp advances one run


def segment(
    x: Float[Array, "n d"],
    y: Float[Array, " n"],
    u: Float[Array, "runs d"],
    v: Float[Array, "runs d"],
    indices: Int[Array, "runs steps"],
    step_sizes: Float[Array, " runs"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "runs d"], Float[Array, "runs d"]]:
    """(u, v) after one step on each of the examples `indices`: (u, v) -= eta r x_i * (v, u).

    r = <u * v, x_i> - y_i is the residual, so that the loss is r^2 / 2. `interpret=True` runs the
    kernel on any device, slowly.

    Example:
        >>> one, first, size = jnp.ones((1, 1)), jnp.zeros((1, 1), int), jnp.array([0.1])
        >>> u, v = segment(one, jnp.zeros(1), one, 2 * one, first, size, interpret=True)
        >>> round(float(u[0, 0]), 6), round(float(v[0, 0]), 6)
        (0.6, 1.8)
    """
    runs, d = u.shape
    # Triton's blocks have powers of two as sizes; u = v = 0 stays so.
    width = max(LANES, pl.next_power_of_2(d))
    wide = lambda a: jnp.pad(a, ((0, 0), (0, width - d)))
    row = pl.BlockSpec((1, width), lambda run: (run, 0))
    whole = lambda a: pl.BlockSpec(a.shape, lambda run: (0,) * a.ndim)
    order = pl.BlockSpec((1, indices.shape[1]), lambda run: (run, 0))
    out = jax.ShapeDtypeStruct((runs, width), u.dtype)
    x = wide(x)
    call = pl.pallas_call(
        _kernel,
        grid=(runs,),
        in_specs=[whole(x), whole(y), row, row, order, pl.BlockSpec((1,), lambda run: (run,))],
        out_specs=[row, row],
        out_shape=[out, out],
        compiler_params=triton.CompilerParams(num_warps=1),
        interpret=interpret,
    )
    u, v = call(x, y, wide(u), wide(v), indices, step_sizes)
    return u[:, :d], v[:, :d]


def _kernel(x, y, u, v, indices, step_sizes, u_out, v_out):
    step_size = step_sizes[0]

    def step(k, uv):
        u, v = uv
        i = indices[0, k]
        gradient = step_size * ((u * v * x[i]).sum() - y[i]) * x[i]
        return u - gradient * v, v - gradient * u

    u_out[0], v_out[0] = jax.lax.fori_loop(0, indices.shape[1], step, (u[0], v[0]))
