"""Files of a run folder: what is read is what was written, and nothing is ever written in part."""

import math
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from experiments.launch import cli
from experiments.storage import arrays, records


@dataclass(frozen=True)
class Config:
    exp_name: str = "one"
    lr: float = 0.1
    seeds: int = 3
    sizes: tuple[float, ...] = (0.5, math.inf)
    max_steps: int = 0


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_files(monkeypatch):
    """No file may grow beyond 60 bytes: writing fails in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_opens_again_with_the_same_settings_only(tmp_path):
    folder = records.open_run(tmp_path, "exp", "one", Config())
    assert folder == tmp_path / "exp" / "one" and names(folder) == ["config.json"]
    assert records.read_json(folder / "config.json")["sizes"] == [0.5, math.inf]
    assert records.open_run(tmp_path, "exp", "one", Config(lr=0.1)) == folder
    with pytest.raises(ValueError, match=r"lr.*max_steps") as refused:
        records.open_run(tmp_path, "exp", "one", Config(lr=0.2, max_steps=9))
    assert "seeds" not in str(refused.value) and str(folder) in str(refused.value)
    assert records.open_run(tmp_path, "exp", "two", Config(lr=0.2, max_steps=9)) != folder
    records.open_run(tmp_path, "exp", "one", Config(max_steps=9), may_change=["max_steps"])
    assert records.read_json(folder / "config.json")["max_steps"] == 9


def test_settings_of_another_version_are_named(tmp_path):
    folder = records.open_run(tmp_path, "exp", "one", Config())
    saved = records.read_json(folder / "config.json")
    del saved["seeds"]
    records.write_json(folder / "config.json", saved | {"old": None})
    with pytest.raises(ValueError, match=r"seeds.*old"):
        records.open_run(tmp_path, "exp", "one", Config())
    (folder / "config.json").write_text('{"lr": 0.1, "se')
    with pytest.raises(ValueError, match=r"config\.json"):
        records.open_run(tmp_path, "exp", "one", Config())
    (folder / "config.json").unlink()  # as the message advises
    records.open_run(tmp_path, "exp", "one", Config())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a/", "x" * 256, "é" * 128])
def test_a_name_is_one_file_name(tmp_path, name):
    with pytest.raises(ValueError, match="--exp_name"):
        records.open_run(tmp_path, "exp", name, Config())
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["mom[0.9]", "a b", "η→0", "-x", "back\\slash", "%d{}", "x" * 255])
def test_odd_but_legal_names_are_folders(tmp_path, name):
    folder = records.open_run(tmp_path / "r [1]", "exp", name, Config())
    records.append_row(folder, {"step": 1})
    records.open_run(tmp_path / "r [1]", "exp", name, Config())
    assert names(folder.parent) == [name] and records.read_rows(folder) == [{"step": 1}]


@pytest.mark.parametrize("runs_dir", ["gs://b/runs", "s3://b", "file:///tmp/x", "~nobody here/x"])
def test_what_is_no_folder_of_this_machine_is_refused(tmp_path, monkeypatch, runs_dir):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--runs_dir"):
        records.open_run(runs_dir, "exp", "one", Config())
    assert names(tmp_path) == []


def test_a_place_where_no_folder_can_be_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as refused:
        records.open_run(tmp_path / "file", "exp", "one", Config())
    assert str(tmp_path / "file") in cli.describe(refused.value)


def test_metrics_come_back_and_a_torn_last_line_goes(tmp_path):
    assert records.read_rows(tmp_path) == []
    rows = [{"step": s, "loss": s / 3, "best": s == 1, "name": "NaN"} for s in range(3)]
    for row in rows:
        records.append_row(tmp_path, row)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')  # a kill in the middle of a write
    assert records.read_rows(tmp_path) == rows
    records.drop_rows_after(tmp_path, 1)  # resumed from step 1
    assert records.read_rows(tmp_path) == rows[:2] and names(tmp_path) == ["metrics.jsonl"]
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    folder = tmp_path / "exp" / "one"
    folder.mkdir(parents=True)
    path.rename(folder / "metrics.jsonl")
    records.open_run(tmp_path, "exp", "one", Config())  # at the next start
    records.append_row(folder, rows[2])
    assert records.read_rows(folder) == rows


def test_numbers_that_are_not_finite_arrays_and_paths_are_written(tmp_path):
    row = {"a": np.float32(np.nan), "b": np.arange(2), "c": Path("x"), "d": [-math.inf, True]}
    records.append_row(tmp_path, row)
    (got,) = records.read_rows(tmp_path)
    assert math.isnan(got.pop("a")) and got == {"b": [0, 1], "c": "x", "d": [-math.inf, True]}


def test_a_damaged_line_is_named_and_removing_it_helps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    for call in (records.read_rows, lambda folder: records.drop_rows_after(folder, 5)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            call(tmp_path)
    path.write_text('{"step": 1}\n{"step": 3}\n')
    assert records.read_rows(tmp_path) == [{"step": 1}, {"step": 3}]


def test_the_manifest_tells_versions_and_whether_the_last_start_finished(tmp_path):
    assert not records.is_finished(tmp_path)
    records.start_manifest(tmp_path, seed=5, devices={"gpu:b", "cpu:a"}, from_step=0)
    assert not records.is_finished(tmp_path)
    records.finish_manifest(tmp_path, steps=7)
    assert records.is_finished(tmp_path)
    records.start_manifest(tmp_path, seed=6, devices=["cpu:a"])
    assert not records.is_finished(tmp_path)
    first, second = records.read_json(tmp_path / "manifest.json")["starts"]
    assert (first["seed"], first["from_step"], first["steps"], second["seed"]) == (5, 0, 7, 6)
    assert first["devices"] == ["cpu:a", "gpu:b"] and first["finished"] >= first["started"]
    assert first["versions"]["numpy"] == np.__version__
    assert first["python"] == sys.version.split()[0] and first["command"] == sys.orig_argv


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", lambda folder, x: records.write_json(folder / "a.json", {"a": [x] * 99})),
        ("a.npz", lambda folder, x: arrays.write_npz(folder / "a.npz", {"a": np.full(99, x)})),
    ],
)
def test_a_write_that_fails_leaves_the_old_file_and_names_it(tmp_path, name, write, request):
    write(tmp_path, 1)
    before = (tmp_path / name).read_bytes()
    request.getfixturevalue("small_files")
    with pytest.raises(OSError) as failed:
        write(tmp_path, 2)
    assert failed.value.filename == str(tmp_path / name)
    assert names(tmp_path) == [name] and (tmp_path / name).read_bytes() == before


def test_a_row_that_does_not_fit_on_the_disk_leaves_the_rows_before(tmp_path, small_files):
    records.append_row(tmp_path, {"step": 1})
    with pytest.raises(OSError) as failed:
        records.append_row(tmp_path, {"step": 2, "name": "x" * 60})
    assert failed.value.filename == str(tmp_path / "metrics.jsonl")
    assert records.read_rows(tmp_path) == [{"step": 1}]
