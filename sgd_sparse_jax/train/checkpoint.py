"""A TrainState on disk: the one module that knows orbax."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sgd_sparse_jax.types import Params, Stats, TrainState

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
LISTED = 5  # arrays that differ, by name
FAILURES = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
ODD = 1_000_003  # so that no set bit is ever multiplied away


@contextlib.contextmanager
def open_checkpoints(
    directory: str | PathLike[str], *, keep: int | None = 2, ours: bool = True
) -> "Iterator[ocp.CheckpointManager]":
    """Keeps the newest `keep` states under `directory`, or all.

    Where the run is `ours`, what is left of saves that were cut goes first. Leaving the context
    waits for saves under way; what went wrong in them is raised, with `save`s as an OSError.
    """
    folder = Path(directory).expanduser().absolute()
    for log in ("absl", "asyncio"):  # for good: the threads outlive this context
        logging.getLogger(log).addFilter(_is_news)
    with _disk_errors(folder), _manager(folder, keep, ours) as checkpoints:
        yield checkpoints


def _manager(folder: Path, keep: int | None, ours: bool) -> "ocp.CheckpointManager":
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        cleanup_tmp_directories=ours,
        # Else, where a folder can't be made, threads that wait for it keep the process for minutes.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    try:
        return ocp.CheckpointManager(
            folder,
            options=options,
            item_handlers=ocp.StandardCheckpointHandler(),  # so that a saved tree can be described
        )
    except FAILURES as error:  # it reads all descriptions before one can be passed over
        raise ValueError(
            f"The states under {folder} can't be listed ({_in_a_line(error)}); move the damaged "
            f"step's folder, in most cases the newest, {latest_step(folder)}, out of it."
        ) from error


def _is_news(record: logging.LogRecord) -> bool:
    """Not what orbax logs, again and again, of a failure that it also raises or we come upon."""
    told = record.getMessage()
    again = record.exc_info or told.startswith("Failed to read Metadata")
    return not (again and "orbax" in record.pathname + told)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Errors of the file system are OSErrors about `folder`: TensorStore's are ValueErrors."""
    try:
        yield
    except ValueError as error:
        found = [number for number in DISK_ERRORS if os.strerror(number) in str(error)]
        if not found:
            raise
        raise OSError(found[0], os.strerror(found[0]), str(folder)) from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error


def latest_step(directory: str | PathLike[str]) -> int | None:
    """The newest step that `directory` holds a finished save of; None where there is none."""
    folder = Path(directory)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


