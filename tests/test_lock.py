"""One process at a time in a run folder: the second is refused in a line and changes nothing."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.launch import lock

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "experiments.diag_nets", "--exp_name=twice"]
HOLD = (
    "import pathlib, sys, time\nfrom experiments.launch import lock\n"
    "with lock.holding(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder of a run of `diag_nets`."""
    folder = tmp_path / "runs" / "diag_nets" / "twice"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "held\n"
        yield process, folder
        process.kill()


def test_a_second_process_is_refused_until_the_first_is_killed(holder, tmp_path):
    process, folder = holder
    before = sorted(folder.iterdir())
    second = subprocess.run(
        [*COMMAND, f"--runs_dir={tmp_path / 'runs'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert (second.returncode, second.stdout, second.stderr.count("\n")) == (1, "", 1)
    for fact in (folder, process.pid, socket.gethostname(), time.strftime("%Y-%m-%d")):
        assert str(fact) in second.stderr
    assert sorted(folder.iterdir()) == before
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.holding(folder):
        pass
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_stopped_process_still_holds(holder):
    process, folder = holder
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(ValueError, match=str(process.pid)), lock.holding(folder):
        pass
    process.send_signal(signal.SIGCONT)


def test_the_lock_is_free_after_an_error_and_for_another_folder(tmp_path):
    with pytest.raises(KeyError), lock.holding(tmp_path / "a"), lock.holding(tmp_path / "b"):
        raise KeyError
    with lock.holding(tmp_path / "a"):
        assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_where_nothing_can_be_locked_a_warning_is_logged_and_the_run_goes_on(tmp_path, caplog):
    (tmp_path / ".lock").mkdir()  # stands for a file system without locks
    with lock.holding(tmp_path), lock.holding(tmp_path):
        pass
    assert str(tmp_path) in caplog.text
