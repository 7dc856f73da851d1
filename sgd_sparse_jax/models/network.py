"""Networks as pure functions, from the modules of Flax."""

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.random as jr

from sgd_sparse_jax.types import Network, Outputs, Params, PRNGKey, Stats


def from_linen(module: nn.Module) -> Network:
    """The network (init, apply) of a linen module.

    `module(x)` or `module(x, train=...)` returns `out`, or `(out, features)` with a dict of
    activations. Parameters are the collection "params"; all other collections (BatchNorm's
    "batch_stats") are `stats`. Modules that draw random numbers while they are applied (linen's
    own Dropout) need a key that this adapter doesn't give; `models.Dropout` carries its own.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> network = from_linen(nn.Dense(1))
        >>> params, stats = network.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> network.apply(params, stats, jnp.ones((4, 3))).out.shape
        (4, 1)
    """
    has_mode = "train" in inspect.signature(type(module).__call__).parameters

    def init(key: PRNGKey, x: jax.Array) -> tuple[Params, Stats]:
        variables = dict(module.init(key, x))
        return variables.pop("params", {}), variables

    def apply(params: Params, stats: Stats, x: jax.Array, *, train: bool = False) -> Outputs:
        variables: Any = {"params": params, **stats}
        mode: Any = {"train": train} if has_mode else {}
        if not train:
            return Outputs(*_split(module.apply(variables, x, **mode)), stats)
        result: Any = module.apply(variables, x, **mode, mutable=list(stats))
        return Outputs(*_split(result[0]), result[1])

    return Network(init, apply)


def from_nnx(constructor: Callable[[PRNGKey], Any]) -> Network:
    """The network (init, apply) of an NNX module; `constructor(key)` makes the module.

    `module(x)` returns `out`, or `(out, features)`. Its `nnx.Param`s are the parameters, all other
    variables (BatchNorm's moments, the keys of Dropout) are `stats`. Training and evaluation are
    `module.train()` and `module.eval()`. NNX keeps BatchNorm's running moments in float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> network = from_nnx(lambda key: nnx.Linear(3, 1, rngs=nnx.Rngs(key)))
        >>> params, stats = network.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> network.apply(params, stats, jnp.ones((4, 3))).out.shape
        (4, 1)
    """
    from flax import nnx

    # Training and evaluation are two graph definitions: BatchNorm's flag is part of them.
    def split(train: bool) -> Any:
        module = nnx.eval_shape(lambda: constructor(jr.key(0)))
        (module.train if train else module.eval)()
        return nnx.split(module, nnx.Param, ...)

    templates = {train: split(train) for train in (False, True)}

    def init(key: PRNGKey, x: jax.Array) -> tuple[Params, Stats]:
        parts: Any = nnx.split(constructor(key), nnx.Param, ...)
        return nnx.to_pure_dict(parts[1]), nnx.to_pure_dict(parts[2])

    def apply(params: Params, stats: Stats, x: jax.Array, *, train: bool = False) -> Outputs:
        graph, *states = templates[train]
        states = jax.tree.map(lambda leaf: leaf, states)  # copies: the next lines write to them
        for state, values in zip(states, (params, stats), strict=True):
            nnx.replace_by_pure_dict(state, dict(values))
        module = nnx.merge(graph, *states)
        result = _split(module(x))
        if not train:
            return Outputs(*result, stats)
        parts: Any = nnx.split(module, nnx.Param, ...)
        return Outputs(*result, nnx.to_pure_dict(parts[2]))

    return Network(init, apply)


def _split(result: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(out, features) of what a module returned."""
    return result if isinstance(result, tuple) else (result, {})
