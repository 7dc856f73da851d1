"""Weights from PyTorch and back: outputs, bit-identity and errors. Skips without torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import export_torch, import_torch
from sgd_sparse_jax import models
from sgd_sparse_jax.models import state_dict

SHAPE = (32, 32, 3)
WIDTHS = {"resnet18_plain": 4, "wrn28": 1, "densenet100_12": 2}


def trained_looking(net):
    """The state dict of a network with random weights and moments."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                drawn = 0.1 * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + drawn.abs() if name.endswith("running_var") else tensor + drawn)
            else:
                tensor.fill_(7)
    return net


@pytest.mark.parametrize(
    "name",
    ["resnet18_plain", "wrn28", pytest.param("densenet100_12", marks=pytest.mark.slow)],
)
def test_outputs_are_those_of_the_pytorch_network_and_weights_return_bit_for_bit(name, tmp_path):
    torch = pytest.importorskip("torch")
    torch_nets = pytest.importorskip("benchmarks.torch_nets")
    net = trained_looking(torch_nets.NETWORKS[name](10, WIDTHS[name])).eval()
    file, again = tmp_path / "net.pth", tmp_path / "again.pth"
    saved = net.state_dict()  # by itself, or as the paper's code saves it
    torch.save(saved if name == "wrn28" else {"last": saved, "swa_last": saved}, file)
    flags = [f"--model={name}", f"--model_width={WIDTHS[name]}"]
    folder = tmp_path / "run"
    with jax.enable_x64(False):
        import_torch.main([str(file), *flags, f"--out={folder}"])
        export_torch.main([str(folder), f"--names={file}", f"--out={again}"])
        before, after = net.state_dict(), torch.load(again, weights_only=True)
        assert list(before) == list(after)
        assert all(torch.equal(before[n], after[n]) for n in before)
        x = np.random.default_rng(0).random((2, *SHAPE), np.float32)
        network = models.from_linen(models.build(name, classes=10, width=WIDTHS[name]))
        tensors = {n: t.numpy() for n, t in before.items()}
        weights = state_dict.from_state_dict(network, SHAPE, tensors)
        out = jax.jit(network.apply)(*weights, jnp.asarray(x)).out
    want = net(torch.from_numpy(x).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def small():
    return models.from_linen(models.ResNet((1,), classes=3, width=2))


def test_the_inverse_is_exact_and_a_file_of_another_network_is_refused():
    network = small()
    weights = network.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    arrays = state_dict.to_state_dict(network, SHAPE, *weights)
    back = state_dict.from_state_dict(network, SHAPE, arrays)
    jax.tree.map(np.testing.assert_array_equal, back, weights)
    name = next(name for name, array in arrays.items() if array.ndim == 4)
    for changed in (
        {**arrays, name: arrays[name][..., :1]},
        dict(list(arrays.items())[:-1]),
        {**arrays, "more.weight": np.zeros(2)},
    ):
        with pytest.raises(ValueError, match="another model"):
            state_dict.from_state_dict(network, SHAPE, changed)


def test_a_file_that_would_execute_code_is_refused(tmp_path, capsys):
    torch = pytest.importorskip("torch")

    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"weight": Harm()}, tmp_path / "net.pth")
    with pytest.raises(SystemExit):
        import_torch.main([str(tmp_path / "net.pth"), f"--out={tmp_path / 'run'}"])
    assert not (tmp_path / "harm").exists() and "net.pth" in capsys.readouterr().err
