"""The points of a sweep from named axes, and its results as labelled arrays."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

if TYPE_CHECKING:
    import xarray


def grid(**axes: ArrayLike | Sequence[float]) -> dict[str, Array]:
    """Every combination of the axes' values, one point each: leaves [points], last axis fastest.

    `sweep(run, keys, grid(step_size=[.1, .2], init_scale=[.01, .1, 1.]))` calls `run(key, point)`
    with `point["step_size"]` and `point["init_scale"]`.
    """
    values = {name: jnp.asarray(axis) for name, axis in axes.items()}
    for name, axis in values.items():
        if axis.ndim != 1 or axis.size == 0:
            raise ValueError(f"The axis {name} has shape {axis.shape}; give a list of values.")
    meshes = jnp.meshgrid(*values.values(), indexing="ij")
    return {name: mesh.reshape(-1) for name, mesh in zip(values, meshes, strict=True)}


def labelled(
    results: Mapping[str, Any],
    *,
    axes: Mapping[str, Any],
    records: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> "xarray.Dataset":
    """Results of `sweep` [seeds, points, …] as an xarray.Dataset with axes seed, *axes, *records.

    `axes` are those that `grid` was given, in order; `records[name]` names the further axes of the
    result `name`, and `coords` says what their places mean. Raises ValueError where a shape and
    its names don't fit.
    """
    import xarray

    shape = tuple(len(values) for values in axes.values())
    variables = {}
    for name, value in results.items():
        array, more = np.asarray(value), tuple((records or {}).get(name, ()))
        if array.ndim != 2 + len(more) or array.shape[1] != np.prod(shape, dtype=int):
            raise ValueError(
                f"The result {name!r} has shape {array.shape}; the axes are seed, "
                f"{' x '.join(f'{axis} ({len(v)})' for axis, v in axes.items())}, {more}: "
                "give `axes` as `grid` got them and a name in `records` for every further axis."
            )
        array = array.reshape(array.shape[0], *shape, *array.shape[2:])
        variables[name] = (("seed", *axes, *more), array)
    seeds = next(iter(variables.values()))[1].shape[0] if variables else 0
    places = {"seed": np.arange(seeds), **axes, **(coords or {})}
    return xarray.Dataset(variables, {name: np.asarray(value) for name, value in places.items()})
