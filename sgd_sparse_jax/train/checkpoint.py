"""A TrainState on disk: the one module that knows orbax."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
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
    """A folder of saved states, for `save` and `restore`; its end waits for saves under way.

    Args:
        directory: made if need be; what an interrupted save has left in it is removed.
        keep: how many of the newest states stay; None for all.
        read_only: nothing is made or removed.

    Raises:
        ValueError: the path can't be used, see `checkpoint_path`.
        OSError: the folder can't be written, or a save failed in the background.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> state = TrainState(jnp.array(3), jnp.ones(2), {}, (), ())
        >>> with tempfile.TemporaryDirectory() as folder, open_checkpoints(folder) as checkpoints:
        ...     save(checkpoints, state, about={"width": 2})
        ...     saved, progress = restore(checkpoints, state, about={"width": 2})
        >>> int(saved.step), saved.params.tolist()
        (3, [1.0, 1.0])
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
    with _as_os_error(folder):
        handler = ocp.StandardCheckpointHandler()  # so that a saved tree can be described
        checkpoints = ocp.CheckpointManager(folder, options=options, item_handlers=handler)
    try:
        yield checkpoints
    finally:
        with _as_os_error(folder):
            checkpoints.close()


def checkpoint_path(directory: str | PathLike[str]) -> Path:
    """The absolute path of a folder of states.

    Raises ValueError for a path with `[`, `]`, `*`, `?` or a backslash, which orbax would save to
    but read as a pattern, or with a folder that ends in a colon, as URLs have.
    """
    folder = Path(directory).expanduser().absolute()
    if odd := [c for c in (*"[]*?\\", ":/") if c in str(folder)]:
        raise ValueError(
            f"Checkpoints can't be read again from {folder}: orbax doesn't take its {odd[0]} "
            "literally; choose another path."
        )
    return folder


@contextlib.contextmanager
def _as_os_error(folder: Path) -> Iterator[None]:
    """Each layer of a save has its own exceptions; a full disk alone raises three kinds."""
    try:
        yield
    except Exception as error:
        newest = latest_step(folder)
        saved = "no state is saved yet" if newest is None else f"step {newest} is saved"
        raise OSError(
            f"Saving to {folder} failed ({_in_a_line(error)}); {saved}. Free some space or make "
            "the folder writable, then run the same command again."
        ) from error


def latest_step(directory: str | PathLike[str]) -> int | None:
    """The newest step of which `directory` holds a finished save; None where there is none."""
    folder = Path(directory)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


