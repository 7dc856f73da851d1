"""Progress of a run: a bar with the latest metrics, and TensorBoard. No JAX."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.figures import terminal


def bar() -> Any:
    """A rich progress bar, which is shown on terminals only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), "{task.description}", TimeRemainingColumn())
    return Progress(*columns, disable=not Console().is_terminal)


@contextlib.contextmanager
def of_runs(total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` runs; yields `advance(count)`."""
    with bar() as shown:
        task = shown.add_task("compiling, then running", total=total)
        yield lambda count: shown.update(task, advance=count, description="runs")


class Live:
    """Shows the progress of a training run from step `done` to `total`.

    `board` is a folder for TensorBoard's files, or None. Call `close` at the end.
    """

    def __init__(self, done: int, total: int, batch_size: int, board: Path | None = None):
        self.bar = bar()
        self.task = self.bar.add_task("compiling", total=total, completed=done)
        self.batch_size = batch_size
        self.since = done, time.perf_counter()
        self.numbers = ""
        self.board = None
        if board:  # from the extra `tensorboard`
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(board))
        self.bar.start()

    def close(self) -> None:
        """Ends the bar and TensorBoard's file."""
        self.bar.stop()
        if self.board:
            self.board.close()

    def on_call(self, step: int) -> None:
        """Moves the bar to `step`."""
        start, at = self.since
        rate = (step - start) * self.batch_size / (time.perf_counter() - at)
        label = f"{rate:.0f} images/s {self.numbers}"
        self.bar.update(self.task, completed=step, description=label)

    def on_evaluation(self, share: float) -> None:
        """Shows the finished share of an evaluation."""
        self.bar.update(self.task, description=f"evaluating, {share:.0%} {self.numbers}")

    def on_record(self, record: dict[str, Any]) -> None:
        """Prints a record, and adds it to TensorBoard."""
        head = "train/distinct/"
        active = [value for name, value in record.items() if name.startswith(head)]
        shares = " / ".join(map("{:.0%}".format, active))
        losses = f"loss {record['train/loss']:.4f}, test error {record['test/error']:.2%}"
        self.numbers = f"{losses}, active {shares}"
        terminal.show(f"step {record['step']}: {self.numbers}")
        if self.board:
            for name, value in record.items():
                if name not in ("step", "epoch"):
                    self.board.add_scalar(name, value, record["step"])
            self.board.flush()
        self.since = record["step"], time.perf_counter()  # the rate excludes evaluations
