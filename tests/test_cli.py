"""A wrong command line ends in one line that names the flag; what is a bug stays a traceback."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Literal

import pytest
from hypothesis import example, given, settings, strategies as st

from experiments.launch import cli

LONG = "a_flag_with_a_name_so_long_that_no_narrow_terminal_can_hold_it_in_a_single_line"
CHOICES = (
    "constant_over_the_whole_run_without_any_decay",
    "piecewise_constant_with_a_warm_up_and_two_decays",
)


@dataclass(frozen=True)
class Config:
    """An experiment."""

    lr_init: float = 0.5
    """Initial step size."""
    no_data_augm: bool = False
    """Train without crops."""
    step_sizes: tuple[float, ...] = (0.25, 0.125)
    """One per schedule."""
    schedule: Literal[
        "constant_over_the_whole_run_without_any_decay",
        "piecewise_constant_with_a_warm_up_and_two_decays",
    ] = "constant_over_the_whole_run_without_any_decay"
    """How the step size falls."""
    seeds: int = 3
    """How many runs."""
    a_flag_with_a_name_so_long_that_no_narrow_terminal_can_hold_it_in_a_single_line: int = 1
    """Beyond any screen."""


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err)
    return err


@pytest.fixture(params=["20", "80", "300"])
def screen(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", request.param)


@pytest.mark.usefixtures("screen")
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr_inti=3"], ["--lr_inti=3", "did you mean --lr_init?"]),
        (["--lr-inti", "3"], ["--lr-inti", "did you mean --lr_init?"]),
        (["-seeds", "3"], ["-seeds", "did you mean --seeds?"]),
        ([f"--{LONG[:-1]}=3"], [f"--{LONG[:-1]}=3", f"did you mean --{LONG}?"]),
        (["--lr_init=big"], ["--lr_init", "'big'"]),
        (["--seeds", "1.5"], ["--seeds", "'1.5'"]),
        ([f"--{LONG}=x"], [f"--{LONG}:", "'x'"]),
        (["--step_sizes", ".1", "x"], ["--step_sizes", "'x'"]),
        (["--schedule", "cubic"], ["'--schedule'", "'cubic'", repr(CHOICES)]),
        (["--schedule", CHOICES[1][:-1]], ["'--schedule'", f"did you mean {CHOICES[1]}?"]),
        (["--seeds"], ["'--seeds'", "missing value"]),
        (["--step_sizes"], ["--step_sizes needs"]),
        (["--step-sizes", "--seeds", "3"], ["--step-sizes needs"]),
        (["--no_data_augm=True"], ["--no_data_augm", "'True'"]),
        (["--no-data-augm", "1"], ["--no-data-augm", "'1'"]),
        (["stray"], ["stray"]),
        (["--seeds", "two\nlines\u2028three"], ["--seeds"]),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(argv, words, capsys):
    message = refused(capsys, *argv)
    assert "--help lists all flags" in message
    for word in words:
        assert word in message


def test_there_is_no_suggestion_where_nothing_is_near(capsys):
    assert "did you mean" not in refused(capsys, "--qqq=3")
    assert "did you mean" not in refused(capsys, "--schedule", "zzz")
    # The unknown flag is another mistake than the one that is reported.
    assert "did you mean" not in refused(capsys, "--schedule", "zzz", "--lr_inti=3")


def test_the_same_line_whatever_the_screen(capsys, monkeypatch):
    said = set()
    for columns in ("10", "41", "80", "1000"):
        monkeypatch.setenv("COLUMNS", columns)
        said.add(refused(capsys, f"--schedule={'x' * 60}"))
        assert os.environ["COLUMNS"] == columns
    monkeypatch.delenv("COLUMNS")
    said.add(refused(capsys, f"--schedule={'x' * 60}"))
    assert len(said) == 1
    assert "COLUMNS" not in os.environ


def test_flags_set_fields():
    assert cli.parse(Config, []) == Config()
    argv = ["--lr_init=0.75", "--no_data_augm", "--step_sizes", ".1", "-.2", "inf", "--seeds", "7"]
    want = Config(lr_init=0.75, no_data_augm=True, step_sizes=(0.1, -0.2, float("inf")), seeds=7)
    assert cli.parse(Config, argv) == want
    assert cli.parse(Config, [word.replace("_", "-") for word in argv]) == want
    assert cli.parse(Config, ["--step_sizes=.1", ".2"]).step_sizes == (0.1, 0.2)


def test_the_flags_default_to_those_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "--seeds=9"])
    assert cli.parse(Config).seeds == 9


@settings(max_examples=100)
@given(st.floats(allow_nan=False), st.lists(st.floats(allow_nan=False), min_size=1, max_size=4))
def test_every_float_arrives(lr_init, step_sizes):
    argv = [f"--lr_init={lr_init!r}", "--step_sizes", *map(repr, step_sizes)]
    got = cli.parse(Config, argv)
    assert (got.lr_init, got.step_sizes) == (lr_init, tuple(step_sizes))


words = st.text(st.characters(exclude_characters="\0"), max_size=12) | st.sampled_from(
    ["--seeds", "--lr_init", "--no_data_augm", "--step_sizes=", "--schedule", "--", "-", "1", "|"]
)


@settings(max_examples=150)
@example(["-" * 30])
@example(["│ ─────────── ╯"])
@given(st.lists(words, max_size=4))
def test_any_words_are_flags_or_one_line(argv):
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(cli, "print", lambda *text, **_: said.append(" ".join(text)), raising=False)
        try:
            assert isinstance(cli.parse(Config, argv), Config)
        except SystemExit as stop:
            if stop.code == 0:  # -h, or the start of --help
                return
            assert stop.code == 2
            assert len(said) == 1
            assert said[0].startswith("error: ")
            assert len(said[0].splitlines()) == 1
            assert "can't be read" not in said[0]


def test_help_lists_every_field_with_its_line_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, ["--help"])
    assert stop.value.code in (0, None)
    out, err = capsys.readouterr()
    assert err == ""
    lines = ["Initial step size.", "Train without crops.", "One per schedule."]
    lines += ["How the step size falls.", "How many runs.", "Beyond any screen."]
    text = " ".join(out.replace("│", " ").split())
    for field, line in zip(fields(Config), lines, strict=True):
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        assert f"{line} (default: {shown})" in text
        assert f"--{field.name} " in text


def ended(capsys, error, code):
    def run(config):
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.main(Config, run, [])
    assert stop.value.code == code
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("--n is 0;\n  it must be 1"), "--n is 0; it must be 1"),
        (FloatingPointError("the loss is NaN"), "the loss is NaN"),
        (PermissionError("choose another folder"), "choose another folder"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "a/b: No such file"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (ValueError(), "ValueError"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, message, capsys, monkeypatch):
    monkeypatch.delenv("SGD_SPARSE_TRACEBACK", raising=False)
    assert ended(capsys, error, 1) == f"error: {message}\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_called_full(number, capsys):
    said = ended(capsys, OSError(number, os.strerror(number), "runs/arrays.npz"), 1)
    assert said.startswith("error: runs/arrays.npz: the disk is full")
    assert said.count("\n") == 1
    assert "the disk is full" in ended(capsys, OSError(number, os.strerror(number)), 1)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_place_that_may_not_be_written_names_the_cure(number, capsys):
    text = os.strerror(number)
    said = ended(capsys, OSError(number, text, "runs/a/figures"), 1)
    assert said.startswith(f"error: runs/a/figures: {text}; change its permissions, or choose ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_that_nothing_defers_is_one_line(number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        cli.main(Config, lambda config: (os.kill(os.getpid(), number), time.sleep(9)), [])
    assert stop.value.code == 130
    assert re.fullmatch(r"error: interrupted; the same[^\n]*\n", capsys.readouterr().err)
    assert signal.getsignal(number) == before


def test_an_interruption_inside_a_finalizer_is_not_lost(capsys):
    """There Python drops any exception."""

    class Dying:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def run(config):
        Dying()
        time.sleep(5)

    cli.main(Config, lambda config: Dying(), [])
    time.sleep(0.1)  # a run that was over by then is; nobody else is interrupted
    start = time.perf_counter()
    with pytest.raises(SystemExit) as stop:
        cli.main(Config, run, [])
    assert stop.value.code == 130 and time.perf_counter() - start < 4
    assert re.fullmatch(r"error: interrupted; the same[^\n]*\n", capsys.readouterr().err)


def test_of_errors_that_nothing_catches_only_echoes_are_silent(monkeypatch):
    """A callback into a closed event loop; reads that orbax gave up when another had failed."""
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(unraisable))
    coroutine = lambda path: SimpleNamespace(cr_code=SimpleNamespace(co_filename=path))
    late = [
        SimpleNamespace(exc_value=RuntimeError(words), object=culprit)
        for words, culprit in (
            ("Event loop is closed", None),
            ("while reading", coroutine("site-packages/orbax/checkpoint/x.py")),
            ("another", None),
            ("one of ours", coroutine("experiments/x.py")),
        )
    ]
    cli.main(Config, lambda config: [sys.unraisablehook(error) for error in late], [])
    assert heard == late[2:]


def test_the_traceback_on_demand(capsys, monkeypatch):
    monkeypatch.setenv("SGD_SPARSE_TRACEBACK", "1")
    said = ended(capsys, ValueError("no"), 1)
    assert said.startswith("Traceback")
    assert said.endswith("\nerror: no\n")
    monkeypatch.setenv("SGD_SPARSE_TRACEBACK", "0")
    assert ended(capsys, ValueError("no"), 1) == "error: no\n"


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    said = ended(capsys, KeyboardInterrupt(), 130)
    assert re.fullmatch(r"error: interrupted[^\n]*\n", said)
    monkeypatch.setattr(cli, "_tyro", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert ended(capsys, AssertionError("never run"), 130) == said


@pytest.mark.parametrize("bug", [TypeError, KeyError, ZeroDivisionError, RuntimeError, IndexError])
def test_a_bug_stays_an_exception(bug):
    def run(config):
        raise bug("here")

    with pytest.raises(bug, match="here"):
        cli.main(Config, run, [])


def test_main_hands_the_flags_on():
    seen = []
    cli.main(Config, seen.append, ["--seeds=4"])
    assert seen == [Config(seeds=4)]


def test_as_a_process_with_an_ascii_terminal():
    code = (
        "import sys\nfrom dataclasses import dataclass\nfrom experiments import cli\n"
        "@dataclass\nclass C:\n    seeds: int = 1\n"
        "cli.main(C, print)\nassert 'jax' not in sys.modules\n"
    )

    def call(*flags):
        return subprocess.run(
            [sys.executable, "-c", code, *flags],
            env=os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "20"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    wrong = call("--sedes=é")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert re.fullmatch(r"error: .*--sedes=.*did you mean --seeds\?.*\n", wrong.stderr)
    right = call("--seeds=5")
    assert (right.returncode, right.stdout, right.stderr) == (0, "C(seeds=5)\n", "")


SETTINGS = {"quick": Config(seeds=1, lr_init=0.1), "long": Config(seeds=50, lr_init=2.0)}


@dataclass(frozen=True)
class Chosen(Config):
    setting: Literal["quick", "long"] = "quick"
    """Whose defaults."""


CHOSEN = {
    name: Chosen(setting=name, seeds=config.seeds, lr_init=config.lr_init)  # pyright: ignore
    for name, config in SETTINGS.items()
}


@pytest.mark.parametrize(
    ("argv", "setting", "seeds"),
    [
        ([], "quick", 1),
        (["--setting", "long"], "long", 50),
        (["--setting=long"], "long", 50),
        (["--seeds", "7", "--setting=long"], "long", 7),
    ],
)
def test_a_setting_gives_the_defaults_and_flags_override_them(argv, setting, seeds):
    config = cli.parse(Chosen, argv, settings=CHOSEN)
    assert (config.setting, config.seeds) == (setting, seeds)
    assert config.lr_init == CHOSEN[setting].lr_init


def test_an_unknown_setting_is_answered_with_the_known(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Chosen, ["--setting", "lnog"], settings=CHOSEN)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "unknown --setting 'lnog'; did you mean long? Known are quick, long" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "setting"),
    [
        (["--setting", "quick", "--setting", "long"], "long"),
        (["--setting=long", "--setting", "quick"], "quick"),
        (["--no_data_augm", "--setting", "long"], "long"),
    ],
)
def test_the_last_setting_named_is_both_what_runs_and_whose_defaults_are_taken(argv, setting):
    config = cli.parse(Chosen, argv, settings=CHOSEN)
    assert (config.setting, config.seeds) == (setting, CHOSEN[setting].seeds)


flags = st.permutations(
    [["--setting", "long"], ["--seeds", "7"], ["--step_sizes", "1.5", "2.5"], ["--no_data_augm"]]
)


@settings(max_examples=20)
@given(flags)
def test_a_setting_gives_the_same_wherever_it_stands(flags):
    config = cli.parse(Chosen, [word for flag in flags for word in flag], settings=CHOSEN)
    want = Chosen(setting="long", seeds=7, lr_init=2.0, step_sizes=(1.5, 2.5), no_data_augm=True)
    assert config == want


def test_the_first_setting_is_the_default_not_the_dataclass():
    backwards = dict(reversed(CHOSEN.items()))
    assert cli.parse(Chosen, [], settings=backwards) == CHOSEN["long"]
    assert cli.parse(Chosen, ["--setting=quick"], settings=backwards) == CHOSEN["quick"]
    assert cli.parse(Chosen, []) == Chosen()


def test_main_takes_the_setting_to_the_run():
    seen = []
    cli.main(Chosen, seen.append, ["--setting=long", "--lr_init=0.5"], settings=CHOSEN)
    assert seen == [Chosen(setting="long", seeds=50, lr_init=0.5)]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--setting=zzz"], "unknown --setting 'zzz'; Known are quick, long"),
        (["--setting=lnog"], "unknown --setting 'lnog'; did you mean long? Known are quick, long"),
        (["--setting"], "Known are quick, long"),
        (["--setting="], "Known are quick, long"),
        (["--setting", "--seeds", "3"], "Known are quick, long"),
        (["--setting=long", "--seeds", "x"], "--seeds: invalid literal"),
        (["--setting=long", "--sedes=3"], "--sedes=3; did you mean --seeds?"),
        (["--settin", "long"], "did you mean --setting?"),
        (["--setting=long", "--step_sizes"], "--step_sizes needs"),
    ],
)
def test_beside_settings_too_a_wrong_flag_is_named_in_one_line(argv, words, capsys):
    ran = []
    with pytest.raises(SystemExit) as stop:
        cli.main(Chosen, ran.append, argv, settings=CHOSEN)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, ran) == (2, "", [])
    assert re.fullmatch(r"error: [^\n]+\n", err) and words in err
    assert "did you mean" in words or "did you mean" not in err


@pytest.mark.parametrize("setting", ["quick", "long"])
def test_help_shows_the_defaults_of_the_setting(setting, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        cli.parse(Chosen, ["--setting", setting, "--help"], settings=CHOSEN)
    assert stop.value.code in (0, None)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    chosen = CHOSEN[setting]
    assert f"How many runs. (default: {chosen.seeds})" in text
    assert f"Initial step size. (default: {chosen.lr_init})" in text
    assert f"Whose defaults. (default: {setting})" in text