def save(
    checkpoints: "ocp.CheckpointManager",
    state: TrainState,
    about: Mapping[str, Any] | None = None,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Files `state` under its own step, in the background; the state's buffers are copied first.

    `about` (JSON values: the net, the batch size, ...) is what a state is only continued under,
    `progress` (JSON values) what `restore` gives back with it. Raises OSError where the disk has no
    room for it, with nothing begun.
    """
    import orbax.checkpoint as ocp

    assert_room(checkpoints, state)
    step = int(state.step)
    beside = {
        "about": dict(about or {}),
        "digest": int(digest(state)),
        "progress": dict(progress or {}),
    }
    args = ocp.args.StandardSave(state._asdict())
    if not checkpoints.save(step, args=args, custom_metadata=beside):
        raise ValueError(
            f"Step {step} isn't newer than what {checkpoints.directory} holds (step "
            f"{checkpoints.latest_step()}); choose another folder."
        )


def assert_room(checkpoints: "ocp.CheckpointManager", state: TrainState) -> None:
    """Raises OSError (ENOSPC) where `state` does not fit onto the disk, in words of its size.

    Orbax itself would stop half-way through a save, with a page of errors from its threads.
    """
    need = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 2**20  # descriptions, rounding
    free = shutil.disk_usage(checkpoints.directory).free
    if _of_process_0(free < need):
        sizes = f"a state takes {need / 2**20:.1f} MiB, {free / 2**20:.1f} are free"
        told = f"{sizes}; what is saved stays"
        raise OSError(errno.ENOSPC, told, str(checkpoints.directory))


def restore(
    checkpoints: "ocp.CheckpointManager",
    like: TrainState,
    about: Mapping[str, Any] | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """The newest state that can be read, laid out on devices like `like`, and its `progress`.

    Where nothing is saved, `like` and {}. A damaged newer state is passed over and moved aside, and
    the log says so. Raises ValueError where a state was saved under another `about`, where the
    saved arrays have other names, shapes or dtypes than `like`, or where all states are damaged.
    """
    import orbax.checkpoint as ocp

    steps = sorted(checkpoints.all_steps(), reverse=True)
    target = jax.tree.map(ocp.tree.to_shape_dtype_struct, like._asdict())
    damaged: dict[int, str] = {}
    for step in steps:
        where = f"{checkpoints.directory}, step {step}"
        try:
            saved, beside = _description(checkpoints, step)
        except Exception as error:  # each layer of a saved state has its own exceptions
            damaged[step] = _in_a_line(error)
            continue
        _assert_same_run(beside["about"], about or {}, where)
        _assert_alike(saved, target, where)
        try:
            state = TrainState(**checkpoints.restore(step, args=ocp.args.StandardRestore(target)))
            if int(digest(state)) != beside["digest"]:
                raise ValueError("its numbers are not those that were saved")
        except Exception as error:
            damaged[step] = _in_a_line(error)
            continue
        # Only now, with a good state at hand: else the run could not save these steps again.
        _move_aside(checkpoints, damaged, step)
        return state, dict(beside.get("progress", {}))
    if steps:
        raise ValueError(
            f"No state under {checkpoints.directory} can be read (steps {steps}; "
            f"{damaged[steps[0]]}); remove that folder to start from the beginning."
        )
    return like, {}


def load_weights(path: str | PathLike[str], params: Any, stats: Any) -> tuple[Params, Stats]:
    """Parameters and moments of a saved state, laid out like `params` and `stats`.

    Those may be arrays or their shapes. `path` is a run's folder, its folder of states (the newest
    counts), or one state. Optimizer, average and step are left behind. Raises ValueError where
    nothing is saved there, where it can't be read, or where the arrays have other names, shapes or
    dtypes.
    """
    folder, step = _find_state(Path(path).expanduser().absolute())
    like = {"params": params, "stats": stats}
    state, _ = _read(folder, step, like)
    put = lambda old, new: jax.device_put(np.asarray(old), new.sharding)
    return jax.tree.map(put, state["params"], params), jax.tree.map(put, state["stats"], stats)


def fork(path: str | PathLike[str], step: int, like: TrainState) -> TrainState:
    """The state that the run in `path` saved at `step`, to go on from in another way.

    Of the optimizer's arrays those that `like` has too are taken (its step count, and momentum
    where both have it), the others begin as in `like`. Raises ValueError where the run has no such
    state, where it can't be read, or where the networks differ.
    """
    network = ("params", "stats", "average")
    folder = state_folder(path, step).parent
    saved = _named_leaves(_read(folder, step, {k: getattr(like, k) for k in network})[0])
    mine = _named_leaves(like)

    def taken(name: str) -> jax.Array:
        old, new = saved.get(name), mine[name]
        same = old is not None and _described(old) == _described(new)
        return jax.device_put(old, new.sharding) if same else new

    return jax.tree.unflatten(jax.tree.structure(like), [taken(name) for name in mine])


def state_folder(path: str | PathLike[str], step: int) -> Path:
    """Where the run in `path` has its state of `step`; ValueError where it has none."""
    run = Path(path).expanduser().absolute()
    places = [run / name for name in ("checkpoints", "models")]
    found = [place / str(step) for place in places if (place / str(step)).is_dir()]
    if found:
        return found[0]
    names = {each.name for place in places if place.is_dir() for each in place.iterdir()}
    known = ", ".join(map(str, sorted(int(name) for name in names if name.isdigit())))
    raise ValueError(
        f"{run} has no state of step {step}; it has those of steps {known or '(none)'}. A run "
        "keeps more with --keep or --save_model_each_k_epochs."
    )


def progress_of(directory: str | PathLike[str], step: int) -> dict[str, Any] | None:
    """What was saved beside a state, all of whose numbers are read too; None if any is damaged."""
    try:
        _, beside = _read(Path(directory).expanduser().absolute(), step, {})
    except ValueError:
        return None
    return dict(beside.get("progress", {}))


def _read(
    folder: Path, step: int, like: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All arrays of a saved state and what is beside it; parts named in `like` have to be alike."""
    import orbax.checkpoint as ocp

    devices = jax.devices() if jax.process_count() > 1 else jax.devices()[:1]
    everywhere = NamedSharding(Mesh(np.asarray(devices), ("all",)), PartitionSpec())
    where = f"{folder}, step {step}"
    with open_checkpoints(folder, keep=None, ours=False) as checkpoints:
        try:
            whole = checkpoints.item_metadata(step)
            saved = {name: jax.tree.map(_described, whole[name]) for name in like}
            place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
            target = jax.tree.map(place, dict(whole))
        except Exception as error:  # each layer of a saved state has its own exceptions
            raise ValueError(
                f"{where}: no state that can be read ({_in_a_line(error)})."
            ) from error
        _assert_alike(saved, like, where)
        try:
            state = checkpoints.restore(step, args=ocp.args.StandardRestore(target))
            beside = _beside(checkpoints, step)
            if int(digest(TrainState(**state))) != beside.get("digest"):
                raise ValueError("its numbers are not those that were saved")
        except Exception as error:
            raise ValueError(f"{where}: the state is damaged ({_in_a_line(error)}).") from error
    return dict(state), beside


