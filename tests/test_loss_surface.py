"""The loss over a plane, at small size."""

from dataclasses import replace

import numpy as np
import pytest

from experiments import loss_surface
from experiments.loss_surface import SETTINGS
from experiments.toy import problems

pytestmark = pytest.mark.usefixtures("quick_compilation")
D3 = SETTINGS["d3"]
SMALL = replace(D3, seeds=2, num_steps=300, spectra_records=2, grid=10, frames=2)


@pytest.fixture(scope="module")
def finding(tmp_path_factory):
    return loss_surface.run(replace(SMALL, runs_dir=str(tmp_path_factory.mktemp("runs"))))


def test_maps_paths_and_animation_are_drawn(finding):
    names = {path.name for path in finding.figures}
    stems = ("loss_surface", "loss_surface_along")
    assert names == {f"{s}.{k}" for s in stems for k in ("png", "pdf")} | {"loss_surface.gif"}
    assert all(path.stat().st_size > 5_000 for path in finding.figures)


def test_the_surface_is_the_loss_and_projections_are_those_of_the_path(finding):
    toy = problems.PROBLEMS["diagonal-plane"]()
    surface = loss_surface.map_out(SMALL, toy, finding.dataset)
    assert surface.points["init"] == (0.0, 0.0)
    np.testing.assert_allclose(surface.paths["flow"][0], 0, atol=1e-12)
    np.testing.assert_allclose(surface.paths["flow"][-1], surface.points["flow"], atol=1e-12)
    assert abs(surface.points["√θ*"][1]) < 1e-12  # the first axis points to it
    # Initialization and end of the flow are in the plane: there both losses are equal.
    flow = surface.loss["flow"], surface.loss_in_plane["flow"]
    np.testing.assert_allclose(flow[0][[0, -1]], flow[1][[0, -1]], rtol=1e-9)
    assert (np.abs(flow[0] / flow[1] - 1) > 1e-3).any()  # elsewhere they differ
    # The cell nearest to the initialization has nearly its loss.
    i = np.abs(surface.at).argmin()
    assert abs(np.log(surface.train[i, i] / flow[0][0])) < 0.7
    assert surface.test[:, -1].min() < surface.test[:, 0].min()  # the right edge is nearer to √θ*
