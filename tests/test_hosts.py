"""Two processes act as one run on the devices of both."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.launch import hosts
from experiments.launch.hosts import Hosts
from experiments.storage import arrays, records

ROOT = Path(__file__).parents[1]
DEEP = [
    *("experiments.resnet_cifar", "--model=resnet_tiny", "--model_width=2", "--batch_size=16"),
    *("--batch_size_eval=32", "--epochs=40", "--eval_iter_freq=3", "--lr_init=0.05"),
    *("--lr_schedule=constant", "--sparsity_images=40", "--bn_images=32", "--deterministic"),
]
TOY = [
    *("experiments.diag_nets", "--n=12", "--d=16", "--support=2", "--seeds=6"),
    *("--num_steps=400", "--spectra_records=3"),
]


def start(command, log, devices, *joined):
    """Starts a process with `devices` CPU devices."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(log.parents[1] / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", *command, *joined]
    with log.open("w") as errors:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )


def alone(command, devices, folder):
    """Runs a command in one process to its end."""
    log = folder / "alone.log"
    assert start(command, log, devices).wait(200) == 0, log.read_text()


@pytest.fixture
def pair(tmp_path):
    """Starts a command as two processes, which end with the test."""
    started = []

    def of(command, devices=2):
        flags = ["--distributed", f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
        logs = [tmp_path / f"process{i}.log" for i in range(2)]
        processes = [
            start(command, log, devices, *flags, f"--process_id={i}") for i, log in enumerate(logs)
        ]
        started.extend(processes)
        return processes, logs

    yield of
    for process in started:
        process.kill()
        process.wait()


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def assert_end(processes, logs, codes):
    assert [process.wait(200) for process in processes] == codes, [log.read_text() for log in logs]


def wait_for(path, seconds=150):
    for _ in range(int(seconds * 20)):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"there is no {path}")


@pytest.fixture
def training(small_cifar, tmp_path):
    """(name, max_steps) -> command and folder of a training run."""

    def of(name, steps):
        where = [f"--data_dir={small_cifar}", f"--runs_dir={tmp_path}", f"--exp_name={name}"]
        folder = f"{name}-cifar10-resnet_tiny-w2-lr0.05-constant-seed0"
        command = [*DEEP, *where, f"--max_steps={steps}"]
        return command, tmp_path / "resnet_cifar" / folder

    return of


@pytest.mark.slow
def test_two_processes_train_as_one_and_continue_as_one(training, pair, tmp_path):
    """Saved by two processes, continued by two and by one: the same records up to tolerance."""
    whole, expected = training("alone", 6)
    alone(whole, 4, tmp_path)
    for steps in (3, 6):
        command, folder = training("pair", steps)
        assert_end(*pair(command), [0, 0])
    assert [entry["processes"] for entry in records.read_starts(folder)] == [2, 2]
    actual, expected = map(records.read_records, (folder, expected))
    assert [row["step"] for row in actual] == [row["step"] for row in expected] == [0, 3, 6]
    for mine, other in zip(actual, expected, strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            np.testing.assert_allclose(value, other[name], rtol=2e-3, atol=2e-2, err_msg=name)
        for name in ("train/loss", "test/loss", "param_norm"):
            np.testing.assert_allclose(mine[name], other[name], rtol=1e-4, err_msg=name)
    alone(training("pair", 8)[0], 1, tmp_path)
    assert [row["step"] for row in records.read_records(folder)] == [0, 3, 6, 8]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_if_one_process_is_killed_the_other_stops(training, pair, victim):
    """JAX may abort it before Python can print more than its first lines."""
    command, folder = training("killed", 0)
    processes, logs = pair([*command, "--save_every_seconds=0"])
    wait_for(folder / "checkpoints" / "3")
    processes[victim].kill()
    assert processes[1 - victim].wait(2 * hosts.HEARTBEAT_SECONDS) not in (0, 75)
    text = logs[1 - victim].read_text()
    assert str(folder) in text and "the same command on all hosts" in text
    assert all(int(step) >= 3 for step in re.findall(r"saved up to step (\d+)", text))
    steps = [row["step"] for row in records.read_records(folder)]
    assert steps == list(range(0, len(steps) * 3, 3))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "devices"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 1)])
def test_a_signal_to_one_process_stops_both_at_the_same_step(training, pair, number, devices):
    command, folder = training("signalled", 0)
    processes, logs = pair(command, devices)
    wait_for(folder / "checkpoints" / "3")
    processes[1].send_signal(number)
    assert_end(processes, logs, [75, 75])
    last = [log.read_text().splitlines()[-1] for log in logs]
    assert last[0].split("stopped")[1] == last[1].split("stopped")[1]
    saved = max(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    assert f"step {saved} of" in last[0] and number.name in last[1]


@pytest.mark.slow
def test_two_processes_sweep_as_one(pair, tmp_path):
    commands = [[*TOY, f"--runs_dir={tmp_path}", f"--exp_name={name}"] for name in ("one", "two")]
    alone(commands[0], 4, tmp_path)
    assert_end(*pair(commands[1]), [0, 0])
    one, two = (arrays.load_dataset(tmp_path / "diag_nets" / name) for name in ("one", "two"))
    for name in one.variables:
        if one[name].dtype.kind == "f":
            np.testing.assert_allclose(two[name], one[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_if_a_process_never_joins_the_others_abort_with_a_hint(tmp_path):
    """JAX itself aborts them."""
    program = (
        "from experiments.launch import hosts; hosts.JOIN_SECONDS = 1; "
        f"hosts.join(hosts.Hosts(True, 'localhost:{free_port()}', 2, 0))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode != 0
    assert "waiting 1 s" in ended.stderr and "--coordinator" in ended.stderr


def test_incomplete_host_flags_are_refused():
    for wrong, named in ((Hosts(coordinator="a:1"), "distributed"), (Hosts(True), "coordinator")):
        with pytest.raises(ValueError, match=f"--{named}"):
            hosts.join(replace(wrong, num_processes=2, process_id=0))
