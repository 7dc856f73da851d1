"""Curvature as linear maps: Hessians, Gauss-Newton matrices, means over chunks, diagonal blocks.

A program is compiled once per function `loss` or `predict` and shapes of its arguments. Parameters
and data are arguments, so that all steps of a run and all chunks of a data set use one program.
Arrays keep their shardings: a product over a batch that is split over devices runs on all of them.
"""

from collections.abc import Callable, Iterable, Sized
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from sgd_sparse_jax.types import LossFn, Network, Outputs, Params, PRNGKey


class Operator(NamedTuple):
    """v -> A v, a symmetric linear map between pytrees of the shapes and dtypes of `like`.

    `matvec` may be any function with these properties; compile it with `jax.jit`.

    Example:
        >>> double = Operator(lambda v: 2 * v, like=jnp.zeros(3))
        >>> double.matvec(jnp.ones(3)).tolist()
        [2.0, 2.0, 2.0]
    """

    matvec: Callable[[Params], Params]  #: v -> A v
    like: Params  #: any pytree of the shapes and dtypes of v
    coupled: bool = False  #: whether A isn't a mean over chunks, since examples share moments


def hessian(
    loss: Callable[..., Any], params: Params, *args: Any, linearize: bool = False
) -> Operator:
    """v -> H v, the Hessian of `loss(params, *args)` with respect to `params`.

    Forward-mode over reverse-mode differentiation, at about the cost and memory of two gradients.
    Source: Pearlmutter, 1994.

    Args:
        loss: Returns the loss, or a tuple (loss, statistics), as objectives of training do. The
            operator is `coupled` if the statistics differ from those in `args`.
        params: The parameters at which the Hessian is taken.
        args: Data, passed to the compiled program as arguments. In a closure they would be
            constants, which are slow to compile and need a new program each.
        linearize: Linearize the gradient once, so that products don't repeat the forward pass and
            take about three quarters of the time. For many products at one point. The operator
            then holds the inputs and about twice the activations that a gradient stores: 5.6 MB
            per image for ResNet-18 of width 16, and 7.5 MB during a product.

    Raises:
        TypeError: If the parameters aren't real numbers.

    Example:
        >>> loss = lambda params, x: (x * params**2).sum() / 2
        >>> hessian(loss, jnp.ones(2), jnp.array([3.0, 5.0])).matvec(jnp.ones(2)).tolist()
        [3.0, 5.0]
    """
    require_real(params)
    of = as_tree(loss)
    coupled = bool(jax.eval_shape(_changed_stats, of, params, args))
    if linearize:
        product = _linearized_gradient(of, params, args)
        return Operator(lambda v: _apply(product, v), params, coupled)
    return Operator(lambda v: _hessian_product(of, params, args, v), params, coupled)


def gauss_newton(predict: Callable[..., Any], loss: LossFn, params: Params, *args: Any) -> Operator:
    """v -> (1/n) sum_i J_i^T l_i'' J_i v, with J_i the Jacobian of the outputs for example i.

    The Hessian of the loss of outputs that are linearized in the parameters. Source: Schraudolph,
    2002.

    Args:
        predict: `predict(params, x)` or `predict(params, stats, x)`, as of `Network.apply`; returns
            outputs [n, ...], or `Outputs`.
        loss: (outputs, targets) -> losses per example [n], convex in the outputs.
        params: The parameters at which the matrix is taken.
        args: (batch,) or (stats, batch), with inputs x and targets y in the `Batch`.

    Raises:
        TypeError: If the parameters aren't real numbers.

    Example:
        >>> from sgd_sparse_jax.types import Batch
        >>> predict, loss = lambda params, x: x * params, lambda out, y: (out - y) ** 2 / 2
        >>> batch = Batch(jnp.array([1.0, 3.0]), jnp.zeros(2))
        >>> float(gauss_newton(predict, loss, jnp.array(2.0), batch).matvec(jnp.array(1.0)))
        5.0
    """
    require_real(params)
    of, *stats, batch = as_tree(predict), *args
    coupled = bool(jax.eval_shape(_changed_stats, of, params, (*stats, batch.x)))
    product = lambda v: _gauss_newton_product(of, as_tree(loss), params, tuple(stats), batch, v)
    return Operator(product, params, coupled)


