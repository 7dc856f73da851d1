"""The loss of a finished classifier over a plane of its weights, and along its saved states.

The loss is the cross-entropy of the first training images in one batch, whose moments BatchNorm
takes: running moments would be those of another point of the plane.
"""

import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from experiments.deep import config as flags, setup
from experiments.figures import maps, plots, progress, terminal
from experiments.storage import arrays
from sgd_sparse_jax import data, measure, models, train
from sgd_sparse_jax.types import Params, Stats

Kind = Literal["random", "path", "curvature"]
AXES = {
    "random": ("filter-normalized direction 1", "filter-normalized direction 2"),
    "path": ("principal component 1 of the path", "principal component 2"),
    "curvature": ("eigenvector of the largest curvature", "of the second largest"),
}


class Found(NamedTuple):
    """The map, and the path of saved states in it."""

    alphas: np.ndarray
    betas: np.ndarray
    loss: np.ndarray  # [betas, alphas]
    steps: np.ndarray
    path: np.ndarray  # [steps, 2]
    loss_of_path: np.ndarray
    loss_in_plane: np.ndarray  # of the projections of the path


def map_run(run: str, kind: Kind, images: int, points: int) -> Path:
    """Maps the loss over `points` x `points` places, saves and draws it; returns the run's folder.

    Raises ValueError if `run` is no run folder with a saved state; for kind "path", with three.
    """
    start, folder = time.perf_counter(), Path(run).expanduser().absolute()
    with setup.naming("run"):
        config = flags.of_folder(folder)
    whole = data.load_images(config.dataset, "train", data_dir=config.data_dir or None)
    network = models.from_linen(setup.build(config, len(whole.class_names)))
    shape = whole.images.shape[1:]
    path = states(folder, network, shape)
    if kind == "path" and len(path) < 3:
        raise ValueError(
            f"--plane is path, but {folder} has {len(path)} saved states; train with "
            "--save_model_each_k_epochs, or choose --plane random."
        )
    some = whole._replace(images=whole.images[:images], labels=whole.labels[:images])
    fetch = setup.make_fetch(setup.placed(some, train.data_mesh()), shape)
    batch = fetch(jr.key(0), jnp.arange(len(some.labels)))
    objective = train.make_objective(network, train.cross_entropy)
    *_, (params, stats) = path.values()
    loss = jax.jit(lambda params: objective(params, stats, batch)[0])
    plane = plane_of(kind, params, [p for p, _ in path.values()], loss)
    found = evaluate(loss, plane, {step: p for step, (p, _) in path.items()}, points)
    arrays.write_npz(folder / f"landscape_{kind}.npz", found._asdict())
    figures = draw(folder / "figures", kind, found, f"{config.model}, {images} images")
    terminal.show(f"{points} x {points} points in {time.perf_counter() - start:.0f} s", *figures)
    return folder


def states(folder: Path, network: Any, shape: tuple[int, ...]) -> dict[int, tuple[Params, Stats]]:
    """Step -> weights of each saved state, in order."""
    places = [*(folder / "models").glob("*"), *(folder / "checkpoints").glob("*")]
    steps = {int(place.name): place for place in places if place.name.isdigit()}
    if not steps:
        raise ValueError(f"--run: {folder} has no saved state; train it first.")
    return {step: setup.load_weights(steps[step], network, shape) for step in sorted(steps)}


def plane_of(kind: Kind, params: Params, path: list[Params], loss: Any) -> measure.Plane:
    """A plane: random or of the two largest curvatures at `params`, or nearest to the path."""
    if kind == "random":
        return measure.random_plane(jr.key(0), params)
    if kind == "path":
        plane, shares = measure.principal_plane(jax.tree.map(lambda *p: jnp.stack(p), *path))
        terminal.show(f"the plane explains {float(shares.sum()):.1%} of the path's variance")
        return plane
    operator = measure.hessian(loss, params)
    pairs = measure.top_eigenpairs(operator, 2, jr.key(0), max_matvecs=200)
    first, second = (jax.tree.map(lambda leaf, k=k: leaf[k], pairs.vectors) for k in range(2))
    return measure.Plane(params, first, second)


def evaluate(loss: Any, plane: measure.Plane, path: dict[int, Params], points: int) -> Found:
    """Losses over a square around the path, or, of a path that hardly moves in it, around it."""
    project = jax.jit(lambda params: measure.coordinates(plane, params))
    lengths = [float(optax.tree.norm(direction)) for direction in plane[1:]]
    places = np.array([np.asarray(project(p)) for p in path.values()]) / np.square(lengths)
    # Filter-normalized directions are as long as the weights; others have length 1.
    least = 1.0 if min(lengths) > 1.01 else 0.05 * float(np.linalg.norm(places.std(0)) + 1)
    reach = np.maximum(1.3 * np.abs(places - places[-1]).max(0), least)
    alphas, betas = (
        np.linspace(c - r, c + r, points) for c, r in zip(places[-1], reach, strict=True)
    )
    # One point after the other: convolutions inside a compiled loop are slow on CPUs.
    value = jax.jit(lambda point: loss(measure.at(plane, point)))
    grid = [(a, b) for b in betas for a in alphas]
    with progress.of_runs(len(grid)) as advance:
        losses = []
        for point in grid:
            losses.append(float(value(jnp.asarray(point, jnp.float32))))
            advance(1)
    return Found(
        alphas,
        betas,
        np.reshape(losses, (points, points)),
        np.array(list(path)),
        places,
        np.array([float(loss(params)) for params in path.values()]),
        np.array([float(value(jnp.asarray(place, jnp.float32))) for place in places]),
    )


def draw(folder: Path, kind: Kind, found: Found, title: str) -> list[Path]:
    """The map with the path, and the loss along the path and along its projection."""
    panel = maps.Map(
        title,
        *AXES[kind],
        found.alphas,
        found.betas,
        found.loss,
        zlabel="cross-entropy",
        log_z=bool(np.nanmax(found.loss) > 30 * np.nanmin(found.loss)),  # else few contours
        overlay={"saved states": (found.path[:, 0], found.path[:, 1])},
        points={"last": (float(found.path[-1, 0]), float(found.path[-1, 1]))},
        filled=True,
    )
    lines = {
        "of the states": (found.steps, found.loss_of_path),
        "of their projections": (found.steps, found.loss_in_plane),
    }
    along = plots.Panel("Loss along the path", "cross-entropy", lines, log_y=True)
    return [
        *maps.figure(folder / f"landscape_{kind}", [panel]),
        *plots.figure(folder / f"landscape_{kind}_along", [along]),
    ]
