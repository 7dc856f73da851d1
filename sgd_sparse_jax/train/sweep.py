"""Many runs in one program: a run with records, a sweep over seeds and points, and its labels."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array, ArrayLike, PyTree

from sgd_sparse_jax.types import PRNGKey, Record, Sampler, Segment, TrainState

if TYPE_CHECKING:
    import xarray

WINDOW = 64  # steps whose indices are drawn at once
STRIDE = 4  # steps per iteration of the compiled loop


class Probe(NamedTuple):
    """`record(state)`, a pytree of arrays, taken before each of the steps `at`.

    `at` are increasing integers, known when the run is compiled; the number of steps of the run
    records its last state.

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

    Each probe has its own `at`, and costs nothing elsewhere; no probe changes the run. `state` may
    be that of any step: a saved run continues. Raises ValueError where the `at` of a probe isn't
    increasing, or leaves [state.step, num_steps]; the lower end can't be checked if `state` is
    traced (an argument of `jax.jit`).

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sgd_sparse_jax import train, types
        >>> tx = optax.sgd(0.5)
        >>> step = train.make_step(lambda w, stats, batch: (w**2 / 2, stats), tx)
        >>> segment = train.make_segment(step, lambda key, idx: types.Batch(idx, idx))
        >>> state = types.TrainState(jnp.array(0), jnp.array(8.0), {}, tx.init(8.0), ())
        >>> weight = Probe(lambda state: state.params, at=[0, 1, 3])
        >>> sampler = train.full_batch(1)
        >>> _, (weights,) = record_run(jax.random.key(0), sampler, segment, state, [weight], 3)
        >>> weights.tolist()
        [8.0, 4.0, 1.0]
    """
    traced = isinstance(state.step, Tracer)
    first = 0 if traced else int(state.step)
    for i, probe in enumerate(probes):
        at = np.asarray(probe.at)
        ordered = at.dtype.kind in "iu" and (np.diff(at) > 0).all()
        if at.size and not (ordered and first <= at[0] and at[-1] <= num_steps):
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
    places = [np.flatnonzero(column) for column in scheduled.T]
    pick = lambda record, place: jax.tree.map(lambda leaf: leaf[place], record)
    return state, tuple(map(pick, records, places))


def _walk(order, noise, sampler: Sampler, segment: Segment, state: TrainState, stop) -> TrainState:
    """Steps until `state.step` is `stop`, which may be traced: no compile per distance."""

    def window(state: TrainState) -> TrainState:
        offset = state.step % WINDOW
        indices = sampler(order, state.step - offset, WINDOW)
        todo = jnp.minimum(stop - state.step, WINDOW - offset)
        rows = lambda first, count: jax.lax.dynamic_slice_in_dim(indices, offset + first, count)
        stride = lambda i, state: segment(noise, state, rows(i * STRIDE, STRIDE))[0]
        single = lambda i, state: segment(noise, state, rows(i, 1))[0]
        state = jax.lax.fori_loop(0, todo // STRIDE, stride, state)
        return jax.lax.fori_loop(todo - todo % STRIDE, todo, single, state)

    return jax.lax.while_loop(lambda state: state.step < stop, window, state)


def _record_if(scheduled, record: Record, state: TrainState):
    """`record(state)`, or zeros of its shape at no cost where none is scheduled."""
    blank = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
    zeros = jax.tree.map(blank, jax.eval_shape(record, state))
    return jax.lax.cond(scheduled, record, lambda _: zeros, state)


def make_sweep(
    run: Callable[[PRNGKey, Any], PyTree[jax.Array]], *, chunk: int = 64, mesh: Mesh | None = None
) -> Callable[..., PyTree[np.ndarray]]:
    """sweep(keys, points): `run(key, point)` for all pairs, leaves [len(keys), points, ...].

    `points` is a pytree whose leaves have one entry per point. One program, compiled at the first
    call, takes `chunk` runs per device of `mesh` at a time (default: all devices, of all hosts);
    results gather in host memory. Run (i, j) is `run(keys[i], points[j])`, whatever the number of
    seeds, points and devices, and the chunk. Further arguments of `sweep`:
    `on_chunk(done)` is called with the number of finished runs after each chunk.
    `store` is a mapping from strings to dicts of arrays: chunks found in it aren't computed, others
    are added, so that with a store on disk an interrupted sweep continues. A chunk's name is the
    digest of keys, points, chunk, shapes of the results, and `fingerprint`: a string for all else
    that `run` depends on. Raises ValueError where keys or points aren't lists.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sweep = make_sweep(lambda key, point: point["scale"] * jax.random.normal(key))
        >>> keys, store = jax.random.split(jax.random.key(0), 4), {}
        >>> sweep(keys, {"scale": jnp.array([1.0, 2.0, 3.0])}, store=store).shape
        (4, 3)
        >>> len(store)
        1
    """
    over = mesh or jax.make_mesh((jax.device_count(),), ("runs",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec(over.axis_names), PartitionSpec()

    def of_index(index, keys, points):
        seed, point = jnp.divmod(index, _length(points))
        return run(keys[seed], jax.tree.map(lambda leaf: leaf[point], points))

    mapped = jax.vmap(of_index, (0, None, None))
    specs = {"in_specs": (split, whole, whole), "out_specs": split}
    program = jax.jit(jax.shard_map(mapped, mesh=over, **specs, check_vma=False))

    def sweep(keys, points, *, on_chunk=lambda done: None, store=None, fingerprint=""):
        if keys.ndim != 1 or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or not len(keys):
            raise ValueError(
                f"keys has shape {keys.shape} and dtype {keys.dtype}; give one key per seed, "
                "as jax.random.split(jax.random.key(0), seeds) does."
            )
        shape = len(keys), _length(points)
        total = shape[0] * shape[1]
        points, store = jax.tree.map(jnp.asarray, points), {} if store is None else store
        turn = min(chunk, -(-total // over.size)) * over.size
        shapes = program.eval_shape(np.arange(turn), keys, points)
        name = _digest(fingerprint, jr.key_data(keys), points, str((keys.dtype, shapes)))
        chunks = []
        for start in range(0, total, turn):
            found = store.get(f"{name}-{start}")
            if found is None:
                indices = np.arange(start, start + turn) % total  # the last repeats early runs
                leaves = jax.tree.leaves(_on_host(program(indices, keys, points)))
                found = {str(i): leaf[: total - start] for i, leaf in enumerate(leaves)}
                store[f"{name}-{start}"] = found
            chunks.append([found[str(i)] for i in range(len(found))])
            on_chunk(min(start + turn, total))
        leaves = [np.concatenate(parts) for parts in zip(*chunks, strict=True)]
        leaves = [leaf.reshape(*shape, *leaf.shape[1:]) for leaf in leaves]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return sweep


def sweep(
    run: Callable[[PRNGKey, Any], PyTree[jax.Array]],
    keys: jax.Array,
    points: Any,
    *,
    chunk: int = 64,
    mesh: Mesh | None = None,
    **options: Any,
) -> PyTree[np.ndarray]:
    """`make_sweep(run, chunk=chunk, mesh=mesh)(keys, points, **options)`: a sweep done once.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> keys = jax.random.split(jax.random.key(0), 2)
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


