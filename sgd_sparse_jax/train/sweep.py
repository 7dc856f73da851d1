"""Many runs in one program."""

import functools
import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import PyTree

from sgd_sparse_jax.types import PRNGKey, Record, Sampler, Segment, TrainState

log = logging.getLogger(__name__)
WINDOW = 64  # steps whose indices are drawn at once
STRIDE = 4  # steps per turn of the compiled loop


class Probe(NamedTuple):
    """`record(state)`, taken before each of the steps `at` (increasing, static)."""

    record: Record
    at: Sequence[int] | np.ndarray


def record_run(
    key: PRNGKey,
    sampler: Sampler,
    segment: Segment,
    state: TrainState,
    gauges: Sequence[Probe],
    num_steps: int,
) -> tuple[TrainState, tuple[PyTree[jax.Array], ...]]:
    """One run of `num_steps` steps; the rows of gauge i are stacked along its own `at`.

    What a gauge does cannot change the run. Gauges may have cadences of their own, so that an
    expensive one is paid for only where it is due.
    """
    order, noise = jr.split(key)
    stops = np.unique(np.concatenate([np.asarray(gauge.at) for gauge in gauges]))
    if stops[0] < 0 or stops[-1] >= num_steps:
        raise ValueError(f"Records at {stops[0]} … {stops[-1]} of a run of {num_steps} steps.")
    due = np.stack([np.isin(stops, gauge.at) for gauge in gauges], axis=1)

    def tick(state, stop_and_due):
        stop, due = stop_and_due
        state = _walk(order, noise, sampler, segment, state, stop)
        return state, tuple(
            _record_if(due[i], gauge.record, state) for i, gauge in enumerate(gauges)
        )

    state, rows = jax.lax.scan(tick, state, (jnp.asarray(stops), jnp.asarray(due)))
    state = _walk(order, noise, sampler, segment, state, num_steps)
    where_due = [np.flatnonzero(column) for column in due.T]
    return state, tuple(
        jax.tree.map(lambda leaf, at=at: leaf[at], row)
        for row, at in zip(rows, where_due, strict=True)
    )


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


def _record_if(due, record: Record, state: TrainState):
    """`record(state)`, or zeros of its shape at no cost where nothing is due."""
    blank = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(record, state)
    )
    return jax.lax.cond(due, record, lambda _: blank, state)


