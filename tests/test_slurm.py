"""docs/slurm.sh, with executables that replace Slurm's."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from experiments import resnet_cifar
from experiments.launch import cli
from experiments.launch.signals import EXIT_CODE

SCRIPT = Path(__file__).parents[1] / "docs" / "slurm.sh"


@pytest.fixture
def submit(tmp_path):
    """(shell commands in place of srun's) -> exit code, the arguments of srun and scontrol."""
    for name, ending in (("srun", 'eval "$FAKE_SRUN"'), ("scontrol", "exit $FAKE_SCONTROL")):
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        noted = f'for word; do echo "$word"; done >> "{tmp_path / name}"'
        fake.write_text(f"#!/usr/bin/env bash\n{noted}\n{ending}\n")
        fake.chmod(0o755)

    def of(commands, *flags, scontrol=0):
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": "4711",
            "RUNS": str(tmp_path / "shared runs"),
            "FAKE_SRUN": commands,
            "FAKE_SCONTROL": str(scontrol),
        }
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        done = subprocess.run(["bash", SCRIPT, *flags], env=environment, cwd=tmp_path, timeout=60)
        noted = [tmp_path / name for name in ("srun", "scontrol")]
        return done.returncode, *(p.read_text().splitlines() if p.exists() else [] for p in noted)

    return of


@pytest.mark.parametrize(
    ("commands", "scontrol", "requeued"),
    [
        *((f"exit {status}", 0, False) for status in (0, 1, 130)),
        (f"exit {EXIT_CODE}", 0, True),
        (f"exit {EXIT_CODE}", 1, True),  # keeps the exit code if requeueing fails
        # `scancel` sends SIGTERM to the processes and to the shell, which waits for them.
        (f"kill -TERM $PPID; sleep 0.1; exit {EXIT_CODE}", 0, False),
        ("kill -USR1 $PPID; sleep 0.1; exit 0", 0, False),
    ],
)
def test_only_runs_stopped_by_a_signal_are_requeued(submit, commands, scontrol, requeued):
    code, _, called = submit(commands, scontrol=scontrol)
    assert code == int(commands.split()[-1])
    assert called == (["requeue", "4711"] if requeued else [])


def test_processes_receive_the_signals_that_the_shell_traps(submit):
    """Ignored signals would be inherited by them."""
    for name in ("USR1", "TERM"):
        trap = f"trap 'exit {EXIT_CODE}' {name}; kill -{name} $$; exit 1"
        assert submit(f"exec bash -c {shlex.quote(trap)}")[0] == EXIT_CODE


def test_every_start_runs_the_same_command_in_the_same_folder(submit, tmp_path):
    environment = tmp_path / "environment"
    commands = f'echo "$JAX_COMPILATION_CACHE_DIR" > "{environment}"; exit 0'
    _, called, _ = submit(commands, "--lr_init=0.75", "--exp_name=two words")
    at = called.index("python")
    assert called[at : at + 3] == ["python", "-m", "experiments.resnet_cifar"]
    config = cli.parse(resnet_cifar.Config, called[at + 3 :])
    assert config.hosts.distributed and not config.hosts.coordinator
    assert (config.lr_init, config.exp_name) == (0.75, "two words")
    assert config.runs_dir == str(tmp_path / "shared runs")
    assert environment.read_text() == f"{tmp_path / 'shared runs' / 'compiled'}\n"


def test_the_header_fits_jax_and_our_signals():
    """One process per GPU, all of a node's GPUs visible; USR1 to the processes, not the shell."""
    lines = SCRIPT.read_text(encoding="utf-8").partition("\n\n")[0]  # sbatch stops reading there
    header = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", lines, re.MULTILINE))
    assert header["ntasks-per-node"] == header["gpus-per-node"]
    assert not {"gpus-per-task", "gpu-bind"} & header.keys()
    assert re.fullmatch(r"USR1@\d+", header["signal"]) and "requeue" in header
