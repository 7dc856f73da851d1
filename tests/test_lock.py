"""One process at a time per run folder: a second one fails and changes nothing."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.launch import lock

PYTHON = {"cwd": Path(__file__).parents[1], "stdout": subprocess.PIPE, "text": True}
HOLD = """
import pathlib, sys, time
from experiments.launch import lock
with lock.holding(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    folder = tmp_path / "diag_nets" / "twice"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], **PYTHON) as first:
        assert first.stdout.readline() == "held\n"
        first.send_signal(signal.SIGSTOP)  # like a stalled node
        before = sorted(folder.iterdir())
        flags = ["-m", "experiments.diag_nets", "--exp_name=twice", f"--runs_dir={tmp_path}"]
        second = subprocess.run([sys.executable, *flags], **PYTHON, stderr=subprocess.PIPE)
        first.kill()
    assert (second.returncode, second.stdout, second.stderr.count("\n")) == (1, "", 1)
    for fact in (folder, first.pid, socket.gethostname()):
        assert str(fact) in second.stderr
    assert sorted(folder.iterdir()) == before
    with lock.alone_in(folder):
        pass
    assert os.listdir(folder) == [".lock"]


def test_a_folder_that_cannot_be_created_is_one_error_without_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), lock.holding(tmp_path / "file" / "run"):
        pass
    assert not caplog.records


def test_without_file_locks_a_warning_is_logged_and_the_run_continues(tmp_path, caplog):
    (tmp_path / ".lock").mkdir()  # simulates a file system without locks
    with lock.alone_in(tmp_path), lock.alone_in(tmp_path):
        pass
    assert str(tmp_path) in caplog.text
