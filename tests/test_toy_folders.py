"""Run folders of toys: interrupted, damaged, or with other settings."""

import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest

from experiments import diag_nets
from experiments.launch.signals import Stopped
from experiments.storage import arrays, records
from experiments.toy import config as toys, ensemble, problems

TOY = problems.diagonal(n=12, d=16, support=2)
CONFIG = replace(  # 8 devices take 128 seeds at once: two chunks
    diag_nets.SETTINGS["d1"], seeds=130, num_steps=60, n=12, d=16, support=2, spectra_records=2
)


def run(runs_dir, **changes):
    """Folder and data of a run."""
    config = replace(CONFIG, runs_dir=str(runs_dir), **changes)
    plan = toys.resolve("diag_nets", config, TOY)
    return plan.folder, ensemble.results(plan)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that received SIGTERM after its first chunk was saved."""
    runs_dir, write = tmp_path_factory.mktemp("stopped"), arrays.write_npz
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
        patch.setattr(arrays, "write_npz", lambda *what: (write(*what), terminate()))
        run(runs_dir)
    folder = runs_dir / "diag_nets" / "d1"
    assert len(list((folder / "chunks").iterdir())) == 1 and not records.is_finished(folder)
    return runs_dir


@pytest.fixture
def runs_dir(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "runs")


def test_a_seed_does_not_depend_on_the_number_of_seeds_or_chunks(whole, tmp_path):
    _, few = run(tmp_path, seeds=2)
    for name in ("train_loss", "support", "rank", "theta"):
        np.testing.assert_allclose(few[name], whole[1][name][:2], rtol=1e-10, atol=1e-14)


def test_a_stopped_run_continues_to_the_same_results(whole, runs_dir, caplog):
    folder = runs_dir / "diag_nets" / "d1"
    scratch = [folder / "chunks" / f".x.npz-{32 * 'a'}", folder / f".config.json-{32 * '0'}"]
    for path in (*scratch, folder / "chunks" / "batch1-0.npz"):  # of a kill, of another version
        path.write_bytes(b"half")
    assert run(runs_dir)[1].identical(whole[1]) and not caplog.records
    assert not (folder / "chunks").exists() and not any(path.exists() for path in scratch)
    assert records.is_finished(folder)


def test_a_finished_chunk_is_not_computed_again(whole, runs_dir):
    (path,) = runs_dir.glob("diag_nets/d1/chunks/*.npz")
    chunk = arrays.read_npz(path)
    arrays.write_npz(path, chunk | {"step/support": chunk["step/support"] + 1})
    more = run(runs_dir)[1]["support"] - whole[1]["support"]
    np.testing.assert_array_equal(more.max(("schedule", "step")), np.arange(130) < 128)


def test_a_damaged_chunk_is_computed_again_with_a_warning(whole, runs_dir, caplog):
    (path,) = runs_dir.glob("diag_nets/d1/chunks/*.npz")
    path.write_bytes(path.read_bytes()[:-40] + 40 * b"x")
    assert run(runs_dir)[1].identical(whole[1])
    assert [path.name in record.getMessage() for record in caplog.records] == [True]


def test_a_finished_run_is_read_again(whole, capsys):
    folder, dataset = whole
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.nc")}
    (folder / "chunks").mkdir()  # left by a kill between the last two steps
    assert run(folder.parents[1])[1].identical(dataset)
    assert not (folder / "chunks").exists() and str(folder) in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.nc")} == before


def test_unreadable_results_are_an_error_with_file_and_hint(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "diag_nets" / "d1")
    path = folder / "results.nc"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="--exp_name") as refused:
        run(tmp_path)
    assert str(path) in str(refused.value)
