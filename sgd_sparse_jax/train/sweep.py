"""Runs with records, sweeps over seeds and points in one program, and labelled results."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, ArrayLike, PyTree

from sgd_sparse_jax.types import PRNGKey, Record, Sampler, Segment, TrainState

from .mesh import data_mesh

if TYPE_CHECKING:
    import xarray

Run: TypeAlias = Callable[[PRNGKey, Any], PyTree[Array]]
WINDOW = 64  # steps per draw of indices: a draw per step costs as much as a toy step


class Probe(NamedTuple):
    """A metric `record(state)`, a pytree of arrays, evaluated before each of the steps `at`.

    `at` are increasing integers, not traced; num_steps records the final state.

    Example:
        >>> Probe(lambda state: state.params, at=[0, 10, 100]).at
        [0, 10, 100]
    """

    record: Record  #: state -> pytree of arrays
    at: Sequence[int] | np.ndarray  #: steps, increasing


def record_run(
    key: PRNGKey,
    sampler: Sampler,
    segment: Segment,
    state: TrainState,
    probes: Sequence[Probe],
    num_steps: int,
    *,
    unroll: int = 4,
) -> tuple[TrainState, tuple[PyTree[jax.Array], ...]]:
    """One run to step `num_steps`: (final state, records), records[i] stacked along probes[i].at.

    Probes don't change the run, and cost nothing between their records.

    Args:
        key: Of the order of examples, augmentation and noise.
        sampler: Indices of the batches, such as `with_replacement(n, b)`.
        segment: The compiled steps, of `make_segment`.
        state: At any step, so that a saved run continues.
        probes: What is recorded, and before which steps.
        num_steps: Number of the last step.
        unroll: Steps per iteration of the compiled loop, a divisor of 64. 1 compiles twice as fast,
            and runs as fast where a step takes more than a few microseconds.

    Raises:
        ValueError: If the `at` of a probe isn't increasing or exceeds [state.step, num_steps], with
            0 as the lower end if `state` is traced; or if `unroll` is no divisor of 64.

    Example:
        >>> from sgd_sparse_jax import train, types
        >>> tx = optax.sgd(0.5)
        >>> step = train.make_step(lambda w, stats, batch: (w**2 / 2, stats), tx)
        >>> segment = train.make_segment(step, lambda key, idx: types.Batch(idx, idx))
        >>> state = types.TrainState(jnp.array(0), jnp.array(8.0), {}, tx.init(8.0), ())
        >>> weight = Probe(lambda state: state.params, at=[0, 1, 3])
        >>> sampler = train.full_batch(1)
        >>> _, (weights,) = record_run(jr.key(0), sampler, segment, state, [weight], 3)
        >>> weights.tolist()
        [8.0, 4.0, 1.0]
    """
    if unroll < 1 or WINDOW % unroll:
        raise ValueError(f"unroll is {unroll}; give a divisor of {WINDOW}.")
    first = 0 if isinstance(state.step, Tracer) else int(state.step)
    for i, (_, at) in enumerate(probes):
        if len(at) and not (first <= at[0] and at[-1] <= num_steps and (np.diff(at) > 0).all()):
            raise ValueError(
                f"probes[{i}].at goes from {at[0]} to {at[-1]}; it must increase within "
                f"[{first}, {num_steps}], from the step of the state to num_steps."
            )
    stops = np.unique(np.concatenate([*(probe.at for probe in probes), [num_steps]])).astype(int)
    scheduled = np.array([np.isin(stops, probe.at) for probe in probes]).reshape(-1, len(stops)).T
    order, noise = jr.split(key)

    def tick(state, stop_and_scheduled):
        stop, now = stop_and_scheduled
        state = _walk(order, noise, sampler, segment, state, stop, unroll)
        return state, tuple(_record_if(now[i], p.record, state) for i, p in enumerate(probes))

    state, records = jax.lax.scan(tick, state, (jnp.asarray(stops), jnp.asarray(scheduled)))
    pick = lambda record, on: jax.tree.map(lambda leaf: leaf[np.flatnonzero(on)], record)
    return state, tuple(map(pick, records, scheduled.T))


def _walk(
    order, noise, sampler: Sampler, segment: Segment, state: TrainState, stop, unroll: int
) -> TrainState:
    """Runs until `state.step` is `stop`, which may be traced: all distances share a program."""

    def window(state: TrainState, trips, length: int) -> TrainState:
        indices = sampler(order, state.step, WINDOW)
        rows = lambda i: jax.lax.dynamic_slice_in_dim(indices, i * length, length)
        advance = lambda i, state: segment(noise, state, rows(i))[0]
        return jax.lax.fori_loop(0, trips, advance, state)

    # The number of trips of the inner loop is known, else a GPU asks the host at each of them.
    full = lambda state: window(state, WINDOW // unroll, unroll)
    state = jax.lax.while_loop(lambda state: state.step + WINDOW <= stop, full, state)
    return window(state, stop - state.step, 1)


def _record_if(scheduled, record: Record, state: TrainState):
    # The scan stacks a record per stop; unscheduled ones are zeros, at no cost. The condition isn't
    # mapped over runs: `vmap` of a mapped one would compute both branches.
    zeros = optax.tree.zeros_like(jax.eval_shape(record, state))
    return jax.lax.cond(scheduled, record, lambda _: zeros, state)


def make_sweep(
    run: Run,
    *,
    chunk: int = 64,
    vectorized: int | None = None,
    mesh: Mesh | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[..., PyTree[np.ndarray]]:
    """sweep(keys, points): `run(key, point)` for all pairs, leaves [len(keys), points, ...].

    One program, compiled at the first call, executes all runs; results are gathered in host memory.
    Run (i, j) is `run(keys[i], points[j])`, independent of the numbers of seeds, points and
    devices, and `chunk`.

    Options of sweep: `on_chunk(done)` is called after each chunk with the number of finished runs.
    `store`, a mapping from strings to dicts of arrays, caches chunks: with a store on disk, an
    interrupted sweep continues. A chunk is named by a digest of keys, points, chunk size, shapes of
    the results, and `fingerprint`, a string that identifies everything else that `run` depends on.

    Args:
        run: (key, point) -> a pytree of arrays.
        chunk: Runs per device at a time.
        vectorized: Runs of a chunk that are vmapped at a time, in a compiled loop (default: all at
            once). For diagonal networks on CPUs, 1 is three times faster, with the flag of
            docs/fast.md.
        mesh: The devices (default: all of all hosts).
        compiler_options: Those of `jax.jit`.

    Raises:
        ValueError: By sweep, if leaves of the pytree `points` differ in their number of points.

    Example:
        >>> sweep = make_sweep(lambda key, point: point["scale"] * jr.normal(key))
        >>> keys, store = jr.split(jr.key(0), 4), {}
        >>> sweep(keys, {"scale": jnp.array([1.0, 2.0, 3.0])}, store=store).shape
        (4, 3)
        >>> len(store)
        1
    """
    over = mesh or data_mesh()
    split, whole = PartitionSpec(over.axis_names), PartitionSpec()

    def of_index(index, keys, points):
        seed, point = jnp.divmod(index, len(jax.tree.leaves(points)[0]))
        return run(keys[seed], jax.tree.map(lambda leaf: leaf[point], points))

    def mapped(indices, keys, points):
        of_one = lambda index: of_index(index, keys, points)
        if vectorized is None:
            return jax.vmap(of_one)(indices)
        return jax.lax.map(of_one, indices, batch_size=vectorized if vectorized > 1 else None)

    specs = {"in_specs": (split, whole, whole), "out_specs": split}
    sharded = jax.shard_map(mapped, mesh=over, **specs, check_vma=False)
    program = jax.jit(sharded, compiler_options=compiler_options)

    def sweep(keys, points, *, on_chunk=lambda done: None, store=None, fingerprint=""):
        points, store = jax.tree.map(jnp.asarray, points), {} if store is None else store
        # Indices beyond a short leaf would be clipped silently; vmap reports unequal lengths.
        pairs = jax.vmap(jax.vmap(lambda key, point: 0, (None, 0)), (0, None))
        shape = jax.eval_shape(pairs, keys, points).shape
        total = math.prod(shape)
        width = min(chunk, -(-total // over.size)) * over.size
        shapes = program.eval_shape(np.arange(width), keys, points)
        name = _digest(fingerprint, jr.key_data(keys), points, str((keys.dtype, shapes)))
        chunks = []
        for start in range(0, total, width):
            found = store.get(f"{name}-{start}")
            if found is None:
                indices = np.arange(start, start + width) % total  # the last is padded
                results = program(indices, keys, points)
                leaves = jax.tree.leaves(multihost_utils.process_allgather(results, tiled=True))
                found = {str(i): leaf[: total - start] for i, leaf in enumerate(leaves)}
                store[f"{name}-{start}"] = found
            chunks.append([found[str(i)] for i in range(len(found))])
            on_chunk(min(start + width, total))
        leaves = [np.concatenate(parts) for parts in zip(*chunks, strict=True)]
        leaves = [leaf.reshape(*shape, *leaf.shape[1:]) for leaf in leaves]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return sweep


def sweep(
    run: Run,
    keys: Array,
    points: Any,
    *,
    chunk: int = 64,
    vectorized: int | None = None,
    mesh: Mesh | None = None,
    compiler_options: dict[str, Any] | None = None,
    **options: Any,
) -> PyTree[np.ndarray]:
    """`make_sweep(run, chunk=chunk, ...)(keys, points, **options)`, for a single sweep.

    Args:
        run: (key, point) -> a pytree of arrays.
        keys: One per seed, [seeds].
        points: Settings, a pytree of arrays [points, ...], such as the result of `grid`.
        chunk: Runs per device at a time.
        vectorized: Runs of a chunk that are vmapped at a time (default: all at once).
        mesh: The devices (default: all of all hosts).
        compiler_options: Those of `jax.jit`.
        options: `on_chunk`, `store` and `fingerprint`, as in `make_sweep`.

    Raises:
        ValueError: If leaves of `points` differ in their number of points.

    Example:
        >>> keys = jr.split(jr.key(0), 2)
        >>> sweep(lambda key, point: 2 * point, keys, jnp.array([1.0, 2.0, 3.0])).tolist()
        [[2.0, 4.0, 6.0], [2.0, 4.0, 6.0]]
    """
    run_all = make_sweep(
        run, chunk=chunk, vectorized=vectorized, mesh=mesh, compiler_options=compiler_options
    )
    return run_all(keys, points, **options)


def _digest(*parts: PyTree) -> str:
    """SHA-256 of the structure, dtypes, shapes and values of pytrees of arrays and strings."""
    sha = hashlib.sha256(str(jax.tree.structure(parts)).encode())
    for leaf in map(np.asarray, jax.tree.leaves(parts)):
        sha.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return sha.hexdigest()


def grid(**axes: ArrayLike | Sequence[Any]) -> dict[str, Array]:
    """All combinations of the axes' values, as `points` of a sweep; the last axis varies fastest.

    Args:
        axes: The values of each axis, by name.

    Example:
        >>> points = grid(step_size=[0.1, 0.2], batch=[1, 2, 4])
        >>> points["batch"].tolist()
        [1, 2, 4, 1, 2, 4]
    """
    meshes = jnp.meshgrid(*map(jnp.asarray, axes.values()), indexing="ij")
    return {name: mesh.reshape(-1) for name, mesh in zip(axes, meshes, strict=True)}


def labelled(
    results: Mapping[str, Any],
    *,
    axes: Mapping[str, Any],
    records: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> "xarray.Dataset":
    """Results of a sweep over `grid(**axes)` as an xarray.Dataset with dims seed, *axes, *records.

    Args:
        results: Arrays [seeds, points, ...] by name.
        axes: Those of `grid`, in the same order.
        records: Names of the remaining dims of each result.
        coords: Coordinates of these dims.

    Example:
        >>> data = labelled({"loss": np.zeros((5, 6))}, axes={"lr": [0.1, 0.2], "b": [1, 2, 4]})
        >>> dict(data["loss"].sel(lr=0.2).sizes)
        {'seed': 5, 'b': 3}
    """
    import xarray

    shape = [len(values) for values in axes.values()]
    variables = {}
    for name, value in results.items():
        array = np.reshape(value, (len(value), *shape, *np.shape(value)[2:]))
        variables[name] = (("seed", *axes, *(records or {}).get(name, ())), array)
    seeds = max((len(array) for _, array in variables.values()), default=0)
    places = {"seed": np.arange(seeds), **axes, **(coords or {})}
    return xarray.Dataset(variables, {name: np.asarray(value) for name, value in places.items()})
