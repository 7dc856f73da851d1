"""A TrainState on disk: the one module that knows orbax."""

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

ODD = 1_000_003  # a factor of the digest: an odd one never multiplies a set bit away


class _Damaged(ValueError):
    """A saved state that can't be read, or whose numbers are not those that were saved."""


@contextlib.contextmanager
def open_checkpoints(
    directory: str | PathLike[str], *, keep: int | None = 2, read_only: bool = False
) -> "Iterator[ocp.CheckpointManager]":
    """A folder of saved states, for `save` and `restore`; waits at its end for saves under way.

    The newest `keep` states are kept, None for all. `read_only` creates and removes nothing. Raises
    OSError where the folder can't be written, or a save failed in the background; ValueError for a
    path that `checkpoint_path` refuses.

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
        lightweight_initialize=True,  # else one damaged description hides all states
        # Else, where a folder can't be made, threads that wait for it keep the process for minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    with _saving(folder):
        handler = ocp.StandardCheckpointHandler()  # without it, item_metadata() knows no arrays
        checkpoints = ocp.CheckpointManager(folder, options=options, item_handlers=handler)
    try:
        yield checkpoints
    finally:
        with _saving(folder):  # errors of a save in the background surface here at the latest
            checkpoints.close()


def checkpoint_path(directory: str | PathLike[str]) -> Path:
    """The absolute path of a folder of states; ValueError for `[`, `]`, `*`, `?`, `\\` and URLs.

    Example:
        >>> checkpoint_path("/runs/1").name
        '1'
    """
    folder = Path(directory).expanduser().absolute()  # orbax fails late on relative paths
    # It saves to such a path, but lists it as a glob pattern, and finds no state.
    if odd := [c for c in (*"[]*?\\", ":/") if c in str(folder)]:
        raise ValueError(f"orbax can't read states from {folder}, with {odd[0]}; use another path.")
    return folder


@contextlib.contextmanager
def _raised_as(kind: type[Exception], before: str, after: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each layer of orbax has its own; a full disk alone raises three
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise kind(f"{before}{cause}{after}") from error


def _saving(folder: Path) -> contextlib.AbstractContextManager[None]:
    newest = latest_step(folder)
    saved = "no state is saved yet" if newest is None else f"step {newest} is saved"
    hint = "Free some space or make the folder writable, then run the same command again."
    return _raised_as(OSError, f"Saving to {folder} failed (", f"); {saved}. {hint}")


def latest_step(directory: str | PathLike[str]) -> int | None:
    """The newest step that `directory` holds a finished save of; None where there is none.

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
    """Saves `state` under its own step, in the background; its buffers may be donated at once.

    `about` are JSON values that identify the run (network, batch size, ...), `progress` those that
    `restore` returns with the state. With several hosts, all call this. Raises OSError where this
    save or the one before failed; ValueError where the folder holds this step or a newer one.

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
    beside = {"about": about or {}, "digest": int(digest(state)), "progress": progress or {}}
    with _saving(Path(checkpoints.directory)):
        args = ocp.args.StandardSave(state._asdict())
        is_newer = checkpoints.save(step, args=args, custom_metadata=beside)
        if is_first:  # a folder that can't hold a state, or return it, is noticed before training
            checkpoints.wait_until_finished()
            if jax.process_count() == 1:
                _read(checkpoints, step, state._asdict(), {})
    if not is_newer:  # orbax returns False and saves nothing
        newest = f"{checkpoints.latest_step()} in {checkpoints.directory}"
        raise ValueError(f"Step {step} isn't newer than step {newest}; choose another folder.")


def restore(
    checkpoints: "ocp.CheckpointManager", like: TrainState, about: Mapping[str, Any] | None = None
) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest state that can be read, and its progress; None where nothing is saved.

    `like` is a state, or `jax.ShapeDtypeStruct`s with shardings: the result is laid out like it. A
    newer state that is damaged is moved to `damaged-STEP`, with a warning. Raises ValueError where
    the state was saved with other values in `about` (names that only one of the two has are not
    compared), or has arrays of other names, shapes or dtypes; or where all states are damaged.

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
            state, beside = _read(checkpoints, step, like._asdict(), about or {})
        except _Damaged as error:
            damaged[step] = error
            continue
        if damaged:  # only now, with a good state at hand: else all of them stay
            _move_aside(checkpoints, damaged, step)
        return TrainState(**state), beside["progress"]
    if damaged:
        cause = next(iter(damaged.values()))
        hint = f"remove {checkpoints.directory} to start from the beginning"
        raise ValueError(f"No state can be read ({cause}); {hint}.")
    return None


def load_weights(path: str | PathLike[str], params: Any, stats: Any) -> tuple[Params, Stats]:
    """Parameters and statistics of a saved state, without its optimizer, average and step.

    `path` is a run's folder, its folder of states (the newest counts), or one state. `params` and
    `stats` are arrays, or `jax.ShapeDtypeStruct`s with shardings, that the saved ones must be like.
    Raises ValueError where nothing is saved, it is damaged, or has other arrays.

    Example:
        >>> import tempfile
        >>> state = TrainState(jnp.array(3), jnp.ones(2), {}, (), ())
        >>> with tempfile.TemporaryDirectory() as folder, open_checkpoints(folder) as checkpoints:
        ...     save(checkpoints, state)
        ...     load_weights(folder, jnp.zeros(2), {})[0].tolist()
        [1.0, 1.0]
    """
    state, _ = _read_one(path, {"params": params, "stats": stats})
    return state["params"], state["stats"]


def fork(path: str | PathLike[str], like: TrainState) -> TrainState:
    """A saved state, to continue from with other settings; `path` as in `load_weights`.

    Of the optimizer's arrays those that `like` has too are taken (its step count, and momentum
    where both have it); the others stay as in `like`. Raises ValueError where there is no state,
    where it is damaged, or where the networks differ.

    Example:
        >>> import tempfile
        >>> state = TrainState(jnp.array(3), jnp.ones(2), {}, (), ())
        >>> with tempfile.TemporaryDirectory() as folder, open_checkpoints(folder) as checkpoints:
        ...     save(checkpoints, state)
        ...     fork(folder, state._replace(opt_state={"momentum": jnp.zeros(2)})).params.tolist()
        [1.0, 1.0]
    """
    network = {name: getattr(like, name) for name in ("params", "stats", "average")}
    saved = _named_leaves(_read_one(path, network)[0])

    def taken(place: Any, mine: jax.Array) -> jax.Array:
        leaf = saved.get(_name(place))
        same = leaf is not None and _described(leaf) == _described(mine)
        return jax.device_put(leaf, mine.sharding) if same else mine

    return jax.tree_util.tree_map_with_path(taken, like)


@jax.jit
def digest(state: TrainState) -> jax.Array:
    """Sum of the numbers' bit patterns times odd weights, modulo 2^32: one flipped bit shows."""
    # Orbax checks lengths but not contents. A sum of integers is the same on any set of devices,
    # and computed where the numbers are: only the total travels to the host.
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(state):
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf  # bool has no bitcast
        words = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
        bits = jax.lax.bitcast_convert_type(leaf, words).ravel().astype(jnp.uint32)
        weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        total = total * jnp.uint32(ODD) + (weights * bits).sum(dtype=jnp.uint32)
    return total


