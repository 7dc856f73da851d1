"""A value outside its range ends in one line that names the flag, before anything is written."""

import importlib

import pytest

from experiments.launch import cli

WRONG = """
diag_nets     --seeds=0
diag_nets     --seed=-1
diag_nets     --data_seed=4294967296
diag_nets     --support=0
diag_nets     --num_steps=2147483648
diag_nets     --alpha=nan
diag_nets     --step_sizes 0.1 0.1 0.1 nan
diag_nets     --step_sizes 0.1 0.1 0.1 -0.1
diag_nets     --decay_times 1 0.1 0.3 1.01
diag_nets     --decay_factors 1 2 3 inf
diag_nets     --warmup_gains 0 0 0 -1
diag_nets     --batch_sizes 1 1 1 0
diag_nets     --batch_sizes 1 1 1 81
diag_nets     --decay_factors 1 2
fc_nets       --step_sizes 0.1 0
fc_nets       --warmup_exponent=0
fc_nets       --init_scale=inf
fc_nets       --momentum=1
fc_nets       --weight_decay=-1e-9
fc_nets       --label_noise=inf
fc_nets       --valley_steps=-1
loss_surface  --grid=1
loss_surface  --low=nan
loss_surface  --high=inf
loss_surface  --low=3
loss_surface  --frames=-1
phase_diagram --step_sizes 0.1 -inf
phase_diagram --trend_records=7
phase_diagram --decay_time=nan
phase_diagram --values 0.5 1.5
phase_diagram --values 1 1.5 --axis=batch_size
phase_diagram --values 1 81 --axis=batch_size
phase_diagram --values nan --axis=batch_size
phase_diagram --values 0 --axis=init_scale
reproduce     --seeds=1
reproduce     --workers=-1
resnet_cifar  --lr_init=nan
resnet_cifar  --epochs=0
resnet_cifar  --n_final_eval=0
resnet_cifar  --eval_iter_freq=-2
resnet_cifar  --frac_train=0
resnet_cifar  --swa_tau=1
resnet_cifar  --save_every_seconds=-1
resnet_cifar  --seed=4294967296
sweep_deep    --lr_init 0.1 inf
sweep_deep    --batch_size 8 0
"""


def start(command, *flags):
    """The command line, in this process, on the devices that it has."""
    module = importlib.import_module(f"experiments.{command}")
    config_type = module.grid_type() if command == "sweep_deep" else module.Config
    cli.main(config_type, module.run, flags, settings=getattr(module, "SETTINGS", None))


@pytest.mark.parametrize("line", WRONG.split("\n")[1:-1])
def test_a_value_out_of_range_is_refused_by_name(line, tmp_path, capsys):
    command, *flags = line.split()
    with pytest.raises(SystemExit) as stop:
        start(command, *flags, f"--runs_dir={tmp_path / 'runs'}")
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (1, "", 1)
    assert flags[0].partition("=")[0] in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    ["--eval_iter_freq=-1", "--save_every_seconds=inf", "--n_final_eval=-1", "--momentum=0"],
)
def test_the_ends_of_a_range_are_allowed_where_they_mean_something(flags, tmp_path, capsys):
    """The next check is reached: there are no data."""
    with pytest.raises(SystemExit):
        start("resnet_cifar", flags, f"--runs_dir={tmp_path}", "--dataset=none")
    assert "--dataset" in capsys.readouterr().err
