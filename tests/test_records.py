"""Files of a run folder: reads return what was written, and writes are atomic."""

import json
import math
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from experiments.storage import arrays, records


@dataclass(frozen=True)
class Config:
    lr: float = 0.1
    seeds: int = 3
    sizes: tuple[float, ...] = (0.5, math.inf)
    max_steps: int = 0


def names(folder):
    return sorted(os.listdir(folder))


def test_a_folder_opens_again_with_the_same_settings_only(tmp_path):
    folder = records.run_folder(tmp_path, "exp", "one")
    records.open_run(folder, Config())
    assert folder == tmp_path / "exp" / "one" and names(folder) == ["config.json"]
    assert records.read_json(folder / "config.json")["sizes"] == [0.5, math.inf]
    records.open_run(folder, Config())
    with pytest.raises(ValueError, match=r"lr 0\.1 -> 0\.2, max_steps 0 -> 9") as refused:
        records.open_run(folder, Config(lr=0.2, max_steps=9))
    assert "seeds" not in str(refused.value) and str(folder) in str(refused.value)
    records.open_run(folder, Config(max_steps=9), may_change=["max_steps"])
    assert records.read_json(folder / "config.json")["max_steps"] == 9


def test_settings_of_another_version_and_damaged_ones_are_named(tmp_path):
    records.open_run(tmp_path, Config())
    saved = records.read_json(tmp_path / "config.json")
    del saved["seeds"]  # a flag that is younger than the folder had its default
    for text, named in ((json.dumps(saved | {"old": 0}), "seeds 3.*old"), ("{", r"config\.json")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=named):
            records.open_run(tmp_path, Config(seeds=4))
    (tmp_path / "config.json").write_text(json.dumps(saved))
    records.open_run(tmp_path, Config())
    assert records.read_json(tmp_path / "config.json")["seeds"] == 3


@pytest.mark.parametrize(
    ("runs_dir", "name", "flag"),
    [(".", name, "--exp_name") for name in ("", "..", "a/b", "a/", "é" * 128)]
    + [(url, "one", "--runs_dir") for url in ("gs://b/runs", "s3://b/runs")],
)
def test_run_names_are_file_names_and_runs_dir_is_local(runs_dir, name, flag):
    with pytest.raises(ValueError, match=flag):
        records.run_folder(runs_dir, "exp", name)


def test_records_come_back_and_a_torn_last_line_is_dropped(tmp_path):
    rows = [{"step": s, "loss": s / 3, "best": s == 1, "name": "NaN"} for s in range(3)]
    for row in rows:
        records.append_record(tmp_path, row)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')  # a kill in the middle of a write
    assert records.read_records(tmp_path) == rows
    records.drop_records_after(tmp_path, 1)  # resumed from step 1
    assert records.read_records(tmp_path) == rows[:2] and names(tmp_path) == ["metrics.jsonl"]
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    records.open_run(tmp_path, Config())  # at the next start
    records.append_record(tmp_path, rows[2])
    assert records.read_records(tmp_path) == rows


def test_numbers_that_are_not_finite_arrays_and_paths_are_written(tmp_path):
    row = {"a": np.float32(np.nan), "b": np.arange(2), "c": Path("x"), "d": [-math.inf, True]}
    records.append_record(tmp_path, row)
    (got,) = records.read_records(tmp_path)
    assert math.isnan(got.pop("a")) and got == {"b": [0, 1], "c": "x", "d": [-math.inf, True]}


def test_the_manifest_has_versions_and_whether_the_last_start_finished(tmp_path):
    records.start_manifest(tmp_path, seed=5, devices={"gpu:b", "cpu:a"}, from_step=0)
    assert not records.is_finished(tmp_path)
    records.finish_manifest(tmp_path, steps=7)
    assert records.is_finished(tmp_path)
    records.start_manifest(tmp_path, seed=6, devices=["cpu:a"])
    assert not records.is_finished(tmp_path)
    first, second = records.read_starts(tmp_path)
    assert (first["seed"], first["from_step"], first["steps"], second["seed"]) == (5, 0, 7, 6)
    assert first["devices"] == ["cpu:a", "gpu:b"] and first["finished"] >= first["started"]
    assert first["versions"]["numpy"] == np.__version__ and first["command"] == sys.orig_argv


append = lambda folder, x: records.append_record(folder, {"x": "x" * 40})


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("config.json", lambda folder, x: records.open_run(folder, Config(lr=x))),
        ("a.npz", lambda folder, x: arrays.write_npz(folder / "a.npz", {"a": np.full(99, x)})),
        ("metrics.jsonl", append),
    ],
)
def test_a_write_that_fails_leaves_what_was_there_and_names_the_file(tmp_path, name, write):
    """With files limited to 60 bytes, writing fails midway, as on a full disk."""
    write(tmp_path, 1)
    read = records.read_records if write is append else lambda _: (tmp_path / name).read_bytes()
    before = read(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, limit[1]))
    try:
        with pytest.raises(OSError) as failed:
            write(tmp_path, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert failed.value.filename == str(tmp_path / name)
    assert names(tmp_path) == [name] and read(tmp_path) == before
