"""Tables printed by `benchmarks.deep`."""

from collections.abc import Mapping
from typing import Any

import jax

GIB = 2**30


def show(name: str, results: Mapping[str, Any]) -> None:
    """Prints the sides of a network as a table, and the other measurements below."""
    from rich.console import Console
    from rich.table import Table

    net, console = results["nets"][name], Console()
    title = (name, f"{net['parameters']:,} parameters", f"batch {results['batch_size']}")
    table = Table(title=", ".join((*title, results["precision"], results["device_kind"])))
    table.caption = (
        "peak: of matrix products; start: until the first call is done; GiB: in JAX as "
        f"compiled, in PyTorch as allocated. Devices: JAX {jax.device_count()}, PyTorch 1."
    )
    table.add_column("side", no_wrap=True)
    headings = ("ms/step", "images/s", "TFLOP/s", "of peak", "start (s)", "GiB")
    for heading in headings:
        table.add_column(heading, justify="right")
    for side, row in net["sides"].items():
        memory = row.get("memory_bytes")
        table.add_row(
            side,
            f"{row['ms_per_step']:.2f}",
            f"{row['images_per_s']:,.0f}",
            f"{row['flop_per_s'] / 1e12:.3g}",
            f"{row['share_of_matmul_peak']:.1%}",
            f"{row['first_call_s']:.1f}",
            "–" if memory is None else f"{memory / GIB:.2f}",
        )
    console.print(table)
    for line in remarks(net, results):
        console.print(line, highlight=False, soft_wrap=True)


def remarks(net: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """Peak rates, lower bounds, epoch, evaluation, and missing sides, in a line each."""
    top, floor = results["ceilings"], net["floors"]
    whole, seen = net["epoch"], net["evaluation"]
    known = lambda value, unit: f"{value:.4g} {unit}" if value else f"{unit} not known"
    lines = [
        f"ceilings of one device: {top['matmul_flop_per_s'] / 1e12:.4g} TFLOP/s in matrix "
        f"products, {top['memory_bytes_per_s'] / 1e9:.4g} GB/s read and written",
        f"a step: {net['step_flop'] / 1e9:.5g} GFLOP by formula (used above), "
        f"{known(floor['xla_step_gflop'], 'GFLOP by XLA')}; at least "
        f"{floor['operations_ms']:.4g} ms for its operations and "
        f"{known(floor['memory_ms'], 'ms for the bytes that our program accesses')}",
        f"an epoch in JAX: {whole['seconds']:.4g} s for {whole['steps']} steps, "
        f"{whole['steps_per_call']} per call, {whole['over_steps']:.3f} of its steps alone",
        f"an evaluation in JAX on {seen['images']:,} images: {seen['evaluation_s']:.4g} s, "
        f"{seen['evaluation_over_forward']:.3f} of its forward passes; with sparsity "
        f"{seen['with_sparsity_s']:.4g} s, {seen['with_sparsity_over_forward']:.3f} of them",
    ]
    if net["our_peak_bytes"]:
        peak = net["our_peak_bytes"] / GIB
        lines.append(
            f"peak of JAX's allocator: {peak:.2f} GiB, autotuning while compiling included"
        )
    lines += [f"torch, {mode} failed: {why}" for mode, why in net["torch_failed"].items()]
    if results["no_torch"]:
        lines.append(f"JAX only: {results['no_torch']}")
    elif not any(side.startswith("torch") for side in net["sides"]):
        lines.append("JAX only: PyTorch's side has no network of that name, or none that ran.")
    return lines
