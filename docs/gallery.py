"""Makes gallery.md and its figures from finished run folders.

python -m experiments.reproduce
python -m experiments.phase_diagram   # and its other commands below
python docs/gallery.py                # reads runs/, writes docs/gallery.md and docs/figures/
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from PIL import Image

HERE = Path(__file__).parent


class Entry(NamedTuple):
    """A figure: where its run wrote it, the command behind it, and what it shows."""

    title: str
    command: str
    source: str
    seen: str


TOYS = "reproduce/toys"
ENTRIES = (
    Entry(
        "D1: diagonal nets, SGD",
        "python -m experiments.diag_nets",
        f"{TOYS}/diag_nets/d1/figures/diag_nets_d1.png",
        "At the small step size the support stays full. At the large ones the loss is held on a "
        "plateau until the step size decays (dotted), and meanwhile coordinates die: the longer "
        "the plateau, the sparser the predictor, the lower the rank and the test loss. Lines are "
        "medians over the seeds that survive, bands reach from the 5th to the 95th percentile.",
    ),
    Entry(
        "D2: gradient descent is no substitute",
        "python -m experiments.diag_nets --setting d2",
        f"{TOYS}/diag_nets/d2/figures/diag_nets_d2.png",
        "Large steps of gradient descent bounce on a plateau too and reduce the support a little, "
        "but the test loss gets worse. SGD at the published step size diverges for all seeds here.",
    ),
    Entry(
        "D3: three ways down",
        "python -m experiments.loss_surface",
        f"{TOYS}/loss_surface/d3/figures/loss_surface.png",
        "Small steps go to the flow's solution; gradient descent with large steps bounces across "
        "the valley and away from the sparse solution; SGD bounces along the valley to it.",
    ),
    Entry(
        "D3: the paths as they grow",
        "python -m experiments.loss_surface",
        f"{TOYS}/loss_surface/d3/figures/loss_surface.gif",
        "The same paths, step by step.",
    ),
    Entry(
        "D3: a plane shows a path's shadow",
        "python -m experiments.loss_surface",
        f"{TOYS}/loss_surface/d3/figures/loss_surface_along.png",
        "The training loss of a path next to that of its projection to the plane: where they part, "
        "the map above is not what the path sees.",
    ),
    Entry(
        "F1: regression on a line",
        "python -m experiments.fc_nets",
        f"{TOYS}/fc_nets/1d/figures/fc_nets_1d.png",
        "A long warm-up to large steps moves a ReLU net of 100 units from about 97 to about 25 "
        "independent directions of its Jacobian, and halves the active features.",
    ),
    Entry(
        "F1: what is learned",
        "python -m experiments.fc_nets",
        f"{TOYS}/fc_nets/1d/figures/fc_nets_1d_functions.png",
        "Small steps keep the kinks of the initialization; large ones end with few.",
    ),
    Entry(
        "F2: over-regularized",
        "python -m experiments.fc_nets --setting 1d-overregularized",
        f"{TOYS}/fc_nets/1d-overregularized/figures/fc_nets_1d-overregularized.png",
        "A little more warm-up, and some seeds no longer fit the points at all.",
    ),
    Entry(
        "F2: what is learned",
        "python -m experiments.fc_nets --setting 1d-overregularized",
        f"{TOYS}/fc_nets/1d-overregularized/figures/fc_nets_1d-overregularized_functions.png",
        "One seed of it.",
    ),
    Entry(
        "T1: teacher and student on the circle",
        "python -m experiments.fc_nets --setting two-layer --seeds 256",
        f"{TOYS}/fc_nets/two-layer/figures/fc_nets_two-layer.png",
        "Most seeds diverge at the published large step size; those that survive are sparser and "
        "generalize better.",
    ),
    Entry(
        "T1: where the units went",
        "python -m experiments.fc_nets --setting two-layer --seeds 256",
        f"{TOYS}/fc_nets/two-layer/figures/fc_nets_two-layer_neurons.png",
        "Large steps align the student's units with the teacher's.",
    ),
    Entry(
        "T3: three layers",
        "python -m experiments.fc_nets --setting three-layer",
        f"{TOYS}/fc_nets/three-layer/figures/fc_nets_three-layer.png",
        "Both layers get sparser, the deeper one and the rank most, the later the decay comes.",
    ),
    Entry(
        "Phases of D1: step size and time of the decay",
        "python -m experiments.phase_diagram",
        "phase_diagram/diagonal-decay_time/figures/phase_diagram.png",
        "Between convergence and divergence lies the region where the loss stabilizes; only there "
        "do rank and support fall. Cells are medians over seeds that did not diverge.",
    ),
    Entry(
        "Phases of D2: step size and batch size",
        "python -m experiments.phase_diagram --problem diagonal-small --axis batch_size "
        "--values 1 4 20 40 --step_sizes 0.1 0.2 0.5 1 2 3.5 5",
        "phase_diagram/diagonal-small-batch_size/figures/phase_diagram.png",
        "Smaller batches diverge at smaller steps, and reach lower test losses before they do.",
    ),
    Entry(
        "Phases of T1: step size and scale of the initialization",
        "python -m experiments.phase_diagram --problem two-layer --axis init_scale "
        "--values 0.25 0.5 1 2 --step_sizes 0.05 0.1 0.2 0.3 0.4 0.5",
        "phase_diagram/two-layer-init_scale/figures/phase_diagram.png",
        "The scale of the initial weights moves the border of divergence.",
    ),
)


def main() -> None:
    """Copies the figures, made small, and writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"))
    runs = parser.parse_args().runs_dir
    missing = [entry for entry in ENTRIES if not (runs / entry.source).exists()]
    if missing:
        commands = "\n  ".join(dict.fromkeys(["", *(entry.command for entry in missing)]))
        raise SystemExit(
            f"{len(missing)} figures are not in {runs}; python -m experiments.reproduce makes "
            f"those of the paper, the others are made by{commands}"
        )
    (HERE / "figures").mkdir(exist_ok=True)
    lines = [
        "# Gallery",
        "",
        "Every figure with the command that draws it, and what it shows. The runs are those "
        "of `python -m experiments.reproduce` (32 seeds) and of the commands shown.",
        "",
    ]
    for entry in ENTRIES:
        parts = Path(entry.source).parts
        target = (
            HERE
            / "figures"
            / (f"phase_{parts[1]}.png" if parts[0] == "phase_diagram" else parts[-1])
        )
        if target.suffix == ".png":
            with Image.open(runs / entry.source) as image:
                image.convert("RGB").quantize(64).save(target, optimize=True)
        else:
            target.write_bytes((runs / entry.source).read_bytes())
        lines += [f"## {entry.title}", "", f"`{entry.command}`", "", entry.seen, ""]
        lines += [f"![{entry.title}](figures/{target.name})", ""]
    (HERE / "gallery.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
