"""The loss around paths of a diagonal net: gradient flow, GD and SGD (D3 of the paper).

    python -m experiments.loss_surface                 # maps, paths, losses along them, animation
    python -m experiments.loss_surface --run runs/resnet_cifar/NAME --plane random

The plane contains the initialization, the sparse solution (√θ*, √θ*) and the solution of gradient
descent with small steps. Paths leave the plane, so that the losses along a path and along its
projection differ: both are drawn. With --run, the loss of a classifier over a plane of its weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.deep import landscape
from experiments.figures import maps, plots, tables
from experiments.launch import cli, devices, hosts, ranges
from experiments.launch.ranges import CountOrNone, Finite, TwoOrMore
from experiments.toy import config as toys, ensemble, problems, run as toy_runs
from sgd_sparse_jax import data, measure

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True)
class Config(toys.Config):
    """n=20, d=30, 3-sparse; three paths: flow (GD, small steps), GD and SGD (large steps)."""

    setting: Literal["d3"] = "d3"
    """The paper's setting; the first of its schedules approximates gradient flow."""
    grid: TwoOrMore = 100
    """Grid points of the maps in each direction."""
    low: Finite = -0.5
    """Smallest coordinate of the maps."""
    high: Finite = 2.3
    """Largest coordinate of the maps."""
    frames: CountOrNone = 60
    """Frames of the animation; 0 for none."""
    run: str = ""
    """Map this run folder of resnet_cifar instead; --plane, --images and --points are for it."""
    plane: landscape.Kind = "random"
    """random: two filter-normalized directions; path: principal components of the saved states;
    curvature: the two top eigenvectors of the Hessian."""
    images: ranges.Count = 512
    """Training images, the first ones, in one batch."""
    points: TwoOrMore = 25
    """Points of the map in each direction."""


SETTINGS = {
    "d3": Config(
        step_sizes=(0.03, 3.0, 0.6),
        decay_times=(1.0, 0.5, 0.5),
        decay_factors=(1.0, 3.0, 3.0),
        warmup_gains=(0.0,) * 3,
        batch_sizes=(20, 20, 1),
        num_steps=10_001,
        log_records=True,
    )
}
PUBLISHED = {"d3": {"test_loss": (0.0149, 0.126, 4.0e-8)}}
COLUMNS = ("test_loss", "train_loss", "support")
WAYS = ("flow", "GD", "SGD")


class Surface(NamedTuple):
    """Losses over the plane [grid, grid], and coordinates of points and paths in it."""

    at: np.ndarray  # coordinates of rows and of columns
    train: np.ndarray
    test: np.ndarray
    points: dict[str, tuple[float, float]]
    paths: dict[str, np.ndarray]  # [records, 2]
    steps: np.ndarray
    loss: dict[str, np.ndarray]  # training loss of the path
    loss_in_plane: dict[str, np.ndarray]  # training loss of its projection


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(Config, map_losses, argv, settings=SETTINGS)


def map_losses(config: Config) -> object:
    """Maps the classifier of --run, else the toy problem."""
    if config.run:
        ranges.check(config)
        devices.set_up_deep(deterministic=False)
        return landscape.map_run(config.run, config.plane, config.images, config.points)
    devices.set_up_toys()
    return run(config)


def run(config: Config) -> tables.Finding:
    """Runs the three paths, or loads them if finished; then prints, draws and animates."""
    hosts.join(config.hosts)
    ranges.check(config)
    if len(config.step_sizes) != len(WAYS):
        raise ValueError(
            f"--step_sizes has {len(config.step_sizes)} values; give one each for {WAYS}."
        )
    if not config.low < config.high:
        raise ValueError(f"--low is {config.low}; it must be less than --high, {config.high}.")
    plan = toys.resolve("loss_surface", config, problems.PROBLEMS["diagonal-plane"]())
    published = toys.published(config, SETTINGS, PUBLISHED)
    title = f"Paths over the loss, {config.seeds} seeds"
    dataset, rows = ensemble.summarized(plan, COLUMNS, published, title)
    figures = draw(plan.folder / "figures", map_out(config, plan.toy, dataset), config.frames)
    return tables.Finding(plan.folder, dataset, rows, figures)


