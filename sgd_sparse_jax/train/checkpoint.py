"""Checkpoints of a TrainState; the only module that uses orbax."""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from sgd_sparse_jax.types import Params, Stats, TrainState

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

ODD = 1_000_003  # odd, hence invertible modulo 2^32: no bit of the digest is lost


class _Damaged(ValueError):
    """A saved state can't be read, or its digest differs from the saved one."""


@contextlib.contextmanager
def open_checkpoints(
    directory: str | PathLike[str], *, keep: int | None = 2, read_only: bool = False
) -> "Iterator[ocp.CheckpointManager]":
    """A context with the manager of a folder of states; its exit waits for pending saves.

    Args:
        directory: The folder.
        keep: Number of states, the newest ones, that are kept (None: all).
        read_only: Whether nothing is created or removed.

    Raises:
        OSError: If the folder can't be written or a background save failed.
        ValueError: For a path that `checkpoint_path` rejects.

    Example:
        >>> import tempfile
        >>> state = TrainState(jnp.array(3), jnp.ones(2), {}, (), ())
        >>> with tempfile.TemporaryDirectory() as folder, open_checkpoints(folder) as checkpoints:
        ...     save(checkpoints, state)
        ...     checkpoints.all_steps()
        [3]
    """
    import orbax.checkpoint as ocp

    folder = checkpoint_path(directory)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        lightweight_initialize=True,  # else damaged metadata of one state hides all
        # Else, if a folder can't be created, waiting threads block the exit for minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    with _saving(folder):
        handler = ocp.StandardCheckpointHandler()  # for item_metadata()
        checkpoints = ocp.CheckpointManager(folder, options=options, item_handlers=handler)
    try:
        yield checkpoints
    finally:
        with _saving(folder):  # raises errors of background saves
            checkpoints.close()


def checkpoint_path(directory: str | PathLike[str]) -> Path:
    """The absolute path of a checkpoint folder.

    Args:
        directory: A local path; `~` is expanded.

    Raises:
        ValueError: If orbax can't read the path: it has `[`, `]`, `*`, `?` or `\\`, or is a URL.

    Example:
        >>> checkpoint_path("/runs/1").name
        '1'
    """
    folder = Path(directory).expanduser().absolute()  # orbax fails late on relative paths
    # orbax saves to such a path, but lists its states with the path as a glob pattern.
    if odd := [c for c in (*"[]*?\\", ":/") if c in str(folder)]:
        raise ValueError(f"orbax can't read a path with {odd[0]}, such as {folder}; use another.")
    return folder


