"""Weights of a network as a state dict of PyTorch's layout, and back.

Layers are matched in order: that of creation here, that of the state dict there. A convolution or
linear layer has `weight` and perhaps `bias`; a norm also `running_mean` and `running_var`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from sgd_sparse_jax.types import Network, Params, Stats

Tensors = Mapping[str, np.ndarray]
# Our name -> PyTorch's; kernels are transposed by their number of dimensions.
NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
MOMENTS = {"mean": "running_mean", "var": "running_var"}
IGNORED = "num_batches_tracked"  # a counter of BatchNorm
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}  # [h, w, in, out] -> [out, in, h, w], [in, out]
FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}


class Place(NamedTuple):
    """An array of a network: a path into params or stats, and PyTorch's name for its last part."""

    in_stats: bool
    path: tuple[str, ...]
    torch_name: str
    shape: tuple[int, ...]


def from_state_dict(
    network: Network, shape: Sequence[int], tensors: Tensors
) -> tuple[Params, Stats]:
    """(params, stats) of `network` for images [h, w, c] of `shape`, from arrays by PyTorch's names.

    Raises ValueError at the first layer whose kind or shape differs, or if one is left over.

    Example:
        >>> from flax import linen as nn
        >>> from sgd_sparse_jax.models import from_linen
        >>> tensors = {"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2)}
        >>> params, stats = from_state_dict(from_linen(nn.Dense(2)), (3,), tensors)
        >>> params["kernel"].shape
        (3, 2)
    """
    params, stats = jax.eval_shape(network.init, jr.key(0), _one(shape))
    left = [(name, np.asarray(a)) for name, a in tensors.items() if not name.endswith(IGNORED)]
    found: dict[tuple, jax.Array] = {}
    places = list(_places(network, shape))
    for place, (name, tensor) in zip(places, left, strict=False):
        array = tensor.transpose(FROM_TORCH.get(tensor.ndim, range(tensor.ndim)))
        if name.rpartition(".")[2] != place.torch_name or array.shape != place.shape:
            want = tuple(np.zeros(place.shape).transpose(_to_torch(place.shape)).shape)
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; {'/'.join(place.path)} needs "
                f"{place.torch_name} of shape {list(want)}: another model, width or number of "
                "classes, or layers in another order."
            )
        found[place.in_stats, place.path] = jnp.asarray(array)
    if len(left) != len(places):
        raise ValueError(
            f"The file has {len(left)} arrays, the network {len(places)}: another model or depth."
        )
    fill = lambda in_stats: lambda path, leaf: found[in_stats, _names(path)].astype(leaf.dtype)
    filled = (jax.tree_util.tree_map_with_path(fill(i), t) for i, t in enumerate((params, stats)))
    return next(filled), next(filled)


def to_state_dict(
    network: Network,
    shape: Sequence[int],
    params: Params,
    stats: Stats,
    like: Tensors | None = None,
) -> dict[str, np.ndarray]:
    """The inverse of `from_state_dict`; names and counters are those of `like`, or of our layers.

    Raises ValueError if `like` has another number of arrays or other shapes.

    Example:
        >>> from flax import linen as nn
        >>> from sgd_sparse_jax.models import from_linen
        >>> network = from_linen(nn.Dense(2))
        >>> params, stats = network.init(jr.key(0), jnp.ones((1, 3)))
        >>> {name: a.shape for name, a in to_state_dict(network, (3,), params, stats).items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    leaves = [
        {_names(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (params, stats)
    ]
    arrays = {}
    for place in _places(network, shape):
        array = np.asarray(leaves[place.in_stats][place.path])
        name = ".".join((*_layer(place), place.torch_name))
        arrays[name] = array.transpose(_to_torch(array.shape)).copy()
    if like is None:
        return arrays
    from_state_dict(network, shape, like)  # raises where it differs
    values = iter(arrays.values())
    return {n: np.asarray(a) if n.endswith(IGNORED) else next(values) for n, a in like.items()}


def _places(network: Network, shape: Sequence[int]) -> Iterator[Place]:
    """All arrays, in the order in which layers are created and PyTorch's order within a layer."""
    created: list[Any] = []

    def init(key: jax.Array, x: jax.Array) -> Any:
        created.extend(network.init(key, x))
        return 0  # jax.eval_shape sorts what it returns

    jax.eval_shape(init, jr.key(0), _one(shape))
    params, stats = map(_walk, created)
    # Without the name of the collection.
    moments = {path[1:]: (path, leaf) for path, leaf in stats}
    layers: dict[tuple, dict[str, Any]] = {}
    for path, leaf in params:
        layers.setdefault(path[:-1], {})[path[-1]] = leaf
    for layer, arrays in layers.items():
        for name, torch_name in NAMES.items():
            if name in arrays:
                yield Place(False, (*layer, name), torch_name, arrays[name].shape)
        for name, torch_name in MOMENTS.items():
            if (*layer, name) in moments:
                path, leaf = moments[*layer, name]
                yield Place(True, path, torch_name, leaf.shape)


def _walk(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _walk(value, (*above, name))
        else:
            yield (*above, name), value


def _layer(place: Place) -> tuple[str, ...]:
    return place.path[1:-1] if place.in_stats else place.path[:-1]


def _to_torch(shape: Sequence[int]) -> Sequence[int]:
    return TO_TORCH.get(len(shape), range(len(shape)))


def _names(path: Any) -> tuple[str, ...]:
    return tuple(entry.key for entry in path)


def _one(shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32)
