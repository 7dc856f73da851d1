"""Writes gallery.md and its figures from finished run folders.

python -m experiments.reproduce --theory
python -m experiments.phase_diagram   # and its other commands below
python docs/gallery.py                # reads runs/, writes docs/gallery.md and docs/figures/
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from PIL import Image

HERE = Path(__file__).parent


class Entry(NamedTuple):
    """A figure: its command, its path in the runs folder, what it shows, and its name here."""

    title: str
    command: str
    source: str
    seen: str
    target: str = ""  # default: that of the source


TOYS = "reproduce/toys"
ENTRIES = (
    Entry(
        "D1: diagonal nets, SGD",
        "python -m experiments.diag_nets",
        f"{TOYS}/diag_nets/d1/figures/diag_nets_d1.png",
        "At the small step size the support stays full. At the large ones the loss stabilizes "
        "until the step size decays (dotted), while coordinates vanish: the longer the plateau, "
        "the sparser the predictor and the lower the rank and the test loss. Lines are medians "
        "over the seeds that did not diverge, bands the 5th to the 95th percentile.",
    ),
    Entry(
        "D2: gradient descent is no substitute",
        "python -m experiments.diag_nets --setting d2",
        f"{TOYS}/diag_nets/d2/figures/diag_nets_d2.png",
        "With large steps of gradient descent the loss also stabilizes and the support decreases a "
        "little, but the test loss increases. SGD at the published step size diverges for nearly "
        "all seeds.",
    ),
    Entry(
        "D3: three paths",
        "python -m experiments.loss_surface",
        f"{TOYS}/loss_surface/d3/figures/loss_surface.png",
        "Small steps converge to the solution of gradient flow. Gradient descent with large steps "
        "oscillates across the valley and moves away from the sparse solution; SGD moves along the "
        "valley towards it.",
    ),
    Entry(
        "D3: animation of the paths",
        "python -m experiments.loss_surface",
        f"{TOYS}/loss_surface/d3/figures/loss_surface.gif",
        "The same paths, step by step.",
    ),
    Entry(
        "D3: losses on and off the plane",
        "python -m experiments.loss_surface",
        f"{TOYS}/loss_surface/d3/figures/loss_surface_along.png",
        "The training loss along each path and along its projection to the plane. Where they "
        "differ, the map does not show the loss of the path.",
    ),
    Entry(
        "F1: regression on a line",
        "python -m experiments.fc_nets",
        f"{TOYS}/fc_nets/1d/figures/fc_nets_1d.png",
        "A long warm-up to large steps reduces the Jacobian rank of a ReLU net with 100 units from "
        "about 97 to about 25, and halves the share of active features.",
    ),
    Entry(
        "F1: what is learned",
        "python -m experiments.fc_nets",
        f"{TOYS}/fc_nets/1d/figures/fc_nets_1d_functions.png",
        "Small steps retain the kinks of the initialization; large ones leave few.",
    ),
    Entry(
        "F2: over-regularized",
        "python -m experiments.fc_nets --setting 1d-overregularized",
        f"{TOYS}/fc_nets/1d-overregularized/figures/fc_nets_1d-overregularized.png",
        "With a stronger warm-up, some seeds no longer fit the points.",
    ),
    Entry(
        "F2: what is learned",
        "python -m experiments.fc_nets --setting 1d-overregularized",
        f"{TOYS}/fc_nets/1d-overregularized/figures/fc_nets_1d-overregularized_functions.png",
        "The predictor of one seed.",
    ),
    Entry(
        "T1: teacher and student on the circle",
        "python -m experiments.fc_nets --setting two-layer --seeds 256",
        f"{TOYS}/fc_nets/two-layer/figures/fc_nets_two-layer.png",
        "Most seeds diverge at the published large step size; the others become sparser and "
        "generalize better.",
    ),
    Entry(
        "T1: incoming weights of the units",
        "python -m experiments.fc_nets --setting two-layer --seeds 256",
        f"{TOYS}/fc_nets/two-layer/figures/fc_nets_two-layer_neurons.png",
        "Large steps align the student's units with the teacher's.",
    ),
    Entry(
        "T3: three layers",
        "python -m experiments.fc_nets --setting three-layer",
        f"{TOYS}/fc_nets/three-layer/figures/fc_nets_three-layer.png",
        "The later the decay, the sparser both layers become; the deeper one a little more.",
    ),
    Entry(
        "Phases of D1: step size and time of the decay",
        "python -m experiments.phase_diagram",
        "phase_diagram/diagonal-decay_time/figures/phase_diagram.png",
        "Between convergence and divergence, there is a region where the loss stabilizes; rank and "
        "support decrease only there. Cells are medians over the seeds that did not diverge.",
        "phase_diagonal-decay_time.png",
    ),
    Entry(
        "Phases of D2: step size and batch size",
        "python -m experiments.phase_diagram --problem diagonal-small --axis batch_size "
        "--values 1 4 20 40 --step_sizes 0.1 0.2 0.5 1 2 3.5 5",
        "phase_diagram/diagonal-small-batch_size/figures/phase_diagram.png",
        "Smaller batches diverge at smaller step sizes, and reach lower test losses below those.",
        "phase_diagonal-small-batch_size.png",
    ),
    Entry(
        "Phases of T1: step size and scale of the initialization",
        "python -m experiments.phase_diagram --problem two-layer --axis init_scale "
        "--values 0.25 0.5 1 2 --step_sizes 0.05 0.1 0.2 0.3 0.4 0.5",
        "phase_diagram/two-layer-init_scale/figures/phase_diagram.png",
        "The step size at which runs diverge depends on the scale of the initial weights.",
        "phase_two-layer-init_scale.png",
    ),
    Entry(
        "Sparsity and the edge",
        "python -m experiments.sparsity_meets_sharpness",
        "sparsity_meets_sharpness/toys/figures/sparsity_meets_sharpness.png",
        "A point per run: 12 seeds of step sizes, batch sizes and decays of three problems. "
        "Diagonal nets are sparse only with single examples at the largest steps, below the "
        "edge; batches of four come nearer to it, and gradient descent reaches it, with full "
        "support. On 1-D regression, runs further below the edge are the sparser ones.",
    ),
    Entry(
        "Theory: where the loss stabilizes",
        "python -m experiments.loss_stabilization",
        f"{TOYS}/loss_stabilization/map/figures/diagram.png",
        "Gradient descent on (1 − θ²)²/4: periods, levels and Lyapunov exponent are those of the "
        "closed forms. That a larger step size has a higher level does not reproduce: it holds "
        "under η < √5 − 1, and for 67 % of neighbouring step sizes up to 2. Verdicts: "
        "[Theory](theory.md).",
        "loss_stabilization.png",
    ),
    Entry(
        "Theory: minima of shallow linear nets",
        "python -m experiments.shallow_linear",
        f"{TOYS}/shallow_linear/grid/figures/shallow_linear.png",
        "All identities hold. That larger steps end flatter does not reproduce in general (93.7 % "
        "of pairs), and holds under sup η·abs(ε) < 1; at η = 1/Φ the error of starts with Q near 0 "
        "stays at 1/√2 of the predicted Φ/√(2t) for longer than a million steps.",
    ),
    Entry(
        "Theory: sampling without replacement",
        "python -m experiments.without_replacement",
        f"{TOYS}/without_replacement/orders/figures/without_replacement.png",
        "Drift and variances have the predicted orders in η. Saddles are left faster where the "
        "noise couples to the escape; with noise along it this does not reproduce: × 1.64 of the "
        "steps with replacement.",
    ),
    Entry(
        "Theory: which noise is SGD's",
        "python -m experiments.noise_models",
        f"{TOYS}/noise_models/d1/figures/noise_models.png",
        "On D1, the SDE with a noise level measured on other seeds of SGD has SGD's loss, sparsity "
        "and coordinates. The SDE that sets its own level, and Gaussian noise with SGD's exact "
        "covariance, do not reproduce its loss: it is 22 to 98 times lower.",
    ),
    Entry(
        "Theory: learning the support",
        "python -m experiments.learn_support",
        f"{TOYS}/learn_support/support/figures/learn_support.png",
        "The norm of irrelevant weights decays at a rate proportional to η/b in linear nets with "
        "label noise and stable, unclipped steps. The law does not reproduce in the paper's "
        "clipped regime, where label noise plays no part, nor for a ReLU net.",
    ),
    Entry(
        "Theory: large steps of (S)GD over diagonal nets",
        "python -m experiments.diag_implicit_bias",
        f"{TOYS}/diag_implicit_bias/edge/figures/diag_implicit_bias.png",
        "At .7 of the edge the error of gradient descent is 114 times that of the smallest step, "
        "SGD's a fifth. It is not monotone (does not reproduce): from a step size to the next GD's "
        "error rises in 92 % of the pairs (predicted: 95 %), SGD's in 4.2 % (predicted: 3 %).",
    ),
)


def main() -> None:
    """Copies the figures, with fewer colours, and writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"))
    runs = parser.parse_args().runs_dir
    missing = [entry for entry in ENTRIES if not (runs / entry.source).exists()]
    if missing:
        commands = "\n  ".join(dict.fromkeys(["", *(entry.command for entry in missing)]))
        raise SystemExit(
            f"{len(missing)} figures are not in {runs}; run python -m experiments.reproduce "
            f"--theory for those of the paper and of theory, and for the others{commands}"
        )
    (HERE / "figures").mkdir(exist_ok=True)
    lines = [
        "# Gallery",
        "",
        "All figures, with their commands. Figures of the paper's settings were drawn by "
        "`python -m experiments.reproduce` (32 seeds); with `--theory` it draws those of theory.",
        "",
    ]
    for entry in ENTRIES:
        target = HERE / "figures" / (entry.target or Path(entry.source).name)
        if target.suffix == ".png":
            with Image.open(runs / entry.source) as image:
                image.convert("RGB").quantize(method=Image.Quantize.FASTOCTREE).save(
                    target, optimize=True
                )
        else:
            target.write_bytes((runs / entry.source).read_bytes())
        lines += [f"## {entry.title}", "", f"`{entry.command}`", "", entry.seen, ""]
        lines += [f"![{entry.title}](figures/{target.name})", ""]
    (HERE / "gallery.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
