"""A grid of classifier runs: finished ones are skipped, interrupted ones continued, all compared.

    python -m experiments.sweep_deep --lr_init 0.002 0.05 --paired --seed 0 1 2 \\
        --lr_schedule constant piecewise_05epochs --l2_reg 0.0005 --exp_name sota_setting

Every flag of experiments.resnet_cifar takes several values here. The same command again runs what
is missing. A run that diverges is a result: it is in the table, and the others go on.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from experiments.deep import config as flags, curves, setup, training
from experiments.deep.config import Config
from experiments.figures import terminal
from experiments.launch import cli, devices, hosts
from experiments.storage import records

FIXED = (  # one value for all runs
    *("exp_name", "data_dir", "runs_dir", "jacobian_tol", "fork_from", "save_every_seconds"),
    *("keep", "hosts"),
)
IN_NAME = ("dataset", "model", "model_width", "lr_init", "lr_schedule", "seed", "fork_step")
SHOWN = {  # columns of the last row: heading and format
    "train/loss": ("train loss", ".4f"),
    "test/error": ("test error", ".2%"),
    "test_average/error": ("test error, averaged weights", ".2%"),
    "images_per_second": ("images/s", ".0f"),
}


class Run(NamedTuple):
    """One run of the grid and its outcome."""

    setting: str
    config: Config
    folder: Path
    outcome: str  # "finished", or why it diverged


def grid_type() -> type:
    """The flags of a run with the same descriptions; those that may vary are lists."""
    import docstring_parser
    import tyro

    help_of = {p.arg_name: p.description for p in docstring_parser.parse_from_object(Config).params}
    fields: list[Any] = []
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.default):  # a group of flags, which describes itself
            fields.append((field.name, field.type, field.default))
            continue
        many = not (field.name in FIXED or isinstance(field.default, bool))
        kind: Any = tuple[field.type, ...] if many else field.type  # type: ignore[valid-type]
        default = (field.default,) if many else field.default
        described = Annotated[kind, tyro.conf.arg(help=help_of[field.name])]
        fields.append((field.name, described, default))
    paired = tyro.conf.arg(
        help="Walk lists of equal length together, in place of crossing them; seeds are crossed."
    )
    fields.append(("paired", Annotated[bool, paired], False))
    grid = dataclasses.make_dataclass("Grid", fields, frozen=True)
    grid.__doc__ = "Trains image classifiers over a grid of settings, and compares them."
    return grid


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(grid_type(), run, argv)


def run(grid: Any) -> Path:
    """Runs what is missing of the grid; returns the folder of table and figures."""
    devices.set_up_deep(deterministic=grid.deterministic)
    hosts.join(grid.hosts)
    settings = expand(grid)
    check(settings)
    everything = [field.name for field in dataclasses.fields(grid)]  # the grid may grow
    place = (grid.runs_dir, "sweep_deep", grid.exp_name)
    folder = records.run_folder(*place)
    hosts.on_first(lambda: records.open_run(*place, grid, may_change=everything))
    flat = [(setting, config) for setting, configs in settings.items() for config in configs]
    runs = []
    for number, (setting, config) in enumerate(flat, 1):
        terminal.show(f"run {number} of {len(flat)}: {flags.run_name(config)}")
        runs.append(once(setting, config))
    hosts.leave_the_rest_to_first()
    report(folder, grid.exp_name, runs)
    return folder


def expand(grid: Any) -> dict[str, list[Config]]:
    """Label of each setting -> its runs, one per seed."""
    values = {f.name: getattr(grid, f.name) for f in dataclasses.fields(Config)}
    varied = {
        k: v for k, v in values.items() if isinstance(v, tuple) and len(v) > 1 and k != "seed"
    }
    lengths = {f"--{name}": len(each) for name, each in varied.items()}
    if grid.paired and len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"--paired needs lists of equal length, given are {listed}.")
    points = (
        zip(*varied.values(), strict=True) if grid.paired else itertools.product(*varied.values())
    )
    single = {k: v[0] if isinstance(v, tuple) else v for k, v in values.items()}
    settings = {}
    for point in points if varied else [()]:
        chosen = dict(zip(varied, point, strict=True))
        label = ", ".join(f"{name} {value}" for name, value in chosen.items()) or "one setting"
        suffix = "".join(f"-{k}{v}" for k, v in chosen.items() if k not in IN_NAME)
        config = Config(**single | chosen | {"exp_name": grid.exp_name + suffix.replace("/", "_")})
        settings[label] = [
            dataclasses.replace(config, seed=seed) for seed in dict.fromkeys(grid.seed)
        ]
    return settings


def check(settings: Mapping[str, Sequence[Config]]) -> None:
    """Raises ValueError for what one of the runs would be refused for, before the first of them."""
    taken: dict[str, str] = {}
    for label, configs in settings.items():
        for config in configs:
            setup.validate(config)
            name = flags.run_name(config)
            if (other := taken.setdefault(name, label)) != label:
                raise ValueError(
                    f"({other}) and ({label}) would share the folder {name}; give them sweeps of "
                    "their own with --exp_name."
                )
    for configs in settings.values():
        setup.resolve(configs[0])  # missing data, too large a batch


def once(setting: str, config: Config) -> Run:
    """Trains to the end, unless that is done; what diverged before is not tried again."""
    folder = records.run_folder(*flags.place_of(config))
    diverged = folder / "diverged.json"
    if diverged.exists():
        reason = cli.one_line(str(records.read_json(diverged).get("reason")))
        terminal.show(f"{folder} has diverged before ({reason}); remove it to try again.")
        return Run(setting, config, folder, reason)
    try:
        training.run(setup.resolve(config))
    except FloatingPointError as error:
        reason = str(error)
        terminal.show(reason)
        hosts.on_first(lambda: records.write_json(diverged, {"reason": reason}))
        return Run(setting, config, folder, reason)
    return Run(setting, config, folder, "finished")


def report(folder: Path, title: str, runs: Sequence[Run]) -> None:
    """summary.json, a table of the last rows, and the curves of all settings."""
    entries = [
        {
            "setting": each.setting,
            "seed": each.config.seed,
            "folder": each.folder.name,
            "outcome": each.outcome,
            "last_row": curves.rows_of(each.folder)[-1],
        }
        for each in runs
    ]
    records.write_json(folder / "summary.json", {"runs": entries})
    by_setting: dict[str, list[Run]] = {}
    for each in runs:
        by_setting.setdefault(each.setting, []).append(each)
    show(folder, title, by_setting)
    folders = {setting: [each.folder for each in some] for setting, some in by_setting.items()}
    common = {(c.dataset, c.model, c.model_width) for c in (each.config for each in runs)}
    of = "{}, {} of width {}".format(*common.pop()) if len(common) == 1 else "several networks"
    curves.several_runs(folder / "figures" / "sweep_deep", folders, f"{title}: {of}")


def show(folder: Path, title: str, by_setting: Mapping[str, Sequence[Run]]) -> None:
    """Prints mean ± standard deviation over the seeds that finished, and the folder."""
    from rich.table import Table

    rows = {
        setting: [curves.rows_of(each.folder)[-1] for each in some if each.outcome == "finished"]
        for setting, some in by_setting.items()
    }
    done = [row for some in rows.values() for row in some]
    share = "active, no duplicates, "
    blocks = {
        f"train/distinct/{b}": (share + b, ".1%") for b in curves.blocks(done[0] if done else {})
    }
    table = Table(title=f"{title}: last rows, mean ± standard deviation over seeds")
    for heading in ("setting", "seeds", "quantity", "value"):
        table.add_column(heading)
    for setting, some in by_setting.items():
        diverged = len(some) - len(rows[setting])
        seeds = f"{len(rows[setting])}" + (f" ({diverged} diverged)" if diverged else "")
        for place, (name, (heading, form)) in enumerate((SHOWN | blocks).items()):
            first = ("", "") if place else (setting, seeds)
            table.add_row(*first, heading, summary(rows[setting], name, form))
        table.add_section()
    terminal.show(table, folder)


def summary(rows: Sequence[Mapping[str, Any]], name: str, form: str) -> str:
    """`mean ± deviation` of a column; a dash where no run has it."""
    values = [row[name] for row in rows if name in row]
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


if __name__ == "__main__":
    main()