def map_out(config: Config, toy: problems.Toy, dataset: "xarray.Dataset") -> Surface:
    """Losses over the plane through initialization, sparse solution and end of the flow."""
    snapshots = jnp.asarray(dataset["shown_theta"].values)
    unravel = lambda theta: toy_runs.parameters(toy, theta)
    # u = v = √θ* is the solution of u * v = θ* with the least norm.
    root = jnp.sqrt(jnp.asarray(data.sparse_regression(0, n=20, d=30, support=3).target))
    sparse, flow = {"u": root, "v": root}, unravel(snapshots[0, -1])
    plane = measure.plane_through(unravel(snapshots[0, 0]), sparse, flow)
    at = jnp.linspace(config.low, config.high, config.grid)

    def place(theta):
        # (u, v) and (-u, -v) are the same predictor: u >= 0, as at initialization.
        params = unravel(theta)
        sign = jnp.where(params["u"] < 0, -1.0, 1.0)
        return measure.coordinates(plane, {"u": sign * params["u"], "v": sign * params["v"]})

    along = jax.jit(jax.vmap(lambda point: toy.mean_loss(measure.at(plane, point), toy.train)))
    over = lambda batch: np.asarray(
        measure.loss_map(jax.jit(lambda params: toy.mean_loss(params, batch)), plane, at, at)
    )
    places = np.asarray(jax.jit(jax.vmap(jax.vmap(place)))(snapshots))
    paths: dict[str, np.ndarray] = dict(zip(WAYS, places, strict=True))
    points = {"init": plane.origin, "flow": flow, "√θ*": sparse}
    seeds = dataset["shown_seed"].values.astype(int)  # not the same for GD and SGD
    return Surface(
        at=np.asarray(at),
        train=over(toy.train),
        test=over(toy.test),
        points={
            name: tuple(np.asarray(measure.coordinates(plane, params)).tolist())
            for name, params in points.items()
        },
        paths=paths,
        steps=dataset["step"].values,
        loss={way: dataset["train_loss"].values[seeds[j], j] for j, way in enumerate(WAYS)},
        loss_in_plane={way: np.asarray(along(path)) for way, path in paths.items()},
    )


def draw(folder: Path, surface: Surface, frames: int) -> list[Path]:
    """Draws both losses over the plane, the loss along each path, and the animation."""

    def over(z: np.ndarray, title: str) -> maps.Map:
        return maps.Map(
            title,
            "towards √θ*",
            "towards the flow's solution",
            surface.at,
            surface.at,
            np.clip(z, 1e-7, 100.0),  # the contours' range; √θ* itself has loss 0
            zlabel="½ mean squared error",
            log_z=True,
            overlay={way: (path[:, 0], path[:, 1]) for way, path in surface.paths.items()},
            points=surface.points,
            filled=True,
        )

    def along(way: str) -> plots.Panel:
        lines = {
            "of the path": (surface.steps, surface.loss[way]),
            "of its projection to the plane": (surface.steps, surface.loss_in_plane[way]),
        }
        return plots.Panel(way, "½ mean squared error", lines, log_x=True, log_y=True)

    stem = folder / "loss_surface"
    planes = [over(surface.train, "Training loss"), over(surface.test, "Test loss")]
    title = "Loss over a plane through three points, and three paths"
    figures = maps.figure(stem, planes, title=title)
    stem, title = folder / "loss_surface_along", "Training loss along the paths"
    figures += plots.figure(stem, [along(way) for way in WAYS], columns=3, title=title)
    if frames:
        # Paths move most in the first steps: frames are spaced logarithmically.
        ends = np.unique(np.geomspace(2, len(surface.steps), frames).astype(int))
        titles = [f"Training loss, step {surface.steps[end - 1]:,}" for end in ends]
        path = folder / "loss_surface.gif"
        figures += maps.animate(path, planes[0], ends.tolist(), titles)
    return figures


if __name__ == "__main__":
    main()