def save(
    checkpoints: "ocp.CheckpointManager",
    state: TrainState,
    about: Mapping[str, Any] | None = None,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Saves `state` under its own step, in the background; its buffers are copied first.

    The first state of a folder is read back before this returns. Of several hosts, all call this.

    Args:
        checkpoints: what `open_checkpoints` yields.
        state: the state.
        about: JSON values that identify the run (network, batch size, ...), see `restore`.
        progress: JSON values that `restore` returns with the state.

    Raises:
        OSError: this save or the one before failed.
        ValueError: the folder holds this step, or a newer one.
    """
    import orbax.checkpoint as ocp

    step, is_first = int(state.step), not checkpoints.all_steps()
    beside = {"about": about or {}, "digest": int(digest(state)), "progress": progress or {}}
    with _as_os_error(Path(checkpoints.directory)):
        args = ocp.args.StandardSave(state._asdict())
        saves = checkpoints.save(step, args=args, custom_metadata=beside)
        if saves and is_first:
            checkpoints.wait_until_finished()
            _read(checkpoints, step, state._asdict(), {})
    if not saves:
        raise ValueError(
            f"Step {step} isn't newer than step {checkpoints.latest_step()} in "
            f"{checkpoints.directory}; choose another folder."
        )


def restore(
    checkpoints: "ocp.CheckpointManager", like: TrainState, about: Mapping[str, Any] | None = None
) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest state that can be read, and its progress; None where nothing is saved.

    A newer state that is damaged is moved to `damaged-STEP`, with a warning.

    Args:
        checkpoints: what `open_checkpoints` yields.
        like: a state, or `jax.ShapeDtypeStruct`s with shardings: the result is laid out like it.
        about: what `save` was given; names that only one of both has are not compared.

    Raises:
        ValueError: the state was saved with another `about`, or has arrays of other names, shapes
            or dtypes; or all states are damaged.
    """
    damaged: dict[int, _Damaged] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            state, beside = _read(checkpoints, step, like._asdict(), about or {})
        except _Damaged as error:
            damaged[step] = error
            continue
        # Only now, with a good state at hand: else the run could not save these steps again.
        _move_aside(checkpoints, damaged, step)
        return TrainState(**state), beside["progress"]
    if damaged:
        raise ValueError(
            f"No state can be read ({next(iter(damaged.values()))}); remove "
            f"{checkpoints.directory} to start from the beginning."
        )
    return None


def load_weights(path: str | PathLike[str], params: Any, stats: Any) -> tuple[Params, Stats]:
    """Parameters and statistics of a saved state, without its optimizer, average and step.

    Args:
        path: a run's folder, its folder of states (the newest counts), or one state.
        params: arrays, or `jax.ShapeDtypeStruct`s with shardings, that the saved ones must be like.
        stats: the same.

    Raises:
        ValueError: nothing is saved there, it is damaged, or has other arrays.
    """
    state, _ = _read_one(path, {"params": params, "stats": stats})
    return state["params"], state["stats"]


def fork(path: str | PathLike[str], like: TrainState) -> TrainState:
    """A saved state, to continue from with other settings; `path` as in `load_weights`.

    Of the optimizer's arrays those that `like` has too are taken (its step count, and momentum
    where both have it); the others stay as in `like`. Raises ValueError where there is no state,
    where it is damaged, or where the networks differ.
    """
    network = {name: getattr(like, name) for name in ("params", "stats", "average")}
    saved = _named_leaves(_read_one(path, network)[0])

    def taken(name: str, mine: jax.Array) -> jax.Array:
        same = name in saved and _described(saved[name]) == _described(mine)
        return jax.device_put(saved[name], mine.sharding) if same else mine

    leaves = [taken(name, leaf) for name, leaf in _named_leaves(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


@jax.jit
def digest(state: TrainState) -> jax.Array:
    """Sum of the numbers' bit patterns times odd weights, modulo 2^32: one flipped bit shows.

    Orbax checks lengths but not contents. A sum of integers is the same on any set of devices, and
    computed where the numbers are: only the total travels to the host.
    """
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(state):
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        words = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
        bits = jax.lax.bitcast_convert_type(leaf, words).ravel().astype(jnp.uint32)
        weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        total = total * jnp.uint32(ODD) + (weights * bits).sum(dtype=jnp.uint32)
    return total


def _read_one(path: str | PathLike[str], like: Mapping[str, Any]) -> tuple[dict, dict]:
    """The state that `path` means, see `_read`."""
    given = Path(path).expanduser().absolute()
    for folder in (given / "checkpoints", given):
        if (step := latest_step(folder)) is not None:
            break
    else:
        folder, step = given.parent, int(given.name) if given.name.isdigit() else -1
    if not (folder / str(step)).is_dir():
        raise ValueError(f"{given} holds no saved state: give the folder of a run or of a state.")
    with open_checkpoints(folder, read_only=True) as checkpoints:
        return _read(checkpoints, step, like, {})


def _read(
    checkpoints: "ocp.CheckpointManager", step: int, like: Mapping[str, Any], about: Mapping
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A saved state as a dict, and what is saved beside it; all parts laid out as in `like`."""
    import orbax.checkpoint as ocp

    where = f"{checkpoints.directory}, step {step}"
    try:
        saved = dict(checkpoints.item_metadata(step))
        beside = dict(checkpoints.metadata(step).custom_metadata)
        mine = {name: saved[name] for name in like}, dict(beside["about"])
    except Exception as error:  # each layer of a saved state has its own exceptions
        raise _Damaged(f"{where} is damaged: {_in_a_line(error)}") from error
    _assert_alike(*mine, like, about, where)
    place = jax.tree.leaves(like)[0].sharding
    target = lambda place_of: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place_of(x))
    targets = jax.tree.map(target(lambda x: place), saved)
    targets |= jax.tree.map(target(lambda x: x.sharding), dict(like))
    try:
        state = checkpoints.restore(step, args=ocp.args.StandardRestore(targets))
        if int(digest(TrainState(**state))) != beside["digest"]:
            raise ValueError("its numbers are not those that were saved")
    except Exception as error:
        raise _Damaged(f"{where} is damaged: {_in_a_line(error)}") from error
    return dict(state), beside


def _assert_alike(saved: Any, saved_about: Mapping, like: Any, about: Mapping, where: str) -> None:
    """Raises ValueError for another run's state. Orbax would cast another precision silently."""
    both = [(name, saved_about[name], about[name]) for name in about if name in saved_about]
    listed = [f"{name} {before!r} -> {now!r}" for name, before, now in both if before != now]
    old, new = ({k: _described(v) for k, v in _named_leaves(t).items()} for t in (saved, like))
    listed += [
        f"{name} {old.get(name, 'missing')} -> {new.get(name, 'missing')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if listed:
        more = f", and {len(listed) - 5} more" if len(listed) > 5 else ""
        raise ValueError(f"{where} is another run's ({', '.join(listed[:5])}{more}).")


def _move_aside(checkpoints: "ocp.CheckpointManager", damaged: Mapping[int, Any], to: int) -> None:
    if not damaged:
        return
    multihost_utils.sync_global_devices("all have read the damaged states")
    for step, reason in damaged.items() if jax.process_index() == 0 else ():
        old = Path(checkpoints.directory) / str(step)
        names = [f"damaged-{step}", *(f"damaged-{step}-{i}" for i in range(1, 100))]
        new = next(path for name in names if not (path := old.with_name(name)).exists())
        old.rename(new)
        logging.getLogger(__name__).warning("%s; moved to %s, back to step %d.", reason, new, to)
    multihost_utils.sync_global_devices("damaged states are moved")
    checkpoints.reload()


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _described(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their place, as `opt_state/1/count`, which is the same for tuples and lists."""
    name_of = lambda k: str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(map(name_of, path)): leaf for path, leaf in leaves}
