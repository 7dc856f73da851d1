"""Trains image classifiers over a grid of flags, and compares the runs.

    python -m experiments.sweep_deep --lr_init 0.002 0.05 --paired --seed 0 1 2 \\
        --lr_schedule constant piecewise_05epochs --l2_reg 0.0005 --exp_name sota_setting

Flags of experiments.resnet_cifar take several values, except switches, --exp_name, --fork_from and
those that may change between starts, such as --max_steps and --keep. Finished runs are skipped,
interrupted ones continue. A diverged run is reported in the table, and the others continue.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from experiments.deep import curves, setup, training
from experiments.deep.config import MAY_CHANGE, Config, folder_of
from experiments.figures import terminal
from experiments.launch import cli, devices, hosts
from experiments.storage import records

FIXED = (*MAY_CHANGE, "exp_name", "fork_from")  # one value for all runs
IN_NAME = ("dataset", "model", "model_width", "lr_init", "lr_schedule", "seed", "fork_step")
SHOWN = {  # of the last record: heading and format
    "train/loss": ("train loss", ".4f"),
    "test/error": ("test error", ".2%"),
    "test_average/error": ("test error, averaged weights", ".2%"),
    "images_per_second": ("images/s", ".0f"),
}


def grid_type() -> type:
    """The flags of a run, with their help; those that may vary take several values."""
    import docstring_parser
    import tyro

    help_of = {p.arg_name: p.description for p in docstring_parser.parse_from_object(Config).params}
    fields: list[Any] = []
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.default):  # a group of flags, with its own help
            fields.append((field.name, field.type, field.default))
            continue
        many = not (field.name in FIXED or isinstance(field.default, bool))
        kind: Any = tuple[field.type, ...] if many else field.type  # type: ignore[valid-type]
        default = (field.default,) if many else field.default
        described = Annotated[kind, tyro.conf.arg(help=help_of[field.name])]
        fields.append((field.name, described, default))
    paired = tyro.conf.arg(
        help="Pair lists of equal length instead of taking their product; seeds are always crossed."
    )
    part = tyro.conf.arg(
        help="I/N: run every N-th run from the I-th on; by default those of the task of a Slurm "
        "array, else all."
    )
    fields.append(("paired", Annotated[bool, paired], False))
    fields.append(("part", Annotated[str, part], ""))
    grid = dataclasses.make_dataclass("Grid", fields, frozen=True)
    grid.__doc__ = "Trains image classifiers over a grid of settings, and compares them."
    return grid


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(grid_type(), run, argv)


def run(grid: Any) -> Path:
    """Runs the unfinished runs of the grid; returns the folder of summary and figures."""
    devices.set_up_deep(deterministic=grid.deterministic)
    hosts.join(grid.hosts)
    settings, part = expand(grid), part_of(grid.part)
    for config in itertools.chain(*settings.values()):  # all, before the first run
        setup.validate(config)
    for first, *_ in settings.values():
        setup.resolve(first)  # missing data, too large a batch
    folder = records.run_folder(grid.runs_dir, "sweep_deep", grid.exp_name)
    hosts.on_first(lambda: records.open_run(folder, grid, may_change=vars(grid)))  # it may grow
    return compare(folder, grid.exp_name, settings, part)


def part_of(text: str) -> slice:
    """The runs of --part I/N, or of the task of a Slurm array."""
    task, first, count = (
        int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", 0), ("MIN", 0), ("COUNT", 1))
    )
    found = re.fullmatch(r"(\d+)/(\d+)", text or f"{task - first + 1}/{count}")
    place, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= place <= parts:
        raise ValueError(f"--part is {text!r}; give I/N with I from 1 to N, such as 2/4.")
    return slice(place - 1, None, parts)


def compare(
    folder: Path, title: str, settings: Mapping[str, Sequence[Config]], part: slice = slice(None)
) -> Path:
    """Runs the unfinished runs of a part; once all parts are finished, compares their runs."""
    flat = [(setting, config) for setting, configs in settings.items() for config in configs]
    mine = flat[part]
    for number, (_, config) in enumerate(mine, 1):
        terminal.show(f"run {number} of {len(mine)}: {folder_of(config).name}")
        once(config)
    hosts.leave_the_rest_to_first()
    outcomes = [outcome(config) for _, config in flat]
    if missing := outcomes.count(""):
        terminal.show(
            f"{missing} of {len(flat)} runs, of other parts, are not finished; the last part "
            "compares all runs, and so does this command when run again."
        )
        return folder
    entries = [
        {
            "setting": setting,
            "seed": config.seed,
            "folder": folder_of(config).name,
            "outcome": ended,
            "last_row": curves.records_of(folder_of(config))[-1],
        }
        for (setting, config), ended in zip(flat, outcomes, strict=True)
    ]
    records.write_json(folder / "summary.json", {"runs": entries})
    show(folder, title, entries)
    networks = {f"{c.dataset}, {c.model} of width {c.model_width}" for _, c in flat}
    title = f"{title}: {networks.pop() if len(networks) == 1 else 'several networks'}"
    folders = {setting: list(map(folder_of, configs)) for setting, configs in settings.items()}
    curves.several_runs(folder / "figures" / "sweep_deep", folders, title)
    return folder


def expand(grid: Any) -> dict[str, list[Config]]:
    """Label of each setting -> its runs, one per seed; ValueError if two would share a folder."""
    values = {f.name: getattr(grid, f.name) for f in dataclasses.fields(Config)}
    lists = {k: v for k, v in values.items() if isinstance(v, tuple) and k != "seed"}
    single = values | {k: v[0] for k, v in lists.items()}
    varied = {k: v for k, v in lists.items() if len(v) > 1}
    lengths = ", ".join(f"--{name} {len(each)}" for name, each in varied.items())
    if grid.paired and len({len(each) for each in varied.values()}) > 1:
        raise ValueError(f"--paired needs lists of equal length, got {lengths}.")
    walk = zip if grid.paired and varied else itertools.product  # which yields () for no lists
    settings = {}
    for point in walk(*varied.values()):
        chosen = dict(zip(varied, point, strict=True))
        label = ", ".join(f"{name} {value}" for name, value in chosen.items()) or "one setting"
        suffix = "".join(f"-{k}{v}" for k, v in chosen.items() if k not in IN_NAME)
        name = grid.exp_name + suffix.replace("/", "_")  # of --model_path
        settings[label] = [
            Config(**single | chosen | {"exp_name": name, "seed": seed})
            for seed in dict.fromkeys(grid.seed)
        ]
    places = [folder_of(first) for first, *_ in settings.values()]
    if shared := [path.name for path in places if places.count(path) > 1]:
        raise ValueError(
            f"{len(shared)} settings have the folder {shared[0]}, with _ for /; run them "
            "as separate sweeps with different --exp_name."
        )
    return settings


def outcome(config: Config) -> str:
    """ "finished", or the reason for which a run diverged; "" if it has not ended."""
    diverged = folder_of(config) / "diverged.json"
    if diverged.exists():
        return cli.one_line(records.read_json(diverged)["reason"])
    return "finished" if records.is_finished(folder_of(config)) else ""


def once(config: Config) -> None:
    """Trains to the end, unless the run is finished or has diverged."""
    if (reason := outcome(config)) not in ("", "finished"):
        terminal.show(
            f"It diverged in an earlier start ({reason}); remove {folder_of(config)} to try again."
        )
        return
    try:
        training.run(config)
    except FloatingPointError as error:
        reason = {"reason": str(error)}
        terminal.show(str(error))
        hosts.on_first(lambda: records.write_json(folder_of(config) / "diverged.json", reason))


def show(folder: Path, title: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """Prints mean ± standard deviation over the seeds that finished, and the folder."""
    from rich.table import Table

    headings = ("setting", "seeds", "quantity", "value")
    table = Table(*headings, title=f"{title}: last records, mean ± standard deviation over seeds")
    for setting, group in itertools.groupby(entries, lambda entry: entry["setting"]):
        runs = list(group)
        rows = [entry["last_row"] for entry in runs if entry["outcome"] == "finished"]
        diverged = len(runs) - len(rows)
        seeds = f"{len(rows)}" + (f" ({diverged} diverged)" if diverged else "")
        blocks = curves.blocks(rows[0]) if rows else ()
        shares = {f"train/distinct/{b}": (f"active, no duplicates, {b}", ".1%") for b in blocks}
        for name, (heading, form) in (SHOWN | shares).items():
            values = [row[name] for row in rows if name in row]  # --deterministic omits speeds
            spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
            value = f"{np.mean(values):{form}}{spread}" if values else "–"
            table.add_row(setting, seeds, heading, value)
            setting = seeds = ""  # in the first line only
        table.add_section()
    terminal.show(table, folder)


if __name__ == "__main__":
    main()
