"""A TrainState on disk: the one module that knows orbax."""

import logging
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from sgd_sparse_jax._types import TrainState

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


def open_checkpoints(directory: str | PathLike[str], *, keep: int = 2) -> "ocp.CheckpointManager":
    """Keeps the newest `keep` states under `directory`; use it as a context manager.

    Leaving the context waits for saves under way, and raises what went wrong in them.
    """
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(
        Path(directory).expanduser().absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        item_handlers=ocp.StandardCheckpointHandler(),  # so that a saved tree can be described
    )


def latest_step(directory: str | PathLike[str]) -> int | None:
    """The newest step that `directory` holds a finished save of; None where there is none."""
    folder = Path(directory)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


def save(checkpoints: "ocp.CheckpointManager", state: TrainState) -> None:
    """Files `state` under its own step, in the background; the state's buffers are copied first."""
    import orbax.checkpoint as ocp

    step = int(state.step)
    if not checkpoints.save(step, args=ocp.args.StandardSave(state._asdict())):
        raise ValueError(
            f"Step {step} isn't newer than what {checkpoints.directory} holds (step "
            f"{checkpoints.latest_step()}); choose another folder."
        )


def restore(checkpoints: "ocp.CheckpointManager", like: TrainState) -> TrainState:
    """The newest state that can be read, laid out on devices like `like`; `like` if none is there.

    A damaged newest state is passed over, and the log says so. Raises ValueError where the saved
    arrays have other names, shapes or dtypes than `like`, or where all states are damaged.
    """
    import orbax.checkpoint as ocp

    steps = sorted(checkpoints.all_steps(), reverse=True)
    target = jax.tree.map(ocp.tree.to_shape_dtype_struct, like._asdict())
    for step in steps:
        try:
            saved = jax.tree.map(_described, checkpoints.item_metadata(step))
            if saved is None:
                raise FileNotFoundError("its description is missing")
        except Exception as error:
            _pass_over(checkpoints, step, error)
            continue
        _assert_alike(saved, target, f"{checkpoints.directory}, step {step}")
        try:
            return TrainState(**checkpoints.restore(step, args=ocp.args.StandardRestore(target)))
        except Exception as error:
            _pass_over(checkpoints, step, error)
    if steps:
        raise ValueError(
            f"No state under {checkpoints.directory} can be read (steps {steps}); remove that "
            "folder to start from the beginning."
        )
    return like


def _pass_over(checkpoints: "ocp.CheckpointManager", step: int, error: Exception) -> None:
    reason = " ".join(str(error).split())[:200]
    logging.getLogger(__name__).warning(
        "The state of step %d in %s is damaged (%s); going back to the one before.",
        *(step, checkpoints.directory, reason),
    )


def _described(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), str(leaf.dtype)


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
        name = different[0]
        raise ValueError(
            f"The state saved in {where} is another network's: {name} is {old.get(name)} there "
            f"and {new.get(name)} here ({len(different)} arrays differ); use another folder."
        )
