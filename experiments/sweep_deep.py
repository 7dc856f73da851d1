"""A grid of classifier runs: finished ones are skipped, broken ones resumed, all compared.

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

from experiments.deep import (
    config as deep_flags,
    curves,
    setup as deep_parts,
    training as classifiers,
)
from experiments.deep.config import Config
from experiments.figures import terminal
from experiments.launch import cli, hosts
from experiments.storage import records

FIXED = (  # one value for all runs
    *(
        "exp_name",
        "data_dir",
        "runs_dir",
        "jacobian_tol",
        "fork_from",
        "save_every_seconds",
        "keep",
    ),
    "hosts",
)
IN_NAME = ("dataset", "model", "model_width", "lr_init", "lr_schedule", "seed", "fork_step")
SHOWN = {  # of the last row: heading, and how it is written
    "train/loss": ("train loss", ".4f"),
    "test/error": ("test error", ".2%"),
    "test_average/error": ("test error, averaged weights", ".2%"),
    "images_per_second": ("images/s", ".0f"),
}


class Run(NamedTuple):
    """One run of the grid, and what became of it."""

    setting: str
    config: Config
    folder: Path
    outcome: str  # "finished", or what stopped it


def grid_type() -> type:
    """The flags of a run, those that may vary as lists, under the same words."""
    import docstring_parser
    import tyro

    words = {p.arg_name: p.description for p in docstring_parser.parse_from_object(Config).params}
    fields: list[Any] = []
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.default):  # a group, with words of its own
            fields.append((field.name, field.type, field.default))
            continue
        told = tyro.conf.arg(help=words[field.name])
        many = not (field.name in FIXED or isinstance(field.default, bool))
        kind: Any = tuple[field.type, ...] if many else field.type  # type: ignore[valid-type]
        default = (field.default,) if many else field.default
        fields.append((field.name, Annotated[kind, told], default))
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
    hosts.join(grid.hosts)
    settings = expand(grid)
    for config in itertools.chain.from_iterable(settings.values()):
        deep_parts.validate(config)
    for configs in settings.values():
        deep_parts.assemble(configs[0])  # missing data, too large a batch: before hours of training
    everything = [field.name for field in dataclasses.fields(grid)]
    place = (grid.runs_dir, "sweep_deep", grid.exp_name)
    folder = records.run_folder(*place)
    hosts.on_first(lambda: records.open_run(*place, grid, may_change=everything))  # it may grow
    flat = [(setting, config) for setting, configs in settings.items() for config in configs]
    runs = []
    for number, (setting, config) in enumerate(flat, 1):
        print(f"run {number} of {len(flat)}: {deep_flags.run_name(config)}")
        runs.append(once(setting, config))
    hosts.leave_the_rest_to_first()
    report(folder, grid.exp_name, runs)
    return folder


def expand(grid: Any) -> dict[str, list[Config]]:
    """Of each setting, in words, its runs: one per seed."""
    values = {f.name: getattr(grid, f.name) for f in dataclasses.fields(Config)}
    varied = {
        k: v for k, v in values.items() if isinstance(v, tuple) and len(v) > 1 and k != "seed"
    }
    lengths = {f"--{name}": len(each) for name, each in varied.items()}
    if grid.paired and len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"--paired walks lists together, which have to be of one length ({told}).")
    points = (
        zip(*varied.values(), strict=True) if grid.paired else itertools.product(*varied.values())
    )
    single = {k: v[0] if isinstance(v, tuple) else v for k, v in values.items()}
    settings = {}
    for point in points if varied else [()]:
        chosen = dict(zip(varied, point, strict=True))
        words = ", ".join(f"{name} {value}" for name, value in chosen.items()) or "one setting"
        suffix = "".join(f"-{k}{v}" for k, v in chosen.items() if k not in IN_NAME)
        config = Config(**single | chosen | {"exp_name": grid.exp_name + suffix.replace("/", "_")})
        settings[words] = [
            dataclasses.replace(config, seed=seed) for seed in dict.fromkeys(grid.seed)
        ]
    return settings


def once(setting: str, config: Config) -> Run:
    """Trains to the end, unless that is done; what diverged before is not tried again."""
    folder = records.run_folder(*deep_flags.place_of(config))
    gone = folder / "diverged.json"
    if gone.exists():
        reason = records.read_json(gone).get("reason")
        if not isinstance(reason, str):
            raise ValueError(f"{gone} gives no reason; remove that file and run again.")
        reason = cli.in_a_line(reason)
        print(f"{folder} has diverged before ({reason}); remove it to try again.")
        return Run(setting, config, folder, reason)
    try:
        classifiers.run(config)
    except FloatingPointError as error:
        told = str(error)
        print(error)
        hosts.on_first(lambda: records.write_json(gone, {"reason": told}))
        return Run(setting, config, folder, str(error))
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
        gone = len(some) - len(rows[setting])
        seeds = f"{len(rows[setting])}" + (f" ({gone} diverged)" if gone else "")
        for place, (name, (words, form)) in enumerate((SHOWN | blocks).items()):
            told = ("", "") if place else (setting, seeds)
            table.add_row(*told, words, summary(rows[setting], name, form))
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
