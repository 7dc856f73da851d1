"""Loss landscapes: the valley floor below an iterate, and planes through three points."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float

from sgd_sparse_jax.types import Params, Scalar


def valley_floor(
    loss: Callable[[Params], Scalar],
    params: Params,
    *,
    step_size: ArrayLike = 0.5,
    num_steps: int = 2000,
) -> Params:
    """The valley floor below `params`: the result of `num_steps` of gradient descent from there.

    Source: the projection before each record in the paper's toy code (2000 steps of size 0.5).

    Example:
        >>> round(float(valley_floor(lambda p: (p - 3.0) ** 2, jnp.array(0.0), step_size=0.1)), 6)
        3.0
    """
    scale = jnp.asarray(step_size)
    step = lambda _, params: optax.tree.add_scale(params, -scale, jax.grad(loss)(params))
    return jax.lax.fori_loop(0, num_steps, step, params)


class Plane(NamedTuple):
    """origin + alpha first + beta second, with orthonormal directions; pytrees of parameters."""

    origin: Params
    first: Params
    second: Params


def plane_through(origin: Params, first: Params, second: Params) -> Plane:
    """The plane through three points, with `first` on its first axis; NaN if they are collinear.

    Example:
        >>> plane = plane_through(jnp.zeros(2), jnp.array([0.0, 3.0]), jnp.array([4.0, 1.0]))
        >>> plane.first.tolist(), plane.second.tolist()
        ([0.0, 1.0], [1.0, 0.0])
    """
    start, unravel = ravel_pytree(origin)
    one, other = ravel_pytree(first)[0] - start, ravel_pytree(second)[0] - start
    one = one / jnp.linalg.norm(one)
    other = other - (other @ one) * one  # Gram-Schmidt
    return Plane(origin, unravel(one), unravel(other / jnp.linalg.norm(other)))


def coordinates(plane: Plane, params: Params) -> Float[Array, "2"]:
    """(alpha, beta) of the orthogonal projection of `params` onto the plane.

    Example:
        >>> plane = plane_through(jnp.zeros(2), jnp.array([0.0, 3.0]), jnp.array([4.0, 1.0]))
        >>> coordinates(plane, jnp.array([4.0, 1.0])).tolist()
        [1.0, 4.0]
    """
    away = ravel_pytree(params)[0] - ravel_pytree(plane.origin)[0]
    return jnp.stack([away @ ravel_pytree(plane.first)[0], away @ ravel_pytree(plane.second)[0]])


def at(plane: Plane, point: Float[Array, "2"]) -> Params:
    """The parameters at coordinates (alpha, beta): origin + alpha first + beta second.

    Example:
        >>> plane = plane_through(jnp.zeros(2), jnp.array([0.0, 3.0]), jnp.array([4.0, 1.0]))
        >>> at(plane, jnp.array([1.0, 4.0])).tolist()
        [4.0, 1.0]
    """
    return jax.tree.map(lambda o, a, b: o + point[0] * a + point[1] * b, *plane)


def loss_map(
    loss: Callable[[Params], Scalar],
    plane: Plane,
    alphas: Float[Array, " a"],
    betas: Float[Array, " b"],
) -> Float[Array, "b a"]:
    """The loss at every (alpha, beta); rows are betas, as for `contour(alphas, betas, ...)`.

    Example:
        >>> plane = Plane(jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
        >>> loss_map(lambda p: p[0] + 10 * p[1], plane, jnp.arange(3.0), jnp.arange(2.0)).tolist()
        [[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]]
    """
    # Row by row: a vmap over all points would hold the network's activations of each.
    row = jax.vmap(lambda alpha, beta: loss(at(plane, jnp.stack([alpha, beta]))), (0, None))
    return jax.lax.map(lambda beta: row(alphas, beta), betas)
