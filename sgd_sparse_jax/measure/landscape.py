"""Loss landscapes: the valley floor below an iterate, and the loss over planes of parameters."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float

from sgd_sparse_jax.types import Params, PRNGKey, Scalar


def valley_floor(
    loss: Callable[[Params], Scalar],
    params: Params,
    *,
    step_size: ArrayLike = 0.5,
    num_steps: int = 2000,
) -> Params:
    """The valley floor below `params`: the result of `num_steps` of gradient descent from there.

    Source: the projection before each record in the paper's toy code (2000 steps of size 0.5).

    Args:
        loss: A function of the parameters, such as the loss of all examples.
        params: The start.
        step_size: Of gradient descent; it must be below 2 / the largest curvature to converge.
        num_steps: Number of steps.

    Example:
        >>> round(float(valley_floor(lambda p: (p - 3.0) ** 2, jnp.array(0.0), step_size=0.1)), 6)
        3.0
    """
    scale = jnp.asarray(step_size)
    step = lambda _, params: optax.tree.add_scale(params, -scale, jax.grad(loss)(params))
    return jax.lax.fori_loop(0, num_steps, step, params)


class Plane(NamedTuple):
    """origin + alpha first + beta second; pytrees of parameters.

    Directions are orthonormal, except those of `random_plane`. The plane of the two largest
    curvatures at theta has the first two `vectors` of `top_eigenpairs` as directions.

    Example:
        >>> vectors = {"w": jnp.array([[0.0, 1.0], [1.0, 0.0]])}  # leaves [k, ...]
        >>> along = lambda k: jax.tree.map(lambda leaf: leaf[k], vectors)
        >>> Plane({"w": jnp.zeros(2)}, along(0), along(1)).second["w"].tolist()
        [1.0, 0.0]
    """

    origin: Params  #: at (0, 0)
    first: Params  #: direction of alpha
    second: Params  #: direction of beta


def plane_through(origin: Params, first: Params, second: Params) -> Plane:
    """The plane through three points, with `first` on its first axis; NaN if they are collinear.

    Args:
        origin: Parameters at coordinates (0, 0).
        first: Parameters at (alpha, 0), with alpha > 0.
        second: Parameters at (alpha, beta), with beta > 0.

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


def principal_plane(path: Params) -> tuple[Plane, Float[Array, "2"]]:
    """The plane nearest to a path theta_1 ... theta_t, and the shares of variance it explains.

    Principal components of the iterates: the origin is their mean. Needs t x t numbers, whatever
    the number of parameters. A small second share means that the path looks straight, and a small
    sum that the plane hides most of it.

    Args:
        path: Iterates, leaves [t, ...] with t of 3 or more.

    Example:
        >>> path = jnp.array([[0.0, 0.0, 5.0], [4.0, 1.0, 5.0], [8.0, 0.0, 5.0]])
        >>> plane, shares = principal_plane(path)
        >>> abs(plane.first).round(3).tolist(), shares.round(3).tolist()
        ([1.0, 0.0, 0.0], [0.98, 0.02])
    """
    mean = jax.tree.map(lambda leaf: leaf.mean(0), path)
    away = jax.tree.map(lambda leaf, m: leaf - m[None], path, mean)
    rows = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(away)]
    gram = jnp.asarray(sum(row @ row.T for row in rows))
    values, vectors = jnp.linalg.eigh(gram)
    along = lambda k: jax.tree.map(
        lambda leaf: jnp.tensordot(vectors[:, k], leaf, 1) / jnp.sqrt(values[k]), away
    )
    return Plane(mean, along(-1), along(-2)), values[:-3:-1] / values.sum()


def random_plane(key: PRNGKey, origin: Params) -> Plane:
    """Two Gaussian directions, each filter scaled to the norm of the same filter of `origin`.

    A filter is what belongs to one output: an entry of the last axis. Vectors, the biases and norms
    of a network, don't move. The directions are nearly orthogonal, and not of unit length.
    Source: Li, Xu, Taylor, Studer, Goldstein, arXiv 1712.09913.

    Args:
        key: Of the two directions.
        origin: Parameters at coordinates (0, 0).

    Example:
        >>> plane = random_plane(jr.key(0), {"kernel": 3 * jnp.eye(2), "bias": jnp.ones(2)})
        >>> jnp.linalg.norm(plane.first["kernel"], axis=0).round(3).tolist()
        [3.0, 3.0]
        >>> plane.first["bias"].tolist()
        [0.0, 0.0]
    """

    def direction(key: PRNGKey) -> Params:
        leaves, structure = jax.tree.flatten(origin)
        keys = jr.split(key, len(leaves))
        return jax.tree.unflatten(structure, map(scaled, keys, leaves))

    def scaled(key: PRNGKey, leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return jnp.zeros_like(leaf)
        drawn = jr.normal(key, leaf.shape, leaf.dtype)
        norm = lambda a: jnp.sqrt((a**2).sum(range(a.ndim - 1), keepdims=True))
        return drawn * norm(leaf) / norm(drawn)

    return Plane(origin, *map(direction, jr.split(key)))


def coordinates(plane: Plane, params: Params) -> Float[Array, "2"]:
    """(alpha, beta) of the orthogonal projection of `params` onto the plane.

    Args:
        plane: With orthonormal directions.
        params: Parameters, on the plane or not.

    Example:
        >>> plane = plane_through(jnp.zeros(2), jnp.array([0.0, 3.0]), jnp.array([4.0, 1.0]))
        >>> coordinates(plane, jnp.array([4.0, 1.0])).tolist()
        [1.0, 4.0]
    """
    away = ravel_pytree(params)[0] - ravel_pytree(plane.origin)[0]
    return jnp.stack([away @ ravel_pytree(plane.first)[0], away @ ravel_pytree(plane.second)[0]])


def at(plane: Plane, point: Float[Array, "2"]) -> Params:
    """The parameters at coordinates (alpha, beta): origin + alpha first + beta second.

    Args:
        plane: Origin and directions.
        point: Coordinates (alpha, beta), [2].

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
    *,
    chunk: int | None = None,
) -> Float[Array, "b a"]:
    """The loss at every (alpha, beta); rows are betas, as for `contour(alphas, betas, ...)`.

    The loop over chunks is compiled; a vmap over all points would hold the network's activations of
    each. On CPUs convolutions in such a loop are slow: there, call a jitted `loss(at(plane,
    point))` for one point after the other.

    Args:
        loss: A function of the parameters.
        plane: Origin and directions.
        alphas: Coordinates along the first direction, [a].
        betas: Coordinates along the second direction, [b].
        chunk: Number of points that are evaluated at a time (default: a row).

    Example:
        >>> plane = Plane(jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
        >>> loss_map(lambda p: p[0] + 10 * p[1], plane, jnp.arange(3.0), jnp.arange(2.0)).tolist()
        [[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]]
    """
    points = jnp.stack(jnp.meshgrid(alphas, betas), axis=-1).reshape(-1, 2)
    chunk = len(alphas) if chunk is None else chunk
    values = jax.lax.map(lambda point: loss(at(plane, point)), points, batch_size=chunk)
    return values.reshape(len(betas), len(alphas))