def make_sweep(
    run: Callable[[PRNGKey, Any], PyTree[jax.Array]], *, chunk: int = 64, mesh: Mesh | None = None
) -> Callable[..., PyTree[np.ndarray]]:
    """(keys, points) -> `run(key, point)` over keys x points, leaves with axes [seeds, points, …].

    One program, compiled at the first call, takes `chunk` runs per device of `mesh` at a time (on
    CPUs 64 diagonal nets fill a core); `on_chunk` hears how many runs are done. Results gather on
    the host, so that the number of runs isn't limited by the memory of a device. Run (i, j) is
    `run(keys[i], points[j])`, whatever the number of seeds, points, devices or the chunk.

    `kept` maps the number of a run to the results of the chunk that begins there, {leaf: array}:
    chunks found in it aren't computed, the others are added, so a mapping that outlives the process
    lets a sweep go on. A chunk that isn't of this run's shapes is computed again, and the log says
    so. Devices of several hosts work together, and each host gets all results.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; a device takes 1 run at a time or more.")
    over = mesh or jax.make_mesh((jax.device_count(),), ("runs",), axis_types=(AxisType.Auto,))
    split = PartitionSpec(over.axis_names)

    def of_index(index, keys, points):
        seed, point = index // _common_length(points), index % _common_length(points)
        return run(keys[seed], jax.tree.map(lambda leaf: leaf[point], points))

    program = jax.jit(
        jax.shard_map(
            jax.vmap(of_index, (0, None, None)),
            mesh=over,
            in_specs=(split, PartitionSpec(), PartitionSpec()),
            out_specs=split,
            check_vma=False,
        )
    )

    def sweep(
        keys,
        points,
        on_chunk: Callable[[int], None] = lambda done: None,
        kept: MutableMapping[int, dict[str, np.ndarray]] | None = None,
    ):
        _check(keys, points)
        points = jax.tree.map(jnp.asarray, points)
        shape = (len(keys), _common_length(points))
        total = shape[0] * shape[1]
        if total == 0:
            raise ValueError(f"Nothing to run: {shape[0]} seeds x {shape[1]} points.")
        turn = min(chunk, -(-total // over.size)) * over.size
        kept = {} if kept is None else kept
        of_one = functools.cache(lambda: jax.eval_shape(run, keys[0], _first(points)))
        start, blocks, structure = 0, [], None
        while start < total:
            found = kept.get(start)
            if found is not None and (why := misfit(found, _named(of_one()), total - start)):
                log.warning("What is kept of runs %d … is no use (%s); they run again.", start, why)
                found = None
            if found is None:
                indices = np.arange(start, start + turn) % total  # the last repeats early runs
                leaves, structure = jax.tree.flatten(_on_host(program(indices, keys, points)))
                found = {name: leaf[: total - start] for name, leaf in _named(leaves).items()}
                kept[start] = found
            blocks.append([found[str(i)] for i in range(len(found))])
            start += len(blocks[-1][0])
            on_chunk(start)
        if structure is None:  # all was kept
            structure = jax.tree.structure(of_one())
        whole = [np.concatenate(parts) for parts in zip(*blocks, strict=True)]
        return jax.tree.unflatten(structure, [a.reshape(*shape, *a.shape[1:]) for a in whole])

    return sweep


def misfit(
    found: Mapping[str, Any], of_one: Mapping[str, jax.ShapeDtypeStruct], most: int
) -> str | None:
    """Why the arrays `found` aren't those of 1 … `most` runs, each like `of_one`; None if they are.

    What is kept may be of another program, or of another's making: its runs would mix with ours.
    """
    if found.keys() != of_one.keys():
        has, due = (", ".join(sorted(names)) or "(none)" for names in (found, of_one))
        return f"its arrays are {has} and not {due}"
    if not found:
        return None
    arrays = {name: np.asarray(array) for name, array in found.items()}
    runs = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(runs) != 1 or not 1 <= min(runs) <= most:
        return f"its arrays are of {sorted(runs)} runs, and up to {most} are due"
    for name, array in arrays.items():
        has, due = (array.dtype, array.shape[1:]), (of_one[name].dtype, of_one[name].shape)
        if has != due:
            return f"{name} is {has[0]}{list(has[1])} per run and not {due[0]}{list(due[1])}"
    return None


def _named(tree: PyTree) -> dict[str, Any]:
    """Leaves by their number, in words: what an archive can hold."""
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _first(points: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], points)


def _on_host(tree: PyTree[jax.Array]) -> PyTree[np.ndarray]:
    """All of every array, on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def sweep(
    run: Callable[[PRNGKey, Any], PyTree[jax.Array]],
    keys: jax.Array,
    points: Any,
    *,
    chunk: int = 64,
    mesh: Mesh | None = None,
    on_chunk: Callable[[int], None] = lambda done: None,
    kept: MutableMapping[int, dict[str, np.ndarray]] | None = None,
) -> PyTree[np.ndarray]:
    """`run(key, point)` over keys x points, once: `make_sweep` says how."""
    return make_sweep(run, chunk=chunk, mesh=mesh)(keys, points, on_chunk, kept)


def _check(keys: jax.Array, points: Any) -> None:
    """ValueError, by the name of the argument and its leaf, for what would fail inside a trace."""
    if keys.ndim != 1 or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"keys has shape {keys.shape} and dtype {keys.dtype}; give one key per seed, "
            "as jax.random.split(jax.random.key(0), seeds) does."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(points):
        name = f"points{jax.tree_util.keystr(path)}"
        values = np.asarray(leaf)
        if values.ndim == 0 or values.dtype.kind not in "iufb":
            raise ValueError(
                f"{name} has shape {values.shape} and dtype {values.dtype}; "
                "give an array of numbers with one entry per point."
            )
        bad = np.flatnonzero(np.isnan(values.reshape(len(values), -1)).any(1))
        if bad.size:
            raise ValueError(f"{name} of shape {values.shape} holds NaN at point {bad[0]}.")


def _common_length(points: Any) -> int:
    """The length that all leaves of `points` share."""
    lengths = {
        jax.tree_util.keystr(path): leaf.shape[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(points)
    }
    if len(set(lengths.values())) != 1:
        raise ValueError(f"Sweep axes of unequal length: {lengths}; give each point every value.")
    return next(iter(lengths.values()))