def _on_host(tree: PyTree[jax.Array]) -> PyTree[np.ndarray]:
    """All of every array, on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def _length(points: Any) -> int:
    """The length, one or more, that all leaves of `points` share."""
    leaves = jax.tree_util.tree_leaves_with_path(points)
    shapes = {f"points{jax.tree_util.keystr(path)}": np.shape(leaf) for path, leaf in leaves}
    lengths = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"Shapes of points: {shapes}; give each leaf one entry per point.")
    return lengths.pop()


def grid(**axes: ArrayLike | Sequence[Any]) -> dict[str, Array]:
    """Every combination of the axes' values as `points` of a sweep, the last axis fastest.

    Raises ValueError for an axis that isn't a list of at least one value.

    Example:
        >>> points = grid(step_size=[0.1, 0.2], batch=[1, 2, 4])
        >>> points["batch"].tolist()
        [1, 2, 4, 1, 2, 4]
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
    """Results of a sweep over `grid(**axes)` as an xarray.Dataset with dims seed, *axes, *records.

    `records[name]` names the further axes of the result `name`; `coords` are their coordinates.
    Raises ValueError where a shape doesn't fit its axes.

    Example:
        >>> import numpy as np
        >>> data = labelled({"loss": np.zeros((5, 6))}, axes={"lr": [0.1, 0.2], "b": [1, 2, 4]})
        >>> dict(data["loss"].sel(lr=0.2).sizes)
        {'seed': 5, 'b': 3}
    """
    import xarray

    shape = [len(values) for values in axes.values()]
    variables = {}
    for name, value in results.items():
        array, more = np.asarray(value), tuple((records or {}).get(name, ()))
        if array.ndim != 2 + len(more) or array.shape[1] != np.prod(shape, dtype=int):
            raise ValueError(
                f"The result {name!r} has shape {array.shape}; it must be [seeds, points, "
                f"{', '.join(more)}], and the points of {tuple(axes)} are {tuple(shape)}."
            )
        array = array.reshape(array.shape[0], *shape, *array.shape[2:])
        variables[name] = (("seed", *axes, *more), array)
    seeds = next(iter(variables.values()))[1].shape[0] if variables else 0
    places = {"seed": np.arange(seeds), **axes, **(coords or {})}
    return xarray.Dataset(variables, {name: np.asarray(value) for name, value in places.items()})