def mean_over(
    operator: Callable[[Any], Operator],
    chunks: Iterable[Any],
    weights: Iterable[float] | None = None,
) -> Operator:
    """v -> sum_c w_c A_c v / sum_c w_c: the operator of a data set that is processed in chunks.

    The loop runs on the host, over one compiled program: on CPUs, convolutions inside a compiled
    loop are 20-30 times slower. It holds one chunk's activations at a time.

    Args:
        operator: chunk -> its `Operator`; called for every chunk in every product.
        chunks: A sequence, or another iterable that can be iterated repeatedly. One that loads its
            chunks on demand allows data sets larger than the memory.
        weights: One for each chunk; default: its number of examples, the length of its first array
            (1 without arrays). Chunks of weight 0 are left out.

    Raises:
        ValueError: If there are no chunks, if their number isn't that of the weights, or if
            examples are coupled, as by BatchNorm in training mode: the mean over chunks would be
            the Hessian of another loss. A single chunk is allowed.
        TypeError: If `chunks` can be iterated only once.

    Example:
        >>> from sgd_sparse_jax.types import Batch
        >>> loss = lambda params, batch: (batch.x * params**2).mean() / 2
        >>> chunks = [Batch(jnp.array(x), jnp.array(x)) for x in ([1.0, 2.0], [6.0])]
        >>> mean = mean_over(lambda chunk: hessian(loss, jnp.array(1.0), chunk), chunks)
        >>> float(mean.matvec(jnp.array(1.0)))
        3.0
    """
    if iter(chunks) is chunks:
        raise TypeError("Each product reads the chunks again: give a list, not an iterator.")
    size = lambda chunk: next((len(each) for each in jax.tree.leaves(chunk) if np.ndim(each)), 1)
    shares = np.array([size(chunk) for chunk in chunks] if weights is None else [*weights], float)
    if isinstance(chunks, Sized) and len(chunks) != len(shares):
        raise ValueError(f"{len(chunks)} chunks have {len(shares)} weights; give one for each.")
    if not 0 < shares.sum() < np.inf:
        raise ValueError(
            f"The {len(shares)} chunks have weights {shares}; their sum must be positive."
        )
    shares /= shares.sum()
    first = operator(next(iter(chunks)))
    if first.coupled and len(shares) > 1:
        raise ValueError(
            "BatchNorm in training mode couples the examples: the Hessian isn't a mean over "
            "chunks. Use a single batch, or in_mode(network, 'eval')."
        )

    def matvec(v: Any) -> Any:
        total = None
        for share, chunk in zip(shares, chunks, strict=True):
            if share:  # the mean loss of a chunk without examples is NaN
                total = _add_scaled(total, float(share), operator(chunk).matvec(v))
        return total

    return Operator(matvec, first.like, first.coupled)


def restrict(operator: Operator, keep: Callable[[str], bool]) -> Operator:
    """v -> P A P^T v: the diagonal block of A for some of the parameters.

    Args:
        operator: A.
        keep: Whether a parameter is in the block, by its path in the pytree, "Dense_0/kernel". The
            block's vectors are dicts from path to array.

    Raises:
        ValueError: If no parameter is in the block.

    Example:
        >>> loss = lambda params: params["w"] ** 2 + params["b"] ** 2 * params["w"]
        >>> whole = hessian(loss, {"w": jnp.array(1.0), "b": jnp.array(2.0)})
        >>> float(restrict(whole, lambda name: name == "b").matvec({"b": jnp.array(1.0)})["b"])
        2.0
    """
    leaves, structure = jax.tree.flatten_with_path(operator.like)
    path = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")
    named = [(path(keys), leaf) for keys, leaf in leaves]
    like = {name: leaf for name, leaf in named if keep(name)}
    if not like:
        raise ValueError(f"No parameter is selected; there are {', '.join(n for n, _ in named)}.")
    zeros = {name: jnp.zeros_like(leaf) for name, leaf in named if name not in like}

    def matvec(v: Any) -> Any:
        filled = [v[name] if name in like else zeros[name] for name, _ in named]
        found = jax.tree.leaves(operator.matvec(structure.unflatten(filled)))
        return {name: leaf for (name, _), leaf in zip(named, found, strict=True) if name in like}

    return Operator(matvec, like, operator.coupled)


def in_mode(network: Network, mode: Literal["train", "eval"] | None = None) -> Network:
    """`network` with BatchNorm in a fixed mode, whatever the argument `train` of `apply`.

    The Hessian of a network with BatchNorm depends on the mode: "train" differentiates through the
    moments of the batch; "eval" takes the moments in `stats` as constants, either running moments
    or others, such as those of `make_moments`.

    Args:
        network: Pure functions (init, apply).
        mode: The mode; None is allowed only for networks without statistics.

    Raises:
        ValueError: If the mode is unknown, or if it is None when a network with statistics is
            applied.

    Example:
        >>> apply = lambda params, stats, x, train: Outputs(x - x.mean() * train, {}, stats)
        >>> network = in_mode(Network(lambda key, x: ((), {}), apply), "train")
        >>> network.apply((), {"mean": 0.0}, jnp.array([1.0, 3.0])).out.tolist()
        [-1.0, 1.0]
    """

    if mode not in ("train", "eval", None):
        raise ValueError(f"Unknown mode {mode!r}; choose 'train' or 'eval'.")

    def apply(params: Any, stats: Any, x: jax.Array, *, train: bool = False) -> Outputs:
        if jax.tree.leaves(stats) and mode is None:
            raise ValueError(
                f"The network has statistics ({', '.join(stats)}), and its curvature depends on "
                "them: give mode='train' or mode='eval'."
            )
        return network.apply(params, stats, x, train=mode == "train")

    return Network(network.init, apply)


