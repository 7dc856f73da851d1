"""The run of an image classifier, from its folder to its last row."""

import contextlib
import dataclasses
import logging
import operator
import time
from collections.abc import Callable, Iterator
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.deep import metrics, setup
from experiments.deep.config import MAY_CHANGE, Config, place_of
from experiments.deep.setup import Plan
from experiments.figures import progress, terminal
from experiments.launch import hosts, lock
from experiments.launch.signals import Stopped, StopRequest, deferred
from experiments.storage import records
from sgd_sparse_jax import train
from sgd_sparse_jax.types import TrainState

log = logging.getLogger(__name__)
TIMES = ("step_seconds", "eval_seconds", "images_per_second")
CALLS = 8  # several hosts agree on interruptions once in so many calls: that waits for the device


class Since(NamedTuple):
    """Training since the last row; a state saved between two rows has it in its progress."""

    loss_sum: float = 0.0
    steps: int = 0
    seconds: float = 0.0

    def plus(self, window: train.Window) -> "Since":
        """One loss after the other: where a run was cut doesn't change a bit of the sum."""
        return Since(
            reduce(operator.add, window.losses.tolist(), self.loss_sum),
            self.steps + len(window.losses),
            self.seconds + window.seconds,
        )


class Interrupts:
    """Whether to save, by the clock, or to stop, by a signal; the same answer on all hosts."""

    def __init__(self, save_every_seconds: float, signal: StopRequest):
        self.every, self.signal = save_every_seconds, signal
        self.saved_at, self.calls = time.monotonic(), 0
        self.saves = self.stops = False

    def __call__(self, step: int) -> bool:
        """Called after each compiled call."""
        self.calls += 1
        if jax.process_count() > 1 and self.calls % CALLS:
            return False
        self.stops = hosts.any_of(bool(self.signal))
        self.saves = self.stops or hosts.any_of(time.monotonic() - self.saved_at >= self.every)
        return self.saves

    def saved(self) -> None:
        """Starts the clock again."""
        self.saved_at, self.saves = time.monotonic(), False


def run(plan: Plan) -> None:
    """Trains from the newest saved state, or from the beginning, to the last step of the plan.

    Raises Stopped, with the state saved, after a signal; FloatingPointError where training diverges
    and OSError where the folder can't be written, with the states before saved.
    """
    folder, config = plan.folder, plan.config
    with hosts.together(folder), alone_in(folder), deferred() as signal:
        saved = train.latest_step(folder / "checkpoints")
        if saved is not None and saved > plan.num_steps:
            raise ValueError(
                f"--max_steps is {plan.num_steps}, but {folder} is at step {saved} already; choose "
                f"{saved} or more, or another --exp_name."
            )
        place = place_of(config)
        hosts.on_first(lambda: records.open_run(*place, config, may_change=MAY_CHANGE))
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs what it also raises
        states = train.open_checkpoints(folder / "checkpoints", keep=config.keep)
        with jax.debug_nans(config.debug), states as checkpoints:
            state, known = starting_state(plan, checkpoints)
            if hosts.is_first():
                complete_rows(plan, int(state.step), known.get("row"))
            if int(state.step) == plan.num_steps:
                terminal.show(f"{folder} is at its last step, {plan.num_steps}, already.")
                return
            interrupts = Interrupts(config.save_every_seconds, signal)
            try:
                train_on(plan, checkpoints, state, known, interrupts)
            except FloatingPointError as error:
                where = f"--lr_init is {config.lr_init:g}, the run is {folder}"
                raise FloatingPointError(f"{error} ({where})") from error
        if hosts.is_first():
            records.finish_manifest(folder, steps=plan.num_steps)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the run's folder, on process 0; the others stop where that fails."""
    with contextlib.ExitStack() as held:
        hosts.on_first(lambda: held.enter_context(lock.holding(folder)))
        yield


def starting_state(plan: Plan, checkpoints: Any) -> tuple[TrainState, dict[str, Any]]:
    """The newest saved state and its progress; else a new state, which is saved at once.

    So a folder that can't hold a state is found out before anything is trained, and a fork needs
    its parent at its first start only.
    """
    mesh = train.data_mesh()
    init = jax.jit(partial(setup.initial_state, plan))
    like = setup.on_all_devices(jax.eval_shape(init, plan.init_key, plan.weights))
    if (found := train.restore(checkpoints, like, plan.about)) is not None:
        return found
    state = train.replicate(init(plan.init_key, plan.weights), mesh)
    if plan.parent is not None:
        state = train.fork(plan.parent, state)
    train.save(checkpoints, state, plan.about)
    return state, {}


def complete_rows(plan: Plan, step: int, newest: dict[str, Any] | None) -> None:
    """Drops rows after `step`, which are computed again, and restores the newest if it was cut."""
    last = -1 if step == plan.config.fork_step else step  # the first state is evaluated again
    rows = [row["step"] for row in records.read_rows(plan.folder)]
    if any(at > last for at in rows):
        records.drop_rows_after(plan.folder, last)
    if newest and newest["step"] not in rows:
        records.append_row(plan.folder, newest)


