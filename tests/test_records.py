"""What is read is what was written, and nothing is ever written by halves."""

import errno
import json
import math
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from experiments.storage import files, npz, records

words = st.text(max_size=8) | st.sampled_from(
    ["NaN", "\\NaN", "\\\\NaN", "Infinity", "-Infinity", "nan", "null", "\u2028", "\ud800", "é\n"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
objects = st.dictionaries(words, values, max_size=5)
steps = st.integers(-3, 30)
row_lists = st.lists(st.builds(lambda row, step: row | {"step": step}, objects, steps), max_size=4)


@dataclass(frozen=True)
class Config:
    exp_name: str = "one"
    lr: float = 0.1
    seeds: int = 3
    sizes: tuple[float, ...] = (0.5, math.inf)
    max_steps: int = 0
    extra: dict = field(default_factory=dict)


def same(a, b):
    """Equality in which NaN equals NaN, and 1, 1.0 and True are three."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if type(a) is not type(b):
        return False
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(folder, rows):
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    for row in rows:
        records.append_row(folder, row)


@pytest.fixture
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.usefixtures("quick_disk")
@settings(max_examples=200)
@example({"x": "NaN", "y": ["\\NaN", {"z": math.nan}], "-Infinity": -math.inf})
@given(objects)
def test_json_comes_back(tmp_path, value):
    records.write_json(tmp_path / "a.json", value)
    assert same(records.read_json(tmp_path / "a.json"), value)
    assert names(tmp_path) == ["a.json"]

    def forbidden(word):
        raise AssertionError(word)

    json.loads((tmp_path / "a.json").read_text("ascii"), parse_constant=forbidden)


@pytest.mark.usefixtures("quick_disk")
@settings(max_examples=200)
@given(row_lists)
def test_rows_come_back(tmp_path, rows):
    fill(tmp_path, rows)
    assert same(records.read_rows(tmp_path), rows)


def test_arrays_and_paths_are_written_as_plain_values(tmp_path):
    row = {"a": np.float32(np.nan), "b": np.arange(2), "c": Path("x/y"), "d": (np.bool_(True), 1)}
    records.append_row(tmp_path, row)
    want = {"a": math.nan, "b": [0, 1], "c": "x/y", "d": [True, 1]}
    assert same(records.read_rows(tmp_path), [want])


def test_a_nan_reads_as_one_outside_too(tmp_path):
    records.append_row(tmp_path, {"loss": math.nan, "name": "NaN"})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"loss": "NaN", "name": "\\NaN"}
    assert math.isnan(float(json.loads(line)["loss"]))


@pytest.mark.usefixtures("quick_disk")
@settings(max_examples=50)
@given(row_lists, steps, st.data())
def test_dropping_leaves_the_rows_up_to_a_step(tmp_path, rows, step, data):
    fill(tmp_path, rows)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes() if rows else b""
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    left = [row for row in rows[: whole[:cut].count(b"\n")] if row["step"] <= step]
    records.drop_rows_after(tmp_path, step)
    assert same(records.read_rows(tmp_path), left)
    assert path.read_bytes() == b"" or path.read_bytes().endswith(b"\n")
    records.append_row(tmp_path, {"step": 99})
    assert same(records.read_rows(tmp_path), [*left, {"step": 99}])
    assert names(tmp_path) == ["metrics.jsonl"]


@pytest.mark.usefixtures("quick_disk")
@settings(max_examples=50)
@given(row_lists, st.data())
def test_a_row_never_sticks_to_one_that_a_kill_cut(tmp_path, rows, data):
    fill(tmp_path, rows)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes() if rows else b""
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    before = records.read_rows(tmp_path)
    assert same(before, rows[: whole[:cut].count(b"\n")])
    records.append_row(tmp_path, {"step": 99})
    assert same(records.read_rows(tmp_path), [*before, {"step": 99}])


def test_no_rows_yet(tmp_path):
    assert records.read_rows(tmp_path) == []
    records.drop_rows_after(tmp_path, 3)
    assert names(tmp_path) == []


@pytest.mark.parametrize("step", ['"3"', "null", '"NaN"', "[]"])
def test_a_row_without_its_step_is_refused(tmp_path, step):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{{"step": {step}}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl.*step"):
        records.drop_rows_after(tmp_path, 5)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl.*step"):
        records.drop_rows_after(tmp_path, 5)


def test_the_folder_holds_the_configuration(tmp_path):
    config = Config(lr=math.nan, extra={"word": "NaN", "é": [1, None]})
    folder = records.open_run(tmp_path, "exp", "one", config)
    assert folder == tmp_path / "exp" / "one"
    assert names(folder) == ["config.json"]
    saved = records.read_json(folder / "config.json")
    assert math.isnan(saved.pop("lr"))
    assert saved == {
        "exp_name": "one",
        "seeds": 3,
        "sizes": [0.5, math.inf],
        "max_steps": 0,
        "extra": {"word": "NaN", "é": [1, None]},
    }
    assert records.open_run(tmp_path, "exp", "one", config) == folder


def test_conflicts_are_named_field_by_field(tmp_path):
    folder = records.open_run(tmp_path, "exp", "one", Config())
    before = (folder / "config.json").read_bytes()
    other = Config(lr=math.inf, sizes=(0.5,), max_steps=9)
    with pytest.raises(ValueError) as error:
        records.open_run(tmp_path, "exp", "one", other)
    text = str(error.value)
    for change in ('lr 0.1 -> "Infinity"', '[0.5, "Infinity"] -> [0.5]', "max_steps 0 -> 9"):
        assert change in text
    assert "seeds" not in text
    assert "--exp_name" in text
    assert str(folder) in text
    assert (folder / "config.json").read_bytes() == before


def test_the_word_nan_and_the_number_conflict(tmp_path):
    records.open_run(tmp_path, "exp", "one", Config(extra={"a": math.nan}))
    with pytest.raises(ValueError, match="extra"):
        records.open_run(tmp_path, "exp", "one", Config(extra={"a": "NaN"}))


def test_fields_that_come_or_go_conflict(tmp_path):
    folder = records.open_run(tmp_path, "exp", "one", Config())
    saved = records.read_json(folder / "config.json")
    del saved["seeds"]
    records.write_json(folder / "config.json", saved | {"old": None})
    with pytest.raises(ValueError, match="seeds absent -> 3, old null -> absent"):
        records.open_run(tmp_path, "exp", "one", Config())
    records.open_run(tmp_path, "exp", "one", Config(), may_change=["seeds", "old"])


def test_what_may_change_changes(tmp_path):
    may = {"may_change": ("max_steps",)}
    folder = records.open_run(tmp_path, "exp", "one", Config(), **may)
    records.open_run(tmp_path, "exp", "one", Config(max_steps=9), **may)
    assert records.read_json(folder / "config.json")["max_steps"] == 9
    with pytest.raises(ValueError, match=r"\(seeds 3 -> 4\)"):
        records.open_run(tmp_path, "exp", "one", Config(max_steps=8, seeds=4), **may)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a/"])
def test_a_name_is_one_folder(tmp_path, name):
    with pytest.raises(ValueError, match="--exp_name"):
        records.open_run(tmp_path, "exp", name, Config())
    assert names(tmp_path) == []


def test_where_no_folder_can_be_is_a_permission_error(tmp_path):
    (tmp_path / "file").write_text("")
    for runs_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PermissionError, match="--runs_dir") as error:
            records.open_run(runs_dir, "exp", "one", Config())
        assert str(runs_dir) in str(error.value)
    with pytest.raises(ValueError, match="--runs_dir"):
        records.open_run("~no such user/runs", "exp", "one", Config())


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def writes(folder):
    """Every way to write, as (file, call)."""
    return {
        "config.json": lambda: records.write_json(folder / "config.json", {"new": 1}),
        "manifest.json": lambda: records.finish_manifest(folder),
        "arrays.npz": lambda: npz.save(folder, {"a": np.ones(3)}),
        "metrics.jsonl": lambda: records.drop_rows_after(folder, 0),
    }


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "arrays.npz", "metrics.jsonl"])
@pytest.mark.parametrize("broken", ["fsync", "replace", "write"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, name, broken):
    folder = records.open_run(tmp_path, "exp", "one", Config())
    records.start_manifest(folder, seed=1, devices=["cpu"])
    npz.save(folder, {"a": np.zeros(2)})
    records.append_row(folder, {"step": 1})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        if broken == "write":
            patch.setattr(Path, "open", half_full(Path.open))
        else:
            patch.setattr(os, broken, full)
        with pytest.raises(OSError) as error:
            writes(folder)[name]()
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(folder / name)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    writes(folder)[name]()
    assert (folder / name).read_bytes() != before[name]
    assert names(folder) == sorted(before)


def half_full(real_open):
    """`Path.open` onto a disk that takes three bytes and is full."""

    def opened(self, mode="r", *args, **kwargs):
        file = real_open(self, mode, *args, **kwargs)
        if mode not in ("wb", "a+b"):
            return file

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, content):
                file.write(bytes(content)[:3])
                file.flush()
                full()

        return Full()

    return opened


def test_a_row_on_a_full_disk_names_the_file_and_harms_no_other(tmp_path, monkeypatch):
    records.append_row(tmp_path, {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", half_full(Path.open))
        with pytest.raises(OSError, match="No space left") as error:
            records.append_row(tmp_path, {"step": 2})
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    assert records.read_rows(tmp_path) == [{"step": 1}]
    records.append_row(tmp_path, {"step": 3})
    assert records.read_rows(tmp_path) == [{"step": 1}, {"step": 3}]


def test_what_json_cannot_say_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        records.append_row(tmp_path, {"a": {1, 2}})
    with pytest.raises(TypeError):
        records.write_json(tmp_path / "a.json", {"a": 1j})
    assert names(tmp_path) == []


def test_a_row_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: (synced.append(os.fstat(f).st_size), real(f))[1])
    records.append_row(tmp_path, {"step": 1})
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_size]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["starts", "finished", "step", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
damaged = (
    st.binary(max_size=60)
    | json_values.map(lambda value: json.dumps(value).encode())
    | json_values.map(lambda value: json.dumps({"starts": value}).encode())
    | st.just(b"[" * 100_000)
    | st.just(b'{"x": ' + b"1" * 5000 + b"}")
    | st.just(b'{"x": "\xff"}')
)


def calls(folder):
    return {
        "manifest.json": [
            lambda: records.is_finished(folder),
            lambda: records.finish_manifest(folder),
            lambda: records.start_manifest(folder, seed=0, devices=()),
        ],
        "config.json": [
            lambda: records.read_json(folder / "config.json"),
            lambda: records.open_run(folder.parent, "exp", "one", Config()),
        ],
        "metrics.jsonl": [
            lambda: records.read_rows(folder),
            lambda: records.drop_rows_after(folder, 3),
        ],
    }


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "metrics.jsonl"])
@pytest.mark.usefixtures("quick_disk")
@settings(max_examples=50)
@given(damaged, st.booleans())
def test_a_damaged_file_is_a_value_error_that_names_it(tmp_path, name, content, ended):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "git_revision", lambda: None)
        patch.setattr(records, "_version", lambda package: None)
        folder = tmp_path / "exp" / "one"
        folder.mkdir(parents=True, exist_ok=True)
        for call in calls(folder)[name]:
            (folder / "config.json").unlink(missing_ok=True)
            (folder / name).write_bytes(content + b"\n" * ended)
            try:
                call()
            except ValueError as error:
                assert name in str(error) or "holds a run with other settings" in str(error)
                assert len(str(error)) < 10_000


def test_the_manifest_says_what_ran(tmp_path):
    records.start_manifest(tmp_path, seed=5, devices={"gpu:b", "cpu:a"}, from_step=0)
    records.finish_manifest(tmp_path, steps=7)
    records.start_manifest(tmp_path, seed=6, devices=["cpu:a"], from_step=7)
    first, second = records.read_json(tmp_path / "manifest.json")["starts"]
    assert first["seed"] == 5
    assert first["devices"] == ["cpu:a", "gpu:b"]
    assert first["from_step"] == 0
    assert first["steps"] == 7
    assert first["finished"] >= first["started"]
    assert first["versions"]["numpy"] == np.__version__
    assert {"jax", "jaxlib", "flax", "optax"} <= first["versions"].keys()
    assert first["git"] == records.git_revision()
    assert first["python"] == sys.version.split()[0]
    assert first["command"][3:] == sys.argv[1:]
    assert second["from_step"] == 7
    assert "finished" not in second


def test_a_run_is_finished_when_its_last_start_is(tmp_path):
    assert not records.is_finished(tmp_path)
    for _ in range(2):
        records.start_manifest(tmp_path, seed=0, devices=[])
        assert not records.is_finished(tmp_path)
        records.finish_manifest(tmp_path)
        assert records.is_finished(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"starts": 3}', '{"starts": [3]}', '{"starts": {}}', "[]"])
def test_an_odd_manifest_is_a_value_error(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    for call in calls(tmp_path)["manifest.json"]:
        with pytest.raises(ValueError, match=r"manifest\.json.*remove it"):
            call()
    assert (tmp_path / "manifest.json").read_text() == text


def test_a_manifest_of_no_start_is_not_finished_and_cannot_be(tmp_path):
    (tmp_path / "manifest.json").write_text('{"starts": []}')
    assert not records.is_finished(tmp_path)
    with pytest.raises(ValueError, match="no start"):
        records.finish_manifest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError):
        records.finish_manifest(tmp_path)


def test_the_revision_says_whether_files_differ(monkeypatch):
    def answers(status):
        def run(command, **_):
            out = "abc\n" if "rev-parse" in command else status
            return records.subprocess.CompletedProcess(command, 0, out, "")

        return run

    monkeypatch.setattr(records.subprocess, "run", answers(""))
    assert records.git_revision() == "abc"
    monkeypatch.setattr(records.subprocess, "run", answers(" M file\n"))
    assert records.git_revision() == "abc+"
    monkeypatch.setattr(records.subprocess, "run", full)
    assert records.git_revision() is None


def test_a_dataclass_that_differs_in_nothing_opens_again(tmp_path):
    records.open_run(tmp_path, "exp", "one", Config(lr=1.0))
    records.open_run(tmp_path, "exp", "one", replace(Config(), lr=1))


def test_one_row_that_was_lost_comes_back_as_it_was(tmp_path, caplog):
    for step in range(3):
        records.append_row(tmp_path, {"step": step, "loss": 0.1 + step, "rank": float("nan")})
    path = tmp_path / "metrics.jsonl"
    whole, known = path.read_bytes(), records.written(tmp_path)
    records.put_back(tmp_path, known)
    assert path.read_bytes() == whole and not caplog.records
    path.write_bytes(whole[:-9])
    records.put_back(tmp_path, known)
    assert path.read_bytes() == whole
    assert f"{path} had lost the row of step 2" in caplog.text


def test_more_than_one_lost_row_is_an_error(tmp_path):
    for step in range(3):
        records.append_row(tmp_path, {"step": step})
    known = records.written(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match=r"has lost 2 rows of its metrics.jsonl; remove that"):
        records.put_back(tmp_path, known)


def test_what_a_killed_process_left_half_written_goes_with_the_next_start(tmp_path):
    folder = records.open_run(tmp_path, "e", "n", Config())
    (folder / "chunks").mkdir()
    mine = [folder / ".hidden", folder / "chunks" / "batch1-0.npz"]
    left = [folder / f".{name}-{32 * 'a'}" for name in ("probe", "metrics.jsonl")]
    left.append(folder / "chunks" / f".batch1-0.npz-{32 * '0'}")
    for path in (*mine, *left):
        path.touch()
    records.open_run(tmp_path, "e", "n", Config())
    assert all(path.exists() for path in mine) and not any(path.exists() for path in left)


def test_a_read_only_place_is_told_by_the_file_that_was_to_be(tmp_path, monkeypatch):
    def read_only(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)  # refused even where there is nothing to remove
    with pytest.raises(OSError, match="Read-only") as no:
        files.write_bytes(tmp_path / "file", b"")
    assert no.value.filename == str(tmp_path / "file")


def test_a_run_folder_on_a_full_disk_names_that_cure(tmp_path, monkeypatch):
    def full(path, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(PermissionError, match="free some space, or choose another place"):
        records.open_run(tmp_path, "e", "n", Config())