def flatten(tree: Any) -> Float[np.ndarray, " p"]:
    """A pytree of arrays as one float64 vector on the host."""
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])


def unflatten(vectors: Float[np.ndarray, "*k p"], like: Any) -> Any:
    """Vectors [..., p] as one pytree of the shapes [..., *shape] and dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    parts = np.split(vectors, np.cumsum([np.size(leaf) for leaf in leaves])[:-1], axis=-1)
    shaped = [
        part.reshape((*vectors.shape[:-1], *np.shape(leaf))).astype(jnp.result_type(leaf))
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return structure.unflatten(shaped)


def dimension(operator: Operator) -> int:
    """The number p of entries of a vector."""
    return sum(np.size(leaf) for leaf in jax.tree.leaves(operator.like))


def on_host(operator: Operator) -> Callable[[np.ndarray], np.ndarray]:
    """v -> A v for float64 vectors [p] on the host; FloatingPointError if A v isn't finite.

    TypeError if the parameters aren't real numbers.
    """
    require_real(operator.like)

    def product(v: np.ndarray) -> np.ndarray:
        w = flatten(operator.matvec(unflatten(v, operator.like)))
        if not np.isfinite(w).all():
            raise FloatingPointError(
                "A product isn't finite; check that the loss is, and has second derivatives there."
            )
        return w

    return product


def require_real(params: Any) -> None:
    """Raises TypeError if a parameter isn't a real floating-point number, or if there is none."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params)]
    if not dtypes or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        found = ", ".join(sorted({dtype.name for dtype in dtypes})) or "no arrays"
        raise TypeError(
            f"The parameters are {found}; curvature needs real floating-point numbers. Make the "
            "others an argument of the loss."
        )


def generator(key: PRNGKey) -> np.random.Generator:
    """A NumPy generator seeded with `key`: XLA takes seconds to compile a normal draw."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def as_tree(function: Callable[..., Any]) -> Partial:
    """A function as a pytree, which compiled programs take as an argument."""
    return function if isinstance(function, Partial) else Partial(function)


def value_of(result: Any) -> Array:
    """The loss, from what a loss function or an objective returned: (loss, stats)."""
    return result[0] if isinstance(result, tuple) else result


@jax.jit
def _hessian_product(loss, params, args, v):
    slope = jax.grad(lambda params: value_of(loss(params, *args)))
    return jax.jvp(slope, (params,), (v,))[1]


@jax.jit
def _linearized_gradient(loss, params, args):
    return jax.linearize(jax.grad(lambda params: value_of(loss(params, *args))), params)[1]


@jax.jit
def _apply(function, v):
    return function(v)


@jax.jit
def _gauss_newton_product(predict, loss, params, stats, batch, v):
    def outputs(params):
        result = predict(params, *stats, batch.x)
        return result.out if isinstance(result, Outputs) else result

    out, moved = jax.jvp(outputs, (params,), (v,))
    slope = jax.grad(lambda out: loss(out, batch.y).mean())
    return jax.vjp(outputs, params)[1](jax.jvp(slope, (out,), (moved,))[1])[0]


@jax.jit
def _add_scaled(total, share, v):
    scaled = jax.tree.map(lambda leaf: share * leaf, v)
    return scaled if total is None else jax.tree.map(jnp.add, total, scaled)


@jax.jit
def _changed_stats(function, params, args):
    """() if statistics are returned unchanged, else (0,): traced for its structure only."""

    def stats(params, args):
        result = function(params, *args)
        stats = result.stats if isinstance(result, Outputs) else ()
        return result[1:] if type(result) is tuple else stats

    jaxpr = jax.make_jaxpr(stats)(params, args).jaxpr
    return (0,) if None in [_input_of(jaxpr, variable) for variable in jaxpr.outvars] else ()


def _input_of(jaxpr, variable) -> int | None:
    """Which input of a jaxpr a variable is, also through jax.jit and jax.checkpoint."""
    if variable in jaxpr.invars:
        return jaxpr.invars.index(variable)
    for equation in jaxpr.eqns:
        call = "jaxpr" in equation.params and equation.primitive.name != "scan"
        if call and variable in equation.outvars:
            inner = equation.params["jaxpr"]
            inner = getattr(inner, "jaxpr", inner)  # jax.jit has constants beside it
            place = _input_of(inner, inner.outvars[equation.outvars.index(variable)])
            return None if place is None else _input_of(jaxpr, equation.invars[place])
    return None
