"""Loss, error and feature sparsity of a classifier over a data set: one forward pass for all."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sgd_sparse_jax.types import Fetch, LossFn, Network, Params, PRNGKey, Scalar, Stats


class Totals(NamedTuple):
    """Sums over the examples of a batch."""

    loss: Scalar
    errors: Scalar
    examples: Scalar


class Seen(NamedTuple):
    """What a batch's features say, block by block."""

    active: dict[str, Scalar]  # the sum over examples of the share of positive units
    alive: dict[str, Bool[Array, " units"]]  # whether a unit is positive for any example
    units: dict[str, Float[Array, "b m"]]  # the sampled ones


def index_batches(n: int, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices and mask [batch] that cover 0 … n-1 once; the last batch is padded and masked."""
    for start in range(0, n, batch):
        places = np.arange(start, start + batch)
        yield np.minimum(places, n - 1).astype(np.int32), places < n


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
    """(key, params, stats, n) -> mean loss and error over the first n examples that `fetch` knows.

    With `sample(block, features)` and `distinct(units)`, also for each block: `active/BLOCK`, the
    share of positive entries; `dead/BLOCK`, that of units which are positive for no example; and
    `distinct/BLOCK`, the share of positive entries without duplicates, of the sampled units alone.
    Every example is seen once; the last batch is padded, counts are exact. The host waits once,
    at the end.
    """

    @jax.jit
    def totals(
        key: PRNGKey, params: Params, stats: Stats, idx: Int[Array, " b"], mask: Bool[Array, " b"]
    ) -> tuple[Totals, dict[str, Array]]:
        examples = fetch(key, shard(idx))
        logits, features, _ = network.apply(params, stats, examples.x)
        wrong = logits.argmax(-1) != examples.y
        summed = lambda values: jnp.where(mask, values, 0).sum(dtype=logits.dtype)
        sums = Totals(summed(loss(logits, examples.y)), summed(wrong), summed(mask))
        return sums, dict(features) if sample else {}

    # A program of its own: in one, XLA computes norms and ReLUs once more for each that reads them.
    @jax.jit
    def see(features: dict[str, Array], mask: Bool[Array, " b"]) -> Seen:
        assert sample is not None
        positive = {block: (phi > 0).reshape(len(phi), -1) for block, phi in features.items()}
        share = lambda on: jnp.where(mask, on.mean(1, dtype=jnp.float32), 0).sum()
        return Seen(
            {block: share(on) for block, on in positive.items()},
            {block: (on & mask[:, None]).any(0) for block, on in positive.items()},
            {block: sample(block, phi) for block, phi in features.items()},
        )

    either = jax.jit(lambda a, b: jax.tree.map(jnp.logical_or, a, b))
    dead = jax.jit(lambda alive: jax.tree.map(lambda unit: (~unit).mean(), alive))
    share = jax.jit(distinct) if distinct else None

    def evaluate(key: PRNGKey, params: Params, stats: Stats, n: int) -> dict[str, Any]:
        parts, active, units, alive = [], [], [], None
        for idx, mask in index_batches(n, batch):
            sums, features = totals(key, params, stats, idx, mask)
            parts.append(sums)
            if sample:
                seen = see(features, mask)
                active.append(seen.active)
                units.append(seen.units)
                alive = seen.alive if alive is None else either(alive, seen.alive)
        joined = lambda block: jnp.concatenate([chosen[block] for chosen in units])[:n]
        shares = {block: share(joined(block)) for block in units[0]} if share and units else {}
        never = dead(alive) if sample else {}
        parts, active, never, shares = jax.device_get((parts, active, never, shares))
        count = sum(float(part.examples) for part in parts)
        row = {
            "loss": sum(float(part.loss) for part in parts) / count,
            "error": sum(float(part.errors) for part in parts) / count,
        }
        for block in never:
            row[f"active/{block}"] = sum(float(part[block]) for part in active) / count
            row[f"dead/{block}"] = float(never[block])
        return row | {f"distinct/{block}": float(value) for block, value in shares.items()}

    return evaluate


def make_moments(
    network: Network, fetch: Fetch, *, batch: int, shard: Callable = lambda idx: idx
) -> Callable[[PRNGKey, Params, Stats, int], Stats]:
    """The mean over batches of the batch's own statistics: (key, params, stats, n) -> stats.

    For weights that no batch has been normalized with, such as averages along a run. `network`
    must forget the past: BatchNorm whose running moments are those of the last batch (momentum 0
    in Flax). Each float in `stats` becomes its mean over the first n examples in batches of `batch`
    (a last partial batch is left out); other leaves, such as keys, stay as they are.
    """

    @jax.jit
    def of_batch(key: PRNGKey, params: Params, stats: Stats, idx: Int[Array, " b"]) -> Stats:
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
