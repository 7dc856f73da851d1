"""The run of an image classifier: training, evaluations, checkpoints, resumption."""

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

TIMES = ("step_seconds", "images_per_second", "eval_seconds", "curvature/seconds")
CALLS = 8  # between agreements of several hosts on interruptions: each waits for the device


class Since(NamedTuple):
    """Loss and time since the last evaluation; saved with each state."""

    loss_sum: float = 0.0
    steps: int = 0
    seconds: float = 0.0

    def plus(self, window: train.Window) -> "Since":
        """Adds the losses one by one, so that interruptions do not change the sum by a bit."""
        return Since(
            reduce(operator.add, window.losses.tolist(), self.loss_sum),
            self.steps + len(window.losses),
            self.seconds + window.seconds,
        )


class Interrupts:
    """Decides when to save (by time) and to stop (by signal), identically on all hosts."""

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
        """Restarts the time to the next save."""
        self.saved_at, self.saves = time.monotonic(), False


def run(config: Config) -> Path:
    """Trains from the newest saved state, or from the beginning; returns the run's folder.

    Raises ValueError for invalid flags or data; Stopped after a signal, once the state is saved;
    FloatingPointError if training diverges; OSError if the folder can't be written.
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
    hosts.on_first(lambda: records.check_run(folder, config, may_change=MAY_CHANGE))
    # Duplicates: orbax also raises what it logs, asyncio logs writes that orbax has abandoned.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    states = train.open_checkpoints(folder / "checkpoints", keep=config.keep)
    with jax.debug_nans(config.debug), states as checkpoints:
        state, known = starting_state(plan, checkpoints)  # refuses a state of other data
        hosts.on_first(lambda: records.write_settings(folder, config))
        if hosts.is_first():
            complete_records(plan, int(state.step), known.get("row"))
        if int(state.step) >= plan.num_steps:
            terminal.show(f"{folder} is already at step {state.step} of {plan.num_steps}.")
            return
        try:
            train_on(plan, checkpoints, state, known, Interrupts(config.save_every_seconds, signal))
        except FloatingPointError as error:
            where = f"--lr_init is {config.lr_init:g}, the run is {folder}"
            raise FloatingPointError(f"{error} ({where})") from error
    if hosts.is_first():
        records.finish_manifest(folder, steps=plan.num_steps)


def starting_state(plan: Plan, checkpoints: Any) -> tuple[TrainState, dict[str, Any]]:
    """The newest saved state and its progress; else a new state, which is saved first.

    Thus a folder that can't store states fails before training, and a fork reads its parent once.
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


def complete_records(plan: Plan, step: int, newest: dict[str, Any] | None) -> None:
    """Drops records after `step`, which are computed again; restores the newest if it was torn."""
    last = -1 if step == plan.config.fork_step else step  # the first state is evaluated again
    records.drop_records_after(plan.folder, last)
    if newest and newest["step"] not in (row["step"] for row in records.read_records(plan.folder)):
        records.append_record(plan.folder, newest)


def train_on(
    plan: Plan, checkpoints: Any, state: TrainState, known: dict[str, Any], interrupts: Interrupts
) -> None:
    """Trains to the end; evaluates, saves and stops between windows."""
    start, bench = int(state.step), workbench.of(plan)
    evaluate, probe = bench.evaluation(), bench.curvature(plan)
    live = start_recording(plan, start) if hosts.is_first() else None  # one process writes
    progress = (live.on_evaluation,) if live else ()

    def record(step: int, since: Since, state: TrainState) -> dict[str, Any]:
        values = evaluate(state, *progress)
        values |= probe(state, *progress) if step in plan.curvature else {}
        row = complete(plan, step, since, values)
        if live:
            records.append_record(plan.folder, row)
            live.on_record(row)
        return row

    row, since = known.get("row", {}), Since(**known.get("window", {}))
    with contextlib.ExitStack() as stack:
        if live:
            stack.callback(live.close)
        manager = train.open_checkpoints(plan.folder / "models", keep=None)
        models = stack.enter_context(manager) if plan.saved_steps else None
        if start == plan.config.fork_step:  # 0 without a fork
            row = record(start, since, state)
        for window in train.windows(
            plan.train_key,
            state,
            plan.sampler,
            bench.segment(plan),
            plan.evaluations | plan.saved_steps,
            steps_per_call=plan.steps_per_call,
            interrupt=interrupts,
            on_call=live.on_call if live else lambda step: None,
        ):
            state, step, since = window.state, window.step, since.plus(window)
            if step in plan.evaluations:
                row, since = record(step, since, state), Since()
            # An earlier start may have saved it.
            if models is not None and step in plan.saved_steps and step not in models.all_steps():
                train.save(models, state, plan.about)
            if step in plan.evaluations or interrupts.saves:
                train.save(checkpoints, state, plan.about, {"window": since._asdict(), "row": row})
                interrupts.saved()
            # A signal during the last call has no effect: the run is finished.
            if interrupts.stops and step < plan.num_steps:
                by = interrupts.signal[0] if interrupts.signal else "Another host"
                raise Stopped(
                    f"{by}: stopped at step {step} of {plan.num_steps}, saved in {plan.folder}; "
                    "run the same command to continue."
                )


def start_recording(plan: Plan, start: int) -> Live:
    """Adds this start to the manifest; returns the progress bar and TensorBoard writer."""
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
    """Logs a warning for code and packages whose versions changed since the previous start."""
    versions = [start["versions"] | {"code": start["git"]} for start in records.read_starts(folder)]
    old, new = versions[-2:][0], versions[-1]  # the same at the first start
    for name, version in new.items():
        if old.get(name, version) != version:
            message = "%s: %s was %s and is now %s."
            logging.getLogger(__name__).warning(message, folder, name, old[name], version)


def parent(config: Config) -> dict[str, Any]:
    """The state this run forks from, and the settings that differ, as [parent, this run]."""
    path = Path(config.fork_from).expanduser().absolute() / "config.json"
    old = records.read_json(path) if path.exists() else {}
    own = (*MAY_CHANGE, "exp_name", "fork_from", "fork_step")
    new = {k: v for k, v in dataclasses.asdict(config).items() if k not in own}
    changed = {k: [old[k], v] for k, v in new.items() if k in old and old[k] != v}
    return {"run": str(path.parent), "step": config.fork_step, "changed": changed}


def complete(plan: Plan, step: int, since: Since, values: dict[str, Any]) -> dict[str, Any]:
    """A record: metrics with epoch, step size and speed; --deterministic omits times."""
    row = {
        "step": step,
        "epoch": step / plan.steps_per_epoch,
        "lr": float(np.asarray(plan.step_size(step))),  # of the next step
    }
    if since.steps:
        row["window_loss"] = since.loss_sum / since.steps
        row["step_seconds"] = since.seconds / since.steps
        row["images_per_second"] = plan.config.batch_size / row["step_seconds"]
    omitted = TIMES if plan.config.deterministic else ()
    return {name: value for name, value in (row | values).items() if name not in omitted}
