"""The run of an image classifier, from its folder to its last row."""

import contextlib
import dataclasses
import logging
import operator
import time
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.deep import setup, workbench
from experiments.deep.config import MAY_CHANGE, Config, folder_of
from experiments.deep.setup import Plan
from experiments.figures import terminal
from experiments.figures.progress import Live
from experiments.launch import hosts, lock
from experiments.launch.signals import Stopped, deferred
from experiments.storage import records
from sgd_sparse_jax import train
from sgd_sparse_jax.types import TrainState

TIMES = ("step_seconds", "eval_seconds", "images_per_second")
CALLS = 8  # several hosts agree on interruptions once in so many calls: that waits for the device


class Since(NamedTuple):
    """Training since the last row; saved with a state between two rows."""

    loss_sum: float = 0.0
    steps: int = 0
    seconds: float = 0.0

    def plus(self, window: train.Window) -> "Since":
        """Adds one loss after the other: where a run was cut doesn't change a bit of the sum."""
        return Since(
            reduce(operator.add, window.losses.tolist(), self.loss_sum),
            self.steps + len(window.losses),
            self.seconds + window.seconds,
        )


class Interrupts:
    """Whether to save, by the clock, or to stop, by a signal; the same answer on all hosts."""

    def __init__(self, save_every_seconds: float, signal: list[str]):
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


def run(config: Config) -> Path:
    """Trains from the newest saved state, or from the beginning; returns the run's folder.

    Raises ValueError for what can't be run; Stopped, with the state saved, after a signal;
    FloatingPointError if training diverges and OSError if the folder can't be written, with earlier
    states saved.
    """
    setup.validate(config)
    folder = folder_of(config)
    with hosts.together(folder):
        plan = setup.resolve(config)
        with lock.alone_in(folder), deferred() as signal:
            _run_in_folder(plan, signal)
    return folder


def _run_in_folder(plan: Plan, signal: list[str]) -> None:
    folder, config = plan.folder, plan.config
    hosts.on_first(lambda: records.open_run(folder, config, may_change=MAY_CHANGE))
    # Orbax logs what it also raises; asyncio logs the writes that orbax abandons after the first.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    states = train.open_checkpoints(folder / "checkpoints", keep=config.keep)
    with jax.debug_nans(config.debug), states as checkpoints:
        state, known = starting_state(plan, checkpoints)
        if hosts.is_first():
            complete_rows(plan, int(state.step), known.get("row"))
        if int(state.step) >= plan.num_steps:
            terminal.show(f"{folder} is at step {state.step} already, of {plan.num_steps}.")
            return
        try:
            train_on(plan, checkpoints, state, known, Interrupts(config.save_every_seconds, signal))
        except FloatingPointError as error:
            where = f"--lr_init is {config.lr_init:g}, the run is {folder}"
            raise FloatingPointError(f"{error} ({where})") from error
    if hosts.is_first():
        records.finish_manifest(folder, steps=plan.num_steps)


def starting_state(plan: Plan, checkpoints: Any) -> tuple[TrainState, dict[str, Any]]:
    """The newest saved state and its progress; else a new state, which is saved at once.

    So a folder that can't hold a state is noticed before anything is trained, and a fork needs its
    parent at its first start only.
    """
    # Weights are an argument: as constants they would be compiled into the program.
    init = workbench.of(plan).initial_state
    like = setup.on_all_devices(jax.eval_shape(init, plan.init_key, plan.weights))
    if (found := train.restore(checkpoints, like, plan.about)) is not None:
        return found
    state = train.replicate(init(plan.init_key, plan.weights), train.data_mesh())
    if plan.parent is not None:
        state = train.fork(plan.parent, state)
    train.save(checkpoints, state, plan.about)
    return state, {}


def complete_rows(plan: Plan, step: int, newest: dict[str, Any] | None) -> None:
    """Drops rows after `step`, which are computed again, and restores the newest if it was cut."""
    last = -1 if step == plan.config.fork_step else step  # the first state is evaluated again
    records.drop_records_after(plan.folder, last)
    if newest and newest["step"] not in (row["step"] for row in records.read_records(plan.folder)):
        records.append_record(plan.folder, newest)


