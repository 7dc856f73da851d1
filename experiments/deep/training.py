"""A run that trains an image classifier: the way through it, from its folder to its last row."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import numpy as np

from experiments.deep import metrics as gauges
from experiments.deep.config import MAY_CHANGE, Config, place_of
from experiments.deep.setup import Parts, assemble, fetch, placed, training, validate
from experiments.figures import progress
from experiments.launch import devices, hosts
from experiments.launch.signals import Asked, Stopped, deferred
from experiments.storage import records, values
from sgd_sparse_jax import train
from sgd_sparse_jax.types import TrainState

TIMES = ("step_seconds", "eval_seconds", "images_per_second")


def run(config: Config) -> Path:
    """Trains, or goes on training, in the run's folder; returns the folder."""
    hosts.join(config.hosts)
    devices.set_up_deep(deterministic=config.deterministic)
    validate(config)
    folder = records.run_folder(*place_of(config))
    with hosts.together(folder), deferred() as asked:
        saved = train.latest_step(folder / "checkpoints")
        parts = assemble(config)
        if saved is not None and saved > parts.num_steps:
            raise ValueError(
                f"--max_steps is {parts.num_steps}, but {folder} is at step {saved} already; give "
                f"{saved} or more, or another --exp_name."
            )
        if config.fork_from and saved is None:
            train.state_folder(config.fork_from, config.fork_step)
        with jax.debug_nans(config.debug), failures_named(config, folder):
            hosts.on_first(
                lambda: records.open_run(*place_of(config), config, may_change=MAY_CHANGE)
            )
            if saved == parts.num_steps and is_whole(folder, parts.num_steps):
                print(f"{folder} is at its last step, {saved}, already.")
            else:
                go_on(config, parts, folder, asked)
    return folder


def is_whole(folder: Path, step: int) -> bool:
    """Whether a finished run has its last state undamaged, and the row that belongs to it."""
    beside = train.progress_of(folder / "checkpoints", step)
    return beside is not None and hosts.agreed(
        known_of(beside, folder)[1] in (None, records.written(folder))
    )


def known_of(
    beside: Mapping[str, Any], folder: Path
) -> tuple[train.Window, records.Written | None]:
    """The window that a state was saved in, and the rows there were; None where it has no rows.

    Raises ValueError where what is saved beside it isn't that.
    """
    window, rows = beside.get("window", {}), beside.get("rows") or None
    try:
        if not all(map(values.is_number, window.values())):
            raise ValueError("no numbers")
        known = None if rows is None else records.Written(*rows)
        if known and type(known.rows) is not int:
            raise ValueError("no number of rows")
        if known and known.rows:
            values.from_bytes(known.newest.encode())
        return train.Window(**window), known
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"What lies beside the newest state in {folder / 'checkpoints'} is damaged ({error}); "
            "move that state's folder out of it and run again."
        ) from error


@contextlib.contextmanager
def failures_named(config: Config, folder: Path) -> Iterator[None]:
    """What stops a run while it trains says where the run is, how far it came, and the cure."""
    try:
        yield
    except FloatingPointError as error:
        cure = f"--lr_init is {config.lr_init:g}, the run is {folder}"
        raise FloatingPointError(f"{error} ({cure})") from error
    except OSError as error:
        if error.errno is None:  # it has its cure in its words
            raise
        saved = train.latest_step(folder / "checkpoints")
        since = "has no saved state yet" if saved is None else f"is saved up to step {saved}"
        told = f"{error.strerror or error}; the run {folder} {since}; the same command goes on"
        raise OSError(error.errno, told, error.filename) from error


