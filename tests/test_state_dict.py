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


def test_a_safetensors_file_returns_and_a_sorted_one_needs_its_order(tmp_path, capsys):
    numpy = pytest.importorskip("safetensors.numpy")
    flags = ["--model=resnet_tiny", "--model_width=2"]
    network = models.from_linen(models.build("resnet_tiny", classes=10, width=2))
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *SHAPE)))
    draw = np.random.default_rng(0).normal
    weights = jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape), jnp.float32), shapes)
    own = state_dict.to_state_dict(network, SHAPE, *weights)
    # Names of a PyTorch network, which do not sort in the order of its layers.
    sort = {"Conv": "conv", "BatchNorm": "bn", "Dense": "linear"}
    kinds = [(name, next(new for old, new in sort.items() if old in name)) for name in own]
    foreign = {f"{kind}{i}.{n.rpartition('.')[2]}": own[n] for i, (n, kind) in enumerate(kinds)}
    contiguous = {name: np.ascontiguousarray(a) for name, a in foreign.items()}
    numpy.save_file(contiguous, tmp_path / "net.safetensors")
    (tmp_path / "order.txt").write_text("\n".join(foreign))
    command = [str(tmp_path / "net.safetensors"), *flags, f"--out={tmp_path / 'run'}"]
    with jax.enable_x64(False):
        with pytest.raises(SystemExit):
            import_torch.main(command)
        assert "--order" in capsys.readouterr().err
        import_torch.main([*command, f"--order={tmp_path / 'order.txt'}"])
        for i in range(2):  # files of export_torch have their order
            again = tmp_path / f"{i}.safetensors"
            export_torch.main([str(tmp_path / ("run1" if i else "run")), f"--out={again}"])
            import_torch.main([str(again), *flags, f"--out={tmp_path / f'run{i + 1}'}"])
            found = numpy.load_file(again)
            assert found.keys() == own.keys()
            for name, array in own.items():
                np.testing.assert_array_equal(found[name], array)