@contextlib.contextmanager
def _raised_as(kind: type[Exception], before: str, after: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax raises many types, three for a full disk alone
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise kind(f"{before}{cause}{after}") from error


def _saving(folder: Path) -> contextlib.AbstractContextManager[None]:
    newest = latest_step(folder)
    saved = "no state is saved yet" if newest is None else f"step {newest} is saved"
    hint = "Free some space or make the folder writable, then run the same command again."
    return _raised_as(OSError, f"Saving to {folder} failed (", f"); {saved}. {hint}")


def latest_step(directory: str | PathLike[str]) -> int | None:
    """The newest completely saved step in `directory`; None if there is none.

    Example:
        >>> print(latest_step("no/such/folder"))
        None
    """
    names = [path.name for path in Path(directory).glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=None)


def save(
    checkpoints: "ocp.CheckpointManager",
    state: TrainState,
    about: Mapping[str, Any] | None = None,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Saves `state` under its step, asynchronously; its buffers may be donated right away.

    Args:
        checkpoints: The manager, of `open_checkpoints`; with several hosts, all must call `save`.
        state: The state.
        about: JSON values that identify the run (network, batch size, ...).
        progress: JSON values that `restore` returns with the state.

    Raises:
        OSError: If this save or the previous one failed.
        ValueError: If the folder has this step or a newer one.

    Example:
        >>> import tempfile
        >>> state = TrainState(jnp.array(3), jnp.ones(2), {}, (), ())
        >>> with tempfile.TemporaryDirectory() as folder, open_checkpoints(folder) as checkpoints:
        ...     save(checkpoints, state)
        ...     latest_step(folder)
        3
    """
    import orbax.checkpoint as ocp

    step, is_first = int(state.step), not checkpoints.all_steps()
    metadata = {"about": about or {}, "digest": int(digest(state)), "progress": progress or {}}
    with _saving(Path(checkpoints.directory)):
        args = ocp.args.StandardSave(state._asdict())
        is_newer = checkpoints.save(step, args=args, custom_metadata=metadata)
        if is_first:  # before training: can the folder store a state, and return it?
            checkpoints.wait_until_finished()
            if jax.process_count() == 1:
                _read(checkpoints, step, state._asdict(), {})
    if not is_newer:  # orbax returns False and saves nothing
        newest = f"{checkpoints.latest_step()} in {checkpoints.directory}"
        raise ValueError(f"Step {step} isn't newer than step {newest}; choose another folder.")


def restore(
    checkpoints: "ocp.CheckpointManager", like: TrainState, about: Mapping[str, Any] | None = None
) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest readable state and its progress; None if nothing is saved.

    Newer, damaged states are moved to `damaged-STEP`, with a warning.

    Args:
        checkpoints: The manager, of `open_checkpoints`.
        like: A state, or `jax.ShapeDtypeStruct`s with shardings, which the result will have.
        about: That of `save`, compared in the names that both have.

    Raises:
        ValueError: If `about` differs, if names, shapes or dtypes of arrays differ, or if all
            states are damaged.

    Example:
        >>> import tempfile
        >>> state = TrainState(jnp.array(3), jnp.ones(2), {}, (), ())
        >>> with tempfile.TemporaryDirectory() as folder, open_checkpoints(folder) as checkpoints:
        ...     save(checkpoints, state, about={"width": 2}, progress={"seconds": 0.5})
        ...     restore(checkpoints, state, about={"width": 2})[1]
        {'seconds': 0.5}
    """
    damaged: dict[int, _Damaged] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            state, metadata = _read(checkpoints, step, like._asdict(), about or {})
        except _Damaged as error:
            damaged[step] = error
            continue
        if damaged:  # not moved unless an older state is good
            _move_aside(checkpoints, damaged, step)
        return TrainState(**state), metadata["progress"]
    if damaged:
        cause = next(iter(damaged.values()))
        hint = f"remove {checkpoints.directory} to start from the beginning"
        raise ValueError(f"No state can be read ({cause}); {hint}.")
    return None


def load_weights(path: str | PathLike[str], params: Any, stats: Any) -> tuple[Params, Stats]:
    """Parameters and statistics of a saved state, without its optimizer, average and step.

    Args:
        path: The folder of a run or of its states (the newest is read), or a single state.
        params: Arrays, or `jax.ShapeDtypeStruct`s with shardings, which the saved ones must match.
        stats: The same for the statistics.

    Raises:
        ValueError: If nothing is saved, or the state is damaged or has other arrays.

    Example:
        >>> import tempfile
        >>> state = TrainState(jnp.array(3), jnp.ones(2), {}, (), ())
        >>> with tempfile.TemporaryDirectory() as folder, open_checkpoints(folder) as checkpoints:
        ...     save(checkpoints, state)
        ...     load_weights(folder, jnp.zeros(2), {})[0].tolist()
        [1.0, 1.0]
    """
    state = _read_one(path, {"params": params, "stats": stats})
    return state["params"], state["stats"]


def fork(path: str | PathLike[str], like: TrainState) -> TrainState:
    """A saved state to continue with other settings.

    Optimizer arrays that both have are those of the saved state (the step count; momentum, if both
    use it), all others those of `like`.

    Args:
        path: The folder of a run or of its states (the newest is read), or a single state.
        like: A state of the same network with the new settings.

    Raises:
        ValueError: If there is no state, it is damaged, or the networks differ.

    Example:
        >>> import tempfile
        >>> state = TrainState(jnp.array(3), jnp.ones(2), {}, (), ())
        >>> with tempfile.TemporaryDirectory() as folder, open_checkpoints(folder) as checkpoints:
        ...     save(checkpoints, state)
        ...     fork(folder, state._replace(opt_state={"momentum": jnp.zeros(2)})).params.tolist()
        [1.0, 1.0]
    """
    network = {name: getattr(like, name) for name in ("params", "stats", "average")}
    saved = _named_leaves(_read_one(path, network))

    def taken(place: Any, mine: jax.Array) -> jax.Array:
        leaf = saved.get(_name(place))
        same = leaf is not None and _described(leaf) == _described(mine)
        return jax.device_put(leaf, mine.sharding) if same else mine

    return jax.tree_util.tree_map_with_path(taken, like)


@jax.jit
def digest(state: TrainState) -> jax.Array:
    """Sum of all bit patterns times odd weights, modulo 2^32; any flipped bit changes it."""
    # Orbax checks lengths but not contents. An integer sum doesn't depend on the sharding, and only
    # the total is transferred to the host.
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(state):
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf  # bool has no bitcast
        words = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
        bits = jax.lax.bitcast_convert_type(leaf, words).ravel().astype(jnp.uint32)
        weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        total = total * jnp.uint32(ODD) + (weights * bits).sum(dtype=jnp.uint32)
    return total


def _read_one(path: str | PathLike[str], like: Mapping[str, Any]) -> dict[str, Any]:
    """The state that `path` refers to."""
    given = Path(path).expanduser().absolute()
    places = [(folder, latest_step(folder)) for folder in (given / "checkpoints", given)]
    places += [(given.parent, int(given.name))] if given.name.isdigit() and given.is_dir() else []
    for folder, step in places:
        if step is not None:
            with open_checkpoints(folder, read_only=True) as checkpoints:
                return _read(checkpoints, step, like, {})[0]
    raise ValueError(f"{given} holds no saved state: give the folder of a run or of a state.")


def _read(
    checkpoints: "ocp.CheckpointManager", step: int, like: Mapping[str, Any], about: Mapping
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a saved state as a dict, sharded like `like`; its metadata)."""
    import orbax.checkpoint as ocp

    where = f"{checkpoints.directory}, step {step}"
    with _raised_as(_Damaged, f"{where} is damaged: "):
        saved = dict(checkpoints.item_metadata(step))
        metadata = dict(checkpoints.metadata(step).custom_metadata)
        mine = {name: saved[name] for name in like}, dict(metadata["about"])
    _assert_alike(*mine, like, about, where)
    # The digest covers the whole state: parts that `like` lacks are read too.
    place = jax.tree.leaves(like)[0].sharding
    of = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    targets = jax.tree.map(lambda x: of(x, place), saved)
    targets |= jax.tree.map(lambda x: of(x, x.sharding), dict(like))
    args = ocp.args.StandardRestore(targets)  # orbax rejects arrays of several hosts
    with _raised_as(_Damaged, f"{where} is damaged: "):
        state = checkpoints.restore(step, args=args)
        if int(digest(TrainState(**state))) != metadata["digest"]:
            raise ValueError("its digest differs from the saved one")
    return dict(state), metadata


def _assert_alike(saved: Any, saved_about: Mapping, like: Any, about: Mapping, where: str) -> None:
    """Raises ValueError if the state belongs to another run."""
    # Compared here because orbax would silently cast to another precision.
    common = [name for name in saved_about if name in about]  # first: they explain the rest
    old, new = (
        {name: flags[name] for name in common}
        | {name: _described(leaf) for name, leaf in _named_leaves(tree).items()}
        for flags, tree in ((saved_about, saved), (about, like))
    )
    changes = [
        f"{name} {old.get(name, 'missing')} -> {new.get(name, 'missing')}"
        for name in old | new
        if old.get(name, "missing") != new.get(name, "missing")
    ]
    if changes:
        more = f", and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise ValueError(f"{where} belongs to another run ({', '.join(changes[:5])}{more}).")


def _move_aside(checkpoints: "ocp.CheckpointManager", damaged: Mapping[int, Any], to: int) -> None:
    """Renames damaged states: orbax refuses to save a step that exists."""
    multihost_utils.sync_global_devices("all have read the damaged states")
    for step, reason in damaged.items() if jax.process_index() == 0 else ():
        old, new = (Path(checkpoints.directory) / name for name in (f"{step}", f"damaged-{step}"))
        shutil.rmtree(new, ignore_errors=True)  # of an earlier start
        old.rename(new)
        logging.getLogger(__name__).warning("%s; moved to %s, back to step %d.", reason, new, to)
    multihost_utils.sync_global_devices("damaged states are moved")
    checkpoints.reload()


def _described(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


# Such as `opt_state/1/count`, for tuples as for the lists that orbax restores.
_name = partial(jax.tree_util.keystr, simple=True, separator="/")


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {_name(place): leaf for place, leaf in jax.tree_util.tree_leaves_with_path(tree)}
