"""What a run costs beside its steps, in small."""

import json

import pytest

from benchmarks import overheads
from experiments.deep.config import Config as Flags
from experiments.launch import cli


def test_the_command_written_into_results_gives_the_same_run():
    config = overheads.Config(net="wrn28", width=1, steps=8, rounds=2)
    words = overheads.command(config).split()[3:]
    assert cli.parse(overheads.Config, words) == config


@pytest.mark.parametrize("flag", ["--steps=3", "--rounds=0", "--batch_size=0"])
def test_what_cannot_be_timed_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        overheads.main(["--net=resnet_tiny", "--width=2", flag])
    assert "4 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_a_save_is_a_share_of_the_time_between_two(tmp_path, capsys):
    out = tmp_path / "overheads.json"
    tiny = ("--net=resnet_tiny", "--width=2", "--batch_size=8", "--steps=8", "--rounds=2")
    overheads.main([*tiny, f"--out={out}"])
    found = json.loads(out.read_text())
    assert all(len(each) == 2 for each in found["rounds"].values())
    assert min(found["save_alone_s"], found["save_keeps_the_loop_s"], found["ms_per_step"]) > 0
    cost = max(found["save_keeps_the_loop_s"], found["save_lengthens_the_run_s"])
    assert found["share_of_a_run"] == pytest.approx(cost / Flags.save_every_seconds)
    assert "from one to the next" in capsys.readouterr().out
