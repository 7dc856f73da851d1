"""Communication of eight devices in a training step, in the compiled program."""

import json

import pytest

from benchmarks import scaling


@pytest.mark.usefixtures("shallow")
def test_a_step_all_reduces_gradients_moments_and_the_loss(tmp_path):
    """And nothing else: each parameter once, the channels of each norm twice, a scalar.

    Forward, a norm sums both moments in one pass. Backward, the two sums that it needs are the
    gradients of its scale and bias up to factors, which are all-reduced as parameters.
    """
    out = tmp_path / "scaling.json"
    scaling.main(["--nets", "shallow", "--width=2", "--precision=fp32", f"--out={out}"])
    net = json.loads(out.read_text())["nets"]["shallow"]
    exchanged = net["exchanged"]
    assert exchanged["ops"] == ["all-reduce"]
    assert exchanged["elements"] == net["parameters"] + 2 * net["norm_channels"] + 1
    assert exchanged["elements"] == exchanged["elements_by_law"]
    assert exchanged["bytes"] == net["gradient_bytes"] + net["norm_bytes"] + 4
    assert exchanged["bytes_sent_per_device_of_8"] == round(7 / 4 * exchanged["bytes"])
    # Forward and backward, the second sum waits for the first: BatchNorm costs latency.
    assert exchanged["instructions"] >= 2 * net["norms"] + 1
    # Weights, momentum, average, moments; the steps of training and of the schedule.
    floats = 3 * net["parameters"] + 2 * net["norm_channels"]
    assert 0 <= net["state_bytes"] - 4 * floats <= 16
