"""Files that others damaged or made: each is read right, or refused in a line that names the cure.

How many malformed inputs each reader is given stands beside it: 1,800 in all.
"""

import builtins
import json
import math
import pickle
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from traps import (
    REFUSED,
    TRAP,
    Trap,
    answer,
    nothing_is_executed as nothing_is_executed,
)

from experiments import resnet_cifar, sweep_deep
from experiments.deep import config as flags, curves
from experiments.storage import records, values

PATIENT = settings(
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ]
)


@pytest.fixture(autouse=True)
def nothing_else_runs(monkeypatch):
    monkeypatch.setattr(records, "git_revision", lambda: None)
    monkeypatch.setattr(records, "_version", lambda package: None)


def test_the_traps_would_spring():
    for sprung in (lambda: pickle.loads(pickle.dumps(Trap())), lambda: eval(TRAP)):
        sprung()
        assert builtins.SPRUNG
        del builtins.SPRUNG


texts = st.text(max_size=6) | st.sampled_from(
    ["NaN", "-Infinity", "\\NaN", "\ud800", "\x1b[2J", "\0", "a\nb", "[/]", "$", TRAP, "step"]
)
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), True, 1e308, -0.0])
keys = texts | st.sampled_from(["starts", "finished", "epoch", "train/loss", "seeds", "reason"])
anything = st.recursive(
    st.none() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
ODD = [10**400, -(10**400), True, False, None, math.nan, math.inf, "NaN", "3", [3], {}, 1e308]
MONSTERS = [
    *(b"", b"\0" * 20, b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"null", b"{} {}", b"{'a': 1}"),
    *(b"[" * 100_000, b'{"a":' * 500 + b"1" + b"}" * 500),
    *(b'{"a": ' + b"[" * deep + b"]" * deep + b"}" for deep in (150, 300, 350, 400, 450, 900)),
    *(b'{"a": ' + b"1" * 5000 + b"}", b'{"a": 1e999}', b'{"a": NaN}', b'{"a": "\xed\xa0\x80"}'),
    *(TRAP.encode(), pickle.dumps(Trap()), b'{"a": "' + b"x" * 100_000 + b'"}'),
]


@st.composite
def damaged(draw, valid):
    """Bytes of the JSON object `valid`, with damage of some kind; or of something else."""
    kinds = ["bytes", "json", "monster", "cut", "flip", "field", "field", "field", "lost", "twice"]
    kind = draw(st.sampled_from(kinds))
    text = json.dumps(valid).encode()
    at = draw(st.integers(0, len(text) - 1))
    if kind == "bytes":
        return draw(st.binary(max_size=60))
    if kind == "json":
        return json.dumps(draw(anything)).encode()
    if kind == "monster":
        return draw(st.sampled_from(MONSTERS))
    if kind == "cut":
        return text[:at] + text[at + draw(st.integers(1, 9)) :]
    if kind == "flip":
        return text[:at] + bytes([text[at] ^ draw(st.integers(1, 255))]) + text[at + 1 :]
    name = draw(st.just(next(iter(valid))) | st.sampled_from(list(valid)))
    value = json.dumps(draw(st.sampled_from(ODD) | anything))
    if kind == "lost":
        return json.dumps({k: v for k, v in valid.items() if k != name}).encode()
    if kind == "twice":
        return text[:-1] + f", {json.dumps(name)}: {value}}}".encode()
    return json.dumps(valid | {name: "VALUE"}).replace('"VALUE"', value).encode()


def parsed(text):
    """Its meaning, by other means than ours: a value, or None where JSON has no single one."""

    def pairs(found):
        assert len(dict(found)) == len(found)
        return dict(found)

    try:
        value = json.loads(text.decode(), object_pairs_hook=pairs)
    except (ValueError, AssertionError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@dataclass(frozen=True)
class Config:
    exp_name: str = "one"
    lr: float = 0.1
    seeds: int = 3
    sizes: tuple[float, ...] = (0.5, 2.0)
    max_steps: int = 0


PLAIN = json.loads(json.dumps(asdict(Config())))


@settings(PATIENT, max_examples=600)
@given(damaged(PLAIN))
def test_a_config_says_the_same_settings_or_is_refused(tmp_path, content):
    """600 configurations."""
    path = tmp_path / "exp" / "one" / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    got = answer(
        lambda: records.open_run(tmp_path, "exp", "one", Config(), may_change=["max_steps"]),
        path.parent,
    )
    said = parsed(content)
    same = said is not None and {**said, "max_steps": 0} == PLAIN
    assert (got == path.parent) == same
    assert path.read_bytes() == content or same


START = {"started": "2026-01-01", "seed": 0, "devices": ["cpu:cpu"], "finished": "2026-01-02"}


@st.composite
def damaged_manifests(draw):
    """Damage to the whole, or to one of its starts."""
    if draw(st.booleans()):
        return draw(damaged({"starts": [START, START], "more": None}))
    last = draw(damaged(START))
    return b'{"starts": [' + json.dumps(START).encode() + b", " + last + b"]}"


@settings(PATIENT, max_examples=400)
@given(damaged_manifests())
def test_a_manifest_lists_starts_or_is_refused(tmp_path, content):
    """400 manifests, each read and written in three ways."""
    path = tmp_path / "manifest.json"
    whole = parsed(content)
    starts = whole.get("starts") if whole else None
    listed = isinstance(starts, list) and all(isinstance(start, dict) for start in starts)
    for call, more in (
        (lambda: records.is_finished(tmp_path), None),
        (lambda: records.start_manifest(tmp_path, seed=0, devices=()), 1),
        (lambda: records.finish_manifest(tmp_path, steps=3), 0),
    ):
        path.write_bytes(content)
        got = answer(call, path)
        if got is REFUSED:
            assert path.read_bytes() == content
        else:
            assert listed
        if more is None and got is not REFUSED:
            assert got == ("finished" in (starts or [{}])[-1])
        elif got is not REFUSED:
            after = json.loads(path.read_bytes())["starts"]
            assert (len(after) == len(starts) + more and more) or after[-1]["steps"] == 3


ROW = {"step": 3, "epoch": 0.5, "lr": 0.1, "train/distinct/block1": 0.5} | {
    f"{where}/{what}": 0.25
    for where in ("train", "test", "test_average")
    for what in ("loss", "error")
}
lines = st.lists(
    st.just(json.dumps(ROW).encode()) | damaged(ROW).map(lambda x: x.replace(b"\n", b" ")),
    min_size=1,
    max_size=3,
)
files = st.tuples(lines, st.booleans()).map(lambda x: b"\n".join(x[0]) + b"\n" * x[1])


def meant(value):
    """`value` with the floats that some words stand for; a backslash more has them be words."""
    if isinstance(value, list):
        return [meant(each) for each in value]
    if isinstance(value, dict):
        return {key: meant(each) for key, each in value.items()}
    floats = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    if isinstance(value, str) and value.lstrip("\\") in floats:
        return floats.get(value, value[1:])
    return value


def steps_of(content):
    """What the whole lines say; None where one of them is no row."""
    rows = [parsed(line) for line in content.split(b"\n")[:-1]]
    return None if None in rows else [row.get("step") for row in rows]


@settings(PATIENT, max_examples=400)
@given(files, st.integers(-1, 9))
def test_metrics_are_rows_or_are_refused(tmp_path, content, most):
    """400 files, each read, shortened and appended to."""
    path, steps = tmp_path / "metrics.jsonl", steps_of(content)
    path.write_bytes(content)
    rows = answer(lambda: records.read_rows(tmp_path), path)
    if rows is not REFUSED:
        assert repr([row.get("step") for row in rows]) == repr(meant(steps))
    kept = answer(lambda: records.drop_rows_after(tmp_path, most), path)
    if kept is REFUSED:
        assert path.read_bytes() == content
    else:
        assert all(values.is_number(step) and type(step) is not bool for step in steps)
        assert steps_of(path.read_bytes()) == [step for step in steps if step <= most]
    path.write_bytes(content)
    records.append_row(tmp_path, ROW)
    *before, last, nothing = path.read_bytes().split(b"\n")
    assert before == content.split(b"\n")[:-1] and parsed(last) == ROW and nothing == b""


@settings(PATIENT, max_examples=300)
@given(files)
def test_what_is_drawn_and_printed_is_numbers_or_is_refused(tmp_path, content):
    """300 files, each drawn in two ways, printed, and summed up in a table."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    run = sweep_deep.Run("one [bold]setting[/]", sweep_deep.Config(), tmp_path, "finished")
    drawn = []

    def figure(stem, panels, **_):
        for panel in panels:
            for x, y in panel.lines.values():
                assert np.asarray(x).dtype == np.asarray(y).dtype == float
                drawn.append(len(x))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves.plots, "figure", figure)
        for call in (
            lambda: curves.one_run(tmp_path, "title"),
            lambda: curves.several_runs(tmp_path / "x", {"one": [tmp_path]}, "title"),
            lambda: resnet_cifar.print_last_row(tmp_path),
            lambda: sweep_deep.show(tmp_path, "title", {run.setting: [run]}),
        ):
            got = answer(call, tmp_path)
    rows = [parsed(line) for line in content.split(b"\n")[:-1]]
    if got is not REFUSED:
        assert set(drawn) == {len(rows)}
        assert all({"step", "epoch", "train/loss", "test/error"} <= row.keys() for row in rows)


@settings(PATIENT, max_examples=100)
@given(damaged({"reason": "The loss is nan at step 3; lower the step size."}))
def test_what_a_run_diverged_of_is_told_or_is_refused(tmp_path, content):
    """100 files; what they say never moves the terminal's cursor."""
    config = replace(sweep_deep.Config(), runs_dir=str(tmp_path))
    folder = records.run_folder(*flags.place_of(config))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "diverged.json").write_bytes(content)
    got = answer(lambda: sweep_deep.once("one", config), folder / "diverged.json")
    said = (parsed(content) or {}).get("reason")
    said = None if said in ("NaN", "Infinity", "-Infinity") else said  # how records writes numbers
    assert (got is not REFUSED) == isinstance(said, str)
    assert got is REFUSED or got.outcome.isprintable()