def _find_state(path: Path) -> tuple[Path, int]:
    """The folder of states and the step that `path` means."""
    if path.name.isdigit() and path.is_dir():
        return path.parent, int(path.name)
    for folder in (path / "checkpoints", path):
        if (step := latest_step(folder)) is not None:
            return folder, step
    raise ValueError(
        f"{path} holds no saved state: give a run's folder, its checkpoints or models folder, or "
        "one of the numbered folders in there."
    )


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


def _description(checkpoints: "ocp.CheckpointManager", step: int) -> tuple[Any, Mapping[str, Any]]:
    """Shapes and dtypes of a saved state, and what was saved beside it."""
    saved = jax.tree.map(_described, checkpoints.item_metadata(step))
    if saved is None:
        raise FileNotFoundError("its description is missing")
    return saved, _beside(checkpoints, step)


def _beside(checkpoints: "ocp.CheckpointManager", step: int) -> dict[str, Any]:
    beside = dict(checkpoints.metadata(step).custom_metadata or {})
    parts = beside.get("about"), beside.get("progress", {})
    if "digest" not in beside or not all(isinstance(part, Mapping) for part in parts):
        raise ValueError("its description is missing or damaged")
    return beside


def _move_aside(checkpoints: "ocp.CheckpointManager", damaged: Mapping[int, str], to: int) -> None:
    if not damaged:
        return
    _all_here("all have read the damaged states")
    for step, reason in damaged.items() if jax.process_index() == 0 else ():
        old = Path(checkpoints.directory) / str(step)
        new = next(
            path
            for count in range(1_000_000)
            if not (path := old.with_name(f"damaged-{step}" + f"-{count}" * bool(count))).exists()
        )
        old.rename(new)
        logging.getLogger(__name__).warning(
            "The state of step %d is damaged (%s) and now in %s; going back to step %d.",
            *(step, reason, new, to),
        )
    _all_here("damaged states are out of the way")
    checkpoints.reload()


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _described(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), str(leaf.dtype)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their place, as `opt_state/1/count`, which is the same for tuples and lists."""
    is_description = lambda v: isinstance(v, tuple) and len(v) == 2 and isinstance(v[1], str)
    name_of = lambda k: str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
    return {
        "/".join(map(name_of, path)): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_description)
    }


def _of_process_0(value: Any) -> Any:
    """What process 0 of several knows: all of them have to decide alike."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(np.asarray(value))


def _all_here(where: str) -> None:
    """Waits for the other processes, where there are any."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def _assert_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    both = [name for name in now if name in saved and saved[name] != now[name]]
    if both:
        changes = ", ".join(f"{name} {saved[name]!r} -> {now[name]!r}" for name in both)
        raise ValueError(
            f"The state saved in {where} is another run's ({changes}); use another folder."
        )


def _assert_alike(saved: Any, target: Any, where: str) -> None:
    """Orbax casts silently; a state of another net or precision is an error here."""
    old, new = _named_leaves(saved), _named_leaves(jax.tree.map(_described, target))
    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if different:
        show = lambda found: f"{found[1]}{list(found[0])}" if found else "missing"
        listed = [
            f"{name} is {show(old.get(name))} there and {show(new.get(name))} here"
            for name in different[:LISTED]
        ]
        more = f"; {len(different) - LISTED} more" if len(different) > LISTED else ""
        raise ValueError(
            f"The state saved in {where} is another network's: {'; '.join(listed)}{more} "
            f"({len(different)} of {len(old.keys() | new.keys())} arrays differ); use another "
            "folder."
        )
