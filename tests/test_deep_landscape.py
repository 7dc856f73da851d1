"""The loss over planes of a classifier's weights, on a run with three saved states."""

import jax
import numpy as np
import pytest

from experiments import loss_surface
from experiments.deep import training
from experiments.deep.config import Config
from experiments.launch import cli
from experiments.storage import arrays

pytestmark = pytest.mark.usefixtures("shallow", "single_precision", "unrendered")


@pytest.fixture(scope="module")
def finished(small_cifar, shallow, tmp_path_factory):
    """The folder of a run with saved states at steps 0, 2 and 4."""
    flags = (
        "--model=shallow --model_width=2 --batch_size=32 --batch_size_eval=16 --epochs=2 "
        "--lr_init=0.05 --lr_schedule=constant --n_final_eval=8 --sparsity_images=8 --bn_images=32 "
        f"--save_model_each_k_epochs=1 --data_dir={small_cifar} "
        f"--runs_dir={tmp_path_factory.mktemp('runs')}"
    )
    with jax.enable_x64(False):
        return training.run(cli.parse(Config, flags.split()))


def mapped(folder, plane):
    flags = [f"--run={folder}", f"--plane={plane}", "--points=3", "--images=32"]
    loss_surface.main(flags)
    return arrays.read_npz(folder / f"landscape_{plane}.npz")


def test_the_centre_is_the_last_state_and_a_plane_through_three_states_has_their_losses(finished):
    random = mapped(finished, "random")
    last = random["loss_of_path"][-1]
    assert random["loss"][1, 1] == pytest.approx(last, rel=1e-5)
    assert not np.allclose(random["loss"], last, rtol=1e-3)
    path = mapped(finished, "path")
    assert len(path["steps"]) == 3
    # Three points lie in their plane.
    np.testing.assert_allclose(path["loss_in_plane"], path["loss_of_path"], rtol=1e-4)


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        loss_surface.main([f"--run={tmp_path}"])
    assert str(tmp_path) in capsys.readouterr().err
