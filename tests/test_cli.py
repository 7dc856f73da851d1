"""Flags, exit codes and messages of a command, whatever the terminal."""

import os
import re
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
    """Initial step size η."""
    no_data_augm: bool = False
    """Train without crops."""
    step_sizes: tuple[float, ...] = (0.25, 0.125)
    """One per schedule."""
    seeds: int = 3
    """How many runs."""


SETTINGS = {"quick": Config(), "long": Config(setting="long", seeds=50)}


def parse(*argv):
    return cli.parse(Config, argv, settings=SETTINGS)


def test_flags_set_fields():
    assert parse() == Config()
    argv = ["--lr_init=0.75", "--no_data_augm", "--step_sizes", ".1", "-.2", "inf", "--seeds", "7"]
    want = Config("quick", 0.75, True, (0.1, -0.2, float("inf")), 7)
    assert parse(*argv) == parse(*(word.replace("_", "-") for word in argv)) == want


@pytest.mark.parametrize(
    ("argv", "want"),
    [
        (["--setting=long"], SETTINGS["long"]),
        (["--seeds", "7", "--setting", "long"], Config("long", seeds=7)),
        (["--setting=quick", "--setting", "long"], SETTINGS["long"]),
        (["--setting", "long", "--setting=quick"], SETTINGS["quick"]),
    ],
)
def test_a_setting_gives_the_defaults_and_flags_override_them(argv, want):
    assert parse(*argv) == want


@pytest.mark.parametrize(
    "argv",
    [
        ["--lr_inti=3"],
        ["--lr_init=big"],
        ["--lr_init"],
        ["--seeds=1.5"],
        ["--step_sizes"],
        ["--step_sizes", "--seeds=3"],
        ["--setting=lnog"],
        ["--setting"],
        ["--setting=long", "--seeds=x"],
        ["--no_data_augm=False"],
        ["--no_data_augm", "False"],
        ["stray"],
    ],
)
def test_a_wrong_flag_exits_with_2_and_is_named_before_anything_runs(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(Config, pytest.fail, argv, settings=SETTINGS)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    named = "False" if "False" in argv[-1] else argv[-1 if "seeds=x" in argv[-1] else 0]
    assert named.partition("=")[0] in err


def test_help_shows_the_defaults_of_the_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--setting=long", "--help")
    assert not stop.value.code
    assert "How many runs. (default: 50)" in capsys.readouterr().out


def ends(capsys, run, code):
    """What a run leaves on stderr that ends with this exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main(Config, run, [])
    assert stop.value.code == code
    return capsys.readouterr().err


def fails(error):
    def run(config):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "facts"),
    [
        (ValueError("--n is 0;\n  give 1"), 1, "error: --n is 0; give 1"),
        (ValueError("\x1b[2J\u202ex\x9b"), 1, r"error: \x1b[2J\u202ex\x9b"),
        (ValueError(), 1, "error: ValueError"),
        (FloatingPointError("the loss is NaN"), 1, "error: the loss is NaN"),
        (FileNotFoundError(2, "No such file", "a/b"), 1, "error: a/b: No such file"),
        (OSError(28, "No space left", "a/b"), 1, "error: a/b: the disk is full"),
        (Stopped("at step 3; the same command goes on"), 75, "at step 3; the same command"),
        (KeyboardInterrupt(), 130, "error: interrupted; the same command goes on"),
    ],
)
def test_an_error_that_a_user_can_fix_is_one_line(error, code, facts, capsys, monkeypatch):
    monkeypatch.delenv("SGD_SPARSE_TRACEBACK", raising=False)
    message = ends(capsys, fails(error), code)
    assert message.startswith(facts) and message.count("\n") == 1
    if code == 1:
        monkeypatch.setenv("SGD_SPARSE_TRACEBACK", "1")
        message = ends(capsys, fails(error), code)
        assert message.startswith("Traceback") and facts in message


def test_a_bug_is_an_exception():
    with pytest.raises(ZeroDivisionError):
        cli.main(Config, lambda config: 1 / 0, [])


class Finalized:
    """Python drops, and prints, what is raised where an object is deleted."""

    def __init__(self, act):
        self.act = act

    def __del__(self):
        self.act()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("where", [lambda act: act(), Finalized])
def test_a_signal_interrupts_wherever_it_arrives(number, where, capsys):
    def run(config):
        where(lambda: (os.kill(os.getpid(), number), time.sleep(0.01)))
        end = time.monotonic() + 20
        while time.monotonic() < end:
            pass

    before = signal.getsignal(number)
    message = ends(capsys, run, 130)
    assert message.startswith("error: interrupted") and message.count("\n") == 1
    assert signal.getsignal(number) == before


def test_only_duplicates_of_a_reported_error_are_hidden(capsys):
    """Reads of a damaged state that orbax abandons find their event loop closed."""
    run = lambda words: Finalized(lambda: fails(RuntimeError(words))(None)) and None
    hook, sys.unraisablehook = sys.unraisablehook, sys.__unraisablehook__
    try:
        cli.main(Config, lambda config: run("Event loop is closed"), [])
        assert capsys.readouterr().err == ""
        cli.main(Config, lambda config: run("another"), [])
        assert "RuntimeError: another" in capsys.readouterr().err
    finally:
        sys.unraisablehook = hook


PROGRAM = """
import sys
from dataclasses import dataclass
from experiments.launch import cli
@dataclass
class Config:
    words: str = "η"
    "Greek: η."
cli.main(Config, lambda config: print(config.words * 99))
assert "jax" not in sys.modules
"""


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("{} --help", 0),
        ("{}", 0),
        ("{} >&-", 0),
        ("set -o pipefail; {} | true", 1),
        ("{} --wodrs=η", 2),
    ],
)
def test_the_terminal_ends_no_run(shell, code):
    command = f"'{sys.executable}' -c '{PROGRAM}'"
    env = {"PYTHONUNBUFFERED": "", "PYTHONIOENCODING": "ascii", "COLUMNS": "9", "TERM": "dumb"}
    done = subprocess.run(
        ["bash", "-c", shell.format(command)],
        cwd=Path(__file__).parents[1],
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert not re.search("Traceback|Exception", done.stderr)
