"""Flags, exit codes and messages of a command, on any terminal."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from experiments.launch import cli
from experiments.launch.signals import Stopped


@dataclass(frozen=True)
class Config:
    """An experiment."""

    setting: Literal["quick", "long"] = "quick"
    """Which defaults."""
    lr_init: float = 0.5
    """Initial step size."""
    no_data_augm: bool = False
    """Train without crops."""
    step_sizes: tuple[float, ...] = (0.25, 0.125)
    """One per schedule."""
    seeds: int = 3
    """How many runs."""


LONG = Config("long", seeds=50)


def exits(capsys, code, run, *argv):
    """Stderr of a command that exits with `code` and prints nothing else."""
    with pytest.raises(SystemExit) as stop:
        cli.main(Config, run, argv, settings={"quick": Config(), "long": LONG})
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (code, "")
    return err


@pytest.mark.parametrize(
    ("argv", "want"),
    [
        ("", Config()),
        ("--lr-init=.75 --no_data_augm --step_sizes .1 -2", Config("quick", 0.75, True, (0.1, -2))),
        ("--seeds 7 --setting long", Config("long", seeds=7)),
        ("--setting=quick --setting long", LONG),
    ],
)
def test_flags_override_the_defaults_of_a_setting(argv, want):
    assert cli.parse(Config, argv.split(), settings={"quick": Config(), "long": LONG}) == want


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--lr_inti=3", "--lr_inti"),
        ("--lr_init=big", "--lr_init"),
        ("--step_sizes --seeds=3", "--step_sizes"),
        ("--setting=lnog", "--setting"),
        ("--no_data_augm=False", "False"),
    ],
)
def test_a_wrong_flag_is_named_before_anything_runs(argv, named, capsys):
    assert named in exits(capsys, 2, pytest.fail, *argv.split())


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("--n is 0;\n  give 1"), 1, "error: --n is 0; give 1"),
        (ValueError("\x1b[2J\u202ex\x9b"), 1, r"error: \x1b[2J\u202ex\x9b"),
        (FloatingPointError("the loss is NaN"), 1, "error: the loss is NaN"),
        (FileNotFoundError(2, "No such file", "a/b"), 1, "error: a/b: No such file"),
        (Stopped("step 3; the same command continues"), 75, "step 3; the same command"),
        (KeyboardInterrupt(), 130, "error: interrupted; run the same command to continue"),
    ],
)
def test_expected_errors_are_one_line(error, code, message, capsys, monkeypatch):
    def run(config):
        raise error

    err = exits(capsys, code, run)
    assert err.startswith(message) and err.count("\n") == 1
    monkeypatch.setenv("SGD_SPARSE_TRACEBACK", "1")
    err = exits(capsys, code, run)
    assert err.startswith("Traceback" if code == 1 else message) and message in err


class Finalized:
    """Calls `act` in a finalizer, in which Python discards exceptions."""

    def __init__(self, act):
        self.act = act

    def __del__(self):
        self.act()


@pytest.mark.parametrize(
    ("number", "where"), [(signal.SIGINT, Finalized), (signal.SIGTERM, lambda act: act())]
)
def test_a_signal_interrupts_finalizers_too(number, where, capsys):
    def run(config):
        where(lambda: (os.kill(os.getpid(), number), time.sleep(0.01)))
        end = time.monotonic() + 20
        while time.monotonic() < end:
            pass

    before = signal.getsignal(number)
    err = exits(capsys, 130, run)
    assert err.startswith("error: interrupted") and err.count("\n") == 1
    assert signal.getsignal(number) == before


PROGRAM = """
import sys
from dataclasses import dataclass
from experiments.figures import progress, terminal
from experiments.launch import cli
@dataclass
class Config:
    words: str = "η"
    "Greek: η."
with progress.of_runs(2) as advance:
    advance(2)
cli.main(Config, lambda config: terminal.show(config.words * 99))
assert "jax" not in sys.modules
"""


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        *(("{} --help", 0), ("{} >&-", 0), ("set -o pipefail; {} | true", 0)),
        *(("{} >/dev/full", 0), ("{} --wodrs=η", 2)),
    ],
)
def test_no_terminal_fails_a_run(shell, code):
    """A narrow ASCII terminal, a closed one, or a pipe whose reader has ended."""
    env = {"PYTHONUNBUFFERED": "", "PYTHONIOENCODING": "ascii", "COLUMNS": "9", "TERM": "dumb"}
    done = subprocess.run(
        ["bash", "-c", shell.format(f"'{sys.executable}' -c '{PROGRAM}'")],
        cwd=Path(__file__).parents[1],
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_the_list_of_commands_has_all_of_them():
    root = Path(__file__).parents[1]
    menu = [sys.executable, "-m", "experiments"]
    shown = subprocess.run(menu, cwd=root, capture_output=True, text=True, check=True).stdout
    found = {line.split()[2] for line in shown.splitlines() if line.startswith("python -m")}
    paths = (root / "experiments").glob("[a-z]*.py")
    assert found == {f"experiments.{path.stem}" for path in paths}


COMPLETE = """
source docs/completion.sh
while IFS= read -r line; do
    mapfile -td ' ' COMP_WORDS < <(printf '%s' "$1 -m $line")
    [[ $line == *' ' ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    _experiments "$1"
    echo "${COMPREPLY[@]}"
done
"""


def test_bash_completes_commands_flags_and_values():
    wanted = {
        "experiments.diag": "experiments.diag_implicit_bias experiments.diag_nets",
        "experiments.diag_nets --setting ": "d1 d2",
        "experiments.diag_nets --seeds 3 --sam": "--sam_rho --sam_of",
        "experiments.diag_nets values": "",  # a word of a description
        "pytest --": "",
    }
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", sys.executable],
        cwd=Path(__file__).parents[1],
        input="".join(f"{line}\n" for line in wanted),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == list(wanted.values()) and not done.stderr
