"""Adapters from Flax modules to `Network`, a pair of pure functions."""

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr

from sgd_sparse_jax.types import Network, Outputs, Params, PRNGKey, Stats


def from_linen(module: nn.Module) -> Network:
    """The `Network` (init, apply) of a linen module.

    Parameters are the collection "params"; all other collections (BatchNorm's "batch_stats") are
    `stats`. Use `models.Dropout`, whose key is in `stats`, not linen's Dropout, which needs a key
    at every call.

    Args:
        module: `module(x)` or `module(x, train=...)` returns `out`, or `(out, features)` with a
            dict of activations.

    Example:
        >>> network = from_linen(nn.Dense(1))
        >>> params, stats = network.init(jr.key(0), jnp.ones((4, 3)))
        >>> network.apply(params, stats, jnp.ones((4, 3))).out.shape
        (4, 1)
    """
    # Some modules, such as nn.Sequential, have no argument `train`.
    has_mode = "train" in inspect.signature(type(module).__call__).parameters
    mode: Any = lambda train: {"train": train} if has_mode else {}

    def init(key: PRNGKey, x: jax.Array) -> tuple[Params, Stats]:
        variables = dict(module.init(key, x, **mode(False)))
        return variables.pop("params", {}), variables

    def apply(params: Params, stats: Stats, x: jax.Array, *, train: bool = False) -> Outputs:
        variables: Any = {"params": params, **stats}
        mutable = list(stats) if train else []
        result, new_stats = module.apply(variables, x, **mode(train), mutable=mutable)
        return Outputs(*_split(result), new_stats if train else stats)

    return Network(init, apply)


def from_nnx(constructor: Callable[[PRNGKey], Any]) -> Network:
    """The `Network` (init, apply) of the NNX module that `constructor(key)` returns.

    The mode is set by `module.train()` and `module.eval()`. `nnx.Param`s are the parameters, all
    other variables are `stats`: BatchNorm's moments (float32, or float64 if parameters are) and
    Dropout's keys (as integers).

    Args:
        constructor: key -> the module; `module(x)` returns `out`, or `(out, features)` with a dict
            of activations.

    Example:
        >>> from flax import nnx
        >>> network = from_nnx(lambda key: nnx.Linear(3, 1, rngs=nnx.Rngs(key)))
        >>> params, stats = network.init(jr.key(0), jnp.ones((4, 3)))
        >>> network.apply(params, stats, jnp.ones((4, 3))).out.shape
        (4, 1)
    """
    from flax import nnx

    split: Any = lambda module: nnx.split(module, nnx.Param, ...)
    graph, *template = split(nnx.eval_shape(lambda: constructor(jr.key(0))))

    def init(key: PRNGKey, x: jax.Array) -> tuple[Params, Stats]:
        params, stats = map(nnx.to_pure_dict, split(constructor(key))[1:])
        # NNX initializes moments in float32, which would round those of a float64 network.
        wide = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
        moments = lambda s: s.astype(wide) if jnp.issubdtype(s.dtype, jnp.floating) else s
        return params, jax.tree.map(moments, _without_keys(stats))

    def apply(params: Params, stats: Stats, x: jax.Array, *, train: bool = False) -> Outputs:
        states = jax.tree.map(lambda leaf: leaf, template)  # a copy, modified below
        key = lambda like, s: jr.wrap_key_data(s) if _is_key(like) else s
        keyed = jax.tree.map(key, nnx.to_pure_dict(states[1]), dict(stats))
        nnx.replace_by_pure_dict(states[0], dict(params))
        nnx.replace_by_pure_dict(states[1], keyed)
        module = nnx.merge(graph, *states)
        (module.train if train else module.eval)()
        out, features = _split(module(x))
        stats = _without_keys(nnx.to_pure_dict(split(module)[2])) if train else stats
        return Outputs(out, features, stats)

    return Network(init, apply)


def _split(result: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(out, features) of the value that a module returned."""
    return result if isinstance(result, tuple) else (result, {})


def _without_keys(stats: Any) -> Any:
    """`stats` with keys as integers: checkpoints and digests take plain arrays."""
    return jax.tree.map(lambda leaf: jr.key_data(leaf) if _is_key(leaf) else leaf, stats)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