def go_on(config: Config, parts: Parts, folder: Path, asked: Asked) -> None:
    """Trains from the newest saved state, or from the beginning, to the last step.

    Raises Stopped, with the state saved, where a signal has `asked` for it.
    """
    mesh = train.data_mesh()
    init_key, fit_key = jr.split(jr.key(config.seed))
    pixels, test_pixels = placed(parts.images, mesh), placed(parts.test_images, mesh)
    fetches = [fetch(each, parts.images.images.shape[1:]) for each in (pixels, test_pixels)]
    segment, sampler, fresh = training(config, parts, mesh, pixels)
    about = {k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
    pauses = hosts.Pauses(config.save_every_seconds, asked)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            train.open_checkpoints(folder / "checkpoints", keep=config.keep)
        )
        kept = config.save_model_each_k_epochs and stack.enter_context(
            train.open_checkpoints(folder / "models", keep=None)
        )
        fresh_state = train.replicate(fresh(init_key), mesh)
        state, beside = starting_state(config, checkpoints, fresh_state, about)
        window, known = known_of(beside, folder)
        on_row, on_call = stack.enter_context(
            recording(config, parts, folder, int(state.step), known)
        )

        def save(state: TrainState, window: train.Window) -> None:
            rows = records.written(folder) if hosts.is_first() else ()
            beside = {"window": window._asdict(), "rows": list(rows)}
            train.save(checkpoints, state, about, beside)
            pauses.saved()

        ended = train.fit(
            fit_key,
            state,
            sampler,
            segment,
            num_steps=parts.num_steps,
            eval_every=parts.eval_every,
            evaluate=gauges.evaluation(config, parts, mesh, *fetches),
            on_row=on_row,
            save=save,
            keep_every=config.save_model_each_k_epochs * parts.steps_per_epoch,
            keep=lambda state: keep(kept, state, about),
            steps_per_call=steps_per_call(config),
            on_call=on_call,
            pause=pauses,
            start=config.fork_step,
            window=window,
        )
        at = int(ended.step)
    if at < parts.num_steps:
        raise Stopped(
            f"{asked.name or 'Another host'}: stopped at step {at} of {parts.num_steps}; {folder} "
            "has all of it, and the same command goes on."
        )
    if hosts.is_first():
        records.finish_manifest(folder, steps=parts.num_steps)


def starting_state(
    config: Config, checkpoints: Any, fresh: TrainState, about: Mapping[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """The newest state of this run, else that of the run it forks from, else `fresh`."""
    if config.fork_from and not checkpoints.all_steps():
        state = train.fork(config.fork_from, config.fork_step, fresh)
        train.save(checkpoints, state, about)  # the other run may go on and drop it
        checkpoints.wait_until_finished()
        return state, {}
    state, beside = train.restore(checkpoints, fresh, about)
    train.assert_room(checkpoints, state)  # now, and not at the first save
    return state, beside


@contextlib.contextmanager
def recording(
    config: Config, parts: Parts, folder: Path, done: int, known: records.Written | None
) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[int], None]]]:
    """Who hears of rows and of steps: files, bar and board of process 0; nobody elsewhere.

    `known` are the rows that the state it begins with had.
    """
    if not hosts.is_first():
        yield lambda row: None, lambda step: None
        return
    # The state a run begins with was saved, if at all, without its row: that row comes anew.
    records.drop_rows_after(folder, done if done > config.fork_step else -1)
    if known:
        records.put_back(folder, known)
    records.start_manifest(
        folder,
        seed=config.seed,
        devices=[f"{device.platform}:{device.device_kind}" for device in jax.devices()],
        from_step=done,
        processes=jax.process_count(),
        **({"parent": parent_of(config)} if config.fork_from else {}),
    )
    board = folder / "tensorboard" if config.tensorboard else None
    live = progress.Live(done, parts.num_steps, config.batch_size, board)

    def on_row(row: dict[str, Any]) -> None:
        whole = completed(config, parts, row)
        records.append_row(folder, whole)
        live.on_row(whole)

    try:
        yield on_row, live.on_call
    finally:
        live.close()


def parent_of(config: Config) -> dict[str, Any]:
    """Which state of which run this one forks from, and the settings that differ: [its, ours]."""
    path = Path(config.fork_from).expanduser().absolute() / "config.json"
    its = records.read_json(path) if path.exists() else {}
    new = (*MAY_CHANGE, "exp_name", "fork_from", "fork_step")
    ours = {k: v for k, v in dataclasses.asdict(config).items() if k not in new}
    changed = {k: [its[k], v] for k, v in ours.items() if k in its and its[k] != v}
    return {"run": str(path.parent), "step": config.fork_step, "changed": changed}


def steps_per_call(config: Config) -> int:
    """Convolutions inside a compiled loop are 16-29 times slower on CPUs (jax issue 12868)."""
    return config.steps_per_call or (1 if jax.default_backend() == "cpu" else 25)


def keep(states: Any, state: TrainState, about: dict[str, Any]) -> None:
    """Saves a state for good, unless a run that was cut has done so before."""
    if int(state.step) not in states.all_steps():
        train.save(states, state, about)


def completed(config: Config, parts: Parts, row: dict[str, Any]) -> dict[str, Any]:
    """A row with epoch, step size and speed; without times where two runs are to be the same."""
    step = row["step"]
    place = {
        "step": step,
        "epoch": step / parts.steps_per_epoch,
        "lr": np.asarray(parts.schedules.step_size(step)),
    }
    if "step_seconds" in row:
        place["images_per_second"] = config.batch_size / row["step_seconds"]
    left_out = TIMES if config.deterministic else ()
    return {name: value for name, value in (place | row).items() if name not in left_out}
