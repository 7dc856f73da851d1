"""The live view of a run: a bar with its last numbers, and TensorBoard where asked for. No JAX."""

import time
from pathlib import Path
from typing import Any


class Live:
    """`on_call(step)` moves the bar, `on_row(row)` prints a row and files it; `close()` at the end.

    `board` is a folder for TensorBoard's files, or None.
    """

    def __init__(self, done: int, total: int, batch_size: int, board: Path | None = None):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), "{task.description}", TimeRemainingColumn())
        self.bar = Progress(*columns)
        self.task = self.bar.add_task("compiling", total=total, completed=done)
        self.batch_size = batch_size
        self.since = done, time.perf_counter()
        self.numbers = ""
        self.board = _writer(board) if board else None
        self.bar.start()

    def close(self) -> None:
        """Gives the terminal back, and ends TensorBoard's file."""
        self.bar.stop()
        if self.board:
            self.board.close()

    def on_call(self, step: int) -> None:
        """Steps up to `step` are under way."""
        start, at = self.since
        rate = (step - start) * self.batch_size / (time.perf_counter() - at)
        self.bar.update(
            self.task, completed=step, description=f"{rate:.0f} images/s {self.numbers}"
        )

    def on_row(self, row: dict[str, Any]) -> None:
        """An evaluation is done."""
        shares = " / ".join(
            f"{value:.0%}" for name, value in row.items() if name.startswith("train/distinct/")
        )
        self.numbers = (
            f"loss {row['train/loss']:.4f}, test error {row['test/error']:.2%}, active {shares}"
        )
        self.bar.console.print(f"step {row['step']}: {self.numbers}")
        if self.board:
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self.board.add_scalar(name, value, row["step"])
            self.board.flush()
        self.since = row["step"], time.perf_counter()  # evaluations are no training time


def _writer(folder: Path) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder))