def train_on(
    plan: Plan, checkpoints: Any, state: TrainState, known: dict[str, Any], interrupts: Interrupts
) -> None:
    """Trains to the end; evaluates, saves and stops between windows."""
    start, bench = int(state.step), workbench.of(plan)
    evaluate = bench.evaluation()
    live = start_recording(plan, start) if hosts.is_first() else None  # one process writes
    progress = (live.on_evaluation,) if live else ()

    def record(step: int, since: Since, state: TrainState) -> dict[str, Any]:
        row = complete(plan, step, since, evaluate(state, *progress))
        if live:
            records.append_record(plan.folder, row)
            live.on_row(row)
        return row

    row, since = known.get("row", {}), Since(**known.get("window", {}))
    with contextlib.ExitStack() as stack:
        if live:
            stack.callback(live.close)
        kept = train.open_checkpoints(plan.folder / "models", keep=None)
        models = stack.enter_context(kept) if plan.kept else None
        if start == plan.config.fork_step:  # 0 without a fork: no window ends at the first step
            row = record(start, since, state)
        for window in train.windows(
            plan.train_key,
            state,
            plan.sampler,
            bench.segment(plan),
            plan.evaluations | plan.kept,
            steps_per_call=plan.steps_per_call,
            interrupt=interrupts,
            on_call=live.on_call if live else lambda step: None,
        ):
            state, step, since = window.state, window.step, since.plus(window)
            if step in plan.evaluations:
                row, since = record(step, since, state), Since()
            # An earlier start may have saved it.
            if models is not None and step in plan.kept and step not in models.all_steps():
                train.save(models, state, plan.about)
            if step in plan.evaluations or interrupts.saves:
                train.save(checkpoints, state, plan.about, {"window": since._asdict(), "row": row})
                interrupts.saved()
            # A signal that arrives in the last call changes nothing: the run is finished.
            if interrupts.stops and step < plan.num_steps:
                by = interrupts.signal[0] if interrupts.signal else "Another host"
                raise Stopped(
                    f"{by}: stopped at step {step} of {plan.num_steps}, all of it saved in "
                    f"{plan.folder}; the same command continues."
                )


def start_recording(plan: Plan, start: int) -> Live:
    """Adds this start to the manifest; returns the progress bar, with TensorBoard if requested."""
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
    return Live(start, plan.num_steps, plan.config.batch_size, board)


def warn_of_changes(folder: Path) -> None:
    """Logs the code and packages whose versions differ from those of the previous start."""
    versions = [start["versions"] | {"code": start["git"]} for start in records.read_starts(folder)]
    old, new = versions[-2:][0], versions[-1]  # the same at the first start
    for name, version in new.items():
        if old.get(name, version) != version:
            message = "%s: %s was %s and is now %s."
            logging.getLogger(__name__).warning(message, folder, name, old[name], version)


def parent(config: Config) -> dict[str, Any]:
    """The state this run forks from, and the settings that differ: [the parent's, this run's]."""
    path = Path(config.fork_from).expanduser().absolute() / "config.json"
    old = records.read_json(path) if path.exists() else {}
    own = (*MAY_CHANGE, "exp_name", "fork_from", "fork_step")
    new = {k: v for k, v in dataclasses.asdict(config).items() if k not in own}
    changed = {k: [old[k], v] for k, v in new.items() if k in old and old[k] != v}
    return {"run": str(path.parent), "step": config.fork_step, "changed": changed}


def complete(plan: Plan, step: int, since: Since, values: dict[str, Any]) -> dict[str, Any]:
    """A row: evaluated values with epoch, step size and speed; --deterministic omits times."""
    row = {
        "step": step,
        "epoch": step / plan.steps_per_epoch,
        "lr": float(np.asarray(plan.step_size(step))),  # of the step that follows
    }
    if since.steps:
        row["window_loss"] = since.loss_sum / since.steps
        row["step_seconds"] = since.seconds / since.steps
        row["images_per_second"] = plan.config.batch_size / row["step_seconds"]
    omitted = TIMES if plan.config.deterministic else ()
    return {name: value for name, value in (row | values).items() if name not in omitted}
