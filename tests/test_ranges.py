"""A value outside its range is a one-line error that names the flag, before any write."""

import importlib
import re

import pytest

from experiments.launch import cli

# The last flag of each line is invalid, the others are valid.
LINES = """
diag_nets     --seeds=0
diag_nets     --num_steps=2147483648
diag_nets     --alpha=nan
diag_nets     --step_sizes 0.1 0.1 0.1 0
diag_nets     --decay_times 1 0.1 0.3 1.01
diag_nets     --decay_factors 1 2
diag_nets     --warmup_gains 0 0 0 -1
diag_nets     --batch_sizes 1 1 1 81
fc_nets       --momentum=1
loss_surface  --grid=1
loss_surface  --low=3
loss_surface  --step_sizes 0.1
phase_diagram --trend_records=7
phase_diagram --values 0.5 1.5
phase_diagram --values 1 81 --axis=batch_size
phase_diagram --num_steps=30
reproduce     --seeds=1
loss_stabilization --seeds=1
shallow_linear --target=0
without_replacement --batches=10
resnet_cifar  --lr_init=nan
resnet_cifar  --n_final_eval=0
sweep_deep    --lr_init 0.1 inf
resnet_cifar  --n_final_eval=-1 --save_every_seconds=inf --momentum=0 --dataset=none
sweep_deep    --frac_train 1 0.5 --dataset=none
"""


@pytest.mark.parametrize("line", LINES.split("\n")[1:-1])
def test_a_value_out_of_range_is_refused_with_its_flag(line, tmp_path, capsys):
    """On the devices of the tests."""
    command, *flags = line.split()
    module = importlib.import_module(f"experiments.{command}")
    config_type = module.grid_type() if command == "sweep_deep" else module.Config
    flags.append(f"--runs_dir={tmp_path}")
    with pytest.raises(SystemExit) as stop:
        cli.main(config_type, module.run, flags, settings=getattr(module, "SETTINGS", None))
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (1, "", 1)
    assert re.findall(r"--\w+", line)[-1] in err
    assert list(tmp_path.iterdir()) == []
