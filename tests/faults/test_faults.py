"""Runs with kills, signals, full disks and damaged files at random times have the same results.

    pytest -n 0 -s -m slow tests/faults

FAULTS_SEED=N repeats the draws of an earlier campaign, which prints its seed above the table;
FAULTS_SHARE=0.2 injects a fifth of the faults.
"""

import contextlib
import math
import os
import secrets
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import verdict
from campaign import Campaign, Experiment
from faults import KINDS, may_bind, mounted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SHARE = float(os.environ.get("FAULTS_SHARE", "1"))
DISK = 48  # MiB
SIGNALS = {"SIGTERM": 3, "SIGINT": 2, "SIGUSR1": 2}
DEEP = Experiment(
    name="resnet_cifar",
    flags=(
        *("--model=resnet_tiny", "--model_width=2", "--batch_size=16", "--batch_size_eval=32"),
        *("--epochs=40", "--max_steps=40", "--eval_iter_freq=7", "--lr_init=0.05"),
        *("--lr_schedule=constant", "--sparsity_images=40", "--bn_images=32", "--deterministic"),
        *("--save_every_seconds=0", "--exp_name=faults"),
    ),
    saves="checkpoints",
    whole=40,
    kinds=SIGNALS | {"kill -9": 8, "disk full": 5, "read-only": 4, "damaged save": 5, "cut row": 3},
)
TOY = Experiment(
    name="diag_nets",
    flags=(
        *("--n=12", "--d=16", "--support=2", "--seeds=256", "--num_steps=4000"),
        *("--spectra_records=3", "--batch_sizes", "1", "1", "12", "12", "--exp_name=faults"),
    ),
    saves="chunks",
    whole=8,
    kinds=SIGNALS | {"kill -9": 7, "disk full": 4, "read-only": 3, "damaged save": 5},
)


@pytest.fixture(scope="module")
def outcome(small_cifar, tmp_path_factory):
    """Runs, findings and faults that could not be tried, by experiment; prints the table."""
    seed = os.environ.get("FAULTS_SEED") or str(secrets.randbelow(10**6))
    place = tmp_path_factory.mktemp("faults")
    began = time.monotonic()
    some = lambda each: {kind: math.ceil(count * SHARE) for kind, count in each.kinds.items()}
    deep = replace(DEEP, flags=(*DEEP.flags, f"--data_dir={small_cifar}"), kinds=some(DEEP))
    both = {each.name: each for each in (deep, replace(TOY, kinds=some(TOY)))}
    with contextlib.ExitStack() as stack:
        disks = [place / f"disk-{name}" for name in both]
        mounts = [stack.enter_context(mounted(disk, DISK)) for disk in disks]
        may = {"disk full": all(mounts), "read-only": may_bind(place / "bound")}
        can = [kind for kind in KINDS if may.get(kind, True)]

        def one(experiment, disk):
            campaign = Campaign(experiment, place, disk, seed)
            return campaign.undisturbed(), campaign.disturbed(can)

        with ThreadPoolExecutor() as pool:
            done = dict(zip(both, pool.map(one, both.values(), disks), strict=True))
    runs = {name: runs for name, (_, runs) in done.items()}
    findings = {
        name: [f for run in runs for f in verdict.of_run(both[name], run, reference)]
        for name, (reference, runs) in done.items()
    }
    not_run = [
        kind for each in both.values() for kind in Counter(each.kinds).elements() if kind not in can
    ]
    seconds = round(time.monotonic() - began)
    print(f"\nFAULTS_SEED={seed}, {seconds} s\n{verdict.table(runs, findings)}")
    print("not run, because this user may not mount:", not_run)
    for name, of_experiment in findings.items():
        for finding in of_experiment:
            print(f"{name}: {finding}")
    return runs, not_run, findings


@pytest.mark.parametrize("counter", verdict.COUNTERS)
def test_faults_cause_no(outcome, counter):
    findings = [f for found in outcome[2].values() for f in found if f.counter == counter]
    assert findings == []


def test_all_faults_were_injected(outcome):
    runs, not_run, _ = outcome
    lives = [life for of_experiment in runs.values() for run in of_experiment for life in run.lives]
    assert sum(bool(life.kind) for life in lives) + len(not_run) >= 50 * SHARE
