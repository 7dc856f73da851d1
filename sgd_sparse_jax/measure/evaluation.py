"""Evaluation of a classifier over a data set: loss, error, sparsity and BatchNorm moments."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sgd_sparse_jax.types import Fetch, LossFn, Network, Params, PRNGKey, Scalar, Stats

from .operators import as_tree

OnBatch: TypeAlias = Callable[[], None]


def make_evaluation(
    network: Network,
    loss: LossFn,
    fetch: Fetch,
    *,
    batch: int,
    sample: Callable[[str, Array], Float[Array, "b m"]] | None = None,
    distinct: Callable[[Float[Array, "n m"]], Scalar] | None = None,
    shard: Callable = lambda idx: idx,
) -> Callable[..., dict[str, Any]]:
    """(key, params, stats, n) -> mean loss and error of a classifier over the first n examples.

    There is one forward pass per example. The returned function has an optional argument
    `on_batch`, called after each batch.

    Args:
        network: The classifier; its statistics are not updated.
        loss: (out, y) -> one number per example.
        fetch: (key, idx) -> a batch. If it is a `jax.tree_util.Partial` of arrays, they are
            arguments of the compiled program; as constants, XLA takes seconds per 100 MB.
        batch: Number of examples at a time.
        sample: (block, features) -> units [b, m] of each block of features; adds `active/BLOCK`,
            the share of positive entries, and `dead/BLOCK`, the share of units that are positive
            for no example.
        distinct: (units [n, m]) -> share; adds `distinct/BLOCK`, its value for the sampled units.
        shard: Constrains the sharding of `idx` (default: no constraint).

    Example:
        >>> from sgd_sparse_jax.types import Batch, Network, Outputs
        >>> network = Network(lambda key, x: ((), {}), lambda p, s, x, **_: Outputs(x, {}, s))
        >>> x, y = jnp.array([[2.0, 0.0], [1.0, 3.0], [4.0, 0.0], [0.0, 2.0]]), jnp.ones(4, int)
        >>> loss, fetch = lambda out, y: out.sum(1), lambda key, idx: Batch(x[idx], y[idx])
        >>> make_evaluation(network, loss, fetch, batch=3)(jax.random.key(0), (), {}, 4)
        {'loss': 3.0, 'error': 0.5}
    """

    fetch = as_tree(fetch)

    @jax.jit
    def totals(fetch, key, params, stats, idx, mask):
        examples = fetch(key, shard(idx))
        logits, features, _ = network.apply(params, stats, examples.x)
        summed = lambda values: jnp.where(mask, values, 0).sum(dtype=logits.dtype)
        wrong = logits.argmax(-1) != examples.y
        sums = {"loss": summed(loss(logits, examples.y)), "error": summed(wrong)}
        return sums, dict(features) if sample else {}

    # A separate program: in one, XLA would recompute norms and ReLUs for each of their consumers.
    @jax.jit
    def observe(features, mask):
        assert sample is not None
        positive = {block: (phi > 0).reshape(len(phi), -1) for block, phi in features.items()}
        share = lambda on: jnp.where(mask, on.mean(1, dtype=jnp.float32), 0).sum()
        active = {f"active/{block}": share(on) for block, on in positive.items()}
        alive = {f"dead/{block}": (on & mask[:, None]).any(0) for block, on in positive.items()}
        return active, alive, {block: sample(block, phi) for block, phi in features.items()}

    share = jax.jit(distinct) if distinct else None
    either = jax.jit(lambda a, b: jax.tree.map(jnp.logical_or, a, b))
    dead = jax.jit(lambda alive: jax.tree.map(lambda unit: (~unit).mean(), alive))

    def evaluate(
        key: PRNGKey, params: Params, stats: Stats, n: int, on_batch: OnBatch = lambda: None
    ) -> dict[str, Any]:
        sums, units, alive = [], [], None
        for start in range(0, n, batch):
            # Padded, so that all batches have one shape, and masked, so that means are exact.
            places = np.arange(start, start + batch)
            idx, mask = np.minimum(places, n - 1).astype(np.int32), places < n
            total, features = totals(fetch, key, params, stats, idx, mask)
            if sample:
                active, on, some = observe(features, mask)
                alive = either(alive, on) if alive else on
                units.append(some)
                total |= active
            sums.append(total)
            on_batch()
        joined = jax.tree.map(lambda *some: jnp.concatenate(some)[:n], *units) if units else {}
        once = {f"distinct/{block}": share(phi) for block, phi in joined.items()} if share else {}
        # The only transfer: one per batch would make the device wait for the host.
        sums, once = jax.device_get((sums, dead(alive or {}) | once))
        means = {name: sum(float(total[name]) for total in sums) / n for name in sums[0]}
        first = {"loss": 0.0, "error": 0.0}  # jit sorts the keys of a dict
        return first | means | {name: float(value) for name, value in once.items()}

    return evaluate


def make_moments(
    network: Network, fetch: Fetch, *, batch: int, shard: Callable = lambda idx: idx
) -> Callable[..., Stats]:
    """(key, params, stats, n) -> batch statistics, averaged over batches of the first n examples.

    For weights without statistics, such as averages of iterates. Float leaves of `stats` are
    averaged over full batches; other leaves, such as keys, are returned unchanged. The returned
    function has an optional argument `on_batch`, called after each batch.

    Args:
        network: Its BatchNorm must have momentum 0 (in Flax), so that its running moments are those
            of the last batch.
        fetch: (key, idx) -> a batch, as in `make_evaluation`.
        batch: Number of examples at a time.
        shard: Constrains the sharding of `idx` (default: no constraint).

    Example:
        >>> from sgd_sparse_jax.types import Batch, Network, Outputs
        >>> apply = lambda p, s, x, train: Outputs(x, {}, {"mean": x.mean()})
        >>> network = Network(lambda key, x: ((), {"mean": x.mean()}), apply)
        >>> fetch = lambda key, idx: Batch(1.0 * idx, idx)
        >>> moments = make_moments(network, fetch, batch=3)
        >>> float(moments(jax.random.key(0), (), {"mean": jnp.zeros(())}, 7)["mean"])
        2.5
    """

    fetch = as_tree(fetch)

    @jax.jit
    def of_batch(fetch, key, params, stats, idx):
        return network.apply(params, stats, fetch(key, shard(idx)).x, train=True).stats

    def moments(
        key: PRNGKey, params: Params, stats: Stats, n: int, on_batch: OnBatch = lambda: None
    ) -> Stats:
        is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
        if not any(map(is_float, jax.tree.leaves(stats))):
            return stats
        size, count = min(batch, n), max(n // batch, 1)
        rows = np.arange(count * size, dtype=np.int32).reshape(count, size)
        found = []
        for row in rows:
            found.append(of_batch(fetch, key, params, stats, row))
            on_batch()
        mean = lambda leaf, *new: sum(new) / count if is_float(leaf) else leaf
        return jax.tree.map(mean, stats, *found)

    return moments
