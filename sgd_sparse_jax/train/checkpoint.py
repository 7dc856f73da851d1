"""A TrainState on disk: the one module that knows orbax."""

import errno
import logging
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from sgd_sparse_jax._types import Params, Stats, TrainState

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

LISTED = 5  # arrays that differ, by name
ODD = 1_000_003  # so that no set bit is ever multiplied away


def open_checkpoints(
    directory: str | PathLike[str], *, keep: int | None = 2
) -> "ocp.CheckpointManager":
    """Keeps the newest `keep` states under `directory`, or all; use it as a context manager.

    Leaving the context waits for saves under way, and raises what went wrong in them.
    """
    import orbax.checkpoint as ocp

    folder = Path(directory).expanduser().absolute()
    try:
        return ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_handlers=ocp.StandardCheckpointHandler(),  # so that a saved tree can be described
        )
    except ValueError as error:  # it reads all descriptions before one can be passed over
        raise ValueError(
            f"The states under {folder} can't be listed ({_in_a_line(error)}); move the damaged "
            "step's folder, in most cases the newest, out of it."
        ) from error


def latest_step(directory: str | PathLike[str]) -> int | None:
    """The newest step that `directory` holds a finished save of; None where there is none."""
    folder = Path(directory)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


def save(
    checkpoints: "ocp.CheckpointManager",
    state: TrainState,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Files `state` under its own step, in the background; the state's buffers are copied first.

    `about` (JSON values: the net, the batch size, ...) is what a state is only continued under.
    Raises OSError where the disk has no room for it, with nothing begun.
    """
    import orbax.checkpoint as ocp

    assert_room(checkpoints, state)
    step = int(state.step)
    beside = {"about": dict(about or {}), "digest": int(digest(state))}
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
    if free < need:
        sizes = f"a state takes {need / 2**20:.1f} MiB, {free / 2**20:.1f} are free"
        told = f"{sizes}; what is saved stays"
        raise OSError(errno.ENOSPC, told, str(checkpoints.directory))


def restore(
    checkpoints: "ocp.CheckpointManager",
    like: TrainState,
    about: Mapping[str, Any] | None = None,
) -> TrainState:
    """The newest state that can be read, laid out on devices like `like`; `like` if none is there.

    A damaged newer state is passed over and moved aside, and the log says so. Raises ValueError
    where a state was saved under another `about`, where the saved arrays have other names, shapes
    or dtypes than `like`, or where all states are damaged.
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
        return state
    if steps:
        raise ValueError(
            f"No state under {checkpoints.directory} can be read (steps {steps}; "
            f"{damaged[steps[0]]}); remove that folder to start from the beginning."
        )
    return like


def load_weights(path: str | PathLike[str], params: Any, stats: Any) -> tuple[Params, Stats]:
    """Parameters and moments of a saved state, laid out like `params` and `stats`.

    Those may be arrays or their shapes. `path` is a run's folder, its folder of states (the newest
    counts), or one state. Optimizer, average and step are left behind. Raises ValueError where
    nothing is saved there, where it can't be read, or where the arrays have other names, shapes or
    dtypes.
    """
    import orbax.checkpoint as ocp

    folder, step = _find_state(Path(path).expanduser().absolute())
    where, like = f"{folder}, step {step}", {"params": params, "stats": stats}
    with open_checkpoints(folder) as checkpoints:
        try:
            whole = checkpoints.item_metadata(step)
            saved = {name: jax.tree.map(_described, whole[name]) for name in like}
            alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=alone),
                dict(whole),
            )
        except Exception as error:  # each layer of a saved state has its own exceptions
            raise ValueError(
                f"{where}: no state that can be read ({_in_a_line(error)})."
            ) from error
        _assert_alike(saved, like, where)
        try:
            state = checkpoints.restore(step, args=ocp.args.StandardRestore(target))
            about = checkpoints.metadata(step).custom_metadata or {}
            if int(digest(TrainState(**state))) != about.get("digest"):
                raise ValueError("its numbers are not those that were saved")
        except Exception as error:
            raise ValueError(f"{where}: the state is damaged ({_in_a_line(error)}).") from error
    put = lambda old, new: jax.device_put(old, new.sharding)
    return jax.tree.map(put, state["params"], params), jax.tree.map(put, state["stats"], stats)


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
    beside = dict(checkpoints.metadata(step).custom_metadata or {})
    if saved is None or not {"about", "digest"} <= beside.keys():
        raise FileNotFoundError("its description is missing")
    return saved, beside


def _move_aside(checkpoints: "ocp.CheckpointManager", damaged: Mapping[int, str], to: int) -> None:
    for step, reason in damaged.items():
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
    if damaged:
        checkpoints.reload()


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _described(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), str(leaf.dtype)


def _assert_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    both = [name for name in now if name in saved and saved[name] != now[name]]
    if both:
        changes = ", ".join(f"{name} {saved[name]!r} -> {now[name]!r}" for name in both)
        raise ValueError(
            f"The state saved in {where} is another run's ({changes}); use another folder."
        )


def _assert_alike(saved: Any, target: Any, where: str) -> None:
    """Orbax casts silently; a state of another net or precision is an error here."""
    flatten = lambda tree: {
        "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): v
        for path, v in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda v: isinstance(v, tuple) and len(v) == 2 and isinstance(v[1], str)
        )
    }
    old, new = flatten(saved), flatten(jax.tree.map(_described, target))
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