def _read_one(path: str | PathLike[str], like: Mapping[str, Any]) -> tuple[dict, dict]:
    """The state that `path` means, see `_read`."""
    given = Path(path).expanduser().absolute()
    places = [(folder, latest_step(folder)) for folder in (given / "checkpoints", given)]
    places += [(given.parent, int(given.name))] if given.name.isdigit() and given.is_dir() else []
    for folder, step in places:
        if step is not None:
            with open_checkpoints(folder, read_only=True) as checkpoints:
                return _read(checkpoints, step, like, {})
    raise ValueError(f"{given} holds no saved state: give the folder of a run or of a state.")


def _read(
    checkpoints: "ocp.CheckpointManager", step: int, like: Mapping[str, Any], about: Mapping
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A saved state as a dict, and what `save` added to it; all parts laid out as in `like`."""
    import orbax.checkpoint as ocp

    where = f"{checkpoints.directory}, step {step}"
    with _raised_as(_Damaged, f"{where} is damaged: "):
        saved = dict(checkpoints.item_metadata(step))
        beside = dict(checkpoints.metadata(step).custom_metadata)
        mine = {name: saved[name] for name in like}, dict(beside["about"])
    _assert_alike(*mine, like, about, where)
    # The digest is that of the whole state: parts that `like` lacks are read too.
    place = jax.tree.leaves(like)[0].sharding
    at = lambda place: (
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place or x.sharding)
    )
    targets = jax.tree.map(at(place), saved) | jax.tree.map(at(None), dict(like))
    args = ocp.args.StandardRestore(targets)  # not arrays: those of several hosts are refused
    with _raised_as(_Damaged, f"{where} is damaged: "):
        state = checkpoints.restore(step, args=args)
        if int(digest(TrainState(**state))) != beside["digest"]:
            raise ValueError("its numbers are not those that were saved")
    return dict(state), beside


def _assert_alike(saved: Any, saved_about: Mapping, like: Any, about: Mapping, where: str) -> None:
    """Raises ValueError for another run's state."""
    # Compared here, because orbax would cast another precision silently.
    common = [name for name in saved_about if name in about]  # first: they explain other shapes
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
        raise ValueError(f"{where} is another run's ({', '.join(changes[:5])}{more}).")


def _move_aside(checkpoints: "ocp.CheckpointManager", damaged: Mapping[int, Any], to: int) -> None:
    """Else the run could not save these steps again: orbax refuses steps that exist."""
    multihost_utils.sync_global_devices("all have read the damaged states")
    for step, reason in damaged.items() if jax.process_index() == 0 else ():
        old, new = (Path(checkpoints.directory) / name for name in (f"{step}", f"damaged-{step}"))
        shutil.rmtree(new, ignore_errors=True)  # of an earlier damage
        old.rename(new)
        logging.getLogger(__name__).warning("%s; moved to %s, back to step %d.", reason, new, to)
    multihost_utils.sync_global_devices("damaged states are moved")
    checkpoints.reload()


def _described(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


# As `opt_state/1/count`: the same for the tuples of a state and the lists that are read.
_name = partial(jax.tree_util.keystr, simple=True, separator="/")


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {_name(place): leaf for place, leaf in jax.tree_util.tree_leaves_with_path(tree)}
