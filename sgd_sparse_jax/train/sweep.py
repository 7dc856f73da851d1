"""Many runs in one program: a run with records, a sweep over seeds and points, and its labels."""

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
WINDOW = 64  # steps whose indices are drawn at once: a draw per step costs as much as a toy step
STRIDE = 4  # steps per iteration of the compiled loop


class Probe(NamedTuple):
    """`record(state)`, a pytree of arrays, taken before each of the steps `at`.

    `at` are increasing integers, which aren't traced; num_steps records the last state.

    Example:
        >>> Probe(lambda state: state.params, at=[0, 10, 100]).at
        [0, 10, 100]
    """

    record: Record
    at: Sequence[int] | np.ndarray


def record_run(
    key: PRNGKey,
    sampler: Sampler,
    segment: Segment,
    state: TrainState,
    probes: Sequence[Probe],
    num_steps: int,
) -> tuple[TrainState, tuple[PyTree[jax.Array], ...]]:
    """One run up to step `num_steps`: (last state, records), records[i] stacked along probes[i].at.

    A probe costs nothing between its records, and doesn't change the run. `state` may be that of
    any step: a saved run continues. Raises ValueError where the `at` of a probe isn't increasing,
    or leaves [state.step, num_steps]; if `state` is traced, the lower end isn't checked.

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
    first = 0 if isinstance(state.step, Tracer) else int(state.step)
    for i, (_, at) in enumerate(probes):
        if len(at) and not (first <= at[0] and at[-1] <= num_steps and (np.diff(at) > 0).all()):
            raise ValueError(
                f"probes[{i}].at goes from {at[0]} to {at[-1]}; give increasing integers in "
                f"[{first}, {num_steps}], from the step of the state to num_steps."
            )
    stops = np.unique(np.concatenate([*(probe.at for probe in probes), [num_steps]])).astype(int)
    scheduled = np.array([np.isin(stops, probe.at) for probe in probes]).reshape(-1, len(stops)).T
    order, noise = jr.split(key)

    def tick(state, stop_and_scheduled):
        stop, now = stop_and_scheduled
        state = _walk(order, noise, sampler, segment, state, stop)
        return state, tuple(_record_if(now[i], p.record, state) for i, p in enumerate(probes))

    state, records = jax.lax.scan(tick, state, (jnp.asarray(stops), jnp.asarray(scheduled)))
    pick = lambda record, on: jax.tree.map(lambda leaf: leaf[np.flatnonzero(on)], record)
    return state, tuple(map(pick, records, scheduled.T))


def _walk(order, noise, sampler: Sampler, segment: Segment, state: TrainState, stop) -> TrainState:
    """Steps until `state.step` is `stop`, which may be traced: one program for all distances."""

    def window(state: TrainState, trips, length: int) -> TrainState:
        indices = sampler(order, state.step, WINDOW)
        rows = lambda i: jax.lax.dynamic_slice_in_dim(indices, i * length, length)
        advance = lambda i, state: segment(noise, state, rows(i))[0]
        return jax.lax.fori_loop(0, trips, advance, state)

    # The number of trips of the inner loop is known, else a GPU asks the host at each of them.
    full = lambda state: window(state, WINDOW // STRIDE, STRIDE)
    state = jax.lax.while_loop(lambda state: state.step + WINDOW <= stop, full, state)
    return window(state, stop - state.step, 1)


def _record_if(scheduled, record: Record, state: TrainState):
    # A scan over stops stacks all records; those that aren't scheduled are zeros, at no cost. The
    # condition isn't mapped over runs, so that `vmap` keeps it: it would compute both sides.
    zeros = optax.tree.zeros_like(jax.eval_shape(record, state))
    return jax.lax.cond(scheduled, record, lambda _: zeros, state)


def make_sweep(
    run: Run, *, chunk: int = 64, mesh: Mesh | None = None
) -> Callable[..., PyTree[np.ndarray]]:
    """sweep(keys, points): `run(key, point)` for all pairs, leaves [len(keys), points, ...].

    One program, compiled at the first call, takes `chunk` runs per device of `mesh` at a time
    (default: all devices, of all hosts); results gather in host memory. Run (i, j) is
    `run(keys[i], points[j])`, whatever the number of seeds, points and devices, and the chunk.

    The leaves of the pytree `points` have one entry per point; raises ValueError otherwise. Further
    arguments of `sweep`: `on_chunk(done)` is called with the number of finished runs after each
    chunk. `store` is a mapping from strings to dicts of arrays: chunks found in it aren't computed,
    others are added, so that with a store on disk an interrupted sweep continues. A chunk's name is
    the digest of keys, points, chunk size, shapes of the results, and `fingerprint`: a string for
    all else that `run` depends on.

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

    mapped = jax.vmap(of_index, (0, None, None))
    specs = {"in_specs": (split, whole, whole), "out_specs": split}
    program = jax.jit(jax.shard_map(mapped, mesh=over, **specs, check_vma=False))

    def sweep(keys, points, *, on_chunk=lambda done: None, store=None, fingerprint=""):
        points, store = jax.tree.map(jnp.asarray, points), {} if store is None else store
        # An index beyond a short leaf would be clipped silently; vmap names leaves of two lengths.
        pairs = jax.vmap(jax.vmap(lambda key, point: 0, (None, 0)), (0, None))
        shape = jax.eval_shape(pairs, keys, points).shape
        total = math.prod(shape)
        turn = min(chunk, -(-total // over.size)) * over.size
        shapes = program.eval_shape(np.arange(turn), keys, points)
        name = _digest(fingerprint, jr.key_data(keys), points, str((keys.dtype, shapes)))
        chunks = []
        for start in range(0, total, turn):
            found = store.get(f"{name}-{start}")
            if found is None:
                indices = np.arange(start, start + turn) % total  # the last repeats early runs
                results = program(indices, keys, points)
                leaves = jax.tree.leaves(multihost_utils.process_allgather(results, tiled=True))
                found = {str(i): leaf[: total - start] for i, leaf in enumerate(leaves)}
                store[f"{name}-{start}"] = found
            chunks.append([found[str(i)] for i in range(len(found))])
            on_chunk(min(start + turn, total))
        leaves = [np.concatenate(parts) for parts in zip(*chunks, strict=True)]
        leaves = [leaf.reshape(*shape, *leaf.shape[1:]) for leaf in leaves]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return sweep


def sweep(
    run: Run, keys: Array, points: Any, *, chunk: int = 64, mesh: Mesh | None = None, **options
) -> PyTree[np.ndarray]:
    """`make_sweep(run, chunk=chunk, mesh=mesh)(keys, points, **options)`: a sweep done once.

    Example:
        >>> keys = jr.split(jr.key(0), 2)
        >>> sweep(lambda key, point: 2 * point, keys, jnp.array([1.0, 2.0, 3.0])).tolist()
        [[2.0, 4.0, 6.0], [2.0, 4.0, 6.0]]
    """
    return make_sweep(run, chunk=chunk, mesh=mesh)(keys, points, **options)


def _digest(*parts: PyTree) -> str:
    """SHA-256 of the structure, dtypes, shapes and values of pytrees of arrays and strings."""
    sha = hashlib.sha256(str(jax.tree.structure(parts)).encode())
    for leaf in map(np.asarray, jax.tree.leaves(parts)):
        sha.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return sha.hexdigest()


def grid(**axes: ArrayLike | Sequence[Any]) -> dict[str, Array]:
    """Every combination of the axes' values as `points` of a sweep, the last axis fastest.

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

    `records[name]` names the further axes of the result `name`; `coords` are their coordinates.

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
