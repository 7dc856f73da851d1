"""Loops on the host over a data set: loss, error and sparsity of a classifier, its moments."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sgd_sparse_jax.types import Fetch, LossFn, Network, Params, PRNGKey, Scalar, Stats


def make_evaluation(
    network: Network,
    loss: LossFn,
    fetch: Fetch,
    *,
    batch: int,
    sample: Callable[[str, Array], Float[Array, "b m"]] | None = None,
    distinct: Callable[[Float[Array, "n m"]], Scalar] | None = None,
    shard: Callable = lambda idx: idx,
) -> Callable[[PRNGKey, Params, Stats, int], dict[str, Any]]:
    """(key, params, stats, n) -> mean loss and error of a classifier over the first n examples.

    `fetch(key, idx)` gathers examples, `batch` at a time; `shard` constrains the layout of `idx`
    over devices. With `sample(block, features) -> [b, m]` and `distinct(units [n, m]) -> share`,
    also for each block of features: `active/BLOCK`, the share of positive entries; `dead/BLOCK`,
    that of units which are positive for no example; and `distinct/BLOCK`, what `distinct` makes of
    the sampled units. Each example passes the network once; the last batch is padded, counts are
    exact. The device never waits for the host before the end.

    Example:
        >>> from sgd_sparse_jax.types import Batch, Network, Outputs
        >>> network = Network(lambda key, x: ((), {}), lambda p, s, x, **_: Outputs(x, {}, s))
        >>> x, y = jnp.array([[2.0, 0.0], [1.0, 3.0], [4.0, 0.0], [0.0, 2.0]]), jnp.ones(4, int)
        >>> loss, fetch = lambda out, y: out.sum(1), lambda key, idx: Batch(x[idx], y[idx])
        >>> make_evaluation(network, loss, fetch, batch=3)(jax.random.key(0), (), {}, 4)
        {'loss': 3.0, 'error': 0.5}
    """

    @jax.jit
    def totals(key: PRNGKey, params: Params, stats: Stats, idx: Array, mask: Array):
        examples = fetch(key, shard(idx))
        logits, features, _ = network.apply(params, stats, examples.x)
        summed = lambda values: jnp.where(mask, values, 0).sum(dtype=logits.dtype)
        wrong = logits.argmax(-1) != examples.y
        sums = {"loss": summed(loss(logits, examples.y)), "error": summed(wrong)}
        return sums, dict(features) if sample else {}

    # A program of its own: in one, XLA computes norms and ReLUs once more for each that reads them.
    @jax.jit
    def observe(features: dict[str, Array], mask: Array):
        assert sample is not None
        positive = {block: (phi > 0).reshape(len(phi), -1) for block, phi in features.items()}
        share = lambda on: jnp.where(mask, on.mean(1, dtype=jnp.float32), 0).sum()
        active = {f"active/{block}": share(on) for block, on in positive.items()}
        alive = {f"dead/{block}": (on & mask[:, None]).any(0) for block, on in positive.items()}
        return active, alive, {block: sample(block, phi) for block, phi in features.items()}

    share = jax.jit(distinct) if distinct else None
    either = jax.jit(lambda a, b: jax.tree.map(jnp.logical_or, a, b))
    dead = jax.jit(lambda alive: jax.tree.map(lambda unit: (~unit).mean(), alive))

    def evaluate(key: PRNGKey, params: Params, stats: Stats, n: int) -> dict[str, Any]:
        sums, units, alive = [], [], None
        for idx, mask in _index_batches(n, batch):
            total, features = totals(key, params, stats, idx, mask)
            if sample:
                active, on, some = observe(features, mask)
                alive = either(alive, on) if alive else on
                units.append(some)
                total |= active
            sums.append(total)
        joined = lambda block: jnp.concatenate([some[block] for some in units])[:n]
        blocks = units[0] if share and units else {}
        once = {f"distinct/{block}": share(joined(block)) for block in blocks} if share else {}
        sums, once = jax.device_get((sums, dead(alive or {}) | once))
        means = {name: sum(float(total[name]) for total in sums) / n for name in sums[0]}
        first = {name: means[name] for name in ("loss", "error")}
        return first | means | {name: float(value) for name, value in once.items()}

    return evaluate


def _index_batches(n: int, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices and mask [batch] that cover 0 … n-1 once; the last batch is padded and masked."""
    for start in range(0, n, batch):
        places = np.arange(start, start + batch)
        yield np.minimum(places, n - 1).astype(np.int32), places < n


def make_moments(
    network: Network, fetch: Fetch, *, batch: int, shard: Callable = lambda idx: idx
) -> Callable[[PRNGKey, Params, Stats, int], Stats]:
    """(key, params, stats, n) -> the mean of each batch's own statistics over the first n examples.

    For weights whose batches have never been normalized, such as averages along a run. `network`
    must have no memory: BatchNorm whose running moments are those of the last batch (momentum 0 in
    Flax). Floats in `stats` are averaged over batches of `batch` (a last partial batch is left
    out); other leaves, such as keys, stay as given.

    Example:
        >>> from sgd_sparse_jax.types import Batch, Network, Outputs
        >>> apply = lambda p, s, x, train: Outputs(x, {}, {"mean": x.mean()})
        >>> network = Network(lambda key, x: ((), {"mean": x.mean()}), apply)
        >>> fetch = lambda key, idx: Batch(1.0 * idx, idx)
        >>> moments = make_moments(network, fetch, batch=3)
        >>> float(moments(jax.random.key(0), (), {"mean": jnp.zeros(())}, 7)["mean"])
        2.5
    """

    @jax.jit
    def of_batch(key: PRNGKey, params: Params, stats: Stats, idx: Array) -> Stats:
        return network.apply(params, stats, fetch(key, shard(idx)).x, train=True).stats

    def moments(key: PRNGKey, params: Params, stats: Stats, n: int) -> Stats:
        is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
        if not any(map(is_float, jax.tree.leaves(stats))):
            return stats
        size, count = min(batch, n), max(n // batch, 1)
        total = None
        for i in range(count):
            idx = np.arange(i * size, (i + 1) * size, dtype=np.int32)
            one = of_batch(key, params, stats, idx)
            add = lambda a, b: a + b if is_float(a) else a
            total = one if total is None else jax.tree.map(add, total, one)
        return jax.tree.map(lambda s, t: t / count if is_float(s) else s, stats, total)

    return moments