def train_on(
    plan: Plan, checkpoints: Any, state: TrainState, known: dict[str, Any], interrupts: Interrupts
) -> None:
    """Trains to the end; evaluates, saves and stops between windows."""
    mesh, shape, start = train.data_mesh(), plan.images.images.shape[1:], int(state.step)
    pixels, test_pixels = (setup.placed(each, mesh) for each in (plan.images, plan.test_images))
    segment = setup.make_segment(plan, mesh, setup.make_fetch(pixels, shape, plan.augment))
    fetches = [setup.make_fetch(each, shape) for each in (pixels, test_pixels)]
    evaluate = metrics.evaluation(plan, mesh, *fetches)
    row, since = known.get("row", {}), Since(**known.get("window", {}))
    with recording(plan, start) as (on_row, on_call), kept_states(plan) as keep:
        if start == plan.config.fork_step:
            row = complete(plan, start, since, evaluate(state))
            on_row(row)
        for window in train.windows(
            plan.train_key,
            state,
            plan.sampler,
            segment,
            plan.stops,
            steps_per_call=plan.steps_per_call,
            interrupt=interrupts,
            on_call=on_call,
        ):
            state, step, since = window.state, window.step, since.plus(window)
            if step in plan.evaluations:
                row, since = complete(plan, step, since, evaluate(state)), Since()
                on_row(row)
            if step in plan.kept:
                keep(state)
            if step in plan.evaluations or interrupts.saves:
                beside = {"window": since._asdict(), "row": row}
                train.save(checkpoints, state, plan.about, beside)
                interrupts.saved()
            if interrupts.stops and step < plan.num_steps:
                by = interrupts.signal.name or "Another host"
                raise Stopped(
                    f"{by}: stopped at step {step} of {plan.num_steps}, all of it saved in "
                    f"{plan.folder}; the same command continues."
                )


@contextlib.contextmanager
def recording(
    plan: Plan, start: int
) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[int], None]]]:
    """Callbacks for rows and for steps: files, progress bar and TensorBoard, on process 0 only."""
    if not hosts.is_first():
        yield lambda row: None, lambda step: None
        return
    records.start_manifest(
        plan.folder,
        seed=plan.config.seed,
        devices=[f"{device.platform}:{device.device_kind}" for device in jax.devices()],
        from_step=start,
        processes=jax.process_count(),
        **({"parent": parent(plan.config)} if plan.config.fork_from else {}),
    )
    warn_of_changes(plan.folder)
    board = plan.folder / "tensorboard" if plan.config.tensorboard else None
    live = progress.Live(start, plan.num_steps, plan.config.batch_size, board)

    def on_row(row: dict[str, Any]) -> None:
        records.append_row(plan.folder, row)
        live.on_row(row)

    try:
        yield on_row, live.on_call
    finally:
        live.close()


def warn_of_changes(folder: Path) -> None:
    """Logs a line for the code and each package that differ from those of the start before."""
    starts = records.read_json(folder / "manifest.json")["starts"]
    versions = [start["versions"] | {"code": start["git"]} for start in starts]
    old, new = versions[-2:][0], versions[-1]
    for name, version in new.items():
        if old.get(name, version) != version:
            log.warning("%s: %s was %s and is now %s.", folder, name, old[name], version)


def parent(config: Config) -> dict[str, Any]:
    """The state this run forks from, and the settings that differ: [the parent's, this run's]."""
    path = Path(config.fork_from).expanduser().absolute() / "config.json"
    old = records.read_json(path) if path.exists() else {}
    own = (*MAY_CHANGE, "exp_name", "fork_from", "fork_step")
    new = {k: v for k, v in dataclasses.asdict(config).items() if k not in own}
    changed = {k: [old[k], v] for k, v in new.items() if k in old and old[k] != v}
    return {"run": str(path.parent), "step": config.fork_step, "changed": changed}


@contextlib.contextmanager
def kept_states(plan: Plan) -> Iterator[Callable[[TrainState], None]]:
    """A callback that saves a state under models/, unless a start before this one has."""
    if not plan.kept:
        yield lambda state: None
        return
    with train.open_checkpoints(plan.folder / "models", keep=None) as states:

        def keep(state: TrainState) -> None:
            if int(state.step) not in states.all_steps():
                train.save(states, state, plan.about)

        yield keep


def complete(plan: Plan, step: int, since: Since, values: dict[str, Any]) -> dict[str, Any]:
    """A row: evaluated values with epoch, step size and speed; --deterministic omits times."""
    row = {
        "step": step,
        "epoch": step / plan.steps_per_epoch,
        "lr": float(np.asarray(plan.step_size(step))),
    }
    if since.steps:
        row["window_loss"] = since.loss_sum / since.steps
        row["step_seconds"] = since.seconds / since.steps
        row["images_per_second"] = plan.config.batch_size / row["step_seconds"]
    omitted = TIMES if plan.config.deterministic else ()
    return {name: value for name, value in (row | values).items() if name not in omitted}
