"""State dicts of PyTorch in files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.launch import cli
from experiments.storage import files

ORDER = "order"  # of names, in the metadata of a .safetensors file


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a state dict by name; ValueError for other files, or a missing package.

    A .safetensors file sorts them; those of `write` have a note of the network's order.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file.")
    if path.suffix == ".safetensors":
        try:
            from safetensors import safe_open
        except ImportError:
            raise ValueError(f"{path} needs a package: pip install safetensors.") from None
        with safe_open(path, "np") as file:
            found = {name: file.get_tensor(name) for name in sorted(file.keys())}
            note = (file.metadata() or {}).get(ORDER, "")
        return in_order(found, note.split()) if note else found
    try:
        import torch
    except ImportError:
        raise ValueError(f"{path} needs a package: pip install torch.") from None
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types
        raise ValueError(
            f"{path} is not a file of weights ({cli.one_line(str(error))[:200]})"
        ) from error
    for name in ("state_dict", "model", "last"):  # "last" in files of the paper's code
        found = found.get(name, found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(torch.is_tensor(t) for t in found.values()):
        raise ValueError(
            f"{path} has no state dict; save one with torch.save(net.state_dict(), ...)."
        )
    return {str(name): tensor.numpy() for name, tensor in found.items()}


def in_order(arrays: Mapping[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """The arrays in the order of `names`; ValueError if these aren't all of their names."""
    if differing := sorted(set(names) ^ set(arrays)):
        raise ValueError(f"The arrays and the order of their names differ in {differing[0]}.")
    return {name: arrays[name] for name in names}


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a state dict; the suffix decides its form, as in `read`."""
    if path.suffix == ".safetensors":
        from safetensors.numpy import save

        contiguous = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
        files.write_bytes(path, save(contiguous, {ORDER: "\n".join(arrays)}))
        return
    import torch

    torch.save({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}, path)
